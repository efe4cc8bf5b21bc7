"""Show a run's gain by the rank at which the raw answer finds the first target.

python experiments/analysis/by_raw_rank.py RUN_OR_EVAL.jsonl [...] [--json]

What of a gain comes from queries that fail as they are, and what is lost on those that do not? The
rank is 1 / mrr_raw of the rows, so it is known as deep as the evaluation looked (reward.k_eval).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from evaluations import format_gain, read_evaluation, summarize_gain

from recr1.evaluation.evaluate import list_metrics

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
                gain = summarize_gain(band_rows, metric)
                result.append(dict(evaluation=str(path), raw_rank=band, **gain))
                print(f"  raw answer's first target {format_band(band):<14} {format_gain(gain)}")
    if args.json:
        print(json.dumps(result))


def is_in_band(row: dict, band: tuple[int, int] | None) -> bool:
    """Return whether the raw answer's first target is at a rank of the band."""
    reciprocal_rank = row["mrr_raw"]
    if reciprocal_rank == 0 or band is None:
        return reciprocal_rank == 0 and band is None
    first, last = band
    return first <= round(1 / reciprocal_rank) <= last


def format_band(band: tuple[int, int] | None) -> str:
    """Format the limits of a band of ranks."""
    if band is None:
        return "not found"
    first, last = band
    return f"at {first}" if first == last else f"at {first} to {last}"


if __name__ == "__main__":
    main()
