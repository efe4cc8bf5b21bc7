"""Show a run's gain by the rank at which the raw answer finds the first target.

python experiments/analysis/by_raw_rank.py RUN_OR_EVAL.jsonl [...] [--json]

What of a gain comes from queries that fail as they are, and what is lost on those that do not? The
rank is 1 / mrr_raw of the rows, so it is known as deep as the evaluation looked (reward.k_eval).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from by_history import read_evaluation

from recr1.evaluation.evaluate import compute_mean_ci, get_column, list_metrics

# the first and the last rank of a band; None: no target is found
BANDS = ((1, 1), (2, 10), (11, 100), (101, 1000), None)


def main() -> None:
    """Print a line for each band of ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("evaluations", nargs="+", type=Path, metavar="RUN_OR_EVAL.jsonl")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    args = parser.parse_args()
    result = []
    for path in args.evaluations:
        rows = read_evaluation(path)
        metric, *_ = list_metrics(rows)
        print(f"{path}, {metric}")
        for band in BANDS:
            band_rows = [row for row in rows if is_in_band(row, band)]
            if band_rows:
                summary = summarize_band(path, band, band_rows, metric)
                result.append(summary)
                print(format_summary(summary))
    if args.json:
        print(json.dumps(result))


def is_in_band(row: dict, band: tuple[int, int] | None) -> bool:
    """Return whether the raw answer's first target is at a rank of the band."""
    reciprocal_rank = row["mrr_raw"]
    if reciprocal_rank == 0 or band is None:
        return reciprocal_rank == 0 and band is None
    first, last = band
    return first <= round(1 / reciprocal_rank) <= last


def summarize_band(path: Path, band: tuple[int, int] | None, rows: list[dict], metric: str) -> dict:
    """Return the scores of the queries of one band, and the gain with its 95% interval."""
    raw = get_column(rows, f"{metric}_raw")
    after = get_column(rows, metric)
    gain, interval = compute_mean_ci(after - raw)
    return dict(
        evaluation=str(path),
        raw_rank=band,
        n=len(rows),
        raw=raw.mean(),
        after=after.mean(),
        gain=gain,
        gain_ci95=interval,
    )


def format_summary(summary: dict) -> str:
    """Format a band's line."""
    name = "not found"
    if summary["raw_rank"] is not None:
        first, last = summary["raw_rank"]
        name = f"at {first}" if first == last else f"at {first} to {last}"
    low, high = summary["gain_ci95"]
    scores = f"raw {summary['raw']:.4f}   after {summary['after']:.4f}"
    gain = f"{summary['gain']:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"  raw answer's first target {name:<14} n {summary['n']:>5}   {scores}   {gain}"


if __name__ == "__main__":
    main()
