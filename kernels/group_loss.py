"""The group-advantage loss on log-probs, by Triton.

Rewards (P, G) become advantages; then one pass over the N tokens makes loss, statistics and
d loss / d logp. The same formulas in torch are in recr1/rl (advantages.py, losses.py, kl.py,
policy_loss.py), which the tests compare this with.

    A_i        (r_i - mean) / (std + floor) | r_i - mean | r_i - mean of the others;
               exactly 0 where a group's rewards are equal
    ratio      exp(logp - old_logp)
    surrogate  min(ratio A, clip(ratio, 1 - low, 1 + high) A)
               CISPO: stop_gradient(clip(ratio, ..)) A logp
    loss       (-sum w min(exp(old_logp - sampler_logp), cap) surrogate + kl sum w (e^d - d - 1))
               / denominator,  d = ref_logp - logp

The caller gives the denominator, a token count or a constant; a mean over sequences goes into the
weights. Lengths are run-time values. DeepSeekMath (arXiv 2402.03300) eq. 3, DAPO (2503.14476),
Dr. GRPO (2503.20783), RLOO (2402.14740), CISPO (2506.13585).

A token takes 28 bytes read and 4 written: 65,536 tokens are 2.1 MB, 0.7 us at 3.0 TB/s, less than a
launch (arithmetic, not measured). Joined with the head (`on_logits_`, through
logprob.fused_linear_loss) the loss is computed between two visits of a row of logits, in one
program. If the second visit finds the row in the L2 cache, 4 bytes a logit move instead of 6, and
the count of kernels/logprob.py becomes 474 / 507 TF/s. Two programs of 32 registers and 1,024
threads share a multiprocessor, 264 rows of 304 KB are 80 MB and H100's L2 holds 50, so expect a
part of that.

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

# The sums that a kernel stores for each program, in this order.
STATISTICS = ("loss", "clipped", "kl", "weight", "gap", "square")

TOKEN_TILE = 1024  # tokens of a program of the token kernel


@dataclass(frozen=True)
class LossRule:
    """The constants of one loss of the family."""

    advantage: str = "std"  # std | mean | leave_one_out
    advantage_eps: float = 1e-4
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    kl_coef: float = 0.0
    cispo: bool = False  # the clipped ratio is a constant weight on logp
    sampler_cap: float = 0.0  # truncated importance sampling against the sampler; 0: off


@dataclass
class GroupTokenLoss:
    """The loss as a TokenLoss of logprob.fused_linear_loss.

    With `on_logits_` it is joined to the head: rewards and hidden states in, gradients out. It has
    the interface of policy_loss.TorchTokenLoss: `__call__` and `stats`.

    `sums` adds up, over tokens and weighted: loss, clipped tokens, k3, the weight itself,
    |logp - sampler_logp|, and, not weighted, (d loss / d logp)^2.
    """

    rule: LossRule
    rewards: torch.Tensor | None  # (P, G); None: `advantages` are given
    rollout: torch.Tensor  # (N,) = p * G + g of each token; -1: none
    weight: torch.Tensor  # (N,)
    sampler_logp: torch.Tensor  # (N,)
    denominator: float
    old_logp: torch.Tensor | None = None  # (N,); None: logp itself
    ref_logp: torch.Tensor | None = None  # (N,)
    advantages: torch.Tensor | None = None  # (P * G,)
    sums: torch.Tensor = field(init=False)  # (len(STATISTICS),)

    def __post_init__(self) -> None:
        require_backend("triton", self.rollout.device)
        self._check_token_tensors()
        if self.advantages is None:
            assert self.rewards is not None
            assert self.rewards.ndim == 2 and self.rewards.dtype == torch.float32
            self.advantages = compute_advantages(self.rewards, self.rule)
        self.sums = self.advantages.new_zeros(len(STATISTICS))

    def __call__(
        self, logp: torch.Tensor, entropy: torch.Tensor, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Return the loss of the rows, d loss / d logp (n,), and None: the entropy has no part."""
        n = len(logp)
        assert logp.dtype == torch.float32 and logp.is_contiguous()
        grad_logp = torch.empty_like(logp)
        num_programs = -(-n // TOKEN_TILE)
        sums = logp.new_empty(num_programs, len(STATISTICS))
        if n:
            get_kernels().token_kernel[num_programs,](
                logp,
                *self._select_tokens(rows),
                self.advantages,
                grad_logp,
                sums,
                n,
                *self._constants(),
                TILE=TOKEN_TILE,
                num_warps=4,
            )
        return self._add_sums(sums), grad_logp, None

    def on_logits_(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        temperature: float,
        rows: slice,
        logp: torch.Tensor,
        entropy: torch.Tensor,
    ) -> torch.Tensor:
        """Overwrite logits (n, V) of the rows with d loss / d logits; fill logp and entropy (n,).

        Returns the loss of the rows.
        """
        n, V = logits.shape
        logprob.check_rows(logits, target, logp, entropy)
        sums = logp.new_empty(n, len(STATISTICS))
        tile = logprob.choose_tile(V)["TILE"]
        get_kernels().joined_kernel[n,](
            logits,
            target,
            *self._select_tokens(rows),
            self.advantages,
            logp,
            entropy,
            sums,
            float(temperature),
            *self._constants(),
            V,
            logits.stride(0),
            tile,
            # many warps, few rows at once: the second visit of a row looks for it in the L2 cache
            num_warps=min(32, tile // 32),
        )
        return self._add_sums(sums)

    def stats(self) -> dict[str, torch.Tensor]:
        """Return the sums so far that TorchTokenLoss has too, by the names that are logged."""
        sums = dict(zip(STATISTICS, self.sums))
        clipped = sums["clipped"]
        stats = {
            "clip_ratio": torch.zeros_like(clipped) if self.rule.cispo else clipped,
            "grad_logp_square": sums["square"],
        }
        if self.ref_logp is not None:
            stats["kl"] = sums["kl"]
        return stats

    def _check_token_tensors(self) -> None:
        """Assert that the tensors (N,) are laid out as the kernels read them."""
        N = len(self.rollout)
        for name in ("weight", "sampler_logp", "old_logp", "ref_logp"):
            x = getattr(self, name)
            if x is None:
                continue
            is_dense = x.shape == (N,) and x.dtype == torch.float32 and x.is_contiguous()
            assert is_dense, f"{name}: wants float32 ({N},), contiguous"
        assert self.rollout.is_contiguous()
        assert self.rule.kl_coef == 0 or self.ref_logp is not None, (
            "kl needs the reference's log-probs"
        )

    def _select_tokens(self, rows: slice) -> list[torch.Tensor | None]:
        """Cut the tensors (N,) to the rows, in the order of the kernels' parameters."""
        selected: list[torch.Tensor | None] = []
        for x in (self.old_logp, self.ref_logp, self.sampler_logp, self.rollout, self.weight):
            selected.append(None if x is None else x[rows])
        return selected

    def _constants(self) -> tuple[float | bool, ...]:
        """Return the loss's constants in the order of the kernels' parameters."""
        rule = self.rule
        return (
            1 / self.denominator,
            float(1 - rule.clip_ratio_low),
            float(1 + rule.clip_ratio_high),
            float(rule.kl_coef),
            float(rule.sampler_cap),
            rule.cispo,
            rule.sampler_cap > 0,
        )

    def _add_sums(self, sums: torch.Tensor) -> torch.Tensor:
        """Add the programs' sums (programs, len(STATISTICS)) to all so far. Returns their loss."""
        total = sums.sum(0)
        self.sums += total
        return total[0]


def compute_group_loss(logp: torch.Tensor, token_loss: GroupTokenLoss) -> torch.Tensor:
    """Compute the scalar loss of logp (N,) with gradient, for head: recompute."""
    values = logp.detach()
    loss, grad_logp, grad_entropy = token_loss(values, values, slice(0, len(values)))
    return WithGradients.apply(logp, values, loss, grad_logp, grad_entropy)


class WithGradients(torch.autograd.Function):
    """A loss whose derivatives at logp and entropy, (N,) each or None, are known."""

    @staticmethod
    def forward(ctx, logp, entropy, loss, grad_logp, grad_entropy):
        ctx.save_for_backward(grad_logp, grad_entropy)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        grad_logp, grad_entropy = ctx.saved_tensors
        grad_logp = None if grad_logp is None else grad_logp * grad
        grad_entropy = None if grad_entropy is None else grad_entropy * grad
        return grad_logp, grad_entropy, None, None, None


def compute_advantages(rewards: torch.Tensor, rule: LossRule) -> torch.Tensor:
    """Turn rewards (P, G) into advantages (P * G,), a program to a group.

    As advantages.compute_group_advantages in recr1/rl.
    """
    P, G = rewards.shape
    advantages = rewards.new_empty(P * G)
    if P == 0:
        return advantages
    get_kernels().advantage_kernel[P,](
        rewards.contiguous(),
        advantages,
        rule.advantage_eps,
        G,
        max(G - 1, 1),
        1 << (G - 1).bit_length(),
        ADVANTAGES.index(rule.advantage),
    )
    return advantages


@cache
def get_kernels() -> SimpleNamespace:
    """Make the Triton kernels at first use, as in kernels/logprob.py."""
    # Triton finds `tl` and the helper functions among the globals of the module.
    global triton, tl, compute_row_statistics, write_logits_gradient
    global compute_token_loss, process_token_tile
    import triton
    import triton.language as tl

    compute_row_statistics = logprob.get_kernels().compute_row_statistics
    write_logits_gradient = logprob.get_kernels().write_logits_gradient

    @triton.jit
    def advantage_kernel(
        rewards,
        advantages,
        floor,
        G: tl.constexpr,
        OTHERS: tl.constexpr,
        TILE: tl.constexpr,
        KIND: tl.constexpr,
    ):
        """Store the advantages of one group. OTHERS = max(G - 1, 1); KIND indexes ADVANTAGES."""
        sibling = tl.arange(0, TILE)
        rollout = tl.program_id(0) * G + sibling
        r = tl.load(rewards + rollout, mask=sibling < G, other=0.0)
        centered = tl.where(sibling < G, r - tl.sum(r, 0) / G, 0.0)
        if KIND == 0:
            a = centered / (tl.sqrt(tl.sum(centered * centered, 0) / OTHERS) + floor)
        elif KIND == 1:
            a = centered
        else:
            a = centered * (G / OTHERS)  # r - (sum - r) / (G - 1)
        highest = tl.max(tl.where(sibling < G, r, -float("inf")), 0)
        lowest = tl.min(tl.where(sibling < G, r, float("inf")), 0)
        tl.store(advantages + rollout, tl.where(highest == lowest, 0.0, a), mask=sibling < G)

    @triton.jit
    def compute_token_loss(
        logp,
        old_logp,
        ref_logp,
        sampler_logp,
        weight,
        advantage,
        inverse,
        low,
        high,
        kl,
        cap,
        CISPO: tl.constexpr,
        CAPPED: tl.constexpr,
    ):
        """Return loss, d loss / d logp, clipped, k3 and gap of one token or of a tile.

        A token of weight 0 adds nothing, whatever else it holds. inverse = 1 / denominator.
        """
        if old_logp is None:
            ratio = logp * 0.0 + 1.0
        else:
            ratio = tl.exp(logp - old_logp)
        clipped_ratio = tl.minimum(tl.maximum(ratio, low), high)
        if CISPO:
            is_clipped = (weight != 0) & (ratio != clipped_ratio)
            slope = clipped_ratio * advantage
            surrogate = slope * logp
        else:
            is_clipped = (weight != 0) & (clipped_ratio * advantage < ratio * advantage)
            surrogate = tl.minimum(ratio * advantage, clipped_ratio * advantage)
            slope = tl.where(is_clipped, 0.0, ratio * advantage)

        # Truncated importance sampling.
        if CAPPED:
            if old_logp is None:
                importance = tl.minimum(tl.exp(logp - sampler_logp), cap)
            else:
                importance = tl.minimum(tl.exp(old_logp - sampler_logp), cap)
            surrogate *= importance
            slope *= importance
        has_advantage = weight * advantage != 0
        loss = tl.where(has_advantage, -surrogate, 0.0)
        grad_logp = tl.where(has_advantage, -slope, 0.0)

        k3 = logp * 0.0
        if ref_logp is not None:
            d = ref_logp - logp
            # e^d - 1 loses its digits for small d: there the series, whose next term is 1e-8 of it
            series = (
                d
                * d
                * (0.5 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d / 5040)))))
            )
            is_small = tl.abs(d) < 0.25
            expm1 = tl.where(is_small, series + d, tl.exp(d) - 1.0)
            k3 = tl.where(weight != 0, tl.where(is_small, series, expm1 - d), 0.0)
            loss += kl * k3
            grad_logp -= tl.where(weight != 0, kl * expm1, 0.0)

        loss_weight = weight * inverse
        gap = tl.where(weight != 0, weight * tl.abs(logp - sampler_logp), 0.0)
        return (
            loss_weight * loss,
            loss_weight * grad_logp,
            tl.where(is_clipped, weight, 0.0),
            weight * k3,
            gap,
        )

    @triton.jit
    def process_token_tile(
        token,
        mask,
        program,
        logp,
        old_logp,
        ref_logp,
        sampler_logp,
        rollout,
        weight,
        advantages,
        grad_logp,
        sums,
        inverse,
        low,
        high,
        kl,
        cap,
        CISPO: tl.constexpr,
        CAPPED: tl.constexpr,
    ):
        """Store d loss / d logp of a tile of tokens and the tile's sums."""
        x = tl.load(logp + token, mask)
        s = tl.load(sampler_logp + token, mask)
        w = tl.load(weight + token, mask)
        r = tl.load(rollout + token, mask)
        if mask is not None:
            w = tl.where(mask, w, 0.0)
            r = tl.where(mask, r, -1)
        a = tl.load(advantages + r, mask=r >= 0, other=0.0)
        o = old_logp if old_logp is None else tl.load(old_logp + token, mask)
        f = ref_logp if ref_logp is None else tl.load(ref_logp + token, mask)
        loss, d, clipped, k3, gap = compute_token_loss(
            x, o, f, s, w, a, inverse, low, high, kl, cap, CISPO, CAPPED
        )
        tl.store(grad_logp + token, d, mask)

        # in the order of STATISTICS
        sums += program * 6
        tl.store(sums, tl.sum(loss, 0))
        tl.store(sums + 1, tl.sum(clipped, 0))
        tl.store(sums + 2, tl.sum(k3, 0))
        tl.store(sums + 3, tl.sum(w, 0))
        tl.store(sums + 4, tl.sum(gap, 0))
        tl.store(sums + 5, tl.sum(d * d, 0))

    @triton.jit(do_not_specialize=["N"])
    def token_kernel(
        logp,
        old_logp,
        ref_logp,
        sampler_logp,
        rollout,
        weight,
        advantages,
        grad_logp,
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
        """Store d loss / d logp of N tokens, and the sums of each tile."""
        program = tl.program_id(0)
        token = program * TILE + tl.arange(0, TILE)
        # full tiles load 16 bytes at a time, which a mask of any N forbids
        if program * TILE + TILE <= N:
            process_token_tile(
                token,
                None,
                program,
                logp,
                old_logp,
                ref_logp,
                sampler_logp,
                rollout,
                weight,
                advantages,
                grad_logp,
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
            process_token_tile(
                token,
                token < N,
                program,
                logp,
                old_logp,
                ref_logp,
                sampler_logp,
                rollout,
                weight,
                advantages,
                grad_logp,
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
    def joined_kernel(
        logits,
        target,
        old_logp,
        ref_logp,
        sampler_logp,
        rollout,
        weight,
        advantages,
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
        """Overwrite one row of logits with its gradient; store its logp, entropy and sums."""
        # First visit of the row: log-prob and entropy.
        row = tl.program_id(0).to(tl.int64)
        scale = 1.0 / temperature
        x = logits + row * STRIDE
        logsumexp, row_entropy = compute_row_statistics(x, scale, V, STRIDE, TILE)
        target_id = tl.load(target + row)
        row_logp = tl.load(x + target_id).to(tl.float32) * scale - logsumexp

        # The loss of the row's token.
        r = tl.load(rollout + row)
        w = tl.load(weight + row)
        s = tl.load(sampler_logp + row)
        a = tl.load(advantages + r, mask=r >= 0, other=0.0)
        o = old_logp if old_logp is None else tl.load(old_logp + row)
        f = ref_logp if ref_logp is None else tl.load(ref_logp + row)
        loss, d, clipped, k3, gap = compute_token_loss(
            row_logp, o, f, s, w, a, inverse, low, high, kl, cap, CISPO, CAPPED
        )
        tl.store(logp + row, row_logp)
        tl.store(entropy + row, row_entropy)

        # in the order of STATISTICS
        sums += row * 6
        tl.store(sums, loss)
        tl.store(sums + 1, clipped)
        tl.store(sums + 2, k3)
        tl.store(sums + 3, w)
        tl.store(sums + 4, gap)
        tl.store(sums + 5, d * d)

        # Second visit: the gradient. The target's logit is read by every thread before any of them
        # overwrites it.
        tl.debug_barrier()
        for start in range(0, V, TILE):
            column = start + tl.arange(0, TILE)
            write_logits_gradient(x, column, target_id, logsumexp, d, None, None, scale, STRIDE)

    return SimpleNamespace(
        advantage_kernel=advantage_kernel,
        token_kernel=token_kernel,
        joined_kernel=joined_kernel,
    )
