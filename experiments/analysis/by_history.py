"""Show a sequential run's gain by the length of the history (cold start).

python experiments/analysis/by_history.py RUN_OR_EVAL.jsonl QUERIES.jsonl [...] [--json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from evaluations import format_gain, read_evaluation, summarize_gain

from recr1.data import readers
from recr1.evaluation.evaluate import list_metrics

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
            summary = dict(history=name, **summarize_gain(band_rows, metric))
            result.append(summary)
    for summary in result:
        print(f"history {summary['history']:<6} {format_gain(summary)}")
    if args.json:
        print(json.dumps(result))


def format_band(low: int, high: int) -> str:
    """Format the limits of a band of lengths."""
    if high == NO_LIMIT:
        return f"{low}+"
    return f"{low}-{high}"


if __name__ == "__main__":
    main()
