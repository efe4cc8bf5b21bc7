"""What a run leaves behind: metrics.jsonl, rollouts.jsonl.gz, JSON files, and one readable console
line per step.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from . import dist, heartbeat, memory
from .config import Config
from .files import WriteError, sync, write_text, writing
from .records import Batch, Reward, Rollout

# 1.15% wide: percentiles of |sampler - trainer| over a whole run
GAP_BINS = np.concatenate([[0.0], np.logspace(-9, 2, 2201)])

NONFINITE = 5  # steps whose batches are kept


class Gaps:
    """|sampler - trainer| log-probs: exact mean and maximum, percentile from a histogram (the upper
    edge of its bin).
    """

    def __init__(self):
        self.counts = np.zeros(len(GAP_BINS), dtype=np.int64)
        self.total = 0.0
        self.largest = 0.0

    def merge(self, other: Gaps) -> None:
        self.counts = self.counts + other.counts
        self.total = self.total + other.total
        self.largest = max(self.largest, other.largest)

    def add(self, gaps: np.ndarray) -> None:
        self.counts += np.bincount(
            np.searchsorted(GAP_BINS, gaps).clip(max=len(GAP_BINS) - 1), minlength=len(GAP_BINS)
        )
        self.total = self.total + float(gaps.sum(dtype=np.float64))
        self.largest = max(self.largest, float(gaps.max(initial=0)))

    def state(self) -> dict:
        """As JSON; the histogram by its bins that hold something."""
        bins = np.flatnonzero(self.counts)
        return dict(
            bins=bins.tolist(),
            counts=self.counts[bins].tolist(),
            total=self.total,
            largest=self.largest,
        )

    @classmethod
    def restored(cls, state: dict) -> Gaps:
        gaps = cls()
        gaps.counts[state["bins"]], gaps.total, gaps.largest = (
            state["counts"],
            float(state["total"]),
            float(state["largest"]),
        )
        return gaps

    def figures(self) -> dict[str, float]:
        n = int(self.counts.sum())
        at = int(np.searchsorted(self.counts.cumsum(), 0.999 * n)) if n else 0
        return dict(
            logprob_gap_mean=self.total / max(1, n),
            logprob_gap_p999=min(float(GAP_BINS[at]), self.largest),
            max_logprob_gap=self.largest,
        )


@dataclass
class Step:
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
    gaps: Gaps = field(default_factory=Gaps)

    def merge(self, other: Step) -> None:
        self.first += [len(self.rollouts) + i for i in other.first]
        for name in ("rollouts", "rewards", "adv", "texts", "drawn", "tokens", "sums"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name) + getattr(other, name))
        self.gaps.merge(other.gaps)

    def logged(self, step: int, log: RunLog, cfg: Config, **more) -> dict:
        """Writes the rollouts of all ranks; the step's row of metrics.jsonl."""
        log.rollouts(rollout_rows(step, self))
        return log.close_step(step_row(step, self, cfg.sampling.group_size, **more), self.gaps)

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
        self, loss: torch.Tensor, logp: torch.Tensor, batch: Batch, stats: dict[str, float]
    ) -> None:
        """Counts a micro-batch's loss, statistics and |sampler - trainer|. logp (N,), the trainer's
        under the policy that sampled.
        """
        old = logp if batch.old_logp is None else batch.old_logp
        self.gaps.add((old - batch.sampler_logp)[batch.weight > 0].abs().cpu().numpy())
        self.sums.append(dict(loss=loss.item(), **stats))


