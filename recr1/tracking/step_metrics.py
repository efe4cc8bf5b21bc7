"""What one step leaves: its row of metrics.jsonl and its rows of rollouts.jsonl.gz."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from recr1.config.schema import Config
from recr1.data_types import MicroBatch, Reward, Rollout
from recr1.tracking.logprob_gap import LogpDiffHistogram
from recr1.tracking.run_log import RunLog


@dataclass
class StepRecord:
    """What one rank did in a step of GRPO.

    Merged in the order of the ranks they are the step's: groups are dealt out whole and contiguous.
    """

    rollouts: list[Rollout]
    rewards: list[Reward]
    advantages: list[float]  # (R,)
    unique: list[Rollout]  # the distinct ones of `rollouts`
    first_index: list[int]  # where each of `unique` stood first in `rollouts`
    num_sampled_groups: int = 0  # more than P where groups were sampled again
    token_values: list[dict] | None = None  # by unique rollout, in the steps that keep them
    stats: list[dict] = field(default_factory=list)  # by micro-batch, sums over its tokens
    logp_diffs: LogpDiffHistogram = field(default_factory=LogpDiffHistogram)

    def merge(self, other: StepRecord) -> None:
        """Append the record of the next rank."""
        self.first_index += [len(self.rollouts) + index for index in other.first_index]
        self.rollouts = self.rollouts + other.rollouts
        self.rewards = self.rewards + other.rewards
        self.advantages = self.advantages + other.advantages
        self.unique = self.unique + other.unique
        self.num_sampled_groups = self.num_sampled_groups + other.num_sampled_groups
        if self.token_values is not None and other.token_values is not None:
            self.token_values = self.token_values + other.token_values
        self.stats = self.stats + other.stats
        self.logp_diffs.merge(other.logp_diffs)

    def add(
        self, loss: torch.Tensor, logp: torch.Tensor, batch: MicroBatch, stats: dict[str, float]
    ) -> None:
        """Count a micro-batch's loss, statistics and |sampler - trainer| log-probs.

        logp (N,): the trainer's. Where the batch has old_logp, that is compared: the trainer's
        under the policy that sampled.
        """
        trainer_logp = logp if batch.old_logp is None else batch.old_logp
        difference = (trainer_logp - batch.sampler_logp)[batch.weight > 0]
        self.logp_diffs.add(difference.abs().cpu().numpy())
        self.stats.append(dict(loss=loss.item(), **stats))

    def write_and_summarize(self, step: int, log: RunLog, cfg: Config, **metrics) -> dict:
        """Write the rollouts of all ranks. Returns the step's row of metrics.jsonl."""
        log.write_rollouts(make_rollout_rows(step, self))
        row = compute_step_metrics(step, self, cfg.sampling.group_size, **metrics)
        return log.close_step(row, self.logp_diffs)

    def describe_texts(self) -> list[dict]:
        """Describe the unique rollouts, for who looks at what was not finite."""
        return [
            dict(
                prompt=rollout.prompt.id,
                sibling=rollout.sibling,
                count=rollout.count,
                reward=self.rewards[index].total,
                advantage=self.advantages[index],
                text=self.rewards[index].text,
            )
            for rollout, index in zip(self.unique, self.first_index)
        ]


@dataclass
class SftStepRecord:
    """What one rank did in a step of SFT; merged in the order of the ranks they are the step's."""

    texts: list[Rollout]
    stats: list[dict] = field(default_factory=list)  # by micro-batch, sums over its tokens

    def merge(self, other: SftStepRecord) -> None:
        """Append the record of the next rank."""
        self.texts = self.texts + other.texts
        self.stats = self.stats + other.stats

    def write_and_summarize(self, step: int, log: RunLog, cfg: Config, **metrics) -> dict:
        """Return the step's row of metrics.jsonl; the texts stand in teacher.jsonl."""
        loss = sum(stats["loss"] for stats in self.stats)
        entropy = sum(stats["entropy"] for stats in self.stats)
        num_tokens = sum(stats["trained"] for stats in self.stats)
        row = dict(
            step=step,
            loss=loss,
            entropy=entropy / num_tokens,
            tokens=int(num_tokens),
            tokens_per_s=num_tokens / log.seconds["train"],
            **metrics,
        )
        return log.add_timings(row)

    def describe_texts(self) -> list[dict]:
        """Describe the texts, for who looks at what was not finite."""
        return [dict(prompt=text.prompt.id, ids=list(text.ids)) for text in self.texts]


