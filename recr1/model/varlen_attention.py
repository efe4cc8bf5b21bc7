"""Attention over packed rows of unequal length without padding, by FlashAttention on a GPU.

The kernel is torch's varlen_attn or that of the package flash-attn. It takes q (M, H, D), k and v
(N, K, D), cu_q and cu_k (B + 1,) int32, the cumulative lengths, and max_q and max_k, the longest,
as Python ints. It is causal from the end: where a sequence has fewer queries than keys, its last
query reads all of them. flash-attn does so from 2.1 on (docstring of flash_attn_varlen_func:
"aligned to the bottom right corner"), and so do the same kernels inside torch (pull request 193630:
"Flash variable-length attention aligns the causal diagonal to the bottom right").

Legend: P prompts, R rollouts, B sequences, M packed tokens, N keys, H query heads, K kv heads,
D head dim.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import partial
from typing import Callable, NamedTuple

import torch


class AttentionUnavailable(ValueError):
    """The attention that was asked for cannot run here. The message says why."""


class AttentionBackend(NamedTuple):
    """How attention over packed rows is computed, and what a run prints about it."""

    name: str = "sdpa"
    # (prompt_lengths, completion_lengths, prompt_of, device) -> VarlenAttention; None: SDPA over
    # padded rows (model/packed_attention.py)
    varlen: Callable | None = None
    note: str = ""
    float32_head: bool = False  # model.head_float32: see log_probs.get_lm_head_weight
    exact: bool = False  # model.batch_invariant: see packed_attention._eager_attention
    # model.kernels: triton; norms, rope and SwiGLU by kernels/decoder_layer.py
    fused_layers: bool = False

    def __str__(self) -> str:
        notes = []
        if self.note:
            notes.append(self.note)
        if self.exact:
            notes.append("batch invariant")
        return f"{self.name} ({'; '.join(notes)})" if notes else self.name


def choose_attention(
    asked: str, grouped: bool, head_dim: int, compute: torch.dtype, device: torch.device
) -> AttentionBackend:
    """Choose the backend that model.attention names.

    auto is varlen where it can run, else sdpa, never flash. Raises AttentionUnavailable when one
    that is named cannot run.

    Args:
        asked: sdpa, varlen, flash or auto.
        grouped: whether there are fewer kv heads than query heads.
    """
    if asked == "sdpa":
        return AttentionBackend()
    name = "flash" if asked == "flash" else "varlen"
    try:
        _check_flash_limits(name, head_dim, compute, device)
        kernel, note = _load_flash() if asked == "flash" else _load_varlen(grouped)
    except AttentionUnavailable as e:
        if asked == "auto":
            return AttentionBackend(note=f"auto: {e}")
        raise

    notes = []
    if asked == "auto":
        notes.append(f"auto: torch {torch.__version__} has it")
    if note:
        notes.append(note)
    return AttentionBackend(name, partial(VarlenAttention, kernel), "; ".join(notes))


def _check_flash_limits(
    name: str, head_dim: int, compute: torch.dtype, device: torch.device
) -> None:
    """Raise AttentionUnavailable where FlashAttention's kernels, of either package, cannot run."""
    if device.type != "cuda":
        raise AttentionUnavailable(
            f"{name} needs a GPU, this process computes on the {device.type}"
        )
    if torch.version.hip:
        raise AttentionUnavailable(
            f"{name} is for NVIDIA's GPUs; how ROCm's kernels align short queries was not checked"
        )
    if compute not in (torch.bfloat16, torch.float16):
        compute_name = str(compute).removeprefix("torch.")
        raise AttentionUnavailable(
            f"{name} computes in bfloat16 or float16, model.compute is {compute_name}"
        )
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise AttentionUnavailable(
            f"{name} needs an Ampere GPU (compute capability 8.0) or newer, "
            f"this is {torch.cuda.get_device_name(device)}"
        )
    # flash-attn pads to a multiple of 8 itself
    needs_multiple = name == "varlen"
    if head_dim > 256 or needs_multiple and head_dim % 8:
        multiple = ", a multiple of 8" if needs_multiple else ""
        raise AttentionUnavailable(
            f"{name} needs a head_dim of at most 256{multiple}; the model's is {head_dim}"
        )


def _load_varlen(grouped: bool) -> tuple[Callable, str]:
    """Return varlen_attn of this torch, causal, and a note.

    What it can do is read from its signature: window_size from 2.11 on (2.10 had is_causal),
    enable_gqa from 2.12 on.
    """
    parameters: Mapping[str, inspect.Parameter]
    try:
        from torch.nn.attention.varlen import varlen_attn

        parameters = inspect.signature(varlen_attn).parameters
    except ImportError:
        parameters = {}
    if "window_size" not in parameters:
        raise AttentionUnavailable(
            "varlen needs torch.nn.attention.varlen.varlen_attn with window_size, "
            f"torch 2.11's or newer; this is torch {torch.__version__}"
        )
    if not torch.backends.cuda.is_flash_attention_available():
        raise AttentionUnavailable(
            f"varlen: this torch {torch.__version__} was built without FlashAttention"
        )
    causal = partial(varlen_attn, window_size=(-1, 0))  # a tuple: 2.11 to 2.13 compare it with one
    if not grouped:
        return causal, ""
    if "enable_gqa" in parameters:
        return partial(causal, enable_gqa=True), ""
    note = "keys and values are repeated for every query head: torch before 2.12 has no enable_gqa"
    return partial(_repeat_heads, causal), note


