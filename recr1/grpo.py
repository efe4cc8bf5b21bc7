"""GRPO: advantages, loss, statistics. Plain tensors in, plain tensors out. Legend: R rollouts, G group, N trained tokens.

Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300), section 4.1; masks do not exist here: a Batch holds real tokens only.
"""
from __future__ import annotations

import torch

from .records import Batch


def group_advantages(rewards: torch.Tensor, group_size: int, std_floor: float) -> torch.Tensor:
    """(r - mean) / (std + std_floor) over each group of adjacent siblings, unbiased std. rewards (R,) -> (R,).

    A group of equal rewards is exactly 0, never the rounding of its mean divided by a tiny floor.
    """
    if not len(rewards):
        return rewards                                                                       # a rank without a share
    r = rewards.view(-1, group_size)                                                         # (P, G)
    centred = r - r.mean(1, keepdim=True)
    same = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)
    return torch.where(same, 0.0, centred / (r.std(1, keepdim=True) + std_floor)).flatten()


def k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """KL(policy || reference) per token, unbiased and never negative: e^d - d - 1, d = ref - new (Schulman 2020, k3)."""
    d = ref_logp - logp
    return torch.expm1(d) - d      # not exp(d) - d - 1: that is noise, even negative, for small d in float32


def policy_loss(logp: torch.Tensor, batch: Batch, total: float, clip: float, kl: float) -> tuple[torch.Tensor, dict[str, float]]:
    """-sum_t min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) / total + kl * sum_t k3 / total (eq. 3, token mean).

    logp (N,) of the trained tokens; `total`: trained tokens of the whole optimiser step, all micro-batches; batch.weight counts
    identical siblings. Returns the scalar loss and sums over tokens for the log (divide by `total`).
    """
    old = logp.detach() if batch.old_logp is None else batch.old_logp
    ratio = (logp - old).exp()                                                               # (N,)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    gain = torch.minimum(ratio * batch.adv, clipped * batch.adv)                             # (N,)
    loss = -(batch.weight * gain).sum() / total
    stats = {"clip_share": (batch.weight * (clipped * batch.adv < ratio * batch.adv)).sum().item()}
    if kl > 0:
        divergence = (batch.weight * k3(logp, batch.ref_logp)).sum()
        loss = loss + kl * divergence / total
        stats["kl"] = divergence.item()
    return loss, stats
