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

from . import config_file as configs, data
from .config import Config, ConfigError, Retriever
from .evaluate import mean_ci
from .log import say
from .retrieval import base
from .retrieval.make import KEPT, make, make_anew
from .tasks.rewards import METRICS
from .terminal import plain

SETTINGS = {field.name: field for field in dataclasses.fields(Retriever)}


def corpus_flags(p: argparse.ArgumentParser, required: bool = True) -> None:
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


def make_retriever(args) -> base.Retriever:
    """The retriever that the flags name over --corpus. Raises ConfigError, DataError."""
    return _made(args, lambda r: make(r)(args.corpus, args.on_bad_line, r.index_dir or None, say))


def _made(args, how) -> base.Retriever:
    settings = {name: getattr(args, name) for name in SETTINGS}
    chosen = configs.checked(
        Config(retriever=Retriever(**settings | dict(prefixes=tuple(args.prefixes))))
    ).retriever
    try:
        retriever, left_out = how(chosen)
    except data.DataError:
        raise
    except (ValueError, OSError) as e:
        raise ConfigError(str(e)) from None
    if left_out:
        say(f"recr1: {left_out}")
    return retriever


def make_index(args) -> None:
    """`recr1 index`: one that is there and fits is kept, any other is replaced."""
    if args.kind not in KEPT or not args.index_dir:
        raise ConfigError(
            f"recr1 index: --retriever must be one that keeps an index, {' or '.join(KEPT)}, and --index-dir D says where"
        )
    started = time.perf_counter()
    retriever = _made(args, lambda r: make_anew(r, args.corpus, args.on_bad_line, r.index_dir, say))
    size = sum(path.stat().st_size for path in Path(args.index_dir).rglob("*") if path.is_file())
    say(
        f"{args.index_dir}: {len(retriever.doc_ids)} documents, {size / 2**20:.1f} MiB, {time.perf_counter() - started:.1f} s; {retriever.how}"
    )


def read_texts(args) -> dict[str, str]:
    """The corpus by document id, to be shown."""
    ids, texts, _ = data.read_corpus(args.corpus, args.on_bad_line)
    return dict(zip(ids, texts))


def eval_queries(args) -> None:
    index = make_retriever(args)
    queries, qrels = read_judged(args)
    values = scores(index, list(queries.values()), [qrels[id] for id in queries], args.metrics)
    result = dict(n=len(queries), **summary(values))
    say("\n".join(row(name, v) for name, v in values.items()))
    finish(args, result)


def search(args) -> None:
    say(hits(make_retriever(args), read_texts(args), args.query, args.k))


def read_judged(args) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Queries that have a judgement, and the judgements. What has no partner in the other file is
    reported.
    """
    queries, (qrels, repeats) = data.read_queries(args.queries)[0], data.read_qrels(args.qrels)
    for path, other, lost in (
        (args.queries, args.qrels, queries.keys() - qrels.keys()),
        (args.qrels, args.queries, qrels.keys() - queries.keys()),
    ):
        if lost:
            say(
                f"recr1: {path}: {len(lost)} query ids are not in {other} and left out, first: {plain(min(lost))}"
            )
    if repeats:
        say(f"recr1: {len(repeats)} judgements given twice, first: {plain(repeats[0])}")
    if not queries.keys() & qrels.keys():
        raise ConfigError(f"{args.queries}: none of its query ids is judged in {args.qrels}")
    return {id: text for id, text in queries.items() if id in qrels}, qrels


def scores(
    index: base.Retriever,
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


def summary(values: dict[str, np.ndarray]) -> dict:
    """{"metrics": {name: mean}, "ci95": {name: [low, high]}}."""
    found = {name: mean_ci(v) for name, v in values.items()}
    return dict(
        metrics={name: mean for name, (mean, _) in found.items()},
        ci95={name: ci for name, (_, ci) in found.items()},
    )


def row(name: str, values: np.ndarray, sign: str = "") -> str:
    mean, (low, high) = mean_ci(values)
    return (
        f"  {name:<12}{mean:{sign}8.4f}   95% [{low:{sign}.4f}, {high:{sign}.4f}]   n {len(values)}"
    )


def finish(args, result: dict) -> None:
    if args.json:
        say(json.dumps(result))


def hits(index: base.Retriever, texts: dict[str, str], query: str, k: int) -> str:
    """The best k as text: rank, score, id, the document's beginning; below it, where the retriever
    can explain, what each matched term adds to the score.
    """
    rows, found = index.search([query], min(k, len(index.doc_ids)))
    lines = []
    for rank, (r, score) in enumerate(zip(rows[0].tolist(), found[0].tolist()), 1):
        if r >= 0:
            id = index.doc_ids[r]
            lines.append(f"{rank:>3}  {score:7.3f}  {plain(id)}  {plain(texts[id])[:80]}")
            if explain := getattr(index, "explain", None):
                lines.append(
                    "              "
                    + "  ".join(f"{plain(term)} {part:.3f}" for term, part in explain(query, r))
                )
    return "\n".join(lines) or "  no hits"


def metric_list(text: str) -> dict[str, tuple]:
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
