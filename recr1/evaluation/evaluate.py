"""A greedy pass over a split: the policy's answers against the raw ones, paired, with bootstrap
intervals and a paired test.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from recr1.data_types import Prompt, Rollout
from recr1.distributed import collectives as dist
from recr1.distributed.fsdp import unsharded
from recr1.evaluation.bootstrap import compute_bootstrap_ci, compute_sign_flip_p
from recr1.memory.estimate import ROWS_AT_ONCE
from recr1.sampling.generate import generate
from recr1.tasks.scorer import Scorer
from recr1.utils.interrupts import raise_on_signal


def evaluate_prompts(
    model: torch.nn.Module,
    prompts: list[Prompt],
    task: Scorer,
    max_new_tokens: int,
    rows_at_once: int = ROWS_AT_ONCE,
) -> list[dict]:
    """One greedy answer per prompt -> rows {id, raw, rewrite, PART_raw and PART for every part of
    the reward, text, error}; an unparsable answer scores 0.

    Each rank takes its share of the prompts; rank 0 gets all rows, in order, the others none.
    """
    mine = dist.split_across_ranks(prompts)
    rollouts = generate_greedily(model, mine, task.stops, max_new_tokens, rows_at_once)
    with dist.fail_together(), raise_on_signal():
        raw = [task.task.baseline_answer(p.row) for p in mine]
        rows = [
            dict(
                id=p.id,
                raw=answer,
                rewrite=reward.answer,
                **{f"{name}_raw": value for name, value in parts.items()},
                **reward.terms,
                text=reward.text,
                error=reward.error,
            )
            for p, answer, parts, reward in zip(
                mine, raw, task.score_answers(mine, raw), task.score(rollouts)
            )
        ]
    return [row for part in dist.gather_to_rank0(rows) or [] for row in part]


def generate_greedily(
    model: torch.nn.Module,
    prompts: list[Prompt],
    stops: frozenset[int],
    max_new_tokens: int,
    rows: int = ROWS_AT_ONCE,
) -> list[Rollout]:
    """One most likely text per prompt, `rows` of them decoded together. A collective: every rank
    calls it, with its own prompts or none.
    """
    rollouts = []
    with unsharded(model), dist.fail_together(), raise_on_signal():
        for start in range(0, len(prompts), rows):
            rollouts += generate(
                model, prompts[start : start + rows], 1, 1.0, max_new_tokens, stops, uniforms=None
            )
    return rollouts


def get_column(rows: list[dict], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=np.float64)


def compute_mean_ci(values: np.ndarray) -> tuple[float, list[float]]:
    """Mean and its 95% interval over queries."""
    return float(values.mean()), list(compute_bootstrap_ci(values))


def compare_evaluations(before: list[dict], after: list[dict], metric: str) -> dict:
    """The figures of a run's evaluations on one metric or part: means, and the paired differences
    with interval and p-value (sign_flip_p).
    """
    raw = get_column(before, f"{metric}_raw")
    b = get_column(before, metric)
    a = get_column(after, metric)
    found = dict(raw=float(raw.mean()), before=float(b.mean()), after=float(a.mean()))
    for name, difference in (("gain", a - raw), ("after_minus_before", a - b)):
        found[name], found[f"{name}_ci95"] = compute_mean_ci(difference)
        found[f"{name}_p"] = compute_sign_flip_p(difference)
    return found


def list_metrics(rows: list[dict]) -> list[str]:
    """The metrics and parts that the rows have for policy and raw answer."""
    return [name for name in rows[0] if f"{name}_raw" in rows[0]]


def format_table(
    before: list[dict], after: list[dict], metric: str, k: int, figures: dict[str, dict]
) -> str:
    """What a run achieved, as text: raw answer, policy before and after, and their paired
    differences. figures: {part: compared(...)}.
    """
    raw = get_column(before, f"{metric}_raw")
    b = get_column(before, metric)
    a = get_column(after, metric)
    lines = [f"{f'{metric}@{k}'} on {len(raw)} test queries      mean     95% interval"]
    for name, values, sign, p in (
        ("raw", raw, "", ""),
        ("before training", b, "", ""),
        ("after training", a, "", ""),
        ("after - raw", a - raw, "+", "gain"),
        ("after - before", a - b, "+", "after_minus_before"),
    ):
        mean, (low, high) = compute_mean_ci(values)
        lines.append(
            f"  {name:<30}{mean:{sign}8.4f}     [{low:{sign}.4f}, {high:{sign}.4f}]"
            + (f"     p {figures[metric][f'{p}_p']:.4f}" if p else "")
        )
    for name, found in figures.items():
        if name != metric:
            low, high = found["gain_ci95"]
            lines.append(
                f"  {name:<30}{found['raw']:8.4f} raw, {found['before']:.4f} before, {found['after']:.4f} after; "
                f"after - raw {found['gain']:+.4f} [{low:+.4f}, {high:+.4f}]"
            )
    errors = Counter(row["error"] for row in after if row["error"] is not None)
    named = f" ({', '.join(f'{name} {n}' for name, n in errors.most_common())})" if errors else ""
    return "\n".join(
        lines
        + [f"  unparsable answers after training: {sum(errors.values())} of {len(after)}{named}"]
    )


def format_examples(after: list[dict], metric: str) -> str:
    """Three answers: the largest gain over the raw answer, the median among those that changed the
    result, the largest loss (where all gain: the smallest gain).
    """

    def gain(row):
        return row[metric] - row[f"{metric}_raw"]

    changed = sorted((row for row in after if gain(row)), key=gain)
    if not changed:
        return "no answer changed a result"
    most = "largest gain" if gain(changed[-1]) > 0 else "smallest loss"
    least = "largest loss" if gain(changed[0]) < 0 else "smallest gain"
    picks = (
        (most, changed[-1]),
        ("median change", changed[len(changed) // 2]),
        (least, changed[0]),
    )
    return "\n".join(
        f"  {name:<14} {_shorten_answer(row['raw'])} -> {_shorten_answer(row['rewrite'])}   {row[f'{metric}_raw']:.3f} -> {row[metric]:.3f}"
        for name, row in picks
    )


def _shorten_answer(answer) -> str:
    text = repr(answer)
    return text if len(text) <= 200 else text[:197] + "..."
