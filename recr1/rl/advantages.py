"""Turn the rewards of a group of siblings into advantages.

Legend: P groups, G siblings, R = P*G rollouts.
"""

from typing import Callable

import torch

from recr1.config.schema import LossConfig

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


def compute_group_advantages(
    rewards: torch.Tensor, group_size: int, advantage: Callable, config: LossConfig
) -> torch.Tensor:
    """Apply `advantage` to each group of adjacent siblings. rewards (R,) -> (R,).

    A group of equal rewards gets exactly 0, never the rounding of its mean divided by a tiny floor.
    """
    if not len(rewards):
        return rewards  # a rank without prompts
    rewards = rewards.view(-1, group_size)  # (P, G)
    highest = rewards.amax(1, keepdim=True)
    lowest = rewards.amin(1, keepdim=True)
    advantages = torch.where(highest == lowest, 0.0, advantage(rewards, config))
    return advantages.flatten()


# The names are those of the config: loss.advantage.
ADVANTAGES = {
    "mean_std": normalize_by_std,
    "mean": subtract_mean,
    "leave_one_out": subtract_leave_one_out_mean,
}
