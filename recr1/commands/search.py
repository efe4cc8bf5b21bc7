"""Work with a corpus from the command line: make its index, show a query's hits, score queries
against judgements. With any retriever of the config.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recr1.config import loader as configs
from recr1.config.schema import Config, ConfigError, RetrieverConfig
from recr1.data import readers
from recr1.distributed.printing import print_rank0
from recr1.evaluation.evaluate import compute_mean_ci
from recr1.retrieval import interface
from recr1.retrieval.factory import RETRIEVERS_WITH_INDEX, build_retriever, rebuild_retriever
from recr1.tasks.rewards import METRICS
from recr1.utils.terminal import make_printable

SETTINGS = {field.name: field for field in dataclasses.fields(RetrieverConfig)}

QUERIES_PER_SEARCH = 1024

Metric = Callable[..., float]  # f(ranked, gains, k)


def add_corpus_flags(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add --corpus, and a flag for each setting of the config's `retriever`.

    The flag of the setting `kind` is --retriever.
    """
    parser.add_argument(
        "--corpus", metavar="F", required=required, help='JSONL[.gz] {"id", "title", "text"}'
    )
    parser.add_argument(
        "--retriever",
        dest="kind",
        metavar="KIND",
        default="bm25",
        help=f"{', '.join(configs.RETRIEVERS)} or module:function; the flags below "
        "are the keys of `retriever` in recr1/config/schema.py",
    )
    parser.add_argument(
        "--on-bad-line",
        choices=configs.CHOICES["data.on_bad_line"],
        default="stop",
        help="what a bad line of the corpus does; default: stop",
    )
    for name, field in SETTINGS.items():
        if name != "kind":
            _add_setting_flag(parser, name, field.default)


def _add_setting_flag(parser: argparse.ArgumentParser, name: str, default: Any) -> None:
    """Add the flag of one setting, of the type that its default has."""
    flag = "--" + name.replace("_", "-")
    if isinstance(default, bool):
        parser.add_argument(flag, action="store_true")
        return
    if isinstance(default, tuple):
        parser.add_argument(flag, default=default, nargs=len(default), metavar="X")
        return

    help_text = f"default: {default}".rstrip(": ")
    if name == "index_dir":
        help_text = "keep the index there; default: in memory only"
    choices = configs.CHOICES.get(f"retriever.{name}")
    parser.add_argument(
        flag, default=default, type=type(default), metavar="X", choices=choices, help=help_text
    )


def make_retriever(args: argparse.Namespace) -> interface.Retriever:
    """Make the retriever that the flags name, over --corpus. Raises ConfigError, DataError."""

    def build(settings: RetrieverConfig) -> tuple[interface.Retriever, str]:
        build_over = build_retriever(settings)
        index_dir = settings.index_dir or None
        return build_over(args.corpus, args.on_bad_line, index_dir, print_rank0)

    return _build_from_flags(args, build)


def _build_from_flags(
    args: argparse.Namespace,
    build: Callable[[RetrieverConfig], tuple[interface.Retriever, str]],
) -> interface.Retriever:
    """Call `build` with the checked settings of the flags, and print what it left out.

    Raises ConfigError, DataError.
    """
    values = {name: getattr(args, name) for name in SETTINGS}
    values["prefixes"] = tuple(args.prefixes)
    cfg = configs.check_config(Config(retriever=RetrieverConfig(**values)))
    try:
        retriever, left_out = build(cfg.retriever)
    except readers.DataError:
        raise
    except (ValueError, OSError) as e:
        raise ConfigError(str(e)) from None
    if left_out:
        print_rank0(f"recr1: {left_out}")
    return retriever


def run_index(args: argparse.Namespace) -> None:
    """`recr1 index`: keep an index that is there and fits, replace any other."""
    if args.kind not in RETRIEVERS_WITH_INDEX or not args.index_dir:
        raise ConfigError(
            "recr1 index: --retriever must be one that keeps an index, "
            f"{' or '.join(RETRIEVERS_WITH_INDEX)}, and --index-dir D says where"
        )

    def build(settings: RetrieverConfig) -> tuple[interface.Retriever, str]:
        return rebuild_retriever(
            settings, args.corpus, args.on_bad_line, settings.index_dir, print_rank0
        )

    started = time.perf_counter()
    retriever = _build_from_flags(args, build)

    num_bytes = 0
    for path in Path(args.index_dir).rglob("*"):
        if path.is_file():
            num_bytes += path.stat().st_size
    mib = num_bytes / 2**20
    seconds = time.perf_counter() - started
    print_rank0(
        f"{args.index_dir}: {len(retriever.doc_ids)} documents, {mib:.1f} MiB, {seconds:.1f} s; "
        f"{retriever.description}"
    )


def read_texts(args: argparse.Namespace) -> dict[str, str]:
    """Read the texts of the corpus, {document id: text}, to show them."""
    doc_ids, texts, _dropped = readers.read_corpus(args.corpus, args.on_bad_line)
    return dict(zip(doc_ids, texts))


def run_eval_queries(args: argparse.Namespace) -> None:
    """`recr1 eval-queries`: score queries as they are."""
    retriever = make_retriever(args)
    queries, qrels = read_judged_files(args)
    gains = [qrels[query_id] for query_id in queries]
    scores = score_queries(retriever, list(queries.values()), gains, args.metrics)
    lines = [format_row(name, values) for name, values in scores.items()]
    result = dict(n=len(queries), **summarize_scores(scores))
    print_rank0("\n".join(lines))
    print_json(args, result)


