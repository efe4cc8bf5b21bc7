"""Sample each sibling's next id, or take the most likely one.

Sampling is by inverse CDF in the order of the vocabulary, with one uniform u per token:

    id = the first i with sum_{j <= i} w_j > u sum_j w_j
    w = exp(x / T - max), or 0 outside the nucleus

The nucleus of top_p < 1 (Holtzman et al., arXiv 1904.09751, section 3.1) is the smallest set of
most likely ids whose mass reaches top_p, with whatever ties with its least likely one. Log-probs
are the full policy's: they are not renormalized over the nucleus.

`sample_token` is the formula in torch. `triton_sample_token` reads a row of logits twice and the
tile of its choice once more, and writes 12 bytes: 384 rows of 151,936 in bf16 are 117 MB a visit,
0.08 ms at 3.0 TB/s where torch's half a dozen passes over float32 take 0.5 (arithmetic, not
measured). The nucleus costs it a visit per bit of a logit, 16 or 32, and no sort. Its log-prob
comes from the function and the tiles of the statistics kernel of kernels/logprob.py: from equal
logits equal bits, in the interpreter; on a GPU not yet compared.

Legend: B rows, K siblings that share a row, C width, V vocabulary.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from recr1.kernels import logprob
from recr1.kernels.availability import require_backend
from recr1.kernels.cpu_linear import multiply, multiply_into


class SampledTokens(NamedTuple):
    """The next tokens of B rows."""

    ids: torch.Tensor  # (B, K) int64
    logp: torch.Tensor  # (B, K) their log-probs
    truncated_mass: torch.Tensor  # (B,) the mass that top_p cut off


def sample_from_hidden(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    temperature: float,
    policy: logprob.MakeDistribution,
    uniforms: torch.Tensor | None = None,
    top_p: float = 1.0,
    backend: str = "torch",
) -> SampledTokens:
    """Sample from hidden states: the logits are made on the way.

    Raises RuntimeError when the backend cannot run here.

    Args:
        hidden: (B, C); weight: (V, C), or what cpu_linear.pack_weight made of it.
        policy: (logits (B, V), temperature) -> TokenDistribution, the definition of the policy
            (recr1/model/log_probs.py). Backend "triton" samples by `triton_sample_token` instead.
        uniforms, top_p: see `sample_token`.
    """
    backend = require_backend(backend, hidden.device)
    hidden = hidden.to(weight.dtype)  # a float32 head on a bfloat16 trunk
    if backend == "triton":
        logits = compute_aligned_logits(hidden, weight)
        return triton_sample_token(logits, temperature, uniforms, top_p)
    logits = compute_aligned_logits(hidden, weight) if hidden.is_cuda else multiply(hidden, weight)
    return sample_token(policy(logits, temperature), uniforms, top_p)


def compute_aligned_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute hidden @ weight.T, (B, V), in rows that start at multiples of 16 numbers.

    Real vocabularies are odd. Rows of an odd length begin anywhere, and for a result like that
    cuBLAS has only kernels of an earlier generation.

    The logits have the type of the operands, as in the trainer's head, so that both round alike. A
    GPU could give float32 at no cost, but not to one side alone: with SmolLM2-135M in bfloat16
    sampler and trainer are then .030 nats apart a token, with float32 logits in both .020.
    """
    V = len(weight)
    workspace = hidden.new_empty(len(hidden), logprob.padded_row_stride(V))
    return multiply_into(workspace[:, :V], hidden, weight)


def sample_token(
    distribution: Any, uniforms: torch.Tensor | None = None, top_p: float = 1.0
) -> SampledTokens:
    """Sample from a TokenDistribution (recr1/model/log_probs.py) of B rows, in torch.

    An id of probability 0 is never sampled, whatever the uniform rounds to. A row that is not
    finite yields some id of the vocabulary and a log-prob that is not finite.

    Args:
        uniforms: (B, K) in [0, 1]. None is greedy, K = 1: the lowest of the most likely ids.
    """
    assert 0 < top_p <= 1, top_p
    weights = distribution.weights  # (B, V)
    truncated_mass = torch.zeros_like(distribution.total[:, 0])
    if uniforms is None:
        ids = distribution.scaled.argmax(-1, keepdim=True)
        return SampledTokens(ids, distribution.logp(ids), truncated_mass)

    if top_p < 1:
        floor = find_nucleus_floor(weights, distribution.total, top_p)
        is_outside = weights < floor
        truncated_mass = weights.where(is_outside, 0).sum(-1) / distribution.total[:, 0]
        weights = weights.masked_fill(is_outside, 0)

    cdf = weights.cumsum(-1)  # (B, V)
    mass = cdf[:, -1:].contiguous()
    # right=True never ends on an id of weight 0. A u that rounds to 1 would be off the end: there
    # the last possible id is taken.
    threshold = uniforms.to(cdf.dtype) * mass
    ids = torch.searchsorted(cdf, threshold, right=True)
    last_possible = torch.searchsorted(cdf, mass)
    ids = torch.minimum(ids, last_possible)
    ids = ids.clamp(max=weights.shape[1] - 1)  # NaN: off the end too
    return SampledTokens(ids, distribution.logp(ids), truncated_mass)


