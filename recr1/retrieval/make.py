"""The config's `retriever` -> what makes it of a corpus. Everything else knows only the interface
(base.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

from .. import config, data, dist, named
from ..config_file import RETRIEVERS
from . import bm25, dense
from .base import Function, Retriever
from .encoder import Encoder
from .index import Index, IndexRefused
from .okapi import rank_bm25
from .postings import Parameters

# kinds whose index lies in a directory: one rank of a machine makes it, the others load it
KEPT = ("bm25", "dense")


def directory_of(r: config.Retriever, run: Path) -> str:
    """Where a run keeps its index: as configured, or beside its own folder."""
    return r.index_dir or str(run.parent / f".{run.name}.index")


def make(r: config.Retriever) -> Callable[..., tuple[Retriever, str]]:
    """A function of (corpus, on_bad_line, directory, say) that gives the Retriever, and what is to
    be said of corpus lines that were left out.

    corpus: JSONL[.gz]; directory: where the index is kept or comes to lie, None: in memory. What is
    wrong without looking at the corpus raises here, before anything is written: ConfigError,
    ModelFolderError, RetrieverError. The function raises DataError, RetrieverError, WriteError,
    ValueError and OSError.
    """
    if r.kind == "bm25":
        bm25.check(r.scorer)
        return partial(_bm25, r)
    if r.kind == "dense":
        encoder = Encoder(r.encoder, r.pooling, r.max_length, r.dtype, dist.device())
        if r.index == "hnsw" or encoder.device.type == "cpu":
            dense.faiss()
        return partial(
            _of_texts,
            partial(
                dense.load_or_build,
                encoder,
                prefixes=r.prefixes,
                index=r.index,
                ef_search=r.ef_search,
            ),
        )
    theirs = (
        partial(rank_bm25, k1=r.k1, b=r.b)
        if r.kind == "rank_bm25"
        else named.function("retriever.kind", r.kind, RETRIEVERS)
    )
    return partial(
        _of_texts,
        lambda doc_ids, texts, directory, say: Function(r.kind, theirs, doc_ids, texts, r.timeout),
    )


def make_anew(
    r: config.Retriever, corpus: str, on_bad_line: str, directory: str, say: Callable[[str], None]
) -> tuple[Retriever, str]:
    """The same for a directory whose index may be torn or of something else: that one is named and
    replaced.
    """
    try:
        return make(r)(corpus, on_bad_line, directory, say)
    except IndexRefused as e:
        say(str(e).partition("; make the index anew")[0] + "; made anew")
    Index.of_file(corpus, _parameters(r), on_bad_line, r.scorer == "numba").save(directory)
    return make(r)(corpus, on_bad_line, directory, say)


def _bm25(
    r: config.Retriever,
    corpus: str,
    on_bad_line: str,
    directory: str | None,
    say: Callable[[str], None],
) -> tuple[Retriever, str]:
    found = bm25.load_or_build(
        directory,
        corpus,
        on_bad_line=on_bad_line,
        scorer=r.scorer,
        upstream_wrapping=r.upstream_wrapping,
        device=dist.device(),
        **asdict(_parameters(r)),
    )
    count, *first = found.index.meta["dropped"]
    return found, _left_out(count, first)


def _parameters(r: config.Retriever) -> Parameters:
    return Parameters(**{f.name: getattr(r, f.name) for f in fields(Parameters)})


def _of_texts(
    build: Callable[..., Retriever],
    corpus: str,
    on_bad_line: str,
    directory: str | None,
    say: Callable[[str], None],
) -> tuple[Retriever, str]:
    doc_ids, texts, dropped = data.read_corpus(corpus, on_bad_line)
    return build(doc_ids, texts, directory, say), _left_out(len(dropped), dropped)


def _left_out(count: int, messages: list[str]) -> str:
    return f"{count} lines of the corpus left out, first: {messages[0]}" if count else ""
