"""The sampler's choice: each sibling's next id by inverse CDF in the order of the vocabulary, one
uniform per token, or the most likely id.

    id = the first i with sum_{j <= i} w_j > u sum_j w_j,   w = exp(x / T - max), or 0 outside the
    nucleus

The nucleus of top_p < 1 (Holtzman et al., arXiv 1904.09751, section 3.1): the smallest set of most
likely ids whose mass reaches top_p, and whatever ties with its least likely one. Log-probs are the
whole policy's, not renormalised over it.

`choose` is the formula in torch. `triton_choose` reads a row of logits twice and its choice's tile
once more, and writes 12 bytes: 384 rows of 151,936 in bf16 are 117 MB a visit, 0.08 ms at 3.0 TB/s
where torch's half a dozen passes over float32 take 0.5 (arithmetic, not measured). The nucleus
costs it a visit per bit of a logit, 16 or 32, and no sort. Its log-prob comes from the function and
the tiles of kernels/logprob.py's `statistics` kernel: from equal logits equal bits, in the interpreter; on
a GPU not yet compared.

Legend: B rows, K siblings that share a row, V vocabulary.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch

from recr1.kernels import logprob
from recr1.kernels.availability import require_backend
from recr1.kernels.cpu_linear import multiply, multiply_into


def sample_from_hidden(
    hidden,
    weight,
    temperature: float,
    policy,
    uniforms: torch.Tensor | None = None,
    top_p: float = 1.0,
    backend: str = "torch",
):
    """`choose` from hidden (B, C) and the head's weight (V, C) or what kernels/cpu_linear.py's `packed` made of
    it: the logits are made on the way.

    `policy(logits (B, V), temperature) -> Policy` is the definition (model/log_probs.py); backend "triton"
    chooses by `triton_choose`. Raises RuntimeError when the backend cannot run here.
    """
    require_backend(backend, hidden.device)
    hidden = hidden.to(weight.dtype)  # a float32 head on a bfloat16 trunk
    if backend == "torch":
        return sample_token(policy(multiply(hidden, weight), temperature), uniforms, top_p)
    workspace = hidden.new_empty(len(hidden), logprob._padded_row_stride(len(weight)))
    return triton_sample_token(
        multiply_into(workspace[:, : len(weight)], hidden, weight), temperature, uniforms, top_p
    )


def sample_token(
    policy, uniforms: torch.Tensor | None = None, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A Policy (model/log_probs.py) of B rows, uniforms (B, K) in [0, 1] -> ids (B, K), their log-probs (B,
    K), the mass that top_p cut off (B,).

    None is greedy, K = 1: the lowest of the most likely ids. An id of probability 0 is never
    chosen, whatever the uniform rounds to. A row that is not finite yields some id of the
    vocabulary and a log-prob that is not finite.
    """
    assert 0 < top_p <= 1, top_p
    weights = policy.weights
    cut = torch.zeros_like(policy.total[:, 0])
    if uniforms is None:
        ids = policy.scaled.argmax(-1, keepdim=True)
        return ids, policy.logp(ids), cut
    if top_p < 1:
        outside = weights < find_nucleus_floor(weights, policy.total, top_p)
        cut = weights.where(outside, 0).sum(-1) / policy.total[:, 0]
        weights = weights.masked_fill(outside, 0)
    cdf = weights.cumsum(-1)  # (B, V)
    mass = cdf[:, -1:].contiguous()
    # right=True never lands on an id of weight 0; a u that rounds to 1 would fall off the end: the
    # last possible id
    ids = torch.minimum(
        torch.searchsorted(cdf, uniforms.to(cdf.dtype) * mass, right=True),
        torch.searchsorted(cdf, mass),
    )
    ids = ids.clamp(max=weights.shape[1] - 1)  # NaN: off the end too
    return ids, policy.logp(ids), cut


def find_nucleus_floor(weights: torch.Tensor, total: torch.Tensor, top_p: float) -> torch.Tensor:
    """weights (B, V) >= 0 and their sums (B, 1) -> (B, 1), the smallest weight in the nucleus."""
    falling = weights.sort(-1, descending=True).values
    # how many ids do not reach it yet
    reached = (falling.cumsum(-1) < top_p * total).sum(-1, keepdim=True)
    return falling.gather(-1, reached.clamp(max=weights.shape[1] - 1))


