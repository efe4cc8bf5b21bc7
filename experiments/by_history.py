"""A sequential run's gain by the length of the history (cold start): python
experiments/by_history.py RUN_OR_EVAL.jsonl QUERIES.jsonl [...] [--json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from recr1.data import readers
from recr1.evaluation.evaluate import compute_mean_ci, get_column, list_metrics

BANDS = ((0, 1), (2, 4), (5, 9), (10, 10**9))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("rows", type=Path)
    p.add_argument("queries")
    p.add_argument("--json", action="store_true", help="one JSON object on the last line")
    args = p.parse_args()
    path = args.rows / "eval_after.jsonl" if args.rows.is_dir() else args.rows
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lengths = {
        id: len(row["history"])
        for id, row in readers.read_rows(args.queries, "stop", ("history",))[0].items()
    }
    metric = list_metrics(rows)[0]
    result = []
    for low, high in BANDS:
        band = [row for row in rows if low <= lengths[row["id"]] <= high]
        if not band:
            continue
        gain, ci = compute_mean_ci(get_column(band, metric) - get_column(band, f"{metric}_raw"))
        name = f"{low}-{high}" if high < 10**9 else f"{low}+"
        result.append(
            dict(
                history=name,
                n=len(band),
                raw=get_column(band, f"{metric}_raw").mean(),
                after=get_column(band, metric).mean(),
                gain=gain,
                gain_ci95=ci,
            )
        )
        print(
            f"history {name:<6} n {len(band):>5}   raw {result[-1]['raw']:.4f}   after "
            f"{result[-1]['after']:.4f}   {gain:+.4f} [{ci[0]:+.4f}, {ci[1]:+.4f}]"
        )
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
