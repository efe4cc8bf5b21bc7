"""From hidden states and the head's weight to each target's log-prob, never holding (N, V).

    x = hidden @ weight.T / T
    logp = x[target] - logsumexp(x)            H = logsumexp(x) - softmax(x) . x

    d logp / d (hidden @ weight.T) = (onehot(target) - softmax(x)) / T
    d H    / d (hidden @ weight.T) = -softmax(x) (log softmax(x) + H) / T

There are two ways.

`linear_log_probs` (recompute) serves any loss on logp. Its backward makes the logits again, by
slices of the vocabulary: with logsumexp known a slice needs no other. d_weight of a slice is one
product over all rows (summed in the product's own float32, written once), and only the small
d_hidden is added up.

`fused_linear_loss` (fused) serves a loss that is a sum over tokens. Gradients are made in the
forward, by chunks of rows, and the logits are made once.

Arithmetic for an H100 (not measured; 700 TF/s in products, 3.0 TB/s), V = 151,936, bf16, chunks of
1,024 rows = 0.29 GiB, in ms per 1,024 rows at C = 896 / 2,048:

    fused       3 products                          1.19 / 2.73
                logits read, read, written          0.31
                float32 d_weight read and written   0.36 / 0.83
                                                    = 448 / 494 TF/s
    recompute   4 products                          1.59 / 3.64
                the same passes                     0.31
                float32 d_hidden                    0.02 / 0.05
                                                    = 580 / 638 TF/s, on a third more FLOP

So on a GPU the two take about the same time, 1.87 / 3.87 and 1.92 / 4.00 ms: what the fourth
product costs, d_weight's visits cost too. On a CPU the products are the cost, and fused wins by
the fourth.

Legend: N trained tokens, C width, V vocabulary, n rows of a chunk, b rows of a block, v columns of
a slice, k rows that have a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from recr1.kernels.availability import require_backend
from recr1.kernels.cpu_linear import multiply, multiply_into

# Bytes of logits that exist at once. CPU: wide products, yet little beside a small head's gradient.
# GPU: 1,024 rows of Qwen's vocabulary in bf16.
WORKSPACE_BYTES = {"cpu": 48 << 20, "cuda": 311_164_928}

# torch: float32 logits that the distribution visits several times over, of which up to four copies
# exist at once. CPU: they stay in cache. GPU: 512 rows of Qwen's vocabulary, half a chunk. A block
# is 93 launches, 126 with KL and entropy, and one wait for the rows that have a gradient: .6 ms of
# the host, less than the 2.6 ms that the GPU takes for 512 rows (arithmetic for an H200, 3B).
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 320 << 20}

SLICE_BYTES = {"cpu": 16 << 20, "cuda": 311_164_928}  # the recomputed logits, which come by columns

GRADIENT_TILE = 4096  # columns of a row that a program of the gradient kernel overwrites

# (logits (b, V), temperature) -> the policy's TokenDistribution, as recr1/model/log_probs.py has it
MakeDistribution = Callable[[torch.Tensor, float], Any]

# (logp (n,), its rows) -> the loss of these rows
Formula = Callable[[torch.Tensor, slice], torch.Tensor]

# (logp (n,), entropy (n,), their rows) -> the loss of these rows, d loss / d logp (n,), and
# d loss / d entropy (n,) or None where the entropy is not in the loss
TokenLoss = Callable[
    [torch.Tensor, torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
]


def linear_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    temperature: float,
    make_distribution: MakeDistribution,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-prob (N,) and entropy (N,) with gradient, at least float32.

    Rows whose incoming gradient is 0 are left out of the backward. Raises RuntimeError when the
    backend cannot run here.

    Args:
        hidden: (N, C); weight: (V, C); target: (N,).
        make_distribution: the definition of the policy. Backend "triton" computes the same in its
            kernels.
    """
    backend = require_backend(backend, hidden.device)
    return _LinearLogProbs.apply(hidden, weight, target, temperature, make_distribution, backend)


