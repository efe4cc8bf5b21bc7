"""The config's `retriever` -> what makes it of a corpus. Everything else knows only the interface (base.py)."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from .. import config, dist, named
from ..config_file import RETRIEVERS
from . import bm25, dense
from .base import Function, Retriever
from .encoder import Encoder
from .okapi import rank_bm25

KEPT = ("bm25", "dense")                 # kinds whose index lies in a directory: one rank of a machine makes it, the others load it


def directory_of(r: config.Retriever, run: Path) -> str:
    """Where a run keeps its index: as configured, or beside its own folder."""
    return r.index_dir or str(run.parent / f".{run.name}.index")


def make(r: config.Retriever) -> Callable[..., Retriever]:
    """A function of (doc_ids, texts, directory, say) that gives the Retriever; directory: where the index is kept or comes to lie, None: in memory.

    What is wrong without looking at the corpus raises here, before anything is written: ConfigError, ModelFolderError, RetrieverError.
    The function raises RetrieverError, WriteError, ValueError and OSError.
    """
    if r.kind == "bm25":
        return partial(_bm25, r)
    if r.kind == "dense":
        encoder = Encoder(r.encoder, r.pooling, r.max_length, r.dtype, dist.device())
        if r.index == "hnsw" or encoder.device.type == "cpu":
            dense.faiss()
        return partial(dense.load_or_build, encoder, prefixes=r.prefixes, index=r.index, ef_search=r.ef_search)
    theirs = partial(rank_bm25, k1=r.k1, b=r.b) if r.kind == "rank_bm25" else named.function("retriever.kind", r.kind, RETRIEVERS)
    return lambda doc_ids, texts, directory, say: Function(r.kind, theirs, doc_ids, texts, r.timeout)


def _bm25(r: config.Retriever, doc_ids: Sequence[str], texts: Sequence[str], directory: str | None, say: Callable[[str], None]) -> Retriever:
    build = partial(bm25.load_or_build, directory) if directory else bm25.BM25.build
    return build(doc_ids, texts, k1=r.k1, b=r.b, variant=r.variant, length=r.length,
                 progress=lambda it: tqdm(it, desc="index", disable=None, leave=False))
