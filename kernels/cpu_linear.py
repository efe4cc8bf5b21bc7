"""Compute x @ w.T + b by the fastest float32 product that torch carries on a CPU.

torch.nn.functional.linear goes to MKL, which on AMD processors stays with AVX2 and whose sums
depend on how many rows there are. oneDNN comes with torch too, uses AVX-512 wherever it is (1.8 to
2.4 times MKL's speed on a Zen 4), and from two rows on gives a row the same bits whatever other
rows there are. Everything that is not float32 on a CPU takes torch's own product.

Legend: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

ONEDNN = torch.backends.mkldnn.is_available()

# Fewer rows are padded to a multiple of this: each count has its own compiled loop, of which oneDNN
# keeps 1,024, and a single row has other bits.
ROW_MULTIPLE = 16

# From this many rows on none are padded.
MAX_PADDED_ROWS = 64 * ROW_MULTIPLE

CACHED_BYTES = 1 << 20  # of a product that is still in cache when it is copied to its place


def multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute x @ weight.T + bias, (M, N), without gradient.

    Args:
        x: (M, K); weight: (N, K), or what `pack_weight` made of it; bias: (N,).
    """
    if not uses_onednn(x):
        return F.linear(x, weight, bias)

    # Rows with gaps, and expanded ones, would take oneDNN's reference loop, a thousand times
    # slower.
    if not (weight.is_mkldnn or weight.is_contiguous() or weight.T.is_contiguous()):
        weight = weight.contiguous()
    if 0 in x.stride():
        x = x.contiguous()

    # One column has a loop of its own, with other bits: the last slice of multiply_into.
    if len(weight) == 1 and bias is None and not weight.is_mkldnn:
        return multiply(x, weight.repeat(2, 1))[:, :1]
    num_rows = len(x)
    if num_rows % ROW_MULTIPLE and num_rows < MAX_PADDED_ROWS:
        padded = F.pad(x, (0, 0, 0, -num_rows % ROW_MULTIPLE))
        return multiply(padded, weight, bias)[:num_rows]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def multiply_into(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Set out (M, N), whose rows may have gaps, to x @ weight.T; weight as for `multiply`."""
    if not uses_onednn(x):
        return torch.mm(x, weight.T, out=out)
    if weight.is_mkldnn:
        return out.copy_(multiply(x, weight))
    num_columns = max(1, CACHED_BYTES // (256 * max(1, len(x)))) * 64
    for start in range(0, len(weight), num_columns):
        stop = start + num_columns
        out[:, start:stop] = multiply(x, weight[start:stop])
    return out


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Reorder weight (N, K) as oneDNN has it, for `multiply` with few rows.

    Each such product would sort it anew (1.2 to 1.4 times faster at 64 rows, same bits).
    """
    if uses_onednn(weight) and len(weight) > 1:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return weight


def uses_onednn(x: torch.Tensor) -> bool:
    """Return whether a product with x is oneDNN's."""
    return not explain_inexact(x.dtype, x.device)


def explain_inexact(dtype: torch.dtype, device: torch.device) -> str:
    """Explain why `multiply` may give a row other bits beside other rows; empty: it does not."""
    if device.type == "cpu" and dtype == torch.float32 and ONEDNN:
        return ""
    return "needs float32 on a CPU, where torch has oneDNN"


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias by `multiply`, forward and backward."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        # a frozen weight's backward needs no x: LoRA's
        needs_weight = ctx.needs_input_grad[1]
        ctx.save_for_backward(x if needs_weight else None, weight)
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        N, K = weight.shape
        d_x = None
        d_weight = None
        d_bias = None
        if needs_weight:
            # the smaller one's rows: up to 1.5 times faster
            d_weight = multiply(grad.T, x.T) if N < K else multiply(x.T, grad.T).T
        if needs_x:
            d_x = multiply(grad, weight.T)
        if needs_bias:
            d_bias = grad.sum(0)
        return d_x, d_weight, d_bias


class Linear(nn.Linear):
    """Compute nn.Linear by `multiply`. x (M, in) -> (M, out)."""

    packed: torch.Tensor | None = None  # the packed weight, inside `packed_for_sampling`

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if uses_onednn(x) and torch.is_grad_enabled():
            return _Linear.apply(x, self.weight, self.bias)
        weight = self.weight if self.packed is None else self.packed
        return multiply(x, weight, self.bias)


@contextmanager
def packed_for_sampling(model: nn.Module, head: torch.Tensor) -> Iterator[torch.Tensor]:
    """Pack the weight of every Linear of the model for the duration of the block.

    The packed weight is another copy in memory. Yields that of the head, a matrix of its own: the
    rows that are used of the embedding, or of a Linear, which is then not packed once more.
    """
    layers = []
    for module in model.modules():
        if not isinstance(module, Linear) or not uses_onednn(module.weight):
            continue
        if module.weight.data_ptr() != head.data_ptr():
            layers.append(module)
    try:
        for layer in layers:
            layer.packed = pack_weight(layer.weight.detach())
        yield pack_weight(head.detach())
    finally:
        for layer in layers:
            del layer.packed