def compute_step_metrics(step: int, record: StepRecord, group_size: int, **metrics) -> dict:
    """Compute the metrics of one step of all ranks, each defined in the README's glossary.

    `metrics` are added at the end of the row.
    """
    rollouts = record.rollouts
    rewards = record.rewards
    totals = torch.tensor([reward.total for reward in rewards]).view(-1, group_size)  # (P, G)
    has_zero_variance = totals.amax(1) == totals.amin(1)  # (P,)
    num_tokens = sum(len(rollout.ids) for rollout in rollouts)
    errors = [reward.error for reward in rewards if reward.error is not None]
    return dict(
        step=step,
        loss=_sum_stat(record.stats, "loss"),
        reward=totals.mean().item(),
        **_average_terms(rewards),
        format_error_rate=float(np.mean([reward.error is not None for reward in rewards])),
        format_errors=dict(Counter(errors)),
        reward_std=totals.std(1).mean().item(),
        frac_reward_zero_std=has_zero_variance.float().mean().item(),
        advantage_std=torch.tensor(record.advantages).std().item(),
        **_compute_loss_metrics(record.stats, num_tokens),
        resampled_groups=record.num_sampled_groups - len(rollouts) // group_size,
        top_p_cut=float(np.mean([rollout.cut for rollout in rollouts])),
        unique_completion_frac=len(record.unique) / len(rollouts),
        completion_length=num_tokens / len(rollouts),
        truncated_ratio=float(np.mean([not rollout.finished for rollout in rollouts])),
        tokens=num_tokens,
        **metrics,
    )


def _average_terms(rewards: list[Reward]) -> dict[str, float]:
    """Return the mean of each term of the rewards."""
    names = rewards[0].terms
    return {name: float(np.mean([reward.terms[name] for reward in rewards])) for name in names}


def _compute_loss_metrics(stats: list[dict], num_tokens: int) -> dict[str, float | None]:
    """Compute what the loss says of the step; `stats`: sums over the tokens of each micro-batch."""
    names = {name for of_batch in stats for name in of_batch}
    num_trained = _sum_stat(stats, "trained")
    metrics: dict[str, float | None] = {}
    metrics["kl"] = _sum_stat(stats, "kl") / num_tokens if "kl" in names else None
    metrics["clip_ratio"] = _sum_stat(stats, "clip_ratio") / num_tokens
    for name in ("ratio_abs_deviation", "importance_sampling_ratio", "entropy"):
        if name in names:
            metrics[name] = _sum_stat(stats, name) / max(1.0, num_trained)
    if "masked" in names:
        metrics["masked_token_frac"] = _sum_stat(stats, "masked") / max(1.0, num_trained)
    metrics["grad_logp_norm"] = _sum_stat(stats, "grad_logp_square") ** 0.5
    metrics["trained_token_frac"] = num_trained / num_tokens
    return metrics


def _sum_stat(stats: list[dict], name: str) -> float:
    """Sum a statistic over the micro-batches; 0.0 where none has it."""
    total = sum(of_batch.get(name, 0.0) for of_batch in stats)
    return total if stats else 0.0


def make_rollout_rows(step: int, record: StepRecord) -> list[dict]:
    """Make one row per distinct completion of a group, as rollouts.jsonl.gz has them.

    In the steps that keep them a row has its per-token values too.
    """
    rows = []
    for number, (rollout, index) in enumerate(zip(record.unique, record.first_index)):
        reward = record.rewards[index]
        row = dict(
            step=step,
            prompt=rollout.prompt.id,
            sibling=rollout.sibling,
            count=rollout.count,
            text=reward.text,
            finished=rollout.finished,
            reward=reward.total,
            reward_terms=reward.terms,
            error=reward.error,
            advantage=_shorten_float(record.advantages[index]),
        )
        if record.token_values is not None:
            row |= dict(
                prompt_ids=list(rollout.prompt.ids),
                ids=list(rollout.ids),
                sampler_logp=_shorten_floats(rollout.sampler_logp),
                **record.token_values[number],
            )
        rows.append(row)
    return rows


def collect_token_values(count: int, batches: list[MicroBatch], columns: list[dict]) -> list[dict]:
    """Cut per-token tensors (N,), by micro-batch, into lists by rollout.

    Args:
        count: rollouts that were packed into the batches.
        columns: by micro-batch {name: (N,) or None}; a column that is None stays null.
    Returns:
        By rollout {name: its tokens' values}. Padding batches (rollout -1) have none.
    """
    values_by_rollout: list[dict] = [{} for _ in range(count)]
    for batch, column_by_name in zip(batches, columns):
        if batch.rollout[0] < 0:
            continue
        indices, sizes = batch.rollout.unique_consecutive(return_counts=True)
        for name, column in column_by_name.items():
            pieces: list[list[float] | None] = [None] * len(indices)
            if column is not None:
                pieces = [_shorten_floats(piece.tolist()) for piece in column.split(sizes.tolist())]
            for index, piece in zip(indices.tolist(), pieces):
                values_by_rollout[index][name] = piece
    return values_by_rollout


def _shorten_floats(values: Sequence[float]) -> list[float]:
    return [_shorten_float(value) for value in values]


def _shorten_float(value: float) -> float:
    """Return the shortest usual decimal that reads back to the same float32."""
    return float(f"{value:.9g}")