def run_search(args: argparse.Namespace) -> None:
    """`recr1 search`: print the hits of one query."""
    retriever = make_retriever(args)
    texts = read_texts(args)
    print_rank0(format_hits(retriever, texts, args.query, args.k))


def read_judged_files(
    args: argparse.Namespace,
) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Read the queries that have a judgement, and the judgements.

    An id that only one of the two files has is reported and left out. Raises ConfigError where no
    id is in both, DataError.
    """
    queries, _dropped = readers.read_queries(args.queries)
    qrels, repeats = readers.read_qrels(args.qrels)
    _report_missing(args.queries, args.qrels, queries.keys() - qrels.keys())
    _report_missing(args.qrels, args.queries, qrels.keys() - queries.keys())
    if repeats:
        first = make_printable(repeats[0])
        print_rank0(f"recr1: {len(repeats)} judgements given twice, first: {first}")

    judged_queries = {}
    for query_id, text in queries.items():
        if query_id in qrels:
            judged_queries[query_id] = text
    if not judged_queries:
        raise ConfigError(f"{args.queries}: none of its query ids is judged in {args.qrels}")
    return judged_queries, qrels


def _report_missing(path: str, other_path: str, query_ids: Iterable[str]) -> None:
    """Print how many query ids of one file the other file lacks."""
    missing = sorted(query_ids)
    if missing:
        print_rank0(
            f"recr1: {path}: {len(missing)} query ids are not in {other_path} and left out, "
            f"first: {make_printable(missing[0])}"
        )


def score_queries(
    retriever: interface.Retriever,
    queries: Sequence[str | None],
    gains: list[dict[str, float]],
    metrics: dict[str, tuple[Metric, int]],
) -> dict[str, np.ndarray]:
    """Search the Q queries and score each ranking.

    Args:
        queries: None where there is no query; that scores 0.
        gains: of each query, {document id: gain}.
        metrics: {name: (function, k)}.
    Returns:
        {name: (Q,) float64}.
    """
    depth = max(k for _metric, k in metrics.values())
    depth = min(depth, len(retriever.doc_ids))
    scores = {name: np.zeros(len(queries)) for name in metrics}

    present = [(i, query) for i, query in enumerate(queries) if query is not None]
    for start in range(0, len(present), QUERIES_PER_SEARCH):
        chunk = present[start : start + QUERIES_PER_SEARCH]
        texts = [query for _, query in chunk]
        indices, _scores = retriever.search(texts, depth)  # (chunk, depth)
        for (i, _), query_indices in zip(chunk, indices.tolist()):
            ranked = [retriever.doc_ids[index] for index in query_indices if index >= 0]
            for name, (metric, k) in metrics.items():
                scores[name][i] = metric(ranked, gains[i], k)
    return scores


def summarize_scores(scores: dict[str, np.ndarray]) -> dict[str, dict]:
    """Summarize {metric: (Q,)} as {"metrics": {name: mean}, "ci95": {name: [low, high]}}."""
    means = {}
    intervals = {}
    for name, values in scores.items():
        means[name], intervals[name] = compute_mean_ci(values)
    return dict(metrics=means, ci95=intervals)


def format_row(name: str, values: np.ndarray, sign: str = "") -> str:
    """Format the mean of a metric and its 95% interval; sign "+" shows the sign of all numbers."""
    mean, (low, high) = compute_mean_ci(values)
    return (
        f"  {name:<12}{mean:{sign}8.4f}   95% [{low:{sign}.4f}, {high:{sign}.4f}]   n {len(values)}"
    )


def print_json(args: argparse.Namespace, result: dict) -> None:
    """Print the result as one line of JSON, with --json."""
    if args.json:
        print_rank0(json.dumps(result))


def format_hits(retriever: interface.Retriever, texts: dict[str, str], query: str, k: int) -> str:
    """Format the best k hits: rank, score, id and the beginning of the document.

    Below each, where the retriever can explain it, what each matched term adds to the score.
    """
    indices, scores = retriever.search([query], min(k, len(retriever.doc_ids)))
    explain = getattr(retriever, "explain", None)
    lines = []
    for rank, (index, score) in enumerate(zip(indices[0].tolist(), scores[0].tolist()), 1):
        if index < 0:  # after the last hit
            break
        doc_id = retriever.doc_ids[index]
        beginning = make_printable(texts[doc_id])[:80]
        lines.append(f"{rank:>3}  {score:7.3f}  {make_printable(doc_id)}  {beginning}")
        if explain is not None:
            term_scores = explain(query, index)
            terms = [f"{make_printable(term)} {value:.3f}" for term, value in term_scores]
            lines.append(" " * 14 + "  ".join(terms))
    return "\n".join(lines) or "  no hits"


def parse_metrics(text: str) -> dict[str, tuple[Metric, int]]:
    """Parse "ndcg@10,recall@100" to {name: (function, k)}. Raises argparse.ArgumentTypeError."""
    names = "|".join(METRICS)
    metrics = {}
    for part in text.split(","):
        name = part.strip()
        match = re.fullmatch(rf"({names})@([1-9]\d*)", name)
        if not match:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no metric; write {', '.join(METRICS)} with @K, such as ndcg@10"
            )
        metrics[name] = (METRICS[match[1]], int(match[2]))
    return metrics
