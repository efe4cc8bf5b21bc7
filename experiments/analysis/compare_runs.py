"""Compare what runs have come to on the same test queries, paired.

python experiments/analysis/compare_runs.py RUN_OR_EVAL.jsonl RUN_OR_EVAL.jsonl [...] [--json]

Each is compared with the first one: the difference of the means, its 95% interval over queries, and
the p-value of the paired sign-flip test.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from evaluations import read_evaluation

from recr1.evaluation.bootstrap import compute_sign_flip_p
from recr1.evaluation.evaluate import compute_mean_ci, get_column, list_metrics


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path, metavar="RUN_OR_EVAL.jsonl")
    parser.add_argument("others", nargs="+", type=Path, metavar="RUN_OR_EVAL.jsonl")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    args = parser.parse_args()
    first_rows = read_evaluation(args.first)
    metric, *_ = list_metrics(first_rows)
    first_scores = get_column(first_rows, metric)
    print(f"{metric} on {len(first_rows)} queries")
    print(f"  {first_scores.mean():.4f}   {args.first}")

    result = []
    for path in args.others:
        rows = read_evaluation(path)
        check_same_queries(path, rows, args.first, first_rows)
        scores = get_column(rows, metric)
        differences = scores - first_scores
        difference, (low, high) = compute_mean_ci(differences)
        p = compute_sign_flip_p(differences)
        print(
            f"  {scores.mean():.4f}   {path}   "
            f"{difference:+.4f} [{low:+.4f}, {high:+.4f}], p {p:.4f}"
        )
        result.append(
            dict(
                evaluation=str(path),
                compared_with=str(args.first),
                metric=metric,
                score=scores.mean(),
                difference=difference,
                difference_ci95=[low, high],
                p=p,
            )
        )
    if args.json:
        print(json.dumps(result))


def check_same_queries(path: Path, rows: list[dict], first: Path, first_rows: list[dict]) -> None:
    """Exit where two evaluations are of other queries, or of the same ones in another order."""
    ids = [row["id"] for row in rows]
    first_ids = [row["id"] for row in first_rows]
    if ids != first_ids:
        raise SystemExit(f"{path}: other test queries than {first}; nothing can be paired")


if __name__ == "__main__":
    main()
