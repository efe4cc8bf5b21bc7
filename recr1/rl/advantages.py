"""Rewards of a group of siblings to advantages."""

from typing import Callable

import torch

from recr1.config.schema import LossConfig

# --- advantages: rewards (P, G) -> (P, G) ---------------------------------------------------------------------------------------


def normalize_by_std(r: torch.Tensor, c: LossConfig) -> torch.Tensor:
    """(r - mean) / (std + std_floor), unbiased std (GRPO: DeepSeekMath, arXiv 2402.03300, section
    4.1.2).
    """
    return subtract_mean(r, c) / (r.std(1, keepdim=True) + c.std_floor)


def subtract_mean(r: torch.Tensor, c: LossConfig) -> torch.Tensor:
    """r - mean: no group counts for more because its rewards lie close together (Dr. GRPO, arXiv
    2503.20783, section 3.2).
    """
    return r - r.mean(1, keepdim=True)


def subtract_leave_one_out_mean(r: torch.Tensor, c: LossConfig) -> torch.Tensor:
    """r - the mean of its siblings, an unbiased baseline (RLOO, arXiv 2402.14740, section 2.2)."""
    return subtract_mean(r, c) * r.shape[1] / (r.shape[1] - 1)


def compute_group_advantages(
    rewards: torch.Tensor, group_size: int, advantage: Callable, c: LossConfig
) -> torch.Tensor:
    """`advantage` over each group of adjacent siblings. rewards (R,) -> (R,).

    A group of equal rewards is exactly 0, never the rounding of its mean divided by a tiny floor.
    """
    if not len(rewards):
        return rewards  # a rank without a share
    r = rewards.view(-1, group_size)  # (P, G)
    same = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)
    return torch.where(same, 0.0, advantage(r, c)).flatten()


# The names are those of the config: loss.advantage.
ADVANTAGES = {
    "mean_std": normalize_by_std,
    "mean": subtract_mean,
    "leave_one_out": subtract_leave_one_out_mean,
}
