"""Attention over packed rows of unequal length without padding, by FlashAttention on a GPU: torch's
varlen_attn or the package flash-attn.

Legend: P prompts, R rollouts, B sequences, M packed tokens, H query heads, K kv heads, D head dim.

A kernel takes q (M, H, D), k and v (N, K, D), cu_q and cu_k (B + 1,) int32, the cumulative lengths,
max_q and max_k, the longest, as Python ints. It is causal from the end: where a sequence has fewer
queries than keys, its last query reads all of them. flash-attn does so from 2.1 on (docstring of
flash_attn_varlen_func: "aligned to the bottom right corner"), and so do the same kernels inside
torch (pull request 193630: "Flash variable-length attention aligns the causal diagonal to the
bottom right").
"""

from __future__ import annotations

import inspect
import re
from functools import partial
from typing import Callable, NamedTuple

import torch


class AttentionUnavailable(ValueError):
    """The attention that was asked for cannot run here. The message says why."""


class AttentionBackend(NamedTuple):
    """How attention over packed rows is computed, and what a run says of it."""

    name: str = "sdpa"
    # (lengths, own, prompt_of, device) -> Varlen; None: SDPA over padded rows (model/packed_attention.py)
    varlen: Callable | None = None
    note: str = ""
    float32_head: bool = False  # model.head_float32: see log_probs.get_lm_head_weight
    exact: bool = False  # model.batch_invariant: see packed_attention._eager_attention

    def __str__(self) -> str:
        said = "; ".join(filter(None, (self.note, "batch invariant" * self.exact)))
        return f"{self.name} ({said})" if said else self.name


def choose_attention(
    asked: str, grouped: bool, head_dim: int, compute: torch.dtype, device: torch.device
) -> AttentionBackend:
    """model.attention -> Backend. `grouped`: fewer kv heads than query heads. auto: varlen where it
    can run, else sdpa, never flash.

    Raises Unusable when one that is named cannot run.
    """
    if asked == "sdpa":
        return AttentionBackend()
    try:
        name = "flash" if asked == "flash" else "varlen"
        _check_flash_limits(name, head_dim, compute, device)
        kernel, note = _load_flash() if asked == "flash" else _load_varlen(grouped)
    except AttentionUnavailable as e:
        if asked == "auto":
            return AttentionBackend(note=f"auto: {e}")
        raise
    return AttentionBackend(
        name,
        partial(VarlenAttention, kernel),
        "; ".join(
            filter(
                None, [f"auto: torch {torch.__version__} has it" if asked == "auto" else "", note]
            )
        ),
    )


def _check_flash_limits(
    name: str, head_dim: int, compute: torch.dtype, device: torch.device
) -> None:
    """What FlashAttention's kernels ask for, from whichever package."""
    if device.type != "cuda":
        raise AttentionUnavailable(
            f"{name} needs a GPU, this process computes on the {device.type}"
        )
    if torch.version.hip:
        raise AttentionUnavailable(
            f"{name} is for NVIDIA's GPUs; how ROCm's kernels align short queries was not checked"
        )
    if compute not in (torch.bfloat16, torch.float16):
        raise AttentionUnavailable(
            f"{name} computes in bfloat16 or float16, model.compute is {str(compute).removeprefix('torch.')}"
        )
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise AttentionUnavailable(
            f"{name} needs an Ampere GPU (compute capability 8.0) or newer, this is {torch.cuda.get_device_name(device)}"
        )
    # flash-attn pads to a multiple of 8 itself
    if head_dim > 256 or name == "varlen" and head_dim % 8:
        raise AttentionUnavailable(
            f"{name} needs a head_dim of at most 256{', a multiple of 8' * (name == 'varlen')}; the model's is {head_dim}"
        )


