"""Linear -> log-prob: from hidden states and the head's weight to each target's log-prob, never
holding (N, V).

    logp = x[target] - logsumexp(x),  x = hidden @ weight.T / T;      d logp / d (hidden @ weight.T)
    = (onehot(target) - softmax(x)) / T H = logsumexp(x) - softmax(x) . x;
    d H / d (hidden @ weight.T) = -softmax(x) (log softmax(x) + H) / T

`linear_logp` (recompute): any loss on logp; its backward makes the logits again, by slices of the
vocabulary: with logsumexp known a slice needs no other, d_weight of a slice is one product over all
rows (summed in the product's own float32, written once), and only the small d_hidden is added up.
`linear_loss` (one shot): a loss that is a sum over tokens; gradients are made in the forward, by
chunks of rows, and the logits are made once.

Arithmetic for an H100 (not measured; 700 TF/s in products, 3.0 TB/s), V = 151,936, bf16, chunks of
1,024 rows = 0.29 GiB, in ms per 1,024 rows at C = 896 / 2,048:
    one shot   3 products 1.19 / 2.73, logits read, read, written 0.31, float32 d_weight read and
    written 0.36 / 0.83: 448 / 494 TF/s recompute  4 products 1.59 / 3.64, the same passes 0.31,
    float32 d_hidden 0.02 / 0.05: 580 / 638 TF/s, on a third more FLOP
so on a GPU the two take about the same time, 1.87 / 3.87 and 1.92 / 4.00 ms: what the fourth
product costs, d_weight's visits cost too. On a CPU the products are the cost and one shot wins by
the fourth.

Legend: N trained tokens, C width, V vocabulary, n rows of a chunk, b rows of a block, v columns of
a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace

import torch

from recr1.kernels.availability import require_backend
from recr1.kernels.cpu_linear import multiply, multiply_into

# Bytes of logits that exist at once. CPU: wide products, yet little beside a small head's gradient.
# GPU: 1,024 rows of Qwen's vocabulary in bf16.
WORKSPACE_BYTES = {"cpu": 48 << 20, "cuda": 311_164_928}

# torch: what the policy visits several times over, in cache on a CPU
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}

SLICE_BYTES = {"cpu": 16 << 20, "cuda": 311_164_928}  # the recomputed logits, which come by columns


# logp (n,), its rows -> that part of the loss
Formula = Callable[[torch.Tensor, slice], torch.Tensor]

# logp (n,), entropy (n,), their rows -> that part of the loss, d loss / d logp (n,), d loss / d
# entropy (n,) or None where it has no part
TokenLoss = Callable[
    [torch.Tensor, torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
]


def linear_log_probs(hidden, weight, target, temperature: float, policy, backend: str = "torch"):
    """hidden (N, C), weight (V, C), target (N,) -> log-prob (N,) and entropy (N,), both with
    gradient, at least float32.

    `policy(logits (b, V), temperature) -> Policy` is the definition (model/log_probs.py); backend "triton"
    computes the same in its kernels. Rows whose incoming gradient is 0 are left out of the
    backward. Raises RuntimeError when the backend cannot run here.
    """
    require_backend(backend, hidden.device)
    return _LinearLogProbs.apply(hidden, weight, target, temperature, policy, backend)


def fused_linear_loss(
    hidden, weight, target, temperature: float, policy, pull: TokenLoss, backend: str = "torch"
):
    """The same inputs -> loss (scalar with gradient), log-prob (N,) and entropy (N,) without; the
    logits are made once.

    The loss is a sum over tokens: `pull(logp (n,), entropy (n,), rows)` returns the part of one
    chunk, already divided by the total, and its derivatives; `by_autograd(formula)` makes a pull of
    a formula in plain torch. `rows` is a slice of 0..N.
    """
    require_backend(backend, hidden.device)
    if not torch.is_grad_enabled():
        # the forward would make gradients that nobody can ask for
        hidden = hidden.detach()
        weight = weight.detach()
    return _FusedLinearLoss.apply(hidden, weight, target, temperature, policy, pull, backend)


def make_token_loss(formula: Formula) -> TokenLoss:
    """The Pull of a loss that is written in plain torch on logp."""

    def pull(logp, entropy, rows):
        with torch.enable_grad():
            leaf = logp.detach().requires_grad_()
            loss = formula(leaf, rows)
        # a plain sum's is one number, expanded
        return loss.detach(), torch.autograd.grad(loss, leaf)[0].contiguous(), None

    return pull


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, policy, backend):
        # (N,) each
        logp, entropy, log_norm = (
            hidden.new_empty(len(hidden), dtype=_accumulation_dtype(weight)) for _ in range(3)
        )
        for rows, logits in _iterate_chunks(hidden, weight):
            if backend == "triton":
                compute_statistics(
                    logits, target[rows], temperature, logp[rows], entropy[rows], log_norm[rows]
                )
                continue
            for here, block in _iterate_blocks(rows, logits):
                p = policy(block, temperature)
                logp[here], entropy[here], log_norm[here] = (
                    p.logp(target[here, None])[:, 0],
                    p.entropy(),
                    p.log_norm[:, 0],
                )
        ctx.save_for_backward(hidden, weight, target, log_norm, entropy)
        ctx.temperature, ctx.gradient_ = (
            temperature,
            triton_logits_to_gradient_ if backend == "triton" else torch_logits_to_gradient_,
        )
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, d_entropy):
        hidden, weight, target, log_norm, entropy = ctx.saved_tensors
        grad = torch.zeros_like(log_norm) if grad is None else grad.contiguous()
        live = (grad if d_entropy is None else grad.abs() + d_entropy.abs()).nonzero()[:, 0]
        some = len(live) < len(hidden)
        h, target, log_norm, grad, entropy, d_entropy = (
            x if x is None or not some else x.index_select(0, live)
            for x in (hidden, target, log_norm, grad, entropy, d_entropy)
        )
        d_hidden = (
            torch.zeros_like(h, dtype=_accumulation_dtype(h)) if ctx.needs_input_grad[0] else None
        )
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for columns, logits in _iterate_slices(h, weight):
            ctx.gradient_(
                logits, target - columns.start, log_norm, grad, ctx.temperature, entropy, d_entropy
            )
            if d_hidden is not None:
                _add_product(d_hidden, logits, weight[columns])
            if d_weight is not None:
                torch.mm(logits.T, h, out=d_weight[columns])
        if d_hidden is not None:
            d_hidden = d_hidden.to(hidden.dtype)
            d_hidden = torch.zeros_like(hidden).index_copy_(0, live, d_hidden) if some else d_hidden
        return d_hidden, d_weight, None, None, None, None


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, policy, pull, backend):
        # (N,) each
        logp, entropy = (
            hidden.new_empty(len(hidden), dtype=_accumulation_dtype(weight)) for _ in range(2)
        )
        loss = logp.new_zeros(())
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = (
            torch.empty_like(weight, dtype=_accumulation_dtype(weight))
            if ctx.needs_input_grad[1]
            else None
        )
        cleared = 0  # the first product overwrites d_weight: it is never cleared, then added to
        for rows, logits in _iterate_chunks(hidden, weight):
            if backend == "triton":
                live = _triton_logits_to_gradient_(
                    rows, logits, target, temperature, pull, logp, entropy, loss
                )
            else:
                live = _torch_logits_to_gradient_(
                    rows, logits, target, temperature, policy, pull, logp, entropy, loss
                )
            if len(live) == 0:
                continue
            d_logits = logits[: len(live)]
            h = hidden.index_select(0, live)
            if d_hidden is not None:
                d_hidden.index_copy_(0, live, multiply(d_logits, weight.T))
            if d_weight is not None:
                _add_product(d_weight, d_logits.T, h, beta=cleared)
                cleared = 1
        if d_weight is not None:
            d_weight = (d_weight if cleared else d_weight.zero_()).to(weight.dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(logp, entropy)
        return loss, logp, entropy

    @staticmethod
    def backward(ctx, grad, *_):
        scaled = (d if d is None or grad == 1 else d * grad.to(d.dtype) for d in ctx.saved_tensors)
        return *scaled, None, None, None, None, None


def _torch_logits_to_gradient_(
    rows, logits, target, temperature, policy, pull, logp, entropy, loss
):
    """Fills logp and entropy of the rows, adds their part to the loss, and packs their d_logits,
    but those of gradient 0, to the top of `logits`. Returns the rows (k,) they belong to. The
    policy's exponentials become the gradient, block by block, in cache.
    """
    found = []
    top = 0
    for here, block in _iterate_blocks(rows, logits):
        p = policy(block, temperature)
        logp[here], entropy[here] = p.logp(target[here, None])[:, 0], p.entropy()
        part, g, h = pull(logp[here], entropy[here], here)
        loss += part
        live = (g if h is None else g.abs() + h.abs()).nonzero()[:, 0]
        found.append(live + here.start)

        def taken(y):
            return y if len(live) == len(g) else y[live]

        weights = taken(p.weights)
        total = taken(p.total)
        at = taken(target[here])
        x = taken(logp[here])[:, None]
        slope = (taken(g) / temperature)[:, None]  # (k, 1)
        at_target = slope * -x.expm1()  # 1 - p, exact near p = 1
        if h is not None:
            bonus = (taken(h) / temperature)[:, None]
            spread = taken(entropy[here])[:, None]
            at_target = at_target - bonus * x.exp() * (x + spread)
            slope = slope + bonus * (taken(p.scaled) - taken(p.log_norm) + spread)  # (k, V)
        d_logits = logits[top : top + len(live)]
        torch.mul(weights, slope / -total, out=d_logits)
        d_logits.scatter_(1, at[:, None], at_target.to(d_logits.dtype))
        top += len(live)
    return torch.cat(found)


def _triton_logits_to_gradient_(rows, logits, target, temperature, pull, logp, entropy, loss):
    """The same by kernels. Rows of gradient 0 stay in place: no row may move while another program
    still reads it.
    """
    # a loss with a kernel of its own: one pass (group_loss.GroupTokenLoss)
    if hasattr(pull, "on_logits_"):
        loss += pull.on_logits_(logits, target[rows], temperature, rows, logp[rows], entropy[rows])
    else:
        log_norm = torch.empty_like(logp[rows])
        compute_statistics(logits, target[rows], temperature, logp[rows], entropy[rows], log_norm)
        part, g, h = pull(logp[rows], entropy[rows], rows)
        loss += part
        if not g.any() and (h is None or not h.any()):
            return target.new_empty(0)
        triton_logits_to_gradient_(logits, target[rows], log_norm, g, temperature, entropy[rows], h)
    return torch.arange(rows.start, rows.stop, device=target.device)


def torch_logits_to_gradient_(
    logits, at, log_norm, pull, temperature: float, entropy=None, d_entropy=None
) -> None:
    """logits (n, v), a slice of the vocabulary -> d loss / d logits, in place. at (n,): the
    target's column, outside the slice too.

    pull and d_entropy (n,): d loss / d logp, d loss / d entropy.
    """
    x = logits.to(_accumulation_dtype(logits))
    if temperature != 1.0:
        x.div_(temperature)
    pull = (pull / temperature)[:, None]
    x.sub_(log_norm[:, None])
    if d_entropy is None:
        x.exp_().mul_(-pull)
    else:
        slope = (x + entropy[:, None]).mul_((d_entropy / -temperature)[:, None]).sub_(pull)
        x.exp_().mul_(slope)
    inside = ((at >= 0) & (at < x.shape[1]))[:, None]
    x.scatter_add_(1, at.clamp(0, x.shape[1] - 1)[:, None], torch.where(inside, pull, 0))
    if x is not logits:
        logits.copy_(x)


def compute_statistics(logits, target, temperature: float, logp, entropy, log_norm) -> None:
    """Fills logp, entropy and logsumexp (n,) of logits (n, V), as log_probs.make_distribution defines them: one
    pass, an online logsumexp, a program to a row.
    """
    n, V = logits.shape
    check_rows(logits, target, logp, entropy, log_norm)
    get_kernels().statistics[n,](
        logits,
        target,
        logp,
        entropy,
        log_norm,
        float(temperature),
        V,
        logits.stride(0),
        **choose_tile(V),
    )


def triton_logits_to_gradient_(
    logits, at, log_norm, pull, temperature: float, entropy=None, d_entropy=None
) -> None:
    """torch_gradient_ by a kernel: one read and one write of logits (n, v), a program to 4,096
    columns of a row.
    """
    n, v = logits.shape
    entropy = None if d_entropy is None else entropy
    check_rows(logits, at, log_norm, pull, *(x for x in (entropy, d_entropy) if x is not None))
    if n:
        get_kernels().gradient[n, -(-v // 4096)](
            logits,
            at,
            log_norm,
            pull,
            entropy,
            d_entropy,
            float(temperature),
            logits.stride(0),
            4096,
            num_warps=4,
        )


def check_rows(logits, *of_rows) -> None:
    n = len(logits)
    stride = logits.stride()
    assert stride[1] == 1 and stride[0] % 16 == 0, (
        f"rows must be dense and start at multiples of 16 numbers, strides are {stride}"
    )
    assert all(x.shape == (n,) and x.is_contiguous() for x in of_rows), (
        f"one number for each of {n} rows, contiguous"
    )


def choose_tile(V: int) -> dict[str, int]:
    """A power of two of columns for a program that walks a row of V, 32 to a thread where there are
    so many.
    """
    tile = min(8192, 1 << max(4, (V - 1).bit_length()))
    return dict(TILE=tile, num_warps=max(1, tile // 1024))


@cache
def get_kernels() -> SimpleNamespace:
    """The Triton kernels, made at first use: importing this file needs no Triton, and Triton finds
    `tl` and helpers among a module's globals.

    V and a workspace's stride are constants of the model, other sizes run-time values: a new batch
    compiles nothing. A tile is loaded whole up to the stride, and what stands behind V is masked
    after the load: masked by an odd V the load would go number by number.
    """
    global triton, tl, row_statistics, d_logits
    import triton
    import triton.language as tl

    @triton.jit
    def row_statistics(x, scale, V: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr):
        """Of the row at x, scaled by 1 / T: logsumexp, entropy."""
        peak = -float("inf")
        total = 0.0
        moment = 0.0
        for start in range(0, V, TILE):
            column = start + tl.arange(0, TILE)
            value = tl.load(x + column, mask=column < STRIDE, other=0.0).to(tl.float32) * scale
            value = tl.where(column < V, value, -float("inf"))
            higher = tl.maximum(peak, tl.max(value, 0))
            weight = tl.exp(value - higher)
            shrink = tl.exp(peak - higher)
            total = total * shrink + tl.sum(weight, 0)
            moment = moment * shrink + tl.sum(tl.where(weight > 0, weight * value, 0.0), 0)
            peak = higher
        log_norm = peak + tl.log(total)
        return log_norm, log_norm - moment / total

    @triton.jit
    def d_logits(x, column, target, log_norm, pull, entropy, d_entropy, scale, STRIDE):
        """Overwrites a tile of the row at x with (pull (onehot - softmax) - d_entropy softmax (log
        softmax + entropy)) / T.
        """
        value = tl.load(x + column, mask=column < STRIDE, other=0.0)
        log_p = value.to(tl.float32) * scale - log_norm
        p = tl.exp(log_p)
        d = pull * tl.where(column == target, 1.0 - p, -p)
        if d_entropy is not None:
            d -= d_entropy * p * (log_p + entropy)
        d *= scale
        tl.store(x + column, d.to(value.dtype), mask=column < STRIDE)

    @triton.jit
    def statistics(
        x,
        target,
        logp,
        entropy,
        log_norm,
        temperature,
        V: tl.constexpr,
        STRIDE: tl.constexpr,
        TILE: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        scale = 1.0 / temperature
        norm, spread = row_statistics(x + row * STRIDE, scale, V, STRIDE, TILE)
        chosen = tl.load(x + row * STRIDE + tl.load(target + row)).to(tl.float32) * scale
        tl.store(logp + row, chosen - norm)
        tl.store(entropy + row, spread)
        tl.store(log_norm + row, norm)

    @triton.jit
    def gradient(
        x, target, log_norm, pull, entropy, d_entropy, temperature, STRIDE, TILE: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        spread = entropy if entropy is None else tl.load(entropy + row)
        bonus = d_entropy if d_entropy is None else tl.load(d_entropy + row)
        d_logits(
            x + row * STRIDE,
            column,
            tl.load(target + row),
            tl.load(log_norm + row),
            tl.load(pull + row),
            spread,
            bonus,
            1.0 / temperature,
            STRIDE,
        )

    return SimpleNamespace(
        statistics=statistics, gradient=gradient, row_statistics=row_statistics, d_logits=d_logits
    )


def _iterate_chunks(hidden, weight) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of 0..N and their logits (n, V), one workspace for all."""
    N = len(hidden)
    stride = _padded_row_stride(len(weight))
    rows = _rows_per_chunk(WORKSPACE_BYTES[hidden.device.type], stride * hidden.element_size(), N)
    workspace = hidden.new_empty(rows, stride)
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        yield (
            slice(start, stop),
            multiply_into(workspace[: stop - start, : len(weight)], hidden[start:stop], weight),
        )


