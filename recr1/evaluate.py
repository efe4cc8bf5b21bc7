"""A greedy pass over a split: the policy's rewrites against the raw queries, paired, with bootstrap intervals."""
from __future__ import annotations

import numpy as np
import torch

from . import dist
from .footprint import AT_ONCE
from .fsdp import gathered
from .metrics import bootstrap_ci
from .records import Prompt, Rollout
from .sample import generate
from .stopping import at_once
from .tasks.product_search import ProductSearch


def evaluate(model: torch.nn.Module, prompts: list[Prompt], task: ProductSearch, max_new_tokens: int, rows_at_once: int = AT_ONCE) -> list[dict]:
    """One greedy answer per prompt -> rows {id, raw, rewrite, ndcg_raw, ndcg, text, error}; an unparsable answer scores 0.

    Each rank takes its share of the prompts; rank 0 gets all rows, in order, the others none.
    """
    mine = dist.share(prompts)
    rollouts = greedy(model, mine, task.stops, max_new_tokens, rows_at_once)
    with dist.together(), at_once():
        raw = task.metric([p.id for p in mine], [p.text for p in mine])
        rows = [dict(id=p.id, raw=p.text, rewrite=reward.answer, ndcg_raw=before, ndcg=reward.parts["ndcg"], text=reward.text, error=reward.error)
                for p, before, reward in zip(mine, raw, task.score(rollouts))]
    return [row for part in dist.gather(rows) or [] for row in part]


def greedy(model: torch.nn.Module, prompts: list[Prompt], stops: frozenset[int], max_new_tokens: int, rows: int = AT_ONCE) -> list[Rollout]:
    """One most likely text per prompt, `rows` of them decoded together. A collective: every rank calls it, with its own prompts or none."""
    rollouts = []
    with gathered(model), dist.together(), at_once():
        for start in range(0, len(prompts), rows):
            rollouts += generate(model, prompts[start:start + rows], 1, 1.0, max_new_tokens, stops, uniforms=None)
    return rollouts


def column(rows: list[dict], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=np.float64)


def mean_ci(values: np.ndarray) -> tuple[float, list[float]]:
    """Mean and its 95% interval over queries."""
    return float(values.mean()), list(bootstrap_ci(values))


def table(before: list[dict], after: list[dict], metric: str) -> str:
    """What a run achieved, as text: raw query, policy before and after, and their paired differences."""
    raw, b, a = column(before, "ndcg_raw"), column(before, "ndcg"), column(after, "ndcg")
    lines = [f"{metric} on {len(raw)} test queries      mean     95% interval"]
    for name, values, sign in (("raw query", raw, ""), ("before training", b, ""), ("after training", a, ""),
                               ("after - raw", a - raw, "+"), ("after - before", a - b, "+")):
        mean, (low, high) = mean_ci(values)
        lines.append(f"  {name:<30}{mean:{sign}8.4f}     [{low:{sign}.4f}, {high:{sign}.4f}]")
    errors = sum(row["error"] is not None for row in after)
    return "\n".join(lines + [f"  unparsable answers after training: {errors} of {len(after)}"])


def examples(after: list[dict]) -> str:
    """Three rewrites: the largest gain, the median among those that changed the result, the largest loss."""
    changed = sorted((row for row in after if row["ndcg"] != row["ndcg_raw"]), key=lambda row: row["ndcg"] - row["ndcg_raw"])
    if not changed:
        return "no rewrite changed a result"
    picks = (("largest gain", changed[-1]), ("median change", changed[len(changed) // 2]), ("largest loss", changed[0]))
    return "\n".join(f"  {name:<14} {row['raw']!r} -> {row['rewrite']!r}   {row['ndcg_raw']:.3f} -> {row['ndcg']:.3f}" for name, row in picks)
