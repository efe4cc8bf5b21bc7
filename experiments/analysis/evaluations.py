"""Read a run's evaluation, and say what the policy gained over the raw answer on some of it."""

from __future__ import annotations

import json
from pathlib import Path

from recr1.evaluation.evaluate import compute_mean_ci, get_column


def read_evaluation(path: Path) -> list[dict]:
    """Read the rows of an evaluation: a file of them, or the last one of a run's folder."""
    if path.is_dir():
        path = path / "eval_after.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def summarize_gain(rows: list[dict], metric: str) -> dict:
    """Return the scores of these rows' queries, and the gain with its 95% interval."""
    raw = get_column(rows, f"{metric}_raw")
    after = get_column(rows, metric)
    gain, interval = compute_mean_ci(after - raw)
    return dict(n=len(rows), raw=raw.mean(), after=after.mean(), gain=gain, gain_ci95=interval)


def format_gain(summary: dict) -> str:
    """Format what `summarize_gain` returned."""
    low, high = summary["gain_ci95"]
    scores = f"raw {summary['raw']:.4f}   after {summary['after']:.4f}"
    gain = f"{summary['gain']:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"n {summary['n']:>5}   {scores}   {gain}"