def _iterate_slices(hidden, weight) -> Iterator[tuple[slice, torch.Tensor]]:
    """Columns of 0..V and their logits (N, v), one workspace for all."""
    N = len(hidden)
    V = len(weight)
    columns = _padded_row_stride(
        _rows_per_chunk(SLICE_BYTES[hidden.device.type], max(N, 1) * hidden.element_size(), V)
    )
    workspace = hidden.new_empty(N, columns)
    for start in range(0, V, columns):
        stop = min(start + columns, V)
        yield (
            slice(start, stop),
            multiply_into(workspace[:, : stop - start], hidden, weight[start:stop]),
        )


def _iterate_blocks(rows: slice, logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The chunk in blocks: rows of 0..N and their logits (b, V)."""
    count = _rows_per_chunk(
        BLOCK_BYTES[logits.device.type],
        logits.shape[1] * _accumulation_dtype(logits).itemsize,
        len(logits),
    )
    for start in range(0, len(logits), count):
        block = logits[start : start + count]
        yield slice(rows.start + start, rows.start + start + len(block)), block


def _rows_per_chunk(budget: int, each: int, all: int) -> int:
    """How many fit the budget: all, or a multiple of 128 (a GPU's tile), or of 4 (below it float32
    sums depend on the number of rows).
    """
    fit = max(budget // each, 4)
    return max(all, 1) if fit >= all else fit - fit % (128 if fit >= 128 else 4)


def _padded_row_stride(columns: int) -> int:
    """Rows of a workspace start 32 bytes apart at least: the wide loads of cuBLAS and Triton need
    it, and real vocabularies are odd.
    """
    return -(-columns // 16) * 16


def _add_product(out, a, b, beta: float = 1) -> None:
    """out = beta * out + a @ b, summed in out's type, which may be wider than theirs."""
    if out.dtype == a.dtype:
        out.addmm_(a, b, beta=beta)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:
        out.mul_(beta).add_(a @ b) if beta else out.copy_(a @ b)


def _accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    """The type of sums and log-probs; float64 stays float64."""
    return torch.promote_types(x.dtype, torch.float32)
