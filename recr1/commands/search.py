"""What the `recr1` command does with a corpus: make an index, show a query's hits, score queries
against judgements. Any retriever of the config.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from pathlib import Path

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


def add_corpus_flags(p: argparse.ArgumentParser, required: bool = True) -> None:
    """--corpus, and a flag for each setting of the config's `retriever`; its kind is --retriever."""
    p.add_argument(
        "--corpus", metavar="F", required=required, help='JSONL[.gz] {"id", "title", "text"}'
    )
    p.add_argument(
        "--retriever",
        dest="kind",
        metavar="KIND",
        default="bm25",
        help=f"{', '.join(configs.RETRIEVERS)} or module:function; the flags below "
        "are the keys of `retriever` in recr1/config.py",
    )
    p.add_argument(
        "--on-bad-line",
        choices=configs.CHOICES["data.on_bad_line"],
        default="stop",
        help="what a bad line of the corpus does; default: stop",
    )
    for name, field in SETTINGS.items():
        flag = "--" + name.replace("_", "-")
        default = field.default
        if isinstance(default, bool):
            p.add_argument(flag, action="store_true")
        elif isinstance(default, tuple):
            p.add_argument(flag, default=default, nargs=len(default), metavar="X")
        elif name != "kind":
            p.add_argument(
                flag,
                default=default,
                type=type(default),
                metavar="X",
                choices=configs.CHOICES.get(f"retriever.{name}"),
                help="keep the index there; default: in memory only"
                if name == "index_dir"
                else f"default: {default}".rstrip(": "),
            )


def make_retriever(args) -> interface.Retriever:
    """The retriever that the flags name over --corpus. Raises ConfigError, DataError."""
    return _make_from_flags(
        args,
        lambda r: build_retriever(r)(
            args.corpus, args.on_bad_line, r.index_dir or None, print_rank0
        ),
    )


def _make_from_flags(args, how) -> interface.Retriever:
    settings = {name: getattr(args, name) for name in SETTINGS}
    chosen = configs.check_config(
        Config(retriever=RetrieverConfig(**settings | dict(prefixes=tuple(args.prefixes))))
    ).retriever
    try:
        retriever, left_out = how(chosen)
    except readers.DataError:
        raise
    except (ValueError, OSError) as e:
        raise ConfigError(str(e)) from None
    if left_out:
        print_rank0(f"recr1: {left_out}")
    return retriever


def run_index(args) -> None:
    """`recr1 index`: one that is there and fits is kept, any other is replaced."""
    if args.kind not in RETRIEVERS_WITH_INDEX or not args.index_dir:
        raise ConfigError(
            f"recr1 index: --retriever must be one that keeps an index, {' or '.join(RETRIEVERS_WITH_INDEX)}, and --index-dir D says where"
        )
    started = time.perf_counter()
    retriever = _make_from_flags(
        args,
        lambda r: rebuild_retriever(r, args.corpus, args.on_bad_line, r.index_dir, print_rank0),
    )
    size = sum(path.stat().st_size for path in Path(args.index_dir).rglob("*") if path.is_file())
    print_rank0(
        f"{args.index_dir}: {len(retriever.doc_ids)} documents, {size / 2**20:.1f} MiB, {time.perf_counter() - started:.1f} s; {retriever.description}"
    )


def read_texts(args) -> dict[str, str]:
    """The corpus by document id, to be shown."""
    ids, texts, _ = readers.read_corpus(args.corpus, args.on_bad_line)
    return dict(zip(ids, texts))


def run_eval_queries(args) -> None:
    index = make_retriever(args)
    queries, qrels = read_judged_files(args)
    values = score_queries(
        index, list(queries.values()), [qrels[id] for id in queries], args.metrics
    )
    result = dict(n=len(queries), **summarize_scores(values))
    print_rank0("\n".join(format_row(name, v) for name, v in values.items()))
    print_json(args, result)


def run_search(args) -> None:
    print_rank0(format_hits(make_retriever(args), read_texts(args), args.query, args.k))