def fused_linear_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    temperature: float,
    make_distribution: MakeDistribution,
    token_loss: TokenLoss,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute a loss that is a sum over tokens; the logits are made once.

    Args:
        token_loss: returns the loss of a chunk of rows, already divided by the denominator, and its
            derivatives. Its rows are a slice of 0..N. `make_token_loss(formula)` makes one of a
            formula in plain torch. The other arguments are those of `linear_log_probs`.

    Returns:
        The loss (scalar with gradient), log-prob (N,) and entropy (N,) without gradient.
    """
    backend = require_backend(backend, hidden.device)
    if not torch.is_grad_enabled():
        # The forward would make gradients that nobody can ask for.
        hidden = hidden.detach()
        weight = weight.detach()
    return _FusedLinearLoss.apply(
        hidden, weight, target, temperature, make_distribution, token_loss, backend
    )


def make_token_loss(formula: Formula) -> TokenLoss:
    """Make the TokenLoss of a loss that is written in plain torch on logp."""

    def token_loss(
        logp: torch.Tensor, entropy: torch.Tensor, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        with torch.enable_grad():
            leaf = logp.detach().requires_grad_()
            loss = formula(leaf, rows)
        [grad_logp] = torch.autograd.grad(loss, leaf)
        # contiguous: the gradient of a plain sum is one number, expanded
        return loss.detach(), grad_logp.contiguous(), None

    return token_loss


class _LinearLogProbs(torch.autograd.Function):
    """Recompute. Forward: log-probs, chunk by chunk. Backward: gradients, slice by slice."""

    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, make_distribution, backend):
        dtype = _accumulation_dtype(weight)
        logp = hidden.new_empty(len(hidden), dtype=dtype)  # (N,)
        entropy = hidden.new_empty(len(hidden), dtype=dtype)  # (N,)
        logsumexp = hidden.new_empty(len(hidden), dtype=dtype)  # (N,)
        for rows, logits in _iterate_chunks(hidden, weight):
            if backend == "triton":
                compute_statistics(
                    logits, target[rows], temperature, logp[rows], entropy[rows], logsumexp[rows]
                )
                continue
            for block_rows, block_logits in _iterate_blocks(rows, logits):
                distribution = make_distribution(block_logits, temperature)
                logp[block_rows] = distribution.logp(target[block_rows, None])[:, 0]
                entropy[block_rows] = distribution.entropy()
                logsumexp[block_rows] = distribution.logsumexp[:, 0]

        ctx.save_for_backward(hidden, weight, target, logsumexp, entropy)
        ctx.temperature = temperature
        ctx.logits_to_gradient_ = torch_logits_to_gradient_
        if backend == "triton":
            ctx.logits_to_gradient_ = triton_logits_to_gradient_
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, target, logsumexp, entropy = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        if grad_logp is None:
            grad_logp = torch.zeros_like(logsumexp)
        grad_logp = grad_logp.contiguous()

        # Rows without a gradient are left out of all products.
        keep = _find_rows_with_gradient(grad_logp, grad_entropy)  # (k,)
        kept_hidden = _select_rows(hidden, keep)
        target = _select_rows(target, keep)
        logsumexp = _select_rows(logsumexp, keep)
        grad_logp = _select_rows(grad_logp, keep)
        entropy = _select_rows(entropy, keep)
        if grad_entropy is not None:
            grad_entropy = _select_rows(grad_entropy, keep)

        d_hidden = None
        d_weight = None
        if needs_hidden:
            d_hidden = torch.zeros_like(kept_hidden, dtype=_accumulation_dtype(hidden))
        if needs_weight:
            d_weight = torch.empty_like(weight)
        for columns, logits in _iterate_slices(kept_hidden, weight):
            ctx.logits_to_gradient_(
                logits,
                target - columns.start,
                logsumexp,
                grad_logp,
                ctx.temperature,
                entropy,
                grad_entropy,
            )
            d_logits = logits
            if d_hidden is not None:
                _add_product(d_hidden, d_logits, weight[columns])
            if d_weight is not None:
                torch.mm(d_logits.T, kept_hidden, out=d_weight[columns])

        if d_hidden is not None:
            d_hidden = d_hidden.to(hidden.dtype)
            if len(keep) < len(hidden):
                d_hidden = torch.zeros_like(hidden).index_copy_(0, keep, d_hidden)
        return d_hidden, d_weight, None, None, None, None


class _FusedLinearLoss(torch.autograd.Function):
    """Fused. Forward: the loss and all gradients, chunk by chunk. Backward: hands them out."""

    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, make_distribution, token_loss, backend):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype = _accumulation_dtype(weight)
        logp = hidden.new_empty(len(hidden), dtype=dtype)  # (N,)
        entropy = hidden.new_empty(len(hidden), dtype=dtype)  # (N,)
        loss = logp.new_zeros(())
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight = torch.empty_like(weight, dtype=dtype) if needs_weight else None

        # The first product overwrites d_weight, which is never cleared; the others are added.
        beta = 0
        for rows, logits in _iterate_chunks(hidden, weight):
            if backend == "triton":
                keep = _triton_chunk_to_gradient_(
                    rows, logits, target, temperature, token_loss, logp, entropy, loss
                )
            else:
                keep = _torch_chunk_to_gradient_(
                    rows,
                    logits,
                    target,
                    temperature,
                    make_distribution,
                    token_loss,
                    logp,
                    entropy,
                    loss,
                )
            if len(keep) == 0:
                continue
            d_logits = logits[: len(keep)]
            if d_hidden is not None:
                d_hidden.index_copy_(0, keep, multiply(d_logits, weight.T))
            if d_weight is not None:
                kept_hidden = hidden.index_select(0, keep)
                _add_product(d_weight, d_logits.T, kept_hidden, beta=beta)
                beta = 1

        if d_weight is not None:
            if beta == 0:  # no row had a gradient
                d_weight.zero_()
            d_weight = d_weight.to(weight.dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(logp, entropy)
        return loss, logp, entropy

    @staticmethod
    def backward(ctx, grad, *_):
        d_hidden, d_weight = ctx.saved_tensors
        if grad != 1:
            d_hidden = None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype)
            d_weight = None if d_weight is None else d_weight * grad.to(d_weight.dtype)
        return d_hidden, d_weight, None, None, None, None, None


def _torch_chunk_to_gradient_(
    rows: slice,
    logits: torch.Tensor,
    target: torch.Tensor,
    temperature: float,
    make_distribution: MakeDistribution,
    token_loss: TokenLoss,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    loss: torch.Tensor,
) -> torch.Tensor:
    """Overwrite a chunk's logits with d loss / d logits, in torch (fused).

    Fills logp and entropy of `rows` and adds their part to `loss`. Rows of gradient 0 are left out:
    the others are packed to the top of `logits`, so that the products that follow are smaller. The
    distribution's exponentials become the gradient block by block, in cache.

    Returns:
        keep (k,): the rows of 0..N that logits[:k] belong to.
    """
    kept_rows = []
    num_kept = 0
    for block_rows, block_logits in _iterate_blocks(rows, logits):
        distribution = make_distribution(block_logits, temperature)
        target_id = target[block_rows, None]  # (b, 1)
        logp[block_rows] = distribution.logp(target_id)[:, 0]
        entropy[block_rows] = distribution.entropy()

        block_loss, grad_logp, grad_entropy = token_loss(
            logp[block_rows], entropy[block_rows], block_rows
        )
        loss += block_loss

        keep = _find_rows_with_gradient(grad_logp, grad_entropy)  # (k,)
        kept_rows.append(keep + block_rows.start)
        weights = _select_rows(distribution.weights, keep)  # (k, V)
        total = _select_rows(distribution.total, keep)  # (k, 1)
        target_id = _select_rows(target_id, keep)
        target_logp = _select_rows(logp[block_rows], keep)[:, None]  # (k, 1)

        # d_logits = -p * slope, but in the target's column. slope (k, 1), or (k, V) with entropy
        slope = (_select_rows(grad_logp, keep) / temperature)[:, None]
        at_target = slope * -target_logp.expm1()  # slope * (1 - p), exact near p = 1
        if grad_entropy is not None:
            entropy_slope = (_select_rows(grad_entropy, keep) / temperature)[:, None]
            block_entropy = _select_rows(entropy[block_rows], keep)[:, None]
            target_p = target_logp.exp()
            at_target = at_target - entropy_slope * target_p * (target_logp + block_entropy)
            # No name for log p, (k, V): it would hold a block in memory.
            slope = slope + entropy_slope * (_select_log_p(distribution, keep) + block_entropy)

        # In place of logits that were already read.
        d_logits = logits[num_kept : num_kept + len(keep)]
        torch.mul(weights, slope / -total, out=d_logits)
        d_logits.scatter_(1, target_id, at_target.to(d_logits.dtype))
        num_kept += len(keep)
    return torch.cat(kept_rows)


def _triton_chunk_to_gradient_(
    rows: slice,
    logits: torch.Tensor,
    target: torch.Tensor,
    temperature: float,
    token_loss: TokenLoss,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    loss: torch.Tensor,
) -> torch.Tensor:
    """Overwrite a chunk's logits with d loss / d logits, by kernels (fused).

    As `_torch_chunk_to_gradient_`, but rows of gradient 0 stay in place: no row may move while
    another program still reads it.
    """
    target = target[rows]
    all_rows = torch.arange(rows.start, rows.stop, device=target.device)

    # A loss with a kernel of its own is computed in the same pass (group_loss.GroupTokenLoss).
    if hasattr(token_loss, "on_logits_"):
        loss += token_loss.on_logits_(logits, target, temperature, rows, logp[rows], entropy[rows])
        return all_rows

    logsumexp = torch.empty_like(logp[rows])
    compute_statistics(logits, target, temperature, logp[rows], entropy[rows], logsumexp)
    chunk_loss, grad_logp, grad_entropy = token_loss(logp[rows], entropy[rows], rows)
    loss += chunk_loss
    if not grad_logp.any() and (grad_entropy is None or not grad_entropy.any()):
        return target.new_empty(0)
    triton_logits_to_gradient_(
        logits, target, logsumexp, grad_logp, temperature, entropy[rows], grad_entropy
    )
    return all_rows


def torch_logits_to_gradient_(
    logits: torch.Tensor,
    target_column: torch.Tensor,
    logsumexp: torch.Tensor,
    grad_logp: torch.Tensor,
    temperature: float,
    entropy: torch.Tensor | None = None,
    grad_entropy: torch.Tensor | None = None,
) -> None:
    """Overwrite logits (n, v), a slice of the vocabulary, with d loss / d logits.

    Args:
        target_column: (n,) the target's column of the slice; it may be outside.
        grad_logp, grad_entropy: (n,) d loss / d logp and d loss / d entropy; None: the entropy is
            not in the loss, and `entropy` is not read.
    """
    x = logits.to(_accumulation_dtype(logits))
    if temperature != 1.0:
        x.div_(temperature)
    slope = (grad_logp / temperature)[:, None]  # (n, 1)
    log_p = x.sub_(logsumexp[:, None])
    if grad_entropy is None:
        log_p.exp_().mul_(-slope)
    else:
        assert entropy is not None
        entropy_slope = (grad_entropy / -temperature)[:, None]
        column_slope = (log_p + entropy[:, None]).mul_(entropy_slope).sub_(slope)
        log_p.exp_().mul_(column_slope)

    num_columns = x.shape[1]
    is_inside = (target_column >= 0) & (target_column < num_columns)
    column = target_column.clamp(0, num_columns - 1)
    x.scatter_add_(1, column[:, None], torch.where(is_inside[:, None], slope, 0))
    if x is not logits:
        logits.copy_(x)


def compute_statistics(
    logits: torch.Tensor,
    target: torch.Tensor,
    temperature: float,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    logsumexp: torch.Tensor,
) -> None:
    """Fill logp, entropy and logsumexp (n,) of logits (n, V), by a kernel.

    They are those of log_probs.make_distribution, in one pass: an online logsumexp, a program to a
    row.
    """
    n, V = logits.shape
    check_rows(logits, target, logp, entropy, logsumexp)
    get_kernels().statistics_kernel[n,](
        logits,
        target,
        logp,
        entropy,
        logsumexp,
        float(temperature),
        V,
        logits.stride(0),
        **choose_tile(V),
    )


def triton_logits_to_gradient_(
    logits: torch.Tensor,
    target_column: torch.Tensor,
    logsumexp: torch.Tensor,
    grad_logp: torch.Tensor,
    temperature: float,
    entropy: torch.Tensor | None = None,
    grad_entropy: torch.Tensor | None = None,
) -> None:
    """Do the same as torch_logits_to_gradient_ by a kernel.

    It reads and writes logits (n, v) once, with a program to 4,096 columns of a row.
    """
    n, v = logits.shape
    of_rows = [target_column, logsumexp, grad_logp]
    if grad_entropy is None:
        entropy = None
    else:
        assert entropy is not None
        of_rows += [entropy, grad_entropy]
    check_rows(logits, *of_rows)
    if n == 0:
        return
    num_tiles = -(-v // GRADIENT_TILE)
    get_kernels().gradient_kernel[n, num_tiles](
        logits,
        target_column,
        logsumexp,
        grad_logp,
        entropy,
        grad_entropy,
        float(temperature),
        logits.stride(0),
        GRADIENT_TILE,
        num_warps=4,
    )


def check_rows(logits: torch.Tensor, *of_rows: torch.Tensor) -> None:
    """Assert that logits (n, V) and the tensors (n,) are laid out as the kernels read them."""
    n = len(logits)
    stride = logits.stride()
    assert stride[1] == 1 and stride[0] % 16 == 0, (
        f"rows must be dense and start at multiples of 16 numbers, strides are {stride}"
    )
    assert all(x.shape == (n,) and x.is_contiguous() for x in of_rows), (
        f"one number for each of {n} rows, contiguous"
    )


def choose_tile(V: int) -> dict[str, int]:
    """Choose how many columns a program visits at once on its walk along a row of V.

    It is a power of two, with 32 columns to a thread where there are so many.
    """
    tile = min(8192, 1 << max(4, (V - 1).bit_length()))
    return dict(TILE=tile, num_warps=max(1, tile // 1024))


@cache
def get_kernels() -> SimpleNamespace:
    """Make the Triton kernels at first use: importing this file needs no Triton.

    V and a workspace's stride are constants of the model, other sizes are run-time values: a new
    batch compiles nothing. A tile is loaded in full up to the stride, and what is behind V is
    masked after the load: masked by an odd V the load would go number by number.
    """
    # Triton finds `tl` and the helper functions among the globals of the module.
    global triton, tl, compute_row_statistics, write_logits_gradient
    import triton
    import triton.language as tl

    @triton.jit
    def compute_row_statistics(x, scale, V: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr):
        """Return logsumexp and entropy of the row at x, scaled by 1 / T."""
        peak = -float("inf")
        total = 0.0
        moment = 0.0
        for start in range(0, V, TILE):
            column = start + tl.arange(0, TILE)
            value = tl.load(x + column, mask=column < STRIDE, other=0.0).to(tl.float32) * scale
            value = tl.where(column < V, value, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(value, 0))
            weight = tl.exp(value - new_peak)
            shrink = tl.exp(peak - new_peak)
            total = total * shrink + tl.sum(weight, 0)
            moment = moment * shrink + tl.sum(tl.where(weight > 0, weight * value, 0.0), 0)
            peak = new_peak
        logsumexp = peak + tl.log(total)
        return logsumexp, logsumexp - moment / total

    @triton.jit
    def write_logits_gradient(
        x, column, target, logsumexp, grad_logp, entropy, grad_entropy, scale, STRIDE
    ):
        """Overwrite a tile of the row at x with its gradient.

        (grad_logp (onehot - softmax) - grad_entropy softmax (log softmax + entropy)) / T
        """
        value = tl.load(x + column, mask=column < STRIDE, other=0.0)
        log_p = value.to(tl.float32) * scale - logsumexp
        p = tl.exp(log_p)
        d = grad_logp * tl.where(column == target, 1.0 - p, -p)
        if grad_entropy is not None:
            d -= grad_entropy * p * (log_p + entropy)
        d *= scale
        tl.store(x + column, d.to(value.dtype), mask=column < STRIDE)

    @triton.jit
    def statistics_kernel(
        logits,
        target,
        logp,
        entropy,
        logsumexp,
        temperature,
        V: tl.constexpr,
        STRIDE: tl.constexpr,
        TILE: tl.constexpr,
    ):
        """Store log-prob, entropy and logsumexp of one row."""
        row = tl.program_id(0).to(tl.int64)
        scale = 1.0 / temperature
        x = logits + row * STRIDE
        row_logsumexp, row_entropy = compute_row_statistics(x, scale, V, STRIDE, TILE)
        target_logit = tl.load(x + tl.load(target + row)).to(tl.float32) * scale
        tl.store(logp + row, target_logit - row_logsumexp)
        tl.store(entropy + row, row_entropy)
        tl.store(logsumexp + row, row_logsumexp)

    @triton.jit
    def gradient_kernel(
        logits,
        target,
        logsumexp,
        grad_logp,
        entropy,
        grad_entropy,
        temperature,
        STRIDE,
        TILE: tl.constexpr,
    ):
        """Overwrite one tile of one row with its gradient."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        row_entropy = entropy if entropy is None else tl.load(entropy + row)
        row_grad_entropy = grad_entropy if grad_entropy is None else tl.load(grad_entropy + row)
        write_logits_gradient(
            logits + row * STRIDE,
            column,
            tl.load(target + row),
            tl.load(logsumexp + row),
            tl.load(grad_logp + row),
            row_entropy,
            row_grad_entropy,
            1.0 / temperature,
            STRIDE,
        )

    return SimpleNamespace(
        statistics_kernel=statistics_kernel,
        gradient_kernel=gradient_kernel,
        compute_row_statistics=compute_row_statistics,
        write_logits_gradient=write_logits_gradient,
    )


