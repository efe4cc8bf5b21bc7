"""Run an operation on CPU memory: by torch's CPU kernel, or, where a CPU has none, by the formula
that the operation's documentation gives.

Legend: M packed queries, N packed keys, H query heads, K kv heads, D head dim; T queries and S keys
of one sequence.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch


def run_on_cpu(func: Callable, args: tuple, kwargs: dict):
    """Run an operation of torch on CPU tensors."""
    formula = FORMULAS.get((get_name(func), func._overloadname))
    if formula is None:
        return func(*args, **kwargs)
    return formula(*args, **kwargs)


def get_name(func: Callable) -> str:
    """Return an operation's name without its library and its overload: aten::add.Tensor is add."""
    return func._schema.name.split("::")[1]


# --- Products whose result is wider than their operands -------------------------------------------


def multiply_wide(
    a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply (mm, bmm) exactly as far as `dtype` goes: cuBLAS sums in float32."""
    product = a.to(dtype) @ b.to(dtype)
    if out is None:
        return product
    return out.copy_(product)


def multiply_and_add_wide(
    addend: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dtype: torch.dtype,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return beta * addend + alpha * a @ b in `dtype`; with beta 0 the addend is not read."""
    assert a.dtype == b.dtype
    assert addend.dtype in (dtype, a.dtype)
    total = alpha * (a.to(dtype) @ b.to(dtype))
    if beta != 0:
        total = total + beta * addend
    if out is None:
        return total
    assert out.dtype == dtype
    return out.copy_(total)


# --- Attention over packed rows -------------------------------------------------------------------


class Sequence(NamedTuple):
    """The rows of one sequence in the packed queries and keys."""

    queries: slice
    keys: slice


def list_sequences(cu_q: torch.Tensor, cu_k: torch.Tensor) -> Iterator[Sequence]:
    q_ends = cu_q.tolist()
    k_ends = cu_k.tolist()
    for i in range(len(q_ends) - 1):
        yield Sequence(slice(q_ends[i], q_ends[i + 1]), slice(k_ends[i], k_ends[i + 1]))


def check_varlen_arguments(q, k, v, cu_q, cu_k, max_q, max_k, is_causal) -> None:
    """Refuse what FlashAttention refuses, and what goes wrong in it without a word."""
    assert is_causal
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert q.shape[2] % 8 == 0
    for x in (q, k, v):
        assert x.stride(-1) == 1
    for cumulative, longest in ((cu_q, max_q), (cu_k, max_k)):
        lengths = cumulative.diff()
        assert cumulative.dtype == torch.int32
        assert (lengths > 0).all()
        assert longest == int(lengths.max())


def compute_softmax_weights(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the weights of one sequence, causal from the end: q (T, K, H/K, D), k (S, K, D) ->
    (K, H/K, T, S), float32.
    """
    T = len(q)
    S = len(k)
    scores = scale * torch.einsum("tkgd,skd->kgts", q.float(), k.float())
    is_read = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return scores.masked_fill(~is_read, -torch.inf).softmax(-1)


def attend_varlen(
    q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, *_, **__
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """aten::_varlen_attn: q (M, H, D), k and v (N, K, D) -> (M, H, D).

    As in the kernel, scores are float32 and weights are rounded before they multiply the values.
    What the kernel keeps for its backward is left out: `attend_varlen_backward` does without.
    """
    check_varlen_arguments(q, k, v, cu_q, cu_k, max_q, max_k, is_causal)
    scale = scale or q.shape[2] ** -0.5
    out = torch.empty_like(q)
    for queries, keys in list_sequences(cu_q, cu_k):
        grouped_q = q[queries].unflatten(1, (k.shape[1], -1))
        weights = compute_softmax_weights(grouped_q, k[keys], scale).to(q.dtype)
        attended = torch.einsum("kgts,skd->tkgd", weights.float(), v[keys].float())
        out[queries] = attended.flatten(1, 2).to(q.dtype)
    logsumexp = torch.zeros(q.shape[1], len(q))
    random_state = torch.zeros(2, dtype=torch.uint64)
    return out, logsumexp, random_state


def attend_varlen_backward(
    grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, is_causal, rng, scale=None, *_, **__
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v: FlashAttention (Dao et al. 2022, appendix B.2), without its
    tiles.
    """
    scale = scale or q.shape[2] ** -0.5
    grad_q = torch.zeros_like(q)
    grad_k = torch.zeros_like(k)
    grad_v = torch.zeros_like(v)
    for queries, keys in list_sequences(cu_q, cu_k):
        heads = (k.shape[1], -1)
        grouped_q = q[queries].unflatten(1, heads).float()  # (T, K, H/K, D)
        grouped_grad = grad[queries].unflatten(1, heads).float()
        weights = compute_softmax_weights(grouped_q, k[keys], scale)

        grad_v[keys] = torch.einsum("kgts,tkgd->skd", weights, grouped_grad).to(q.dtype)
        grad_weights = torch.einsum("tkgd,skd->kgts", grouped_grad, v[keys].float())
        mean = (weights * grad_weights).sum(-1, keepdim=True)
        grad_scores = scale * weights * (grad_weights - mean)
        grad_k[keys] = torch.einsum("kgts,tkgd->skd", grad_scores, grouped_q).to(q.dtype)
        sequence_grad_q = torch.einsum("kgts,skd->tkgd", grad_scores, k[keys].float())
        grad_q[queries] = sequence_grad_q.flatten(1, 2).to(q.dtype)
    return grad_q, grad_k, grad_v


# (operation, overload) -> what computes it
FORMULAS = {
    ("mm", "dtype"): multiply_wide,
    ("mm", "dtype_out"): multiply_wide,
    ("bmm", "dtype"): multiply_wide,
    ("bmm", "dtype_out"): multiply_wide,
    ("addmm", "dtype"): multiply_and_add_wide,
    ("addmm", "dtype_out"): multiply_and_add_wide,
    ("_varlen_attn", "default"): attend_varlen,
    ("_varlen_attn_backward", "default"): attend_varlen_backward,
}