def find_nucleus_floor(weights: torch.Tensor, total: torch.Tensor, top_p: float) -> torch.Tensor:
    """Find the smallest weight in the nucleus, (B, 1), of weights (B, V) >= 0 with sums (B, 1)."""
    descending = weights.sort(-1, descending=True).values
    is_below_top_p = descending.cumsum(-1) < top_p * total
    num_below = is_below_top_p.sum(-1, keepdim=True)
    return descending.gather(-1, num_below.clamp(max=weights.shape[1] - 1))


def triton_sample_token(
    logits: torch.Tensor,
    temperature: float,
    uniforms: torch.Tensor | None = None,
    top_p: float = 1.0,
) -> SampledTokens:
    """Do the same as `sample_token` by a kernel, from logits (B, V) in bf16 or float32.

    A program serves one sibling.
    """
    require_backend("triton", logits.device)
    assert 0 < top_p <= 1, top_p
    assert logits.dtype in (torch.float32, torch.bfloat16), logits.dtype
    assert uniforms is None or (
        uniforms.is_contiguous() and uniforms.ndim == 2 and len(uniforms) == len(logits)
    ), "uniforms: (B, K), contiguous"
    B, V = logits.shape
    K = 1 if uniforms is None else uniforms.shape[1]
    ids = logits.new_empty(B, K, dtype=torch.int64)
    logp = logits.new_empty(B, K, dtype=torch.float32)
    truncated_mass = logits.new_zeros(B, dtype=torch.float32)
    logprob.check_rows(logits, truncated_mass)
    if B * K == 0:
        return SampledTokens(ids, logp, truncated_mass)

    has_nucleus = uniforms is not None and top_p != 1
    get_kernels().sample_token_kernel[B, K](
        logits,
        uniforms,
        ids,
        logp,
        truncated_mass,
        float(temperature),
        float(top_p),
        V,
        logits.stride(0),
        8 * logits.itemsize if has_nucleus else 0,
        **logprob.choose_tile(V),
    )
    return SampledTokens(ids, logp, truncated_mass)


