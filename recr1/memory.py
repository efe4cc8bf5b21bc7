"""The peak of this process's memory over a stretch of time: what torch allocated on the GPU, or without one the resident high-water mark."""
from __future__ import annotations

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


def installed() -> int | None:
    """Bytes of this rank's GPU; None without one."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
