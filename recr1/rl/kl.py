"""Estimate the KL divergence to the reference policy, token by token.

Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html. There and here
d = ref_logp - logp. Legend: n tokens.
"""

import torch

from recr1.data_types import MicroBatch

# --- estimators of KL(policy || reference): log-probs (n,) -> (n,) --------------------------------


def k1(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """Estimate by -d: unbiased.

    In the loss its gradient has the mean 0, so it belongs in the reward.
    """
    return logp - ref_logp


def k2(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """Estimate by d^2 / 2: biased, but its gradient is that of the KL."""
    return (ref_logp - logp).square() / 2


def k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """Estimate by e^d - 1 - d: unbiased and never negative."""
    d = ref_logp - logp
    # not exp(d) - 1 - d: that is noise, even negative, for small d in float32
    return torch.expm1(d) - d


def k3_unbiased(logp: torch.Tensor, ref_logp: torch.Tensor, old_logp: torch.Tensor) -> torch.Tensor:
    """Estimate by ratio k3, ratio = e^(logp - old_logp) with its gradient (DeepSeek-V3.2).

    The tokens are old_logp's policy's: weighted so, the estimate and its gradient, ratio (logp -
    ref_logp), are unbiased for the policy that is trained (arXiv 2512.02556).
    """
    return (logp - old_logp).exp() * k3(logp, ref_logp)


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def estimate_kl(
    estimator: str, logp: torch.Tensor, ref_logp: torch.Tensor, old_logp: torch.Tensor
) -> torch.Tensor:
    """Estimate by the one that `loss.kl_estimator` names: log-probs (n,) -> (n,)."""
    if estimator == "k3_unbiased":
        return k3_unbiased(logp, ref_logp, old_logp)
    return KL_ESTIMATORS[estimator](logp, ref_logp)


def sum_kl_by_rollout(batches: list[MicroBatch], num_rollouts: int, estimator: str) -> torch.Tensor:
    """Sum the KL to the reference over each packed rollout's tokens. Returns (num_rollouts,).

    This is what `kl_in: reward` subtracts from the rewards. It uses the sampler's log-probs.
    """
    # The last element collects the tokens of idle batches, whose rollout is -1.
    num_sums = num_rollouts + 1
    sums = torch.zeros(num_sums)
    for batch in batches:
        assert batch.ref_logp is not None
        kl = KL_ESTIMATORS[estimator](batch.sampler_logp, batch.ref_logp)  # (n,)
        rollout = batch.rollout.cpu() % num_sums
        sums.index_add_(0, rollout, kl.cpu())
    return sums[:num_rollouts]
