"""Attention over packed rows and over the cache, against its formula in float64.

    out = softmax(q k^T / sqrt(D)) v, causal from the end of the keys

The oracle goes from one text to the next and shares no code with what it checks.

Legend: M packed tokens, H query heads, K kv heads, D head dim, T queries and S keys of a text, B
rows of the cache.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from gpu_sections.report import Report
from gpu_sections.setting import Setting, relative_error

from recr1.data_types import PackedLayout
from recr1.model.packed_attention import PackedAttention, attend_decode, make_decode_bias
from recr1.model.varlen_attention import AttentionBackend, AttentionUnavailable, choose_attention

ERROR_BAR = 1e-2  # relative; bfloat16 has 8 bits: 2^-8 = .004 for one rounding

HEADS = ((16, 2, 128), (14, 2, 64))  # H, K, D of Qwen2.5 3B and 0.5B

# Prompts of unequal lengths; a completion without rows, one longer than its prompt.
PROMPT_LENGTHS = (37, 333, 11)
COMPLETION_LENGTHS = (29, 0, 203, 58, 29)
PROMPT_OF = (0, 0, 1, 2, 2)


class AttentionCase(NamedTuple):
    """The inputs of one layer's attention."""

    q: torch.Tensor  # (M, H, D)
    k: torch.Tensor  # (M, K, D)
    v: torch.Tensor  # (M, K, D)
    d_out: torch.Tensor  # (M, H, D)
    layout: PackedLayout


def check_packed_attention(report: Report, setting: Setting) -> None:
    """varlen, flash-attn and SDPA over packed rows, with gradients, against float64."""
    for num_heads, num_kv_heads, head_dim in HEADS:
        case = draw_case(setting, num_heads, num_kv_heads, head_dim)
        want = run_attention(case, torch.float64, attend_by_formula)
        for name in ("varlen", "flash", "sdpa"):
            title = f"{num_heads}/{num_kv_heads} heads of {head_dim}, {name}"
            try:
                backend = choose_attention(name, True, head_dim, torch.bfloat16, setting.device)
            except AttentionUnavailable as e:
                report.skip(title, str(e))
                continue
            attend = make_packed(case.layout, setting.device, backend)
            actual = run_attention(case, torch.bfloat16, attend)
            for label, a, b in zip(("out", "dq", "dk", "dv"), actual, want):
                report.at_most(f"{title}: {label}", relative_error(a, b), ERROR_BAR)
        compare_repeated_heads(report, setting, case)


def draw_case(setting: Setting, num_heads: int, num_kv_heads: int, head_dim: int) -> AttentionCase:
    layout = PackedLayout(
        torch.tensor(PROMPT_LENGTHS), torch.tensor(COMPLETION_LENGTHS), torch.tensor(PROMPT_OF)
    )
    M = sum(PROMPT_LENGTHS) + sum(COMPLETION_LENGTHS)
    q = setting.draw(M, num_heads, head_dim)
    k = setting.draw(M, num_kv_heads, head_dim)
    v = setting.draw(M, num_kv_heads, head_dim)
    return AttentionCase(q, k, v, setting.draw(M, num_heads, head_dim), layout)


def run_attention(case: AttentionCase, dtype: torch.dtype, attend) -> list[torch.Tensor]:
    """Return out and the gradients of q, k and v, all computed in `dtype`."""
    inputs = []
    for x in (case.q, case.k, case.v):
        inputs.append(x.detach().to(dtype, copy=True).requires_grad_())
    out = attend(*inputs)
    gradients = torch.autograd.grad(out, inputs, case.d_out.to(dtype))
    return [out.detach(), *gradients]


def make_packed(layout: PackedLayout, device: torch.device, backend: AttentionBackend):
    """Return our attention as a function (q, k, v) -> out."""
    packed = PackedAttention(*layout, device, backend)
    return lambda q, k, v: packed(0, q, k, v)


