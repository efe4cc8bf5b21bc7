"""Choose a backend, and check that it can run before its first launch.

A backend that is asked for by name is never replaced. `auto` leaves the choice to the device.
"""

from __future__ import annotations

import os

import torch

BACKENDS = ("torch", "triton")

AUTO = "auto"  # choose_backend says what it is


def explain_unavailable(backend: str, device: torch.device) -> str | None:
    """Explain in one sentence why `backend` cannot run on `device`; None when it can.

    TRITON_INTERPRET=1 runs Triton on the CPU.
    """
    if backend not in (AUTO, *BACKENDS):
        return f"kernels: {backend!r} is none of {', '.join((AUTO, *BACKENDS))}"
    if backend != "triton":
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


def choose_backend(asked: str, device: torch.device) -> str:
    """Return the backend that `asked` names; auto: triton on a GPU that can run it, else torch."""
    if asked != AUTO:
        return asked
    is_gpu = device.type == "cuda"
    return "triton" if is_gpu and explain_unavailable("triton", device) is None else "torch"


def require_backend(asked: str, device: torch.device) -> str:
    """Return the backend that `asked` names. Raise RuntimeError when it cannot run on `device`."""
    reason = explain_unavailable(asked, device)
    if reason is not None:
        raise RuntimeError(reason)
    return choose_backend(asked, device)
