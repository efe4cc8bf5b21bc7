"""Build the retriever that the config's `retriever` section names.

Everything else knows only the interface (retrieval/interface.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

# kinds whose index is kept in a directory: one rank of a machine builds it, the others load it
RETRIEVERS_WITH_INDEX = ("bm25", "dense")

Say = Callable[[str], None]

# (doc_ids, texts, directory, say) -> the retriever of a corpus in memory
BuildFromTexts = Callable[[Sequence[str], Sequence[str], str | None, Say], Retriever]


def get_index_dir(r: schema.RetrieverConfig, run: Path) -> str:
    """Return where a run keeps its index: as configured, or beside its own folder."""
    return r.index_dir or str(run.parent / f".{run.name}.index")


def build_retriever(r: schema.RetrieverConfig) -> Callable[..., tuple[Retriever, str]]:
    """Return a function of (corpus, on_bad_line, directory, say) that builds the Retriever.

    That function returns the Retriever and a message about the corpus lines that were left out.
    corpus: JSONL[.gz]; directory: where the index is kept or will be written, None: in memory.

    What is wrong without looking at the corpus raises here, before anything is written:
    ConfigError, ModelFolderError, RetrieverError. The function raises DataError, RetrieverError,
    WriteError, ValueError and OSError.
    """
    if r.kind == "bm25":
        bm25.check_scorer(r.scorer)
        return partial(_build_bm25, r)
    if r.kind == "dense":
        return partial(_build_from_texts, _prepare_dense(r))
    if r.kind == "rank_bm25":
        make_search: Callable = partial(
            make_rank_bm25_search, k1=r.k1, b=r.b, repeat_terms=r.repeat_terms
        )
    else:
        make_search = plugins.load_function("retriever.kind", r.kind, RETRIEVERS)
    return partial(_build_from_texts, partial(_build_user_retriever, r, make_search))


def rebuild_retriever(
    r: schema.RetrieverConfig,
    corpus: str,
    on_bad_line: str,
    directory: str,
    say: Say,
) -> tuple[Retriever, str]:
    """Build the retriever in a directory whose index may be torn or of something else.

    Such an index is named and replaced.
    """
    try:
        return build_retriever(r)(corpus, on_bad_line, directory, say)
    except IndexRefused as e:
        reason, _, _ = str(e).partition("; make the index anew")
        say(reason + "; made anew")
    index = BM25Index.of_file(corpus, _get_parameters(r), on_bad_line, r.scorer == "numba")
    index.save(directory)
    return build_retriever(r)(corpus, on_bad_line, directory, say)


def _build_bm25(
    r: schema.RetrieverConfig,
    corpus: str,
    on_bad_line: str,
    directory: str | None,
    say: Say,
) -> tuple[Retriever, str]:
    searcher = bm25.load_or_build_bm25(
        directory,
        corpus,
        on_bad_line=on_bad_line,
        scorer=r.scorer,
        reproduce_upstream_query_bug=r.reproduce_upstream_query_bug,
        repeat_terms=r.repeat_terms,
        device=dist.device(),
        **asdict(_get_parameters(r)),
    )
    num_dropped, *messages = searcher.index.meta["dropped"]
    return searcher, _describe_dropped(num_dropped, messages)


def _get_parameters(r: schema.RetrieverConfig) -> BM25Parameters:
    values = {field.name: getattr(r, field.name) for field in fields(BM25Parameters)}
    return BM25Parameters(**values)


def _prepare_dense(r: schema.RetrieverConfig) -> BuildFromTexts:
    """Load the encoder, check that faiss can be imported where it is needed."""
    encoder = Encoder(r.encoder, r.pooling, r.max_length, r.dtype, dist.device())
    if r.index == "hnsw" or encoder.device.type == "cpu":
        dense.import_faiss()
    return partial(
        dense.load_or_build_dense,
        encoder,
        prefixes=r.prefixes,
        index=r.index,
        ef_search=r.ef_search,
    )


def _build_user_retriever(
    r: schema.RetrieverConfig,
    make_search: Callable,
    doc_ids: Sequence[str],
    texts: Sequence[str],
    directory: str | None,
    say: Say,
) -> Retriever:
    return UserRetriever(r.kind, make_search, doc_ids, texts, r.timeout)


def _build_from_texts(
    build: BuildFromTexts,
    corpus: str,
    on_bad_line: str,
    directory: str | None,
    say: Say,
) -> tuple[Retriever, str]:
    doc_ids, texts, dropped = readers.read_corpus(corpus, on_bad_line)
    retriever = build(doc_ids, texts, directory, say)
    return retriever, _describe_dropped(len(dropped), dropped)


def _describe_dropped(num_dropped: int, messages: list[str]) -> str:
    if not num_dropped:
        return ""
    return f"{num_dropped} lines of the corpus left out, first: {messages[0]}"