def attend_by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend text by text: each prompt to itself, each completion to its prompt and itself."""
    prompts = slice_rows(PROMPT_LENGTHS, 0)
    completions = slice_rows(COMPLETION_LENGTHS, sum(PROMPT_LENGTHS))
    outputs = [attend_one(q[rows], k[rows], v[rows]) for rows in prompts]
    for rows, prompt in zip(completions, PROMPT_OF):
        keys = torch.cat([k[prompts[prompt]], k[rows]])
        values = torch.cat([v[prompts[prompt]], v[rows]])
        outputs.append(attend_one(q[rows], keys, values))
    return torch.cat(outputs)


def slice_rows(lengths: tuple[int, ...], start: int) -> list[slice]:
    """Return where each text of these lengths is."""
    slices = []
    for length in lengths:
        slices.append(slice(start, start + length))
        start += length
    return slices


def attend_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend in one text: q (T, H, D), k and v (S, K, D) -> (T, H, D). Query t reads keys up to
    S - T + t.
    """
    T, H, D = q.shape
    S, K, _ = k.shape
    k = k.repeat_interleave(H // K, 1)
    v = v.repeat_interleave(H // K, 1)
    scores = torch.einsum("thd,shd->hts", q, k) / D**0.5
    is_read = torch.ones(T, S, device=q.device).tril(S - T) > 0
    weights = scores.masked_fill(~is_read, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v)


def compare_repeated_heads(report: Report, setting: Setting, case: AttentionCase) -> None:
    """Measure, where varlen_attn has no enable_gqa (torch 2.11), what repeating heads changes.

    About 0: then model/varlen_attention.py need not repeat them.
    """
    if not setting.has_real_gpu:
        return
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        return
    rows = slice(0, PROMPT_LENGTHS[0])
    cu = torch.tensor([0, rows.stop], dtype=torch.int32, device=setting.device)
    lengths = (cu, cu, rows.stop, rows.stop)
    q, k, v = case.q[rows], case.k[rows], case.v[rows]
    heads_per_kv = q.shape[1] // k.shape[1]
    repeated_k = k.repeat_interleave(heads_per_kv, 1)
    repeated_v = v.repeat_interleave(heads_per_kv, 1)
    want = varlen_attn(q, repeated_k, repeated_v, *lengths, window_size=(-1, 0))
    try:
        actual = varlen_attn(q, k, v, *lengths, window_size=(-1, 0))
    except (RuntimeError, ValueError, TypeError) as e:
        report.skip(f"{q.shape[1]} heads of {k.shape[1]} kv heads without repeating them", str(e))
        return
    error = relative_error(actual, want)
    report.figure(f"{q.shape[1]} heads of {k.shape[1]}, without repeating them", error)


# --- decoding -------------------------------------------------------------------------------------


def check_decode_attention(report: Report, setting: Setting) -> None:
    """One query per row over the cache, as the sampler has it, against float64.

    The scores are as wide as a trained model's, up to 20 and more. Rounded to bfloat16 such a score
    is off by .06 and its weight by 6%, which the trainer's attention does not do: an error of .013
    here, where scores in float32 leave .005 (both computed on a CPU).
    """
    for num_heads, num_kv_heads, head_dim in HEADS:
        rows = setting.pick(64, 5)
        slots = 512
        compute = setting.compute
        q = setting.draw(rows, num_heads, head_dim, std=8.0, dtype=compute)
        k = setting.draw(rows, num_kv_heads, slots, head_dim, dtype=compute)
        v = setting.draw(rows, num_kv_heads, slots, head_dim, dtype=compute)
        last = torch.randint(slots // 2, slots, (rows,))

        bias = make_decode_bias(last.to(setting.device), slots, compute)
        with torch.no_grad():
            actual = attend_decode(q, k, v, bias)
        want = decode_by_formula(q.double(), k.double(), v.double(), last.tolist())
        title = f"{num_heads}/{num_kv_heads} heads of {head_dim}, {rows} x {slots}"
        report.at_most(title, relative_error(actual, want), ERROR_BAR)


def decode_by_formula(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, last: list[int]
) -> torch.Tensor:
    """Attend row by row: row b reads slots 0 .. last[b]."""
    outputs = []
    for row, last_slot in enumerate(last):
        keys = k[row, :, : last_slot + 1].transpose(0, 1)  # (S, K, D)
        values = v[row, :, : last_slot + 1].transpose(0, 1)
        outputs.append(attend_one(q[row, None], keys, values))
    return torch.cat(outputs)
