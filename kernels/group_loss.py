"""The group-advantage loss on log-probs, by Triton: rewards (P, G) to advantages, then one pass
over the N tokens for loss, statistics and d loss / d logp. In torch the same formulas stand in
recr1/rl/policy_loss.py (group_advantages, policy_loss, k3), which the tests hold this against.

    A_i = (r_i - mean) / (std + floor) | r_i - mean | r_i - mean of the others;  exactly 0 where a
    group's rewards are equal gain = min(rho A, clip(rho, 1 - low, 1 + high) A),  rho = exp(logp -
    old)          CISPO: sg(clip(rho, ..)) A logp loss = (-sum w min(exp(old - sampler), cap) gain +
    kl sum w (e^d - d - 1)) / total,  d = ref - logp

Denominators are the caller's: `total` is a token count or a constant, a mean over sequences goes
into the weights. Lengths are run-time values. DeepSeekMath (arXiv 2402.03300) eq. 3, DAPO
(2503.14476), Dr.GRPO (2503.20783), RLOO (2402.14740), CISPO (2506.13585).

A token takes 28 bytes read and 4 written: 65,536 tokens are 2.1 MB, 0.7 us at 3.0 TB/s, less than a
launch (arithmetic, not measured). Joined with the head (`on_logits_`, through logprob.fused_linear_loss)
the loss stands between two visits of a row of logits in one program. If the second visit finds the
row in the L2 cache, 4 bytes a logit move instead of 6, and kernels/logprob.py's count becomes 474 / 507
TF/s; two programs of 32 registers and 1,024 threads share a multiprocessor, 264 rows of 304 KB are
80 MB and H100's L2 holds 50, so expect a part of that.

Legend: P groups, G siblings, N tokens, n rows of a chunk, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace

import torch

from recr1.kernels import logprob
from recr1.kernels.availability import require_backend

ADVANTAGES = ("std", "mean", "leave_one_out")

STATISTICS = ("loss", "clipped", "kl", "weight", "gap", "square")


@dataclass(frozen=True)
class LossRule:
    """The constants of one loss of the family."""

    advantage: str = "std"  # std | mean | leave_one_out
    std_floor: float = 1e-4
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.0
    cispo: bool = False  # the clipped ratio is a constant weight on logp
    sampler_cap: float = 0.0  # truncated importance sampling against the sampler; 0: off


@dataclass
class GroupTokenLoss:
    """The loss as a Pull of logprob.fused_linear_loss, and with `on_logits_` joined to the head: rewards
    and hidden states in, gradients out.

    rewards (P, G), or None where `adv` (P * G,) is given; of each token: rollout (N,) = p * G + g,
    or -1 for none, weight (N,), sampler (N,), and old and ref (N,) or None.
    `sums` gathers, over tokens and weighted: loss, clipped tokens, k3, the weight itself, |logp -
    sampler|, (d loss / d logp)^2.
    """

    rule: LossRule
    rewards: torch.Tensor | None
    rollout: torch.Tensor
    weight: torch.Tensor
    sampler: torch.Tensor
    total: float
    old: torch.Tensor | None = None
    ref: torch.Tensor | None = None
    adv: torch.Tensor | None = None
    sums: torch.Tensor = field(init=False)

    def __post_init__(self):
        N = len(self.rollout)
        require_backend("triton", self.rollout.device)
        for name in ("weight", "sampler", "old", "ref"):
            x = getattr(self, name)
            assert x is None or (
                x.shape == (N,) and x.dtype == torch.float32 and x.is_contiguous()
            ), f"{name}: wants float32 ({N},), contiguous"
        assert self.rollout.is_contiguous()
        assert self.rule.kl == 0 or self.ref is not None, "kl needs the reference's log-probs"
        if self.adv is None:
            assert self.rewards.ndim == 2 and self.rewards.dtype == torch.float32
            self.adv = compute_advantages(self.rewards, self.rule)
        self.sums = self.adv.new_zeros(len(STATISTICS))

    def __call__(
        self, logp: torch.Tensor, entropy: torch.Tensor, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """logp (n,) of the rows -> their part of the loss, d loss / d logp (n,); the entropy has no
        part in it.
        """
        n = len(logp)
        tile = 1024
        assert logp.dtype == torch.float32 and logp.is_contiguous()
        pull = torch.empty_like(logp)
        sums = logp.new_empty(-(-n // tile), len(STATISTICS))
        if n:
            get_kernels().tokens[len(sums),](
                logp,
                *self._of_tokens(rows),
                self.adv,
                pull,
                sums,
                n,
                *self._constants(),
                TILE=tile,
                num_warps=4,
            )
        return self._add(sums), pull, None

    def on_logits_(
        self, logits, target, temperature: float, rows: slice, logp, entropy
    ) -> torch.Tensor:
        """logits (n, V) of the rows -> d loss / d logits in place, logp and entropy (n,) filled;
        returns their part of the loss.
        """
        n, V = logits.shape
        logprob.check_rows(logits, target, logp, entropy)
        sums = logp.new_empty(n, len(STATISTICS))
        # many warps, few rows at once: the second visit of a row looks for it in the L2 cache
        get_kernels().joined[n,](
            logits,
            target,
            *self._of_tokens(rows),
            self.adv,
            logp,
            entropy,
            sums,
            float(temperature),
            *self._constants(),
            V,
            logits.stride(0),
            logprob.choose_tile(V)["TILE"],
            num_warps=min(32, logprob.choose_tile(V)["TILE"] // 32),
        )
        return self._add(sums)

    def statistics(self) -> dict[str, float]:
        """The sums so far, by name."""
        return dict(zip(STATISTICS, self.sums.tolist()))

    def logged(self) -> dict[str, float]:
        """Those of them that policy_loss.compute_token_loss gives too, by its names."""
        found = self.statistics()
        return dict(
            clip_share=0.0 if self.rule.cispo else found["clipped"], dlogp_square=found["square"]
        ) | (dict(kl=found["kl"]) if self.ref is not None else {})

    def _of_tokens(self, rows: slice):
        return (
            x if x is None else x[rows]
            for x in (self.old, self.ref, self.sampler, self.rollout, self.weight)
        )

    def _constants(self):
        r = self.rule
        return (
            1 / self.total,
            float(1 - r.clip_low),
            float(1 + r.clip_high),
            float(r.kl),
            float(r.sampler_cap),
            r.cispo,
            r.sampler_cap > 0,
        )

    def _add(self, sums: torch.Tensor) -> torch.Tensor:
        sums = sums.sum(0)
        self.sums += sums
        return sums[0]


def compute_group_loss(logp: torch.Tensor, pull: GroupTokenLoss) -> torch.Tensor:
    """logp (N,) with gradient -> the scalar loss, for head: recompute."""
    at = logp.detach()
    return WithGradients.apply(logp, at, *pull(at, at, slice(0, len(at))))


class WithGradients(torch.autograd.Function):
    """A loss whose derivatives at logp and entropy, (N,) each or None, are known."""

    @staticmethod
    def forward(ctx, logp, entropy, loss, d_logp, d_entropy):
        ctx.save_for_backward(d_logp, d_entropy)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return *(d if d is None else d * grad for d in ctx.saved_tensors), None, None, None


def compute_advantages(rewards: torch.Tensor, rule: LossRule) -> torch.Tensor:
    """rewards (P, G) -> advantages (P * G,): advantages.compute_group_advantages, a program to a group."""
    P, G = rewards.shape
    adv = rewards.new_empty(P * G)
    if P:
        get_kernels().advantage[P,](
            rewards.contiguous(),
            adv,
            rule.std_floor,
            G,
            max(G - 1, 1),
            1 << (G - 1).bit_length(),
            ADVANTAGES.index(rule.advantage),
        )
    return adv


@cache
def get_kernels() -> SimpleNamespace:
    """The Triton kernels, made at first use, as in kernels/logprob.py."""
    global triton, tl, row_statistics, d_logits, token_loss, token_tile
    import triton
    import triton.language as tl

    row_statistics = logprob.get_kernels().row_statistics
    d_logits = logprob.get_kernels().d_logits

    @triton.jit
    def advantage(
        rewards,
        adv,
        floor,
        G: tl.constexpr,
        OTHERS: tl.constexpr,
        TILE: tl.constexpr,
        KIND: tl.constexpr,
    ):
        """OTHERS = max(G - 1, 1); KIND counts ADVANTAGES."""
        i = tl.arange(0, TILE)
        at = tl.program_id(0) * G + i
        r = tl.load(rewards + at, mask=i < G, other=0.0)
        centred = tl.where(i < G, r - tl.sum(r, 0) / G, 0.0)
        if KIND == 0:
            a = centred / (tl.sqrt(tl.sum(centred * centred, 0) / OTHERS) + floor)
        elif KIND == 1:
            a = centred
        else:
            a = centred * (G / OTHERS)  # r - (sum - r) / (G - 1)
        same = tl.max(tl.where(i < G, r, -float("inf")), 0) == tl.min(
            tl.where(i < G, r, float("inf")), 0
        )
        tl.store(adv + at, tl.where(same, 0.0, a), mask=i < G)

    @triton.jit
    def token_loss(
        logp,
        old,
        ref,
        sampler,
        weight,
        adv,
        inverse,
        low,
        high,
        kl,
        cap,
        CISPO: tl.constexpr,
        CAPPED: tl.constexpr,
    ):
        """Of one token or a tile: loss, d loss / d logp, clipped, k3, gap. A token of weight 0 adds
        nothing, whatever else it holds.
        """
        if old is None:
            ratio = logp * 0.0 + 1.0
        else:
            ratio = tl.exp(logp - old)
        bounded = tl.minimum(tl.maximum(ratio, low), high)
        if CISPO:
            outside = (weight != 0) & (ratio != bounded)
            pull = bounded * adv
            gain = pull * logp
        else:
            outside = (weight != 0) & (bounded * adv < ratio * adv)
            gain = tl.minimum(ratio * adv, bounded * adv)
            pull = tl.where(outside, 0.0, ratio * adv)
        if CAPPED:
            if old is None:
                correction = tl.minimum(tl.exp(logp - sampler), cap)
            else:
                correction = tl.minimum(tl.exp(old - sampler), cap)
            gain *= correction
            pull *= correction
        live = weight * adv != 0
        loss = tl.where(live, -gain, 0.0)
        pull = tl.where(live, -pull, 0.0)
        k3 = logp * 0.0
        if ref is not None:
            d = ref - logp
            # e^d - 1 loses its digits for small d: there the series, whose next term is 1e-8 of it
            series = (
                d
                * d
                * (0.5 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d / 5040)))))
            )
            small = tl.abs(d) < 0.25
            expm1 = tl.where(small, series + d, tl.exp(d) - 1.0)
            k3 = tl.where(weight != 0, tl.where(small, series, expm1 - d), 0.0)
            loss += kl * k3
            pull -= tl.where(weight != 0, kl * expm1, 0.0)
        weight_in_loss = weight * inverse
        gap = tl.where(weight != 0, weight * tl.abs(logp - sampler), 0.0)
        return (
            weight_in_loss * loss,
            weight_in_loss * pull,
            tl.where(outside, weight, 0.0),
            weight * k3,
            gap,
        )

    @triton.jit
    def token_tile(
        i,
        mask,
        program,
        logp,
        old,
        ref,
        sampler,
        rollout,
        weight,
        adv,
        pull,
        sums,
        inverse,
        low,
        high,
        kl,
        cap,
        CISPO: tl.constexpr,
        CAPPED: tl.constexpr,
    ):
        x = tl.load(logp + i, mask)
        s = tl.load(sampler + i, mask)
        w = tl.load(weight + i, mask)
        r = tl.load(rollout + i, mask)
        if mask is not None:
            w = tl.where(mask, w, 0.0)
            r = tl.where(mask, r, -1)
        a = tl.load(adv + r, mask=r >= 0, other=0.0)
        o = old if old is None else tl.load(old + i, mask)
        f = ref if ref is None else tl.load(ref + i, mask)
        loss, d, outside, k3, gap = token_loss(
            x, o, f, s, w, a, inverse, low, high, kl, cap, CISPO, CAPPED
        )
        tl.store(pull + i, d, mask)
        sums += program * 6
        tl.store(sums, tl.sum(loss, 0))
        tl.store(sums + 1, tl.sum(outside, 0))
        tl.store(sums + 2, tl.sum(k3, 0))
        tl.store(sums + 3, tl.sum(w, 0))
        tl.store(sums + 4, tl.sum(gap, 0))
        tl.store(sums + 5, tl.sum(d * d, 0))

    @triton.jit(do_not_specialize=["N"])
    def tokens(
        logp,
        old,
        ref,
        sampler,
        rollout,
        weight,
        adv,
        pull,
        sums,
        N,
        inverse,
        low,
        high,
        kl,
        cap,
        CISPO: tl.constexpr,
        CAPPED: tl.constexpr,
        TILE: tl.constexpr,
    ):
        program = tl.program_id(0)
        i = program * TILE + tl.arange(0, TILE)
        # whole tiles load 16 bytes at a time, which a mask of any N forbids
        if program * TILE + TILE <= N:
            token_tile(
                i,
                None,
                program,
                logp,
                old,
                ref,
                sampler,
                rollout,
                weight,
                adv,
                pull,
                sums,
                inverse,
                low,
                high,
                kl,
                cap,
                CISPO,
                CAPPED,
            )
        else:
            token_tile(
                i,
                i < N,
                program,
                logp,
                old,
                ref,
                sampler,
                rollout,
                weight,
                adv,
                pull,
                sums,
                inverse,
                low,
                high,
                kl,
                cap,
                CISPO,
                CAPPED,
            )

    @triton.jit
    def joined(
        x,
        target,
        old,
        ref,
        sampler,
        rollout,
        weight,
        adv,
        logp,
        entropy,
        sums,
        temperature,
        inverse,
        low,
        high,
        kl,
        cap,
        CISPO: tl.constexpr,
        CAPPED: tl.constexpr,
        V: tl.constexpr,
        STRIDE: tl.constexpr,
        TILE: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        scale = 1.0 / temperature
        x += row * STRIDE
        norm, spread = row_statistics(x, scale, V, STRIDE, TILE)
        t = tl.load(target + row)
        chosen = tl.load(x + t).to(tl.float32) * scale - norm
        r = tl.load(rollout + row)
        w = tl.load(weight + row)
        s = tl.load(sampler + row)
        a = tl.load(adv + r, mask=r >= 0, other=0.0)
        o = old if old is None else tl.load(old + row)
        f = ref if ref is None else tl.load(ref + row)
        loss, d, outside, k3, gap = token_loss(
            chosen, o, f, s, w, a, inverse, low, high, kl, cap, CISPO, CAPPED
        )
        tl.store(logp + row, chosen)
        tl.store(entropy + row, spread)
        sums += row * 6
        tl.store(sums, loss)
        tl.store(sums + 1, outside)
        tl.store(sums + 2, k3)
        tl.store(sums + 3, w)
        tl.store(sums + 4, gap)
        tl.store(sums + 5, d * d)
        # the target's logit is read by every thread before any of them overwrites it
        tl.debug_barrier()
        for start in range(0, V, TILE):
            d_logits(x, start + tl.arange(0, TILE), t, norm, d, None, None, scale, STRIDE)

    return SimpleNamespace(advantage=advantage, tokens=tokens, joined=joined)
