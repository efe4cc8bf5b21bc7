"""Define what a retriever is.

This is all that rewards, evaluation and the command line know about BM25, a dense index or a
function of yours. A document has two names: its id, a string of the corpus file, and its row, the
number that arrays hold (Lucene's internal docID). `doc_ids[row]` is the id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class RetrieverError(ValueError):
    """Report that the retriever cannot be used, or has failed.

    The message names the retriever and the call, and says what to do.
    """


class Retriever(Protocol):
    """A fixed black box that turns query texts into ranked documents.

    doc_ids: the id of every row; the row numbers that `search` returns index this list.
    description: what searches, in words.
    """

    doc_ids: Sequence[str]
    description: str

    def search(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows (Q, k) int64 and the scores (Q, k) float32 of Q queries, best first.

        A row occurs at most once in a ranking. A query with fewer than k hits is filled up with row
        -1, score -inf; an empty query has no hits. A query's result does not depend on the other
        queries of the call. Raises ValueError for k < 1.
        """
        ...


class NoRetriever:
    """Take a retriever's place where the task searches nothing: no index is built."""

    doc_ids: Sequence[str] = ()
    description = "none"
    search: Any = None  # a task that searches nothing never calls it

    @classmethod
    def make(cls, *_: object) -> tuple[NoRetriever, str]:
        """Stand in for the function that factory.build_retriever returns."""
        return cls(), ""


def make_empty_result(num_queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and scores (Q, k) of no hits, to be written into. Raises ValueError for k < 1."""
    if k < 1:
        raise ValueError(f"k: must be at least 1, got {k}")
    doc_rows = np.full((num_queries, k), -1, np.int64)
    scores = np.full((num_queries, k), -np.inf, np.float32)
    return doc_rows, scores


def select_nonempty(queries: Sequence[str]) -> list[int]:
    """Return the indices of the queries that have any text: only those are searched."""
    return [index for index, query in enumerate(queries) if query.strip()]


def check_corpus(doc_ids: Sequence[str], texts: Sequence[str]) -> Sequence[str]:
    """Return the ids.

    Raises ValueError for an empty corpus, ids that repeat, or another number of texts than ids.
    """
    if len(doc_ids) != len(texts):
        raise ValueError(
            f"doc_ids and texts must be of the same length, got {len(doc_ids)} and {len(texts)}"
        )
    if not len(doc_ids):
        raise ValueError("doc_ids: the corpus is empty; a retriever needs at least one document")
    if len(set(doc_ids)) < len(doc_ids):
        duplicate = _find_duplicate(doc_ids)
        raise ValueError(
            f"doc_ids: {duplicate!r} stands there twice; every document needs its own id"
        )
    return doc_ids


def _find_duplicate(doc_ids: Sequence[str]) -> str:
    seen: set[str] = set()
    for doc_id in doc_ids:
        if doc_id in seen:
            return doc_id
        seen.add(doc_id)
    raise AssertionError("every id occurs once")
