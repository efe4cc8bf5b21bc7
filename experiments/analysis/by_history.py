"""Show a sequential run's gain by the length of the history (cold start).

python experiments/analysis/by_history.py RUN_OR_EVAL.jsonl QUERIES.jsonl [...] [--json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from recr1.data import readers
from recr1.evaluation.evaluate import compute_mean_ci, get_column, list_metrics

# shortest and longest history
BANDS = ((0, 1), (2, 4), (5, 9), (10, 10**9))


def main() -> None:
    """Print a line for each band of history lengths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("queries")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    args = parser.parse_args()
    path = args.rows / "eval_after.jsonl" if args.rows.is_dir() else args.rows
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    query_rows = readers.read_rows(args.queries, "stop", ("history",))[0]
    history_lengths = {id: len(row["history"]) for id, row in query_rows.items()}
    metric = list_metrics(rows)[0]
    result = []
    for low, high in BANDS:
        band_rows = [row for row in rows if low <= history_lengths[row["id"]] <= high]
        if band_rows:
            name = f"{low}-{high}" if high < 10**9 else f"{low}+"
            result.append(summarize_band(name, band_rows, metric))
    for band in result:
        interval_low, interval_high = band["gain_ci95"]
        print(
            f"history {band['history']:<6} n {band['n']:>5}   raw {band['raw']:.4f}   "
            f"after {band['after']:.4f}   "
            f"{band['gain']:+.4f} [{interval_low:+.4f}, {interval_high:+.4f}]"
        )
    if args.json:
        print(json.dumps(result))


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


if __name__ == "__main__":
    main()