class RunLog:
    """Appends to the files of one run folder; everything is on disk when a call returns. Rank 0's
    object writes, the others' only keep time.
    """

    def __init__(self, folder: Path, loop: str = "train"):
        self.folder = folder
        self.writes = dist.rank() == 0
        self.growing = (
            ("metrics.jsonl", "rollouts.jsonl.gz") if loop == "train" else ("metrics.jsonl",)
        )
        self.run_gaps = Gaps()
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self.peaks = {}
        self.peaks_of = ""
        self.sampled = 0
        self.sampling_s = 0.0

    @contextmanager
    def phase(self, name: str):
        """Adds the block's wall seconds to this step's `seconds` and keeps its peak of memory; the
        rank's heartbeat names it.
        """
        heartbeat.at(name)
        start = time.perf_counter()
        try:
            with self.peak(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def peak(self, name: str):
        """Keeps the block's peak of this rank's memory: the step's and the run's largest of that
        name.
        """
        self.peaks_of = memory.restart()
        yield
        most = memory.peak()
        for kept in (self.memory, self.peaks):
            kept[name] = max(kept.get(name, 0), most)

    def close_step(self, row: dict, gaps: Gaps) -> dict:
        """The step's row with its log-prob gap, tokens/s, and seconds and memory by phase, which
        then start anew.
        """
        # no seconds in a replay
        tokens = row.pop("tokens")
        sampling_s = self.seconds.get("sample", 0.0)
        self.sampled = self.sampled + tokens * (sampling_s > 0)
        self.sampling_s = self.sampling_s + sampling_s
        self.run_gaps.merge(gaps)
        return self.timed(
            row
            | gaps.figures()
            | dict(
                rollout_tokens_per_s=tokens / sampling_s if sampling_s else None,
                reward_wait=self.seconds.get("reward", 0.0) / self.seconds["step"],
            )
        )

    def timed(self, row: dict) -> dict:
        """The row with the step's seconds and memory by phase, which then start anew."""
        row |= dict(seconds=self.seconds, memory=self.memory)
        self.seconds = {}
        self.memory = {}
        return row

    def metrics(self, row: dict) -> None:
        path = self.folder / "metrics.jsonl"
        with writing(path), open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def rollouts(self, rows: list[dict]) -> None:
        """One gzip member per call: a torn tail costs one step."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = self.folder / "rollouts.jsonl.gz"
        with writing(path), open(path, "ab") as f:
            f.write(gzip.compress(text.encode("utf-8", "surrogatepass"), compresslevel=6, mtime=0))

    def rows(self, name: str, rows: list[dict]) -> None:
        """All of them or none, on rank 0."""
        if self.writes:
            write_text(
                self.folder / name,
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
            )

    def json(self, name: str, value: dict) -> None:
        write_text(self.folder / name, json.dumps(value, indent=2) + "\n")

    def nonfinite(
        self, step: int, batches: list[Batch], losses: list[float], texts: list[dict]
    ) -> str:
        """Keeps this rank's batches of a step that was not finite, with their losses and texts; all
        ranks. Says where.
        """
        root = self.folder / "nonfinite"
        own = f"rank_{dist.rank():05d}"
        folder = root / f"step_{step:06d}"
        if dist.first(
            not folder.exists() and root.exists() and len(list(root.iterdir())) >= NONFINITE
        ):
            return f"its batches are not kept, {root} has those of {NONFINITE} steps"
        tensors = {
            f"{i}.{name}": t.detach().cpu().contiguous()
            for i, b in enumerate(batches)
            for name, t in (vars(b) | b.layout._asdict()).items()
            if isinstance(t, torch.Tensor)
        }
        failed = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / f"{own}.safetensors")
            write_text(
                folder / f"{own}.json",
                json.dumps(dict(step=step, rank=dist.rank(), losses=losses, texts=texts)) + "\n",
            )
        except (OSError, WriteError, SafetensorError):
            failed = 1
        return f"its batches {'could not be written to' if dist.largest(failed) else 'are in'} {folder}"

    def state(self) -> dict:
        """What a resumed run goes on from: the length in bytes of the files that grow, forced onto
        the disk, and the counters of the whole run.
        """
        ends = {}
        for name in self.growing:
            sync(self.folder / name)
            ends[name] = (self.folder / name).stat().st_size
        return dict(
            ends=ends, gaps=self.run_gaps.state(), sampled=self.sampled, sampling_s=self.sampling_s
        )

    def check(self, state: dict) -> None:
        """Raises ValueError unless the files here are at least as long as `state` says."""
        Gaps.restored(state["gaps"])
        for name in self.growing:
            path = self.folder / name
            end = state["ends"][name]
            if not 0 <= end <= (path.stat().st_size if path.exists() else 0):
                raise ValueError(f"{name} is shorter than it was then; the log has lost rows")

    def restore(self, state: dict | None) -> None:
        """Cuts the files back to where they stood; None: to nothing."""
        if state:
            self.run_gaps = Gaps.restored(state["gaps"])
            self.sampled = state["sampled"]
            self.sampling_s = state["sampling_s"]
        for name in self.growing:
            if self.writes and (self.folder / name).exists():
                os.truncate(self.folder / name, state["ends"][name] if state else 0)


def step_row(step: int, done: Step, group_size: int, **more) -> dict:
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
    parts = {name: float(np.mean([r.parts[name] for r in rewards])) for name in rewards[0].parts}
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


def rollout_rows(step: int, done: Step) -> list[dict]:
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
            parts=reward.parts,
            error=reward.error,
            adv=_short(done.adv[i]),
        )
        if done.tokens is not None:
            row |= dict(
                prompt_ids=list(r.prompt.ids),
                ids=list(r.ids),
                sampler_logp=_short(r.sampler_logp),
                **done.tokens[t],
            )
        rows.append(row)
    return rows


def token_values(count: int, batches: list[Batch], columns: list[dict]) -> list[dict]:
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
                else [_short(v.tolist()) for v in values.split(sizes.tolist())]
            )
            for i, part in zip(index.tolist(), parts):
                out[i][name] = part
    return out


def _short(x):
    """The shortest usual decimal that reads back to the same float32."""
    return [float(f"{v:.9g}") for v in x] if isinstance(x, (list, tuple)) else float(f"{x:.9g}")


def console_line(row: dict, steps: int) -> str:
    val = f"  val gain {row['val_gain']:+.4f}" if "val_gain" in row else ""
    if "reward" not in row:  # SFT's
        return (
            f"step {row['step']:>5}/{steps}  loss {row['loss']:.4f}  epoch {row['epoch']:.2f}  grad {row['grad_norm']:.3f}  "
            f"{row['tokens_per_s']:,.0f} tok/s{val}"
        )
    kl = f"{row['kl']:.4f}" if row["kl"] is not None else "off"
    speed = f"{row['rollout_tokens_per_s']:,.0f} tok/s" if row["rollout_tokens_per_s"] else "replay"
    return (
        f"step {row['step']:>5}/{steps}  reward {row['reward']:.4f}  spread {row['reward_spread']:.4f}  zero-var {row['zero_variance']:.2f}  "
        f"kl {kl}  grad {row['grad_norm']:.3f}  gap {row['logprob_gap_mean']:.1e}  {speed}  wait {row['reward_wait']:.0%}{val}"
    )


def say(text: str) -> None:
    """Prints above a progress bar, on rank 0; what the terminal cannot write becomes a question
    mark.
    """
    if dist.rank() == 0:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        tqdm.write(text.encode(encoding, "replace").decode(encoding))