def _find_rows_with_gradient(
    grad_logp: torch.Tensor, grad_entropy: torch.Tensor | None
) -> torch.Tensor:
    """Return the rows (k,) whose gradient is not 0."""
    has_gradient = grad_logp != 0
    if grad_entropy is not None:
        has_gradient = has_gradient | (grad_entropy != 0)
    return has_gradient.nonzero()[:, 0]


def _select_rows(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Return rows `keep` (k,) of x (n, ...); x itself, without a copy, when all are kept."""
    return x if len(keep) == len(x) else x.index_select(0, keep)


def _select_log_p(distribution: Any, keep: torch.Tensor) -> torch.Tensor:
    """Return log p of rows `keep` of a TokenDistribution, (k, V)."""
    scaled = _select_rows(distribution.scaled, keep)
    return scaled - _select_rows(distribution.logsumexp, keep)


def _iterate_chunks(
    hidden: torch.Tensor, weight: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield rows of 0..N and their logits (n, V), in one workspace for all chunks."""
    N = len(hidden)
    V = len(weight)
    stride = padded_row_stride(V)
    row_bytes = stride * hidden.element_size()
    chunk_rows = _rows_per_chunk(WORKSPACE_BYTES[hidden.device.type], row_bytes, N)
    workspace = hidden.new_empty(chunk_rows, stride)
    for start in range(0, N, chunk_rows):
        stop = min(start + chunk_rows, N)
        logits = workspace[: stop - start, :V]
        yield slice(start, stop), multiply_into(logits, hidden[start:stop], weight)


def _iterate_slices(
    hidden: torch.Tensor, weight: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield columns of 0..V and their logits (N, v), in one workspace for all slices."""
    N = len(hidden)
    V = len(weight)
    column_bytes = max(N, 1) * hidden.element_size()
    num_columns = _rows_per_chunk(SLICE_BYTES[hidden.device.type], column_bytes, V)
    num_columns = padded_row_stride(num_columns)
    workspace = hidden.new_empty(N, num_columns)
    for start in range(0, V, num_columns):
        stop = min(start + num_columns, V)
        logits = workspace[:, : stop - start]
        yield slice(start, stop), multiply_into(logits, hidden, weight[start:stop])


def _iterate_blocks(rows: slice, logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield rows of 0..N and their logits (b, V): the chunk `rows` in blocks."""
    n, V = logits.shape
    row_bytes = V * _accumulation_dtype(logits).itemsize
    num_rows = _rows_per_chunk(BLOCK_BYTES[logits.device.type], row_bytes, n)
    for start in range(0, n, num_rows):
        block = logits[start : start + num_rows]
        first = rows.start + start
        yield slice(first, first + len(block)), block


def _rows_per_chunk(budget: int, row_bytes: int, num_rows: int) -> int:
    """Return how many rows fit the budget.

    That is all of them, or a multiple of 128 (a GPU's tile), or of 4 (below it float32 sums depend
    on the number of rows).
    """
    fit = max(budget // row_bytes, 4)
    if fit >= num_rows:
        return max(num_rows, 1)
    multiple = 128 if fit >= 128 else 4
    return fit - fit % multiple


def padded_row_stride(columns: int) -> int:
    """Round up the columns of a workspace, so that its rows start 32 bytes apart at least.

    The wide loads of cuBLAS and Triton need it, and real vocabularies are odd.
    """
    return -(-columns // 16) * 16


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float = 1) -> None:
    """Set out = beta * out + a @ b, summed in out's type, which may be wider than theirs."""
    if out.dtype == a.dtype:
        out.addmm_(a, b, beta=beta)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    elif beta:
        out.mul_(beta).add_(a @ b)
    else:
        out.copy_(a @ b)


def _accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the type of sums and log-probs; float64 stays float64."""
    return torch.promote_types(x.dtype, torch.float32)
