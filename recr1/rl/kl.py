"""Estimators of the KL divergence to the reference policy (Schulman 2020, http://joschu.net/blog/kl-approx.html)."""

import torch

from recr1.data_types import MicroBatch

# --- KL(policy || reference) per token, d = ref - logp (Schulman 2020, "Approximating KL divergence") ----------------------------


def k1(logp: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """-d: unbiased; in the loss its gradient is 0 in the mean, so it belongs into the reward."""
    return logp - ref


def k2(logp: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """d^2 / 2: biased, but its gradient is that of the KL."""
    return (ref - logp).square() / 2


def k3(logp: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """e^d - 1 - d: unbiased and never negative."""
    d = ref - logp
    # not exp(d) - 1 - d: that is noise, even negative, for small d in float32
    return torch.expm1(d) - d


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def sum_kl_by_rollout(batches: list[MicroBatch], count: int, estimator: str) -> torch.Tensor:
    """KL to the reference summed over each packed rollout's tokens, (count,): what `kl_in: reward`
    takes off the rewards. Uses the sampler's log-probs.
    """
    sums = torch.zeros(count + 1)  # the last one: idle batches' rollout -1
    for b in batches:
        sums.index_add_(
            0,
            b.rollout.cpu() % (count + 1),
            KL_ESTIMATORS[estimator](b.sampler_logp, b.ref_logp).cpu(),
        )
    return sums[:count]