@cache
def get_kernels() -> SimpleNamespace:
    """Make the Triton kernels at first use, as in kernels/logprob.py."""
    # Triton finds `tl` and the helper functions among the globals of the module.
    global triton, tl, compute_row_statistics, make_sort_key, load_probabilities, find_tile
    global find_nucleus
    import triton
    import triton.language as tl

    compute_row_statistics = logprob.get_kernels().compute_row_statistics

    @triton.jit
    def make_sort_key(value, BITS: tl.constexpr):
        """Turn float32 into int32 in the same order.

        Of bf16 (BITS = 16) the upper half is all. 0 and -0 are one number.
        """
        bits = tl.where(value == 0.0, 0, value.to(tl.int32, bitcast=True))
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> (32 - BITS)

    @triton.jit
    def load_probabilities(x, column, scale, logsumexp, floor, V, STRIDE, BITS: tl.constexpr):
        """Return probabilities of a tile of the row at x, 0 where the sort key is below `floor`."""
        value = tl.load(x + column, mask=column < STRIDE, other=0.0).to(tl.float32)
        p = tl.where(column < V, tl.exp(value * scale - logsumexp), 0.0)
        if BITS > 0:
            p = tl.where(make_sort_key(value, BITS) >= floor, p, 0.0)
        return p

    @triton.jit
    def find_tile(
        x,
        first,
        before,
        threshold,
        scale,
        logsumexp,
        floor,
        V,
        STRIDE,
        WIDTH: tl.constexpr,
        TILE: tl.constexpr,
        BITS: tl.constexpr,
    ):
        """Find in which tile of columns first .. first + WIDTH the sum passes the threshold.

        `before` is the sum at `first`. It is the last tile of any mass before which the sum has not
        passed: so too where rounding keeps the full sum below the threshold.

        Returns the tile's first column, the sum before it, and the sum at the end.
        """
        tile = first
        running = before
        for start in range(0, WIDTH, TILE):
            column = first + start + tl.arange(0, TILE)
            p = load_probabilities(x, column, scale, logsumexp, floor, V, STRIDE, BITS)
            mass = tl.sum(p, 0)
            is_candidate = (running <= threshold) & (mass > 0)
            tile = tl.where(is_candidate, first + start, tile)
            before = tl.where(is_candidate, running, before)
            running += mass
        return tile, before, running

    @triton.jit
    def find_nucleus(
        x,
        scale,
        logsumexp,
        top_p,
        V: tl.constexpr,
        STRIDE: tl.constexpr,
        TILE: tl.constexpr,
        BITS: tl.constexpr,
    ):
        """Find the highest sort key from which upwards the mass reaches top_p, bit by bit.

        Returns the key and that mass.
        """
        step = tl.full((), 1 << (BITS - 1), tl.int64)
        floor = -step
        nucleus_mass = 1.0
        first = 0
        zero = 0.0
        for _ in range(0, BITS):
            candidate = (floor + step).to(tl.int32)
            _, _, mass = find_tile(
                x, first, zero, zero, scale, logsumexp, candidate, V, STRIDE, V, TILE, BITS
            )
            floor = tl.where(mass >= top_p, floor + step, floor)
            nucleus_mass = tl.where(mass >= top_p, mass, nucleus_mass)
            step = step // 2
        return floor.to(tl.int32), nucleus_mass

    @triton.jit
    def sample_token_kernel(
        logits,
        uniforms,
        ids,
        logp,
        truncated_mass,
        temperature,
        top_p,
        V: tl.constexpr,
        STRIDE: tl.constexpr,
        BITS: tl.constexpr,
        TILE: tl.constexpr,
    ):
        """Store one sibling's id and its log-prob. BITS = 0: top_p is 1."""
        row = tl.program_id(0).to(tl.int64)
        sibling = row * tl.num_programs(1) + tl.program_id(1)
        scale = 1.0 / temperature
        x = logits + row * STRIDE
        logsumexp, _ = compute_row_statistics(x, scale, V, STRIDE, TILE)
        if uniforms is None:
            # Greedy: the lowest column of the highest logit.
            best = -float("inf")
            chosen = 0
            for start in range(0, V, TILE):
                column = start + tl.arange(0, TILE)
                value = tl.load(x + column, mask=column < STRIDE, other=0.0).to(tl.float32) * scale
                value = tl.where(column < V, value, -float("inf"))
                top = tl.max(value, 0)
                first_of_top = tl.min(tl.where(value == top, column, V - 1), 0)
                chosen = tl.where(top > best, first_of_top, chosen)
                best = tl.maximum(best, top)
        else:
            floor = 0
            threshold = tl.load(uniforms + sibling).to(tl.float32)
            if BITS > 0:
                floor, nucleus_mass = find_nucleus(
                    x, scale, logsumexp, top_p, V, STRIDE, TILE, BITS
                )
                threshold *= nucleus_mass
                if tl.program_id(1) == 0:
                    tl.store(truncated_mass + row, tl.maximum(1.0 - nucleus_mass, 0.0))

            # The tile, then the quarter of it, then the column in which the sum passes.
            tile = 0
            before = 0.0
            tile, before, _ = find_tile(
                x, tile, before, threshold, scale, logsumexp, floor, V, STRIDE, V, TILE, BITS
            )
            quarter, before, _ = find_tile(
                x,
                tile,
                before,
                threshold,
                scale,
                logsumexp,
                floor,
                V,
                STRIDE,
                TILE,
                TILE // 4,
                BITS,
            )
            column = quarter + tl.arange(0, TILE // 4)
            p = load_probabilities(x, column, scale, logsumexp, floor, V, STRIDE, BITS)
            has_passed = (p > 0) & (before + tl.cumsum(p, 0) > threshold)
            chosen = tl.min(tl.where(has_passed, column, V), 0)
            last_possible = tl.max(tl.where(p > 0, column, 0), 0)
            chosen = tl.where(chosen < V, chosen, last_possible)
        tl.store(ids + sibling, chosen)
        tl.store(logp + sibling, tl.load(x + chosen).to(tl.float32) * scale - logsumexp)

    return SimpleNamespace(sample_token_kernel=sample_token_kernel)