def triton_sample_token(
    logits: torch.Tensor,
    temperature: float,
    uniforms: torch.Tensor | None = None,
    top_p: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`choose(policy(logits, temperature), uniforms, top_p)` by a kernel, a program to a sibling.
    logits (B, V) bf16 or float32.
    """
    require_backend("triton", logits.device)
    assert 0 < top_p <= 1, top_p
    assert logits.dtype in (torch.float32, torch.bfloat16), logits.dtype
    assert uniforms is None or (
        uniforms.is_contiguous() and uniforms.ndim == 2 and len(uniforms) == len(logits)
    ), "uniforms: (B, K), contiguous"
    (B, V), K = logits.shape, 1 if uniforms is None else uniforms.shape[1]
    ids = logits.new_empty(B, K, dtype=torch.int64)
    logp = logits.new_empty(B, K, dtype=torch.float32)
    cut = logits.new_zeros(B, dtype=torch.float32)
    logprob.check_rows(logits, cut)
    if B * K:
        bits = 0 if uniforms is None or top_p == 1 else 8 * logits.itemsize
        get_kernels().choose[B, K](
            logits,
            uniforms,
            ids,
            logp,
            cut,
            float(temperature),
            float(top_p),
            V,
            logits.stride(0),
            bits,
            **logprob.choose_tile(V),
        )
    return ids, logp, cut


@cache
def get_kernels() -> SimpleNamespace:
    """The Triton kernels, made at first use, as in kernels/logprob.py."""
    global triton, tl, row_statistics, order, likely, walk, nucleus
    import triton
    import triton.language as tl

    row_statistics = logprob.get_kernels().row_statistics

    @triton.jit
    def order(value, BITS: tl.constexpr):
        """float32 -> int32 in the same order; of bf16 (BITS = 16) the upper half is all. 0 and -0
        are one number.
        """
        bits = tl.where(value == 0.0, 0, value.to(tl.int32, bitcast=True))
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> (32 - BITS)

    @triton.jit
    def likely(x, column, scale, norm, least, V, STRIDE, BITS: tl.constexpr):
        """Probabilities of a tile of the row at x, 0 below `least` in order()."""
        value = tl.load(x + column, mask=column < STRIDE, other=0.0).to(tl.float32)
        p = tl.where(column < V, tl.exp(value * scale - norm), 0.0)
        if BITS > 0:
            p = tl.where(order(value, BITS) >= least, p, 0.0)
        return p

    @triton.jit
    def walk(
        x,
        first,
        before,
        at,
        scale,
        norm,
        least,
        V,
        STRIDE,
        WIDTH: tl.constexpr,
        TILE: tl.constexpr,
        BITS: tl.constexpr,
    ):
        """Where among the tiles of columns first .. first + WIDTH the sum, `before` so far, passes
        `at`, the sum there, and the sum at the end.

        It is the last tile of any mass before which the sum has not: so too where rounding keeps
        the whole sum below `at`.
        """
        tile = first
        running = before
        for start in range(0, WIDTH, TILE):
            mass = tl.sum(
                likely(x, first + start + tl.arange(0, TILE), scale, norm, least, V, STRIDE, BITS),
                0,
            )
            here = (running <= at) & (mass > 0)
            tile = tl.where(here, first + start, tile)
            before = tl.where(here, running, before)
            running += mass
        return tile, before, running

    @triton.jit
    def nucleus(
        x,
        scale,
        norm,
        top_p,
        V: tl.constexpr,
        STRIDE: tl.constexpr,
        TILE: tl.constexpr,
        BITS: tl.constexpr,
    ):
        """The highest logit, in order(), from which upwards the mass reaches top_p: bit by bit. And
        that mass.
        """
        step = tl.full((), 1 << (BITS - 1), tl.int64)
        least = -step
        kept = 1.0
        first = 0
        none = 0.0
        for _ in range(0, BITS):
            _, _, mass = walk(
                x,
                first,
                none,
                none,
                scale,
                norm,
                (least + step).to(tl.int32),
                V,
                STRIDE,
                V,
                TILE,
                BITS,
            )
            least = tl.where(mass >= top_p, least + step, least)
            kept = tl.where(mass >= top_p, mass, kept)
            step = step // 2
        return least.to(tl.int32), kept

    @triton.jit
    def choose(
        x,
        uniforms,
        ids,
        logp,
        cut,
        temperature,
        top_p,
        V: tl.constexpr,
        STRIDE: tl.constexpr,
        BITS: tl.constexpr,
        TILE: tl.constexpr,
    ):
        """BITS = 0: top_p is 1."""
        row = tl.program_id(0).to(tl.int64)
        place = row * tl.num_programs(1) + tl.program_id(1)
        scale = 1.0 / temperature
        x += row * STRIDE
        norm, _ = row_statistics(x, scale, V, STRIDE, TILE)
        if uniforms is None:
            best = -float("inf")
            chosen = 0
            for start in range(0, V, TILE):
                column = start + tl.arange(0, TILE)
                value = tl.load(x + column, mask=column < STRIDE, other=0.0).to(tl.float32) * scale
                value = tl.where(column < V, value, -float("inf"))
                top = tl.max(value, 0)
                chosen = tl.where(
                    top > best, tl.min(tl.where(value == top, column, V - 1), 0), chosen
                )
                best = tl.maximum(best, top)
        else:
            least = 0
            at = tl.load(uniforms + place).to(tl.float32)
            if BITS > 0:
                least, kept = nucleus(x, scale, norm, top_p, V, STRIDE, TILE, BITS)
                at *= kept
                if tl.program_id(1) == 0:
                    tl.store(cut + row, tl.maximum(1.0 - kept, 0.0))
            tile = 0
            before = 0.0
            tile, before, _ = walk(
                x, tile, before, at, scale, norm, least, V, STRIDE, V, TILE, BITS
            )
            part, before, _ = walk(
                x, tile, before, at, scale, norm, least, V, STRIDE, TILE, TILE // 4, BITS
            )
            column = part + tl.arange(0, TILE // 4)
            p = likely(x, column, scale, norm, least, V, STRIDE, BITS)
            passed = (p > 0) & (before + tl.cumsum(p, 0) > at)
            chosen = tl.min(tl.where(passed, column, V), 0)
            chosen = tl.where(chosen < V, chosen, tl.max(tl.where(p > 0, column, 0), 0))
        tl.store(ids + place, chosen)
        tl.store(logp + place, tl.load(x + chosen).to(tl.float32) * scale - norm)

    return SimpleNamespace(choose=choose)
