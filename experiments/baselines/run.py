"""Run the baselines of sequential recommendation and print one table.

python experiments/baselines/run.py DIR --setting transductive --out F.json

DIR holds a prepared sequential set (corpus, train, test_transductive, test_inductive). Every method
ranks the whole catalog, no sampled negatives:

    popularity  interactions in train
    last title  the last item's title as a BM25 query
    last item   what followed it in train (Markov chain)
    item-kNN    cosine of co-occurrence in train, summed over the history
    SASRec      Transformer, 2 x 64, full softmax; dropout and when to stop chosen by NDCG@10 on the
                validation tenth of train (readers.is_validation)

All train on train without that tenth and see a user's last --history items, 10 by default: what the
windows hold and a language model is shown. With 50 they see what else train holds of a test user,
as published figures do. An item of which a method knows nothing is not ranked, equal scores go by
popularity.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import counts
import numpy as np
import sasrec
import sequences
import torch

from recr1.cli import parse_natural, parse_positive
from recr1.distributed.printing import print_rank0
from recr1.evaluation.evaluate import compute_mean_ci
from recr1.tasks.ranking_metrics import (
    compute_hit_rate,
    compute_ndcg,
    compute_recall,
    compute_reciprocal_rank,
)
from recr1.training.launch import run_command
from recr1.utils.files import write_text

METRICS = {
    "ndcg@10": (compute_ndcg, 10),
    "ndcg@100": (compute_ndcg, 100),
    "recall@10": (compute_recall, 10),
    "hit@10": (compute_hit_rate, 10),
    "mrr@100": (compute_reciprocal_rank, 100),
}
DEPTH = 100
AT_ONCE = 256  # queries scored together
METHODS = ("popularity", "last title", "last item", "item-kNN", "SASRec")
# validation queries that an epoch of SASRec is judged by, evenly spaced: the tenth of 100,000
# windows would take longer than the epoch
MOST_VALIDATED = 2000


def main(argv: list[str]) -> None:
    """Run all methods, print the table and write the figures."""
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--setting", choices=("transductive", "inductive"), required=True)
    parser.add_argument(
        "--out",
        metavar="F.json",
        help="the table's figures and every query's, for further comparisons",
    )
    parser.add_argument(
        "--history",
        type=parse_positive,
        default=10,
        metavar="N",
        help="a user's last items that a method sees; default 10",
    )
    parser.add_argument(
        "--remove-seen", action="store_true", help="leave those items out of the rankings"
    )
    parser.add_argument(
        "--dropout",
        type=parse_rates,
        default="0.2,0.5",
        metavar="P,...",
        help="SASRec's, tried in turn; default 0.2,0.5",
    )
    parser.add_argument(
        "--epochs", type=parse_positive, default=sasrec.Settings.epochs, help="of SASRec, at most"
    )
    parser.add_argument("--seed", type=parse_natural, default=0)
    args = parser.parse_args(argv)
    start = time.monotonic()
    found = sequences.load_data_set(args.folder, args.setting)
    histories = [
        sequences.extend_history(query, found.sequences, args.history) for query in found.test
    ]
    methods, fitted = make_scorers(found, args)
    values = {
        name: evaluate(scores, found.items, found.test, histories, args.remove_seen)
        for name, scores in methods.items()
    }
    result = dict(
        folder=str(args.folder),
        setting=args.setting,
        n=len(found.test),
        items=len(found.items),
        known_items=sum(c > 0 for c in found.counts),
        history=args.history,
        remove_seen=args.remove_seen,
        seed=args.seed,
        sasrec=fitted,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        wall_s=round(time.monotonic() - start, 1),
        methods={name: summarize(v) for name, v in values.items()},
        differences={
            f"SASRec - {name}": summarize({m: values["SASRec"][m] - v[m] for m in METRICS})
            for name, v in values.items()
            if name != "SASRec"
        },
    )
    print_rank0(format_table(result))
    if args.out:
        rows = {
            query.id: {name: {m: float(v[m][i]) for m in METRICS} for name, v in values.items()}
            for i, query in enumerate(found.test)
        }
        write_text(Path(args.out), json.dumps(result | dict(queries=rows)) + "\n")


def parse_rates(text: str) -> list[float]:
    """Parse a list of dropout rates."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= p < 1 for p in found):
        raise argparse.ArgumentTypeError(
            f"must be numbers from 0 to below 1 with commas between, is {text!r}"
        )
    return found


def make_scorers(found: sequences.Sequential, args) -> tuple[dict[str, counts.Scorer], dict]:
    """Return {method: its scorer}, and how SASRec came about."""
    parts = list(found.sequences.values())
    flat = [sequence for user in parts for sequence in user]
    n = len(found.items)
    neural, fitted = tune_sasrec(found, flat, args)
    return dict(
        zip(
            METHODS,
            (
                counts.make_popularity(found.counts),
                counts.make_last_title(found.items, found.contents),
                counts.make_last_item(flat, n),
                counts.make_item_knn(parts, n),
                neural,
            ),
        )
    ), fitted


