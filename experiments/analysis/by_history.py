"""Show a sequential run's gain by the length of the history (cold start).

python experiments/analysis/by_history.py RUN_OR_EVAL.jsonl QUERIES.jsonl [...] [--json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from recr1.data import readers
from recr1.evaluation.evaluate import compute_mean_ci, get_column, list_metrics

NO_LIMIT = 10**9
# shortest and longest history
BANDS = ((0, 1), (2, 4), (5, 9), (10, NO_LIMIT))


def main() -> None:
    """Print a line for each band of history lengths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("queries")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    args = parser.parse_args()
    rows = read_evaluation(args.rows)
    query_rows, *_ = readers.read_rows(args.queries, "stop", ("history",))
    metric = list_metrics(rows)[0]
    result = []
    for low, high in BANDS:
        band_rows = []
        for row in rows:
            history = query_rows[row["id"]]["history"]
            if low <= len(history) <= high:
                band_rows.append(row)
        if band_rows:
            name = format_band(low, high)
            summary = summarize_band(name, band_rows, metric)
            result.append(summary)
    for summary in result:
        print(format_summary(summary))
    if args.json:
        print(json.dumps(result))


def read_evaluation(path: Path) -> list[dict]:
    """Read the rows of an evaluation: a file of them, or the last one of a run's folder."""
    if path.is_dir():
        path = path / "eval_after.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def format_band(low: int, high: int) -> str:
    """Format the limits of a band of lengths."""
    if high == NO_LIMIT:
        return f"{low}+"
    return f"{low}-{high}"


def summarize_band(name: str, rows: list[dict], metric: str) -> dict:
    """Return the scores of the queries of one band, and the gain with its 95% interval."""
    raw = get_column(rows, f"{metric}_raw")
    after = get_column(rows, metric)
    gain, interval = compute_mean_ci(after - raw)
    return dict(
        history=name,
        n=len(rows),
        raw=raw.mean(),
        after=after.mean(),
        gain=gain,
        gain_ci95=interval,
    )


def format_summary(summary: dict) -> str:
    """Format a band's line."""
    low, high = summary["gain_ci95"]
    scores = f"raw {summary['raw']:.4f}   after {summary['after']:.4f}"
    gain = f"{summary['gain']:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"history {summary['history']:<6} n {summary['n']:>5}   {scores}   {gain}"


if __name__ == "__main__":
    main()
