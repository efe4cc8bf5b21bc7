"""Check finished quickstart runs against the project's bars, from the files they left.

python experiments/benchmarks/quickstart.py RUN [RUN ...]

Make the runs with `bash experiments/quickstart.sh runs/seed0 run.seed=0`, and so on for seeds 1 and
2. Every figure is recomputed from eval_before.jsonl and eval_after.jsonl; the log-prob gap and the
seconds are read from summary.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from recr1.evaluation.bootstrap import compute_bootstrap_ci


def make_at_most(name: str, value: float, limit: float) -> dict:
    """Return a bar that holds for values up to the limit."""
    return make_bar(name, value, limit, value <= limit)


def make_at_least(name: str, value: float, limit: float) -> dict:
    """Return a bar that holds for values from the limit."""
    return make_bar(name, value, limit, value >= limit)


def make_above(name: str, value: float, limit: float) -> dict:
    """Return a bar that holds for values above the limit."""
    return make_bar(name, value, limit, value > limit)


def make_bar(name: str, value: float, limit: float, ok: bool) -> dict:
    """Return a bar for the line of JSON."""
    return dict(name=name, value=round(float(value), 10), bar=limit, ok=bool(ok))


def read_rows(path: Path) -> list[dict]:
    """Read a JSONL file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def get_scores(rows: list[dict], name: str) -> np.ndarray:
    """Return a score of every query, (Q,)."""
    return np.array([row[name] for row in rows])


def format_change(change: np.ndarray, low: float, high: float) -> str:
    """Format a mean change with its interval."""
    return f"{change.mean():+.4f} [{low:+.4f}, {high:+.4f}]"


def check_run(folder: Path) -> tuple[list[dict], float]:
    """Print a run's line; return its bars and its gain over the raw query."""
    summary = json.loads((folder / "summary.json").read_text())
    rows_before = read_rows(folder / "eval_before.jsonl")
    rows_after = read_rows(folder / "eval_after.jsonl")
    raw = get_scores(rows_after, "ndcg_raw")
    before = get_scores(rows_before, "ndcg")
    after = get_scores(rows_after, "ndcg")
    gain = after - raw
    lift = after - before
    gain_low, gain_high = compute_bootstrap_ci(gain)
    lift_low, lift_high = compute_bootstrap_ci(lift)
    unparsable = np.mean([row["error"] is not None for row in rows_after])
    seed = summary["seed"]
    wall_s = summary["wall_s"]

    scores = f"{raw.mean():8.4f}{before.mean():8.4f}{after.mean():8.4f}"
    gain_text = format_change(gain, gain_low, gain_high)
    lift_text = format_change(lift, lift_low, lift_high)
    print(f"{folder.name:<24}{seed:>5}{scores}   {gain_text:<28}{lift_text:<28}{wall_s:7.0f}")
    drift = abs(before.mean() - raw.mean())
    gap_mean = summary["sampling_logp_diff_mean"]
    gap_p999 = summary["sampling_logp_diff_p999"]
    gap_max = summary["sampling_logp_diff_max"]
    bars = [
        make_at_most(f"seed {seed}: |before - raw|", drift, 0.005),
        make_at_least(f"seed {seed}: after - before", lift.mean(), 0.005),
        make_above(f"seed {seed}: after - before, interval's low end", lift_low, 0.0),
        make_above(f"seed {seed}: after - raw, interval's low end", gain_low, 0.0),
        make_at_most(f"seed {seed}: unparsable share", unparsable, 0.003),
        make_at_most(f"seed {seed}: gap mean", gap_mean, 1e-6),
        make_at_most(f"seed {seed}: gap p99.9", gap_p999, 1e-5),
        make_at_most(f"seed {seed}: gap max", gap_max, 2e-4),
        make_bar(f"seed {seed}: wall minutes", wall_s / 60, 12, wall_s <= 720),
    ]
    return bars, gain.mean()


def main(folders: list[str]) -> int:
    """Print the bars of the runs on the command line."""
    if not folders:
        print(__doc__.splitlines()[0], file=sys.stderr)
        return 2
    bars = []
    gains = []
    print(
        f"{'run':<24}{'seed':>5}{'raw':>8}{'before':>8}{'after':>8}   "
        f"{'after - raw':<28}{'after - before':<28}{'wall s':>7}"
    )
    for folder in folders:
        run_bars, gain = check_run(Path(folder))
        bars += run_bars
        gains.append(gain)
    title = f"mean after - raw of {len(gains)} runs"
    bars.append(make_at_least(title, np.mean(gains), 0.010))
    print(json.dumps({"bars": bars}))
    return 0 if all(bar["ok"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