def tune_sasrec(
    found: sequences.Sequential, flat: list[sequences.Sequence], args
) -> tuple[counts.Scorer, dict]:
    """Train SASRec with each dropout and take the one that is best on validation.

    Returns (scorer, {settings, epochs of every run}).
    """
    known = np.flatnonzero(np.array(found.counts) > 0)
    if not any(found.counts[item] for query in found.test for item in query.history):
        print_rank0(
            "SASRec: not trained, because train has no item of the test's histories: "
            "it ranks nothing"
        )
        return lambda histories, texts: np.full(
            (len(histories), len(found.items)), -np.inf, np.float32
        ), dict(runs=[])
    chosen = found.validation[:: -(-len(found.validation) // MOST_VALIDATED)]
    # not longer than the window: the sequence goes on past it
    histories = [sequences.extend_history(query, {}, args.history) for query in chosen]

    def validate(scorer: counts.Scorer) -> float:
        return float(
            evaluate(scorer, found.items, chosen, histories, args.remove_seen)["ndcg@10"].mean()
        )

    runs = []
    for dropout in args.dropout:
        settings = replace(sasrec.Settings(), dropout=dropout, epochs=args.epochs)
        runs.append(
            (
                settings,
                *sasrec.fit(
                    flat,
                    known,
                    len(found.items),
                    settings,
                    args.seed,
                    validate,
                    f"sasrec, dropout {dropout:g}",
                ),
            )
        )
        best = max(runs[-1][2], key=lambda row: row["validation"])
        print_rank0(
            f"SASRec, dropout {dropout:g}: validation NDCG@10 {best['validation']:.4f} (n "
            f"{len(chosen)}) after epoch {best['epoch']} of {len(runs[-1][2])}, "
            f"loss {best['loss']:.3f}"
        )
    settings, scorer, log = max(runs, key=lambda run: max(row["validation"] for row in run[2]))
    return scorer, dict(
        settings=asdict(settings),
        validation_queries=len(chosen),
        runs=[dict(dropout=s.dropout, log=rows) for s, _, rows in runs],
    )


def evaluate(
    scorer: counts.Scorer,
    items: list[str],
    queries: list[sequences.Query],
    histories: list[list[int]],
    remove_seen: bool,
) -> dict[str, np.ndarray]:
    """Return {metric: (Q,)} of the best DEPTH of the whole catalog."""
    values = {name: np.zeros(len(queries)) for name in METRICS}
    for start in range(0, len(queries), AT_ONCE):
        at = slice(start, start + AT_ONCE)
        scores = scorer(histories[at], [query.text for query in queries[at]])
        if remove_seen:
            for row, history in zip(scores, histories[at]):
                row[history] = -np.inf
        for i, (row, query) in enumerate(zip(scores, queries[at]), start):
            ranked = [items[d] for d in rank_items(row)]
            for name, (metric, k) in METRICS.items():
                values[name][i] = metric(ranked, query.gains, k)
    return values


def rank_items(row: np.ndarray) -> np.ndarray:
    """The DEPTH best item numbers of one row of scores (D,), equal ones by number, without those
    that are not ranked.
    """
    top = np.flatnonzero(row > -np.inf)
    if len(top) > DEPTH:
        top = top[row[top] >= np.partition(row[top], -DEPTH)[-DEPTH]]
    return top[np.argsort(-row[top], kind="stable")][:DEPTH]


def summarize(values: dict[str, np.ndarray]) -> dict:
    return {name: dict(zip(("mean", "ci95"), compute_mean_ci(v))) for name, v in values.items()}


def format_table(result: dict) -> str:
    """Format a line for each method."""
    seen = "left out of the rankings" if result["remove_seen"] else "ranked like all others"
    lines = [
        f"{result['setting']}: {result['n']} queries, full ranking of {result['items']:,} items, "
        f"{result['known_items']:,} of them in train; "
        f"the last {result['history']} items of a user are seen and {seen}"
    ]
    for title, rows, cell in (
        ("method", result["methods"], "{:.4f} [{:.4f}, {:.4f}]"),
        ("paired", result["differences"], "{:+.4f} [{:+.4f}, {:+.4f}]"),
    ):
        lines.append(f"{title:<22}" + "".join(f"{name:<28}" for name in METRICS))
        lines += [
            f"{name:<22}"
            + "".join(f"{cell.format(row[m]['mean'], *row[m]['ci95']):<28}" for m in METRICS)
            for name, row in rows.items()
        ]
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
