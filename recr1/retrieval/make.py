"""The config's `retriever` and a corpus -> the Retriever. Everything else knows only that interface."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from .. import config, dist, named
from . import bm25, dense
from .base import Function, Retriever
from .encoder import Encoder
from .okapi import rank_bm25

KEPT = ("bm25", "dense")                 # kinds whose index lies in a directory: one rank of a machine makes it, the others load it


def directory_of(r: config.Retriever, run: Path) -> str:
    """Where a run keeps its index: as configured, or beside its own folder."""
    return r.index_dir or str(run.parent / f".{run.name}.index")


def make(r: config.Retriever, doc_ids: Sequence[str], texts: Sequence[str], directory: str | None, say: Callable[[str], None] = print) -> Retriever:
    """directory: where the index is kept or comes to lie; None: in memory alone. Raises ConfigError, ModelFolderError, RetrieverError, WriteError,
    ValueError and OSError."""
    if r.kind == "bm25":
        build = partial(bm25.load_or_build, directory) if directory else bm25.BM25.build
        return build(doc_ids, texts, k1=r.k1, b=r.b, variant=r.variant, length=r.length,
                     progress=lambda it: tqdm(it, desc="index", disable=None, leave=False))
    if r.kind == "dense":
        encoder = Encoder(r.encoder, r.pooling, r.max_length, r.dtype, dist.device())
        return dense.load_or_build(directory, doc_ids, texts, encoder, prefixes=r.prefixes, dtype=r.dtype, index=r.index, ef_search=r.ef_search, say=say)
    if r.kind == "rank_bm25":
        return Function(r.kind, partial(rank_bm25, k1=r.k1, b=r.b), doc_ids, texts)
    return Function(r.kind, named.function("retriever.kind", r.kind, (*KEPT, "rank_bm25")), doc_ids, texts, r.timeout)
