"""Check that a backend can run before its first launch.

A backend is asked for by name and never replaced in silence.
"""

from __future__ import annotations

import os

import torch

BACKENDS = ("torch", "triton")


def explain_unavailable(backend: str, device: torch.device) -> str | None:
    """Explain in one sentence why `backend` cannot run on `device`; None when it can.

    TRITON_INTERPRET=1 runs Triton on the CPU.
    """
    if backend not in BACKENDS:
        return f"kernels: {backend!r} is none of {', '.join(BACKENDS)}"
    if backend == "torch":
        return None
    try:
        import triton  # noqa: F401
    except ImportError:
        return (
            "kernels: triton needs the package triton, which is not installed here; "
            "kernels: torch runs without it"
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"kernels: triton needs a GPU, the tensors are on {device.type}; "
            "kernels: torch runs everywhere"
        )
    return None


def require_backend(backend: str, device: torch.device) -> None:
    """Raise RuntimeError with the explanation when `backend` cannot run on `device`."""
    reason = explain_unavailable(backend, device)
    if reason is not None:
        raise RuntimeError(reason)
