"""The peak of this process's memory over a stretch of time: what torch allocated on the GPU, or
without one the resident high-water mark. And its pages.
"""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from pathlib import Path

import torch


def restart_peak() -> str:
    """The stretch begins here. Returns what `peak` will be: where the kernel does not let a process
    reset its mark, that of its whole life.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return "torch.cuda.max_memory_allocated"
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return "VmHWM"
    except OSError:
        return "ru_maxrss"


def measure_peak() -> int:
    """Bytes, since `restart`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )


def get_free_bytes() -> int | None:
    """Bytes of this rank's GPU that nothing holds; None without one."""
    if not torch.cuda.is_available():
        return None
    return (
        torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    )


def get_installed_bytes() -> int | None:
    """Bytes of this rank's GPU; None without one."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None


def keep_freed_pages() -> None:
    """Memory that torch frees on a CPU stays this process's own, ready for the next tensor.

    By default glibc gives freed tensors of 32 MiB and more back to the system, and what lies at its
    heap's end, and the next one of their size costs a page fault every 4 KiB: 22 ms for 19 MB here,
    where writing it takes 1 ms. Elsewhere than on Linux with glibc nothing is done.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):
            libc.mallopt(option, value)