def _load_varlen(grouped: bool) -> tuple[Callable, str]:
    """varlen_attn of this torch, by its signature: window_size from 2.11 on (2.10 had is_causal),
    enable_gqa from 2.12 on.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn

        takes = inspect.signature(varlen_attn).parameters
    except ImportError:
        takes = {}
    if "window_size" not in takes:
        raise AttentionUnavailable(
            f"varlen needs torch.nn.attention.varlen.varlen_attn with window_size, torch 2.11's or newer; this is torch {torch.__version__}"
        )
    if not torch.backends.cuda.is_flash_attention_available():
        raise AttentionUnavailable(
            f"varlen: this torch {torch.__version__} was built without FlashAttention"
        )
    causal = partial(varlen_attn, window_size=(-1, 0))  # a tuple: 2.11 to 2.13 compare it with one
    if not grouped:
        return causal, ""
    if "enable_gqa" in takes:
        return partial(causal, enable_gqa=True), ""
    return partial(
        _repeat_heads, causal
    ), "keys and values are repeated for every query head: torch before 2.12 has no enable_gqa"


def _load_flash() -> tuple[Callable, str]:
    try:
        import flash_attn

        kernel = flash_attn.flash_attn_varlen_func
        version = flash_attn.__version__
    except (ImportError, AttributeError) as e:
        raise AttentionUnavailable(
            f"flash needs the package flash-attn 2.1 or newer, which is not usable here ({' '.join(str(e).split())}); "
            "varlen needs no package"
        ) from None
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (2, 1):
        raise AttentionUnavailable(
            f"flash needs flash-attn 2.1 or newer, which aligns a short query with the end of its keys; this is {version}"
        )
    return partial(kernel, causal=True), f"flash-attn {version}"


def _repeat_heads(
    kernel: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lengths
) -> torch.Tensor:
    """The one place where heads are repeated: varlen_attn of torch 2.11 is documented for as many
    kv heads as query heads only.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return kernel(q, k, v, *lengths)


class VarlenAttention:
    """Attention of one layout (data_types.py) by a kernel; call it as (q, k, v): (M, H, D), (M, K, D),
    (M, K, D) -> (M, H, D).

    Two calls without a row of padding: prompts over themselves, completions over their prompt's
    keys and their own.
    """

    def __init__(
        self,
        kernel: Callable,
        lengths: torch.Tensor,
        own: torch.Tensor,
        prompt_of: torch.Tensor,
        device=None,
    ):
        """lengths (P,), own (R,), prompt_of (R,), on the CPU: the longest are then known without
        waiting for a GPU.
        """
        self.kernel = kernel
        self.prompt_rows = int(lengths.sum())
        cu = _cumulate_lengths(lengths).to(device)
        longest = int(lengths.max())
        # one tensor: torch 2.15 asks for that before it lets cuDNN be causal
        self.prompts = cu, cu, longest, longest
        start = lengths.cumsum(0) - lengths
        own_start = self.prompt_rows + own.cumsum(0) - own
        # a completion without inputs has no row; in the kernels, sequences without queries go wrong
        # (flash-attention issues 1537, 1619)
        own, own_start, prompt_of = (x[own > 0] for x in (own, own_start, prompt_of))
        self.completions = None
        if not len(own):
            return
        before = lengths[prompt_of]
        cu_k = _cumulate_lengths(lengths[prompt_of] + own)
        row = torch.arange(len(own)).repeat_interleave(before + own)  # (keys,): whose key it is
        slot = torch.arange(len(row)) - cu_k[row]  # (keys,): which of them
        self.keys = torch.where(
            slot < before[row], start[prompt_of][row] + slot, (own_start - before)[row] + slot
        ).to(device)
        self.completions = (
            _cumulate_lengths(own).to(device),
            cu_k.to(device),
            int(own.max()),
            int((before + own).max()),
        )

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = self.prompt_rows
        out = self.kernel(q[:n], k[:n], v[:n], *self.prompts)
        if self.completions is None:
            return out
        # a prompt's keys once per sibling; the backward sums them
        k, v = (x.index_select(0, self.keys) for x in (k, v))
        return torch.cat([out, self.kernel(q[n:], k, v, *self.completions)])


def _cumulate_lengths(lengths: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B + 1,) int32, from 0."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
