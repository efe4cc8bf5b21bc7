"""x @ w.T + b, by the fastest float32 product that torch carries on a CPU. Legend: M rows, K
inputs, N outputs.

torch.nn.functional.linear goes to MKL, which on AMD processors stays with AVX2 and whose sums
depend on how many rows there are. oneDNN comes with torch too, uses AVX-512 wherever it is (1.8 to
2.4 times MKL's speed on a Zen 4), and from two rows on gives a row the same bits whatever stands
beside it. Everything that is not float32 on a CPU takes torch's own product.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

ONEDNN = torch.backends.mkldnn.is_available()

# fewer rows are padded to a multiple: each count has its own compiled loop, of which oneDNN keeps
# 1,024; and a single row other bits
ROWS = 16

SLICE = 1 << 20  # bytes of a product that is still in cache when it is copied to its place


def multiply(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (M, K), w (N, K) or what `packed` made of it, bias (N,) -> x @ w.T + bias (M, N), without
    gradient.
    """
    if not uses_onednn(x):
        return F.linear(x, w, bias)
    if not (w.is_mkldnn or w.is_contiguous() or w.T.is_contiguous()):
        # rows with gaps would take oneDNN's reference loop, a thousand times slower,
        w = w.contiguous()
    if 0 in x.stride():
        x = x.contiguous()  # and so would expanded ones
    # one column has a loop of its own, with other bits: the last slice of product_into
    if len(w) == 1 and bias is None and not w.is_mkldnn:
        return multiply(x, w.repeat(2, 1))[:, :1]
    n = len(x)
    if n % ROWS and n < 64 * ROWS:
        return multiply(F.pad(x, (0, 0, 0, -n % ROWS)), w, bias)[:n]
    return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")


def multiply_into(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """out (M, N) = x @ w.T, whose rows may have gaps; w as for `product`."""
    if not uses_onednn(x):
        return torch.mm(x, w.T, out=out)
    if w.is_mkldnn:
        return out.copy_(multiply(x, w))
    columns = max(1, SLICE // (256 * max(1, len(x)))) * 64
    for start in range(0, len(w), columns):
        out[:, start : start + columns] = multiply(x, w[start : start + columns])
    return out


def pack_weight(w: torch.Tensor) -> torch.Tensor:
    """w (N, K) in oneDNN's own order, for `product` with few rows, each of which would sort it anew
    (1.2 to 1.4 times faster at 64, same bits).
    """
    return (
        torch.ops.mkldnn._reorder_linear_weight(w.contiguous())
        if uses_onednn(w) and len(w) > 1
        else w
    )


def uses_onednn(x: torch.Tensor) -> bool:
    return not explain_inexact(x.dtype, x.device)


def explain_inexact(dtype: torch.dtype, device: torch.device) -> str:
    """Why `product` may give a row other bits beside other rows; empty: it does not."""
    return (
        ""
        if device.type == "cpu" and dtype == torch.float32 and ONEDNN
        else "needs float32 on a CPU, where torch has oneDNN"
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs, (N, K) = ctx.needs_input_grad, weight.shape
        # the smaller one's rows: up to 1.5 times faster
        d_weight = (
            None if not needs[1] else multiply(grad.T, x.T) if N < K else multiply(x.T, grad.T).T
        )
        return (
            multiply(grad, weight.T) if needs[0] else None,
            d_weight,
            grad.sum(0) if needs[2] else None,
        )


class Linear(nn.Linear):
    """nn.Linear by `product`. x (M, in) -> (M, out)."""

    packed: torch.Tensor | None = None  # the weight's, while `sampling` lasts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if uses_onednn(x) and torch.is_grad_enabled():
            return _Linear.apply(x, self.weight, self.bias)
        return multiply(x, self.weight if self.packed is None else self.packed, self.bias)


@contextmanager
def packed_for_sampling(model: nn.Module, head: torch.Tensor):
    """For the block every Linear of the model has its weight `packed`, another copy of it in
    memory; yields the head's.
    """
    layers = [m for m in model.modules() if isinstance(m, Linear) and uses_onednn(m.weight)]
    try:
        for m in layers:
            m.packed = pack_weight(m.weight.detach())
        yield pack_weight(head.detach())
    finally:
        for m in layers:
            del m.packed
