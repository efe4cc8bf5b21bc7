"""Turn the rewards of a group of siblings into advantages.

Legend: P groups, G siblings, R = P*G rollouts, K parts of a reward.
"""

from collections.abc import Mapping
from math import comb
from typing import Callable, NamedTuple

import torch

from recr1.config.schema import ConfigError, LossConfig
from recr1.data_types import Reward
from recr1.distributed import collectives as dist

# --- advantages: rewards (P, G) -> (P, G) ---------------------------------------------------------


def normalize_by_std(rewards: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """Compute (r - mean) / (std + advantage_eps), with the unbiased std.

    GRPO: DeepSeekMath, arXiv 2402.03300, section 4.1.2.
    """
    std = rewards.std(1, keepdim=True)
    return subtract_mean(rewards, config) / (std + config.advantage_eps)


def subtract_mean(rewards: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """Compute r - mean: no group counts for more because its rewards are close together.

    Dr. GRPO, arXiv 2503.20783, section 3.2.
    """
    return rewards - rewards.mean(1, keepdim=True)


def subtract_leave_one_out_mean(rewards: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """Compute r - the mean of its siblings, an unbiased baseline.

    RLOO: arXiv 2402.14740, section 2.2.
    """
    group_size = rewards.shape[1]
    return subtract_mean(rewards, config) * group_size / (group_size - 1)


def divide_by_mean(rewards: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """Compute (r - mean) / mean: a group that seldom succeeds counts for more.

    MaxRL, arXiv 2602.02710: the gradient of log(success rate) in place of the rate's. A group whose
    mean is 0 has no success and gets 0, and so does one below 0, of which there is no logarithm.
    """
    mean = rewards.mean(1, keepdim=True)
    return torch.where(mean > 0, subtract_mean(rewards, config) / mean, 0.0)


def reward_best_of_k(rewards: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """Compute by how much a sibling raises the best of k of its group, on average.

        mean over subsets I of k siblings of  max(I) - max(I without i),  0 where i is not in I

    Pass@k training: PKPO, arXiv 2505.15201, with the leave-one-out baseline of k - 1.
    With k = G (loss.pass_k of 0) only the best one has an advantage, its lead on the second
    (arXiv 2503.19595). Sibling i counts against j where j is the second best: the k - 2 others of
    the subset are then below j.
    """
    group_size = rewards.shape[1]
    k = config.pass_k or group_size
    ordered, order = rewards.sort(1)  # (P, G), the lowest first
    lead = (ordered[:, :, None] - ordered[:, None, :]).clamp(min=0)  # (P, G, G) of i on j
    shares = [comb(num_below, k - 2) / comb(group_size, k) for num_below in range(group_size)]
    advantages = lead @ rewards.new_tensor(shares)  # (P, G), in the order of `ordered`
    return torch.zeros_like(rewards).scatter(1, order, advantages)


# --- advantages of the reward's parts -------------------------------------------------------------


class RewardParts(NamedTuple):
    """The rewards of R rollouts in K parts: values @ weights are the totals."""

    values: torch.Tensor  # (R, K) float64
    weights: torch.Tensor  # (K,) float64


def split_rewards(rewards: list[Reward], weights: Mapping[str, float]) -> RewardParts:
    """Split rewards into their weighted terms and, of weight 1, what the total has beside them.

    That is the bonus, the miss, the penalty for an answer that cannot be parsed, or for length.
    Raises ConfigError for a term that replayed rewards do not have.
    """
    weights = {name: weight for name, weight in weights.items() if weight}
    rows = []
    for reward in rewards:
        missing = weights.keys() - reward.terms.keys()
        if missing:
            raise ConfigError(
                f"reward.weights: the logged rewards have no {', '.join(sorted(missing))}; "
                "replay with the terms of the run that logged them"
            )
        terms = [reward.terms[name] for name in weights]
        rest = reward.total - sum(w * term for w, term in zip(weights.values(), terms))
        # A sum's rounding is no reward.
        rows.append([*terms, round(rest, 9)])
    values = torch.tensor(rows, dtype=torch.float64).view(len(rewards), len(weights) + 1)
    return RewardParts(values, torch.tensor([*weights.values(), 1.0], dtype=torch.float64))


def normalize_each_part(parts: RewardParts, group_size: int, config: LossConfig) -> torch.Tensor:
    """Normalize each part within its group, sum them weighted, normalize the sum over the batch.

        A_i = sum_k w_k (r_ik - mean_k) / (std_k + advantage_eps),  A_i / (std(A) + advantage_eps)

    GDPO, arXiv 2601.05242. The batch is the step's: all ranks. The mean of A over it,
    which the paper subtracts, is 0, for it is 0 in every group. Returns (R,). A collective.
    """
    values = parts.values.view(-1, group_size, len(parts.weights))  # (P, G, K)
    is_equal = values.amax(1, keepdim=True) == values.amin(1, keepdim=True)  # (P, 1, K)
    mean = values.mean(1, keepdim=True)
    std = values.std(1, keepdim=True)
    normalized = torch.where(is_equal, 0.0, (values - mean) / (std + config.advantage_eps))
    advantages = (normalized @ parts.weights).flatten()  # (R,)

    square_sum, count = dist.all_reduce_sum(advantages.square().sum().item(), len(advantages))
    batch_std = (square_sum / max(1, count - 1)) ** 0.5
    if batch_std == 0:
        return advantages
    return advantages / (batch_std + config.advantage_eps)


def compute_group_advantages(
    rewards: torch.Tensor,
    group_size: int,
    advantage: Callable,
    config: LossConfig,
    parts: RewardParts | None = None,
) -> torch.Tensor:
    """Apply `advantage` to each group of adjacent siblings. rewards (R,) -> (R,).

    A group of equal rewards gets exactly 0, never the rounding of its mean divided by a tiny floor.

    Args:
        parts: of the rewards, for the advantage that looks at them; None: the reward is the one
            part that it has.
    """
    if advantage is normalize_each_part:
        if parts is None:
            parts = RewardParts(rewards.double()[:, None], torch.ones(1, dtype=torch.float64))
        return normalize_each_part(parts, group_size, config).to(rewards)
    if not len(rewards):
        return rewards  # a rank without prompts
    rewards = rewards.view(-1, group_size)  # (P, G)
    highest = rewards.amax(1, keepdim=True)
    lowest = rewards.amin(1, keepdim=True)
    advantages = torch.where(highest == lowest, 0.0, advantage(rewards, config))
    return advantages.flatten()


# The names are those of the config: loss.advantage.
ADVANTAGES: dict[str, Callable] = {
    "mean_std": normalize_by_std,
    "mean": subtract_mean,
    "leave_one_out": subtract_leave_one_out_mean,
    "maxrl": divide_by_mean,
    "pass_at_k": reward_best_of_k,
    "gdpo": normalize_each_part,
}
