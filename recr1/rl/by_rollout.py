"""Sum and average values over the tokens of each rollout of a micro-batch.

A micro-batch holds whole rollouts, so these need no other micro-batch and no other rank. Identical
siblings are one rollout here: what they share is computed once. Legend: n tokens.
"""

import torch


def sum_over_rollout(values: torch.Tensor, rollout: torch.Tensor) -> torch.Tensor:
    """Give each token the sum over its rollout's tokens: values, rollout (n,) -> (n,)."""
    sums, index, _ = _sum_each(values, rollout)
    return sums.index_select(0, index)


def average_over_rollout(values: torch.Tensor, rollout: torch.Tensor) -> torch.Tensor:
    """Give each token the mean over its rollout's tokens: values, rollout (n,) -> (n,)."""
    sums, index, num_tokens = _sum_each(values, rollout)
    means = sums / num_tokens
    return means.index_select(0, index)


def _sum_each(
    values: torch.Tensor, rollout: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sum of each rollout (rollouts,), its index at each token (n,), and how many tokens
    each has (rollouts,).
    """
    _, index, num_tokens = rollout.unique(return_inverse=True, return_counts=True)
    sums = values.new_zeros(len(num_tokens)).index_add(0, index, values)
    return sums, index, num_tokens
