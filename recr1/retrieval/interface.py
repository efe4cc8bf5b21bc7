"""What a retriever is: the one thing that rewards, evaluation and the command line know about BM25,
a dense index or a function of yours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class RetrieverError(ValueError):
    """The retriever cannot be used, or has failed. The message names it and the call, and says what
    to do.
    """


class Retriever(Protocol):
    """A fixed black box that turns query texts into ranked documents.

    doc_ids: the id of every row; the row numbers that `search` returns index this list. how: what
    searches, in words.
    """

    doc_ids: Sequence[str]
    description: str

    def search(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Q queries -> rows (Q, k) int64 and scores (Q, k) float32, best first.

        A row number stands at most once in a ranking. A query with fewer than k hits ends in row
        -1, score -inf; an empty query has none. A query's result does not depend on the other
        queries of the call. k < 1 raises ValueError.
        """
        ...


class NoRetriever:
    """In place of one, for a task that searches nothing: no index is made."""

    doc_ids = ()
    description = "none"
    search = None

    @classmethod
    def make(cls, *_) -> tuple[NoRetriever, str]:
        return cls(), ""


def make_empty_result(queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The result (Q, k) of no hits, to be written into. Raises ValueError for k < 1."""
    if k < 1:
        raise ValueError(f"k: must be at least 1, got {k}")
    return np.full((queries, k), -1, np.int64), np.full((queries, k), -np.inf, np.float32)


def check_corpus(doc_ids: Sequence[str], texts: Sequence[str]) -> Sequence[str]:
    """The ids. Raises ValueError for an empty corpus, ids that repeat, or another number of texts."""
    if len(doc_ids) != len(texts):
        raise ValueError(
            f"doc_ids and texts must be of the same length, got {len(doc_ids)} and {len(texts)}"
        )
    if not len(doc_ids):
        raise ValueError("doc_ids: the corpus is empty; a retriever needs at least one document")
    if len(set(doc_ids)) < len(doc_ids):
        seen = set()
        twice = next(id for id in doc_ids if id in seen or seen.add(id))
        raise ValueError(f"doc_ids: {twice!r} stands there twice; every document needs its own id")
    return doc_ids
