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
from itertools import chain
from pathlib import Path
from typing import NamedTuple

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


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
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
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Run all methods, print the table and write the figures."""
    args = parse_arguments(argv)
    start = time.monotonic()
    data = sequences.load_data_set(args.folder, args.setting)
    histories = []
    for query in data.test:
        histories.append(sequences.extend_history(query, data.sequences, args.history))
    methods, fitted = make_scorers(data, args)
    values = {}
    for name, scorer in methods.items():
        values[name] = evaluate(scorer, data.items, data.test, histories, args.remove_seen)
    known_items = [count for count in data.counts if count > 0]
    result = dict(
        folder=str(args.folder),
        setting=args.setting,
        n=len(data.test),
        items=len(data.items),
        known_items=len(known_items),
        history=args.history,
        remove_seen=args.remove_seen,
        seed=args.seed,
        sasrec=fitted,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        wall_s=round(time.monotonic() - start, 1),
        methods={name: summarize(scores) for name, scores in values.items()},
        differences=compare_with_sasrec(values),
    )
    print_rank0(format_table(result))
    if args.out:
        rows = {}
        for index, query in enumerate(data.test):
            rows[query.id] = get_query_scores(values, index)
        write_text(Path(args.out), json.dumps(result | dict(queries=rows)) + "\n")


def compare_with_sasrec(values: dict[str, dict[str, np.ndarray]]) -> dict[str, dict]:
    """Return the paired differences of SASRec to each other method."""
    differences = {}
    for name, scores in values.items():
        if name != "SASRec":
            paired = {}
            for metric in METRICS:
                paired[metric] = values["SASRec"][metric] - scores[metric]
            differences[f"SASRec - {name}"] = summarize(paired)
    return differences


def get_query_scores(values: dict[str, dict[str, np.ndarray]], index: int) -> dict:
    """Return {method: {metric: score}} of one query."""
    query_scores = {}
    for name, scores in values.items():
        query_scores[name] = {metric: float(scores[metric][index]) for metric in METRICS}
    return query_scores


def parse_rates(text: str) -> list[float]:
    """Parse a list of dropout rates."""
    try:
        rates = [float(rate) for rate in text.split(",")]
    except ValueError:
        rates = [-1.0]
    if not all(0 <= rate < 1 for rate in rates):
        raise argparse.ArgumentTypeError(
            f"must be numbers from 0 to below 1 with commas between, is {text!r}"
        )
    return rates


def make_scorers(
    data: sequences.Sequential, args: argparse.Namespace
) -> tuple[dict[str, counts.Scorer], dict]:
    """Return {method: its scorer}, and how SASRec came about."""
    by_user = list(data.sequences.values())
    all_sequences = list(chain.from_iterable(by_user))
    num_items = len(data.items)
    sasrec_scorer, fitted = tune_sasrec(data, all_sequences, args)
    scorers = (
        counts.make_popularity(data.counts),
        counts.make_last_title(data.items, data.contents),
        counts.make_last_item(all_sequences, num_items),
        counts.make_item_knn(by_user, num_items),
        sasrec_scorer,
    )
    return dict(zip(METHODS, scorers)), fitted


class SASRecRun(NamedTuple):
    """Hold what training with one dropout gave."""

    settings: sasrec.Settings
    scorer: counts.Scorer
    log: list[dict]  # of the epochs

    def get_best_epoch(self) -> dict:
        """Return the first of the epochs with the best validation score."""
        return max(self.log, key=get_validation)


def get_validation(epoch: dict) -> float:
    """Return the validation score of an epoch."""
    return epoch["validation"]


def tune_sasrec(
    data: sequences.Sequential, all_sequences: list[sequences.Sequence], args: argparse.Namespace
) -> tuple[counts.Scorer, dict]:
    """Train SASRec with each dropout and take the one that is best on validation.

    Returns (scorer, {settings, epochs of every run}).
    """
    num_items = len(data.items)
    known_items = np.flatnonzero(np.array(data.counts) > 0)
    test_items = set(chain.from_iterable(query.history for query in data.test))
    if test_items.isdisjoint(known_items.tolist()):
        print_rank0(
            "SASRec: not trained, because train has no item of the test's histories: "
            "it ranks nothing"
        )

        def rank_nothing(histories: list[list[int]], texts: list[str]) -> np.ndarray:
            return np.full((len(histories), num_items), -np.inf, np.float32)

        return rank_nothing, dict(runs=[])
    every = -(-len(data.validation) // MOST_VALIDATED)
    queries = data.validation[::every]
    # Not longer than the window: the sequence goes on past it.
    histories = [sequences.extend_history(query, {}, args.history) for query in queries]

    def validate(scorer: counts.Scorer) -> float:
        values = evaluate(scorer, data.items, queries, histories, args.remove_seen)
        return float(values["ndcg@10"].mean())

    best = None
    logs = []
    for dropout in args.dropout:
        settings = replace(sasrec.Settings(), dropout=dropout, epochs=args.epochs)
        title = f"sasrec, dropout {dropout:g}"
        scorer, log = sasrec.fit(
            all_sequences, known_items, num_items, settings, args.seed, validate, title
        )
        logs.append(dict(dropout=dropout, log=log))
        run = SASRecRun(settings, scorer, log)
        epoch = run.get_best_epoch()
        print_rank0(
            f"SASRec, dropout {dropout:g}: validation NDCG@10 {epoch['validation']:.4f} "
            f"(n {len(queries)}) after epoch {epoch['epoch']} of {len(log)}, "
            f"loss {epoch['loss']:.3f}"
        )
        if best is None or epoch["validation"] > best.get_best_epoch()["validation"]:
            best = run
    fitted = dict(settings=asdict(best.settings), validation_queries=len(queries), runs=logs)
    return best.scorer, fitted


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
        batch = slice(start, start + AT_ONCE)
        texts = [query.text for query in queries[batch]]
        scores = scorer(histories[batch], texts)
        for offset, row in enumerate(scores):
            index = start + offset
            if remove_seen:
                row[histories[index]] = -np.inf
            ranked_ids = [items[number] for number in rank_items(row)]
            for name, (compute_metric, k) in METRICS.items():
                values[name][index] = compute_metric(ranked_ids, queries[index].gains, k)
    return values


def rank_items(row: np.ndarray) -> np.ndarray:
    """Return the DEPTH best item numbers of one row of scores (D,), equal ones by number.

    Items that are not ranked are left out.
    """
    top = np.flatnonzero(row > -np.inf)
    if len(top) > DEPTH:
        threshold = np.partition(row[top], -DEPTH)[-DEPTH]
        top = top[row[top] >= threshold]
    best_first = np.argsort(-row[top], kind="stable")
    return top[best_first][:DEPTH]


def summarize(values: dict[str, np.ndarray]) -> dict:
    """Return {metric: {mean, ci95}}."""
    summary = {}
    for name, scores in values.items():
        mean, interval = compute_mean_ci(scores)
        summary[name] = dict(mean=mean, ci95=interval)
    return summary


def format_table(result: dict) -> str:
    """Format a line for each method, then one for each paired difference."""
    seen = "left out of the rankings" if result["remove_seen"] else "ranked like all others"
    lines = [
        f"{result['setting']}: {result['n']} queries, full ranking of {result['items']:,} items, "
        f"{result['known_items']:,} of them in train; "
        f"the last {result['history']} items of a user are seen and {seen}"
    ]
    lines += format_rows("method", result["methods"], "{:.4f} [{:.4f}, {:.4f}]")
    lines += format_rows("paired", result["differences"], "{:+.4f} [{:+.4f}, {:+.4f}]")
    return "\n".join(line.rstrip() for line in lines)


def format_rows(title: str, rows: dict[str, dict], cell_format: str) -> list[str]:
    """Format a head and a line for each row: {name: {metric: {mean, ci95}}}."""
    lines = [f"{title:<22}" + "".join(f"{name:<28}" for name in METRICS)]
    for name, row in rows.items():
        line = f"{name:<22}"
        for metric in METRICS:
            cell = cell_format.format(row[metric]["mean"], *row[metric]["ci95"])
            line += f"{cell:<28}"
        lines.append(line)
    return lines


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
