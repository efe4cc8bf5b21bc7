"""The config's `retriever` -> what makes it of a corpus. Everything else knows only the interface
(retrieval/interface.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

from recr1.config import plugins, schema
from recr1.config.loader import RETRIEVERS
from recr1.data import readers
from recr1.distributed import collectives as dist
from recr1.retrieval.bm25 import searcher as bm25
from recr1.retrieval.bm25.impacts import BM25Parameters
from recr1.retrieval.bm25.index import BM25Index, IndexRefused
from recr1.retrieval.dense import searcher as dense
from recr1.retrieval.dense.encoder import Encoder
from recr1.retrieval.interface import Retriever
from recr1.retrieval.rank_bm25 import make_rank_bm25_search
from recr1.retrieval.user_function import UserRetriever

# kinds whose index lies in a directory: one rank of a machine makes it, the others load it
RETRIEVERS_WITH_INDEX = ("bm25", "dense")


def get_index_dir(r: schema.RetrieverConfig, run: Path) -> str:
    """Where a run keeps its index: as configured, or beside its own folder."""
    return r.index_dir or str(run.parent / f".{run.name}.index")


def build_retriever(r: schema.RetrieverConfig) -> Callable[..., tuple[Retriever, str]]:
    """A function of (corpus, on_bad_line, directory, say) that gives the Retriever, and what is to
    be said of corpus lines that were left out.

    corpus: JSONL[.gz]; directory: where the index is kept or comes to lie, None: in memory. What is
    wrong without looking at the corpus raises here, before anything is written: ConfigError,
    ModelFolderError, RetrieverError. The function raises DataError, RetrieverError, WriteError,
    ValueError and OSError.
    """
    if r.kind == "bm25":
        bm25.check_scorer(r.scorer)
        return partial(_build_bm25, r)
    if r.kind == "dense":
        encoder = Encoder(r.encoder, r.pooling, r.max_length, r.dtype, dist.device())
        if r.index == "hnsw" or encoder.device.type == "cpu":
            dense.import_faiss()
        return partial(
            _build_from_texts,
            partial(
                dense.load_or_build_dense,
                encoder,
                prefixes=r.prefixes,
                index=r.index,
                ef_search=r.ef_search,
            ),
        )
    theirs = (
        partial(make_rank_bm25_search, k1=r.k1, b=r.b)
        if r.kind == "rank_bm25"
        else plugins.load_function("retriever.kind", r.kind, RETRIEVERS)
    )
    return partial(
        _build_from_texts,
        lambda doc_ids, texts, directory, say: UserRetriever(
            r.kind, theirs, doc_ids, texts, r.timeout
        ),
    )


def rebuild_retriever(
    r: schema.RetrieverConfig,
    corpus: str,
    on_bad_line: str,
    directory: str,
    say: Callable[[str], None],
) -> tuple[Retriever, str]:
    """The same for a directory whose index may be torn or of something else: that one is named and
    replaced.
    """
    try:
        return build_retriever(r)(corpus, on_bad_line, directory, say)
    except IndexRefused as e:
        say(str(e).partition("; make the index anew")[0] + "; made anew")
    BM25Index.of_file(corpus, _get_parameters(r), on_bad_line, r.scorer == "numba").save(directory)
    return build_retriever(r)(corpus, on_bad_line, directory, say)


def _build_bm25(
    r: schema.RetrieverConfig,
    corpus: str,
    on_bad_line: str,
    directory: str | None,
    say: Callable[[str], None],
) -> tuple[Retriever, str]:
    found = bm25.load_or_build_bm25(
        directory,
        corpus,
        on_bad_line=on_bad_line,
        scorer=r.scorer,
        upstream_wrapping=r.upstream_wrapping,
        device=dist.device(),
        **asdict(_get_parameters(r)),
    )
    count, *first = found.index.meta["dropped"]
    return found, _describe_dropped(count, first)


def _get_parameters(r: schema.RetrieverConfig) -> BM25Parameters:
    return BM25Parameters(**{f.name: getattr(r, f.name) for f in fields(BM25Parameters)})


def _build_from_texts(
    build: Callable[..., Retriever],
    corpus: str,
    on_bad_line: str,
    directory: str | None,
    say: Callable[[str], None],
) -> tuple[Retriever, str]:
    doc_ids, texts, dropped = readers.read_corpus(corpus, on_bad_line)
    return build(doc_ids, texts, directory, say), _describe_dropped(len(dropped), dropped)


def _describe_dropped(count: int, messages: list[str]) -> str:
    return f"{count} lines of the corpus left out, first: {messages[0]}" if count else ""
