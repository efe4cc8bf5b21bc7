"""Tell that memory has run out from other errors, and say it in one line."""

from __future__ import annotations

import re
import traceback

import torch

# What errors say that have no type of their own: of a CPU's allocator, of CUDA's pinned memory, of
# cuBLAS' workspaces.
MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class OutOfMemory(RuntimeError):
    """Memory has run out. The message says where, and what to set.

    Args:
        is_common: every rank raises it.
    """

    def __init__(self, message: str, is_common: bool):
        super().__init__(message, is_common)
        self.message = message
        self.is_common = is_common

    def __str__(self) -> str:
        return self.message


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory has run out, a GPU's or the machine's."""
    if isinstance(error, (OutOfMemory, torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MESSAGES)


def describe_allocation(error: BaseException) -> str:
    """Return what could not be allocated, from an error's message."""
    text = " ".join(str(error).split())
    size = re.search(r"(?:ried|nable) to allocate ([\d.]+ \w+)", text)
    if size is None:
        return text[:200] or type(error).__name__
    description = f"could not allocate {size[1]}"
    gpu = re.search(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", text)
    if gpu is not None:
        description += f" on a GPU with {gpu[2]} free of {gpu[1]}"
    return description


def release_tensors(error: BaseException) -> None:
    """Let go of what the functions held that have ended by `error`."""
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
