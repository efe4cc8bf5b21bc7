"""What one step leaves: its row of metrics.jsonl and its rows of rollouts.jsonl.gz."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from recr1.config.schema import Config
from recr1.data_types import MicroBatch, Reward, Rollout
from recr1.tracking.logprob_gap import LogpDiffHistogram
from recr1.tracking.run_log import RunLog


@dataclass
class StepRecord:
    """What one rank did in a step; the ranks' merged in order are the step's: groups are dealt out
    whole and contiguous.
    """

    rollouts: list[Rollout]
    rewards: list[Reward]
    adv: list[float]  # (R,)
    texts: list[Rollout]  # the distinct ones of `rollouts`
    first: list[int]  # where each stood first
    drawn: int = 0  # groups sampled for them
    tokens: list[dict] | None = None  # per-token values by text, in the steps that keep them
    sums: list[dict] = field(default_factory=list)  # by micro-batch, over tokens
    gaps: LogpDiffHistogram = field(default_factory=LogpDiffHistogram)

    def merge(self, other: StepRecord) -> None:
        self.first += [len(self.rollouts) + i for i in other.first]
        for name in ("rollouts", "rewards", "adv", "texts", "drawn", "tokens", "sums"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name) + getattr(other, name))
        self.gaps.merge(other.gaps)

    def logged(self, step: int, log: RunLog, cfg: Config, **more) -> dict:
        """Writes the rollouts of all ranks; the step's row of metrics.jsonl."""
        log.write_rollouts(make_rollout_rows(step, self))
        return log.close_step(
            compute_step_metrics(step, self, cfg.sampling.group_size, **more), self.gaps
        )

    def named(self) -> list[dict]:
        """The texts, for who looks at what was not finite."""
        return [
            dict(
                prompt=r.prompt.id,
                sibling=r.sibling,
                count=r.count,
                reward=self.rewards[i].total,
                adv=self.adv[i],
                text=self.rewards[i].text,
            )
            for r, i in zip(self.texts, self.first)
        ]

    def add(
        self, loss: torch.Tensor, logp: torch.Tensor, batch: MicroBatch, stats: dict[str, float]
    ) -> None:
        """Counts a micro-batch's loss, statistics and |sampler - trainer|. logp (N,), the trainer's
        under the policy that sampled.
        """
        old = logp if batch.old_logp is None else batch.old_logp
        self.gaps.add((old - batch.sampler_logp)[batch.weight > 0].abs().cpu().numpy())
        self.sums.append(dict(loss=loss.item(), **stats))


def compute_step_metrics(step: int, done: StepRecord, group_size: int, **more) -> dict:
    """The metrics of one step (all ranks' merged), each defined in the README's glossary."""
    rollouts = done.rollouts
    rewards = done.rewards
    sums = done.sums
    totals = torch.tensor([r.total for r in rewards]).view(-1, group_size)  # (P, G)
    tokens = sum(len(r.ids) for r in rollouts)
    summed = {
        name: sum(s.get(name, 0.0) for s in sums) for name in {name for s in sums for name in s}
    }
    trained = summed.get("trained", 0.0)
    parts = {name: float(np.mean([r.terms[name] for r in rewards])) for name in rewards[0].terms}
    return dict(
        step=step,
        loss=summed.get("loss", 0.0),
        reward=totals.mean().item(),
        **parts,
        unparsable=float(np.mean([r.error is not None for r in rewards])),
        errors=dict(Counter(r.error for r in rewards if r.error is not None)),
        reward_spread=totals.std(1).mean().item(),
        zero_variance=(totals.amax(1) == totals.amin(1)).float().mean().item(),
        adv_std=torch.tensor(done.adv).std().item(),
        kl=summed["kl"] / tokens if "kl" in summed else None,
        clip_share=summed.get("clip_share", 0.0) / tokens,
        **{
            name: summed[name] / max(1.0, trained)
            for name in ("ratio_off", "trust", "entropy")
            if name in summed
        },
        dlogp_norm=summed.get("dlogp_square", 0.0) ** 0.5,
        trained_share=trained / tokens,
        resampled=done.drawn - len(rollouts) // group_size,
        top_p_cut=float(np.mean([r.cut for r in rollouts])),
        distinct=len(done.texts) / len(rollouts),
        completion_tokens=tokens / len(rollouts),
        unfinished=float(np.mean([not r.finished for r in rollouts])),
        tokens=tokens,
        **more,
    )


def make_rollout_rows(step: int, done: StepRecord) -> list[dict]:
    """One row per distinct completion of a group, with the per-token values in those steps that
    keep them.
    """
    rows = []
    for t, (r, i) in enumerate(zip(done.texts, done.first)):
        reward = done.rewards[i]
        row = dict(
            step=step,
            prompt=r.prompt.id,
            sibling=r.sibling,
            count=r.count,
            text=reward.text,
            finished=r.finished,
            reward=reward.total,
            parts=reward.terms,
            error=reward.error,
            adv=_shorten_float(done.adv[i]),
        )
        if done.tokens is not None:
            row |= dict(
                prompt_ids=list(r.prompt.ids),
                ids=list(r.ids),
                sampler_logp=_shorten_float(r.sampler_logp),
                **done.tokens[t],
            )
        rows.append(row)
    return rows


def collect_token_values(count: int, batches: list[MicroBatch], columns: list[dict]) -> list[dict]:
    """Per-token tensors (N,) by batch -> one dict of lists per rollout; a column that is None stays
    null. Idle batches have none.
    """
    out: list[dict] = [{} for _ in range(count)]
    for batch, named in zip(batches, columns):
        if batch.rollout[0] < 0:
            continue
        index, sizes = batch.rollout.unique_consecutive(return_counts=True)
        for name, values in named.items():
            parts = (
                [None] * len(index)
                if values is None
                else [_shorten_float(v.tolist()) for v in values.split(sizes.tolist())]
            )
            for i, part in zip(index.tolist(), parts):
                out[i][name] = part
    return out


def _shorten_float(x):
    """The shortest usual decimal that reads back to the same float32."""
    return [float(f"{v:.9g}") for v in x] if isinstance(x, (list, tuple)) else float(f"{x:.9g}")
