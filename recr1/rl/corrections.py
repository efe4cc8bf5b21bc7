"""Correct for what the sampler's policy and the trainer's are apart. Both are off by default.

Two programs compute the same policy with other rounding, and a policy may have moved since it was
sampled. Either a token's part of the objective is weighted (`loss.tis_cap`), or whole rollouts are
left out of it (`loss.off_policy_mask_threshold`). Neither has a gradient. Legend: n tokens.
"""

import torch

from recr1.config.schema import LossConfig
from recr1.data_types import MicroBatch
from recr1.rl.by_rollout import average_over_rollout, sum_over_rollout


def correct(
    logp: torch.Tensor, old_logp: torch.Tensor, batch: MicroBatch, config: LossConfig
) -> torch.Tensor | None:
    """Compute what each token's surrogate is multiplied by, (n,); None where nothing is asked for.

    logp, old_logp: (n,), without gradient.
    """
    mask = None
    if config.off_policy_mask_threshold > 0:
        mask = mask_off_policy(logp, batch, config)
    if config.tis_cap == 0:
        return mask
    weight = weigh_by_importance(old_logp, batch, config)
    return weight if mask is None else mask * weight


def weigh_by_importance(
    old_logp: torch.Tensor, batch: MicroBatch, config: LossConfig
) -> torch.Tensor:
    """Compute the importance weight of each token between sampler and trainer, (n,).

        w = e^(old_logp - sampler_logp), of the token or the product over its rollout (tis_level)
        truncate: min(max(w, floor), cap)       (TIS, Yao et al. 2025)
        mask:     w where floor <= w <= cap, else 0    (IcePop, arXiv 2510.18855: M(k); MIS)

    floor and cap are loss.tis_floor and loss.tis_cap.
    """
    log_weight = old_logp - batch.sampler_logp
    if config.tis_level == "sequence":
        log_weight = sum_over_rollout(log_weight, batch.rollout)
    weight = log_weight.exp()
    if config.tis_mode == "truncate":
        return weight.clamp(config.tis_floor, config.tis_cap)
    is_inside = (weight >= config.tis_floor) & (weight <= config.tis_cap)
    return torch.where(is_inside, weight, 0.0)


def mask_off_policy(logp: torch.Tensor, batch: MicroBatch, config: LossConfig) -> torch.Tensor:
    """Return 0 at the tokens that pull down a rollout which the policy would hardly write, else 1.

        0 where A < 0 and mean_t(sampler_logp - logp) > threshold    (DeepSeek-V3.2,
        arXiv 2512.02556, eq. 9)

    The mean is over the rollout's tokens, the threshold loss.off_policy_mask_threshold; -> (n,).
    """
    assert batch.advantages is not None
    mean_kl = average_over_rollout(batch.sampler_logp - logp, batch.rollout)  # (n,)
    is_off = (batch.advantages < 0) & (mean_kl > config.off_policy_mask_threshold)
    return (~is_off).to(logp.dtype)