def _load_flash() -> tuple[Callable, str]:
    """Return flash_attn_varlen_func of the package flash-attn, causal, and a note."""
    try:
        import flash_attn

        kernel = flash_attn.flash_attn_varlen_func
        version = flash_attn.__version__
    except (ImportError, AttributeError) as e:
        reason = " ".join(str(e).split())
        raise AttentionUnavailable(
            "flash needs the package flash-attn 2.1 or newer, which is not usable here "
            f"({reason}); varlen needs no package"
        ) from None
    numbers = [int(number) for number in re.findall(r"\d+", version)]
    if tuple(numbers[:2]) < (2, 1):
        raise AttentionUnavailable(
            "flash needs flash-attn 2.1 or newer, which aligns a short query with the end of its "
            f"keys; this is {version}"
        )
    return partial(kernel, causal=True), f"flash-attn {version}"


def _repeat_heads(
    kernel: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lengths
) -> torch.Tensor:
    """Repeat kv heads for every query head; this is the one place where heads are repeated.

    varlen_attn of torch 2.11 is documented only for as many kv heads as query heads.
    """
    heads_per_kv = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(heads_per_kv, 1)
    v = v.repeat_interleave(heads_per_kv, 1)
    return kernel(q, k, v, *lengths)


class KernelLengths(NamedTuple):
    """The lengths of the sequences of one call, in the order of the kernel's arguments."""

    cu_q: torch.Tensor  # (B + 1,) int32
    cu_k: torch.Tensor  # (B + 1,) int32
    max_q: int
    max_k: int


class VarlenAttention:
    """Attention of one layout (data_types.py) by a kernel.

    Call it as (q, k, v): (M, H, D), (M, K, D), (M, K, D) -> (M, H, D). There are two calls of the
    kernel without a row of padding: prompts over themselves, and completions over their prompt's
    keys and their own.

    Args:
        prompt_lengths: (P,); completion_lengths: (R,); prompt_of: (R,). They are on the CPU: the
            longest are then known without waiting for a GPU.
    """

    def __init__(
        self,
        kernel: Callable,
        prompt_lengths: torch.Tensor,
        completion_lengths: torch.Tensor,
        prompt_of: torch.Tensor,
        device: torch.device | str | None = None,
    ):
        self.kernel = kernel
        self.num_prompt_rows = int(prompt_lengths.sum())
        # one tensor for both: torch 2.15 asks for that before it lets cuDNN be causal
        cu_prompt = _cumulate_lengths(prompt_lengths).to(device, non_blocking=True)
        longest = int(prompt_lengths.max())
        self.prompts = KernelLengths(cu_prompt, cu_prompt, longest, longest)

        # A completion without inputs has no row. In the kernels, sequences without queries go wrong
        # (flash-attention issues 1537, 1619).
        completion_end = self.num_prompt_rows + completion_lengths.cumsum(0)
        completion_start = completion_end - completion_lengths
        has_rows = completion_lengths > 0
        completion_len = completion_lengths[has_rows]
        completion_start = completion_start[has_rows]
        prompt_of = prompt_of[has_rows]
        self.completions: KernelLengths | None = None
        if not len(completion_len):
            return

        # Rows of the completions' keys: their prompt's, then their own.
        prompt_start = (prompt_lengths.cumsum(0) - prompt_lengths)[prompt_of]
        prompt_len = prompt_lengths[prompt_of]
        total_len = prompt_len + completion_len
        cu_total = _cumulate_lengths(total_len)
        # (keys,): whose key it is, and which of them
        completion = torch.arange(len(completion_len)).repeat_interleave(total_len)
        slot = torch.arange(len(completion)) - cu_total[completion]
        prompt_row = prompt_start[completion] + slot
        completion_row = (completion_start - prompt_len)[completion] + slot
        is_prompt_key = slot < prompt_len[completion]
        keys = torch.where(is_prompt_key, prompt_row, completion_row)
        self.keys = keys.to(device, non_blocking=True)
        self.completions = KernelLengths(
            _cumulate_lengths(completion_len).to(device, non_blocking=True),
            cu_total.to(device, non_blocking=True),
            int(completion_len.max()),
            int(total_len.max()),
        )

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = self.num_prompt_rows
        prompts = self.kernel(q[:n], k[:n], v[:n], *self.prompts)
        if self.completions is None:
            return prompts
        # a prompt's keys once per sibling; the backward sums them
        k = k.index_select(0, self.keys)
        v = v.index_select(0, self.keys)
        completions = self.kernel(q[n:], k, v, *self.completions)
        return torch.cat([prompts, completions])


def _cumulate_lengths(lengths: torch.Tensor) -> torch.Tensor:
    """Return the cumulative lengths from 0: (B,) -> (B + 1,) int32."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