def read_judged_files(args) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Queries that have a judgement, and the judgements. What has no partner in the other file is
    reported.
    """
    queries, (qrels, repeats) = (
        readers.read_queries(args.queries)[0],
        readers.read_qrels(args.qrels),
    )
    for path, other, lost in (
        (args.queries, args.qrels, queries.keys() - qrels.keys()),
        (args.qrels, args.queries, qrels.keys() - queries.keys()),
    ):
        if lost:
            print_rank0(
                f"recr1: {path}: {len(lost)} query ids are not in {other} and left out, first: {make_printable(min(lost))}"
            )
    if repeats:
        print_rank0(
            f"recr1: {len(repeats)} judgements given twice, first: {make_printable(repeats[0])}"
        )
    if not queries.keys() & qrels.keys():
        raise ConfigError(f"{args.queries}: none of its query ids is judged in {args.qrels}")
    return {id: text for id, text in queries.items() if id in qrels}, qrels


def score_queries(
    index: interface.Retriever,
    queries: list[str | None],
    gains: list[dict[str, float]],
    metrics: dict[str, tuple],
) -> dict[str, np.ndarray]:
    """{metric: (Q,)}; no query (None) scores 0."""
    depth = min(max(k for _, k in metrics.values()), len(index.doc_ids))
    values = {name: np.zeros(len(queries)) for name in metrics}
    asked = [i for i, query in enumerate(queries) if query is not None]
    for start in range(0, len(asked), 1024):
        at = asked[start : start + 1024]
        for i, ranking in zip(at, index.search([queries[i] for i in at], depth)[0].tolist()):
            ranked = [index.doc_ids[r] for r in ranking if r >= 0]
            for name, (metric, k) in metrics.items():
                values[name][i] = metric(ranked, gains[i], k)
    return values


def summarize_scores(values: dict[str, np.ndarray]) -> dict:
    """{"metrics": {name: mean}, "ci95": {name: [low, high]}}."""
    found = {name: compute_mean_ci(v) for name, v in values.items()}
    return dict(
        metrics={name: mean for name, (mean, _) in found.items()},
        ci95={name: ci for name, (_, ci) in found.items()},
    )


def format_row(name: str, values: np.ndarray, sign: str = "") -> str:
    mean, (low, high) = compute_mean_ci(values)
    return (
        f"  {name:<12}{mean:{sign}8.4f}   95% [{low:{sign}.4f}, {high:{sign}.4f}]   n {len(values)}"
    )


def print_json(args, result: dict) -> None:
    if args.json:
        print_rank0(json.dumps(result))


def format_hits(index: interface.Retriever, texts: dict[str, str], query: str, k: int) -> str:
    """The best k as text: rank, score, id, the document's beginning; below it, where the retriever
    can explain, what each matched term adds to the score.
    """
    rows, found = index.search([query], min(k, len(index.doc_ids)))
    lines = []
    for rank, (r, score) in enumerate(zip(rows[0].tolist(), found[0].tolist()), 1):
        if r >= 0:
            id = index.doc_ids[r]
            lines.append(
                f"{rank:>3}  {score:7.3f}  {make_printable(id)}  {make_printable(texts[id])[:80]}"
            )
            if explain := getattr(index, "explain", None):
                lines.append(
                    "              "
                    + "  ".join(
                        f"{make_printable(term)} {part:.3f}" for term, part in explain(query, r)
                    )
                )
    return "\n".join(lines) or "  no hits"


def parse_metrics(text: str) -> dict[str, tuple]:
    """ "ndcg@10,recall@100" -> {name: (function, k)}."""
    found = {}
    for name in text.split(","):
        match = re.fullmatch(rf"({'|'.join(METRICS)})@([1-9]\d*)", name.strip())
        if not match:
            raise argparse.ArgumentTypeError(
                f"{name.strip()!r} is no metric; write {', '.join(METRICS)} with @K, such as ndcg@10"
            )
        found[match[0]] = METRICS[match[1]], int(match[2])
    return found
