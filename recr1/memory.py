"""The peak of this process's memory over a stretch of time: what torch allocated on the GPU, or without one the resident high-water mark. And its pages."""
from __future__ import annotations

import ctypes
import re
import resource
import sys
from pathlib import Path

import torch


def restart() -> str:
    """The stretch begins here. Returns what `peak` will be: where the kernel does not let a process reset its mark, that of its whole life."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return "torch.cuda.max_memory_allocated"
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return "VmHWM"
    except OSError:
        return "ru_maxrss"


def peak() -> int:
    """Bytes, since `restart`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free() -> int | None:
    """Bytes of this rank's GPU that nothing holds; None without one."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def installed() -> int | None:
    """Bytes of this rank's GPU; None without one."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None


def keep_pages(on: bool = True) -> None:
    """Memory that torch frees on a CPU stays this process's own, ready for the next tensor; off: glibc's defaults again.

    By default glibc gives every freed tensor above 128 KiB to 32 MiB back to the system, and the next one of its size costs a page fault every
    4 KiB: 22 ms for 19 MB here, where writing it takes 1 ms. The peak is the same. Elsewhere than on Linux with glibc nothing is done.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        for option, kept, default in ((-4, 0, 65536), (-1, 1 << 40, 128 << 10), (-2, 64 << 20, 128 << 10)):     # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, min(kept if on else default, 2**31 - 1))
