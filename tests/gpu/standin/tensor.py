"""A tensor that says it is on the GPU and holds CPU memory."""

from __future__ import annotations

import os
from typing import Any

import torch
from gpu.standin.streams import Stream, find_allocation, is_deleted

NUM_DEVICES = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # each rank has one of its own
DEVICE_INDEX = int(os.environ.get("LOCAL_RANK", "0"))
GPU = torch.device("cuda", DEVICE_INDEX)


class GpuTensor(torch.Tensor):
    """A wrapper of the CPU tensor `inner`, of its shape, strides and type, on the device GPU.

    Every operation on it comes to `__torch_dispatch__`, below autograd: also those of a backward.
    `allocation` is that of the memory, which views share.
    """

    # (func, args, kwargs) -> result: see dispatch.register_operations
    run_operation: Any = None

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> GpuTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=GPU,
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner
        self.allocation = find_allocation(inner)

    def __repr__(self, **_: Any) -> str:
        return f"GpuTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return cls.run_operation(func, args, kwargs or {})

    # What C++ would read from memory that is not there.

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def is_pinned(self, *_: Any) -> bool:
        return False

    def tolist(self) -> list:
        return self.cpu().tolist()

    def record_stream(self, stream: Stream) -> None:
        if not is_deleted():
            self.allocation.recorded_streams.add(stream)
