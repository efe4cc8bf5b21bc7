"""What every Triton path checks before its first launch: a backend is asked for by name and never
replaced in silence.
"""

from __future__ import annotations

import os

import torch

BACKENDS = ("torch", "triton")


def explain_unavailable(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run on `device`, as one sentence; None when it can. TRITON_INTERPRET=1
    runs Triton on the CPU.
    """
    if backend not in BACKENDS:
        return f"kernels: {backend!r} is none of {', '.join(BACKENDS)}"
    if backend == "triton":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "kernels: triton needs the package triton, which is not installed here; kernels: torch runs without it"
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"kernels: triton needs a GPU, the tensors are on {device.type}; kernels: torch runs everywhere"
    return None


def require_backend(backend: str, device: torch.device) -> None:
    """Raises RuntimeError with the `refusal`, if there is one."""
    if why := explain_unavailable(backend, device):
        raise RuntimeError(why)
