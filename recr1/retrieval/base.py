"""What a retriever is: the one thing that rewards, evaluation and the command line know about BM25,
a dense index or a function of yours.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from ..stopping import Stopped
from ..terminal import said


class RetrieverError(ValueError):
    """The retriever cannot be used, or has failed. The message names it and the call, and says what
    to do.
    """


class _Late(Exception):
    pass


class Retriever(Protocol):
    """A fixed black box that turns query texts into ranked documents.

    doc_ids: the id of every row; the row numbers that `search` returns index this list. how: what
    searches, in words.
    """

    doc_ids: Sequence[str]
    how: str

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
    how = "none"
    search = None

    @classmethod
    def make(cls, *_) -> tuple[NoRetriever, str]:
        return cls(), ""


class Function:
    """Anybody's function behind that interface, and the place where what it does wrong becomes one
    RetrieverError.

    make(doc_ids, texts) is called once per process and returns search(queries, k), which gives rows
    (numbers of documents in the corpus' order) and scores, as anything that numpy reads as two
    arrays (Q, up to k); hits come first, higher scores are better. A call that raises, takes longer
    than `timeout` seconds (0: no limit) or returns anything else is not repeated and never counts
    as "no hits": a reward of 0 for a fault of the machinery would be learnt from.
    """

    def __init__(
        self,
        name: str,
        make: Callable,
        doc_ids: Sequence[str],
        texts: Sequence[str],
        timeout: float = 0.0,
    ):
        self.name = name
        self.how = name
        self.doc_ids = check_corpus(doc_ids, texts)
        self.timeout = timeout
        self.calls = 0
        try:
            # a copy: our rows stand for these ids, whatever is done to the list
            self._search = make(list(doc_ids), texts)
        except (Stopped, KeyboardInterrupt):
            raise
        except BaseException as e:
            raise RetrieverError(
                f"retriever {name}: called with the corpus ({len(doc_ids)} documents) it raised {said(e)}"
            ) from e
        if not callable(self._search):
            raise RetrieverError(
                f"retriever {name}: called with the corpus it must return a function search(queries, k), "
                f"it returned {type(self._search).__name__}"
            )

    def search(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """As Retriever.search. Raises RetrieverError."""
        rows, scores = nothing(len(queries), k)
        asked = [i for i, query in enumerate(queries) if query.strip()]
        if asked:
            found_rows, found_scores = self._checked([queries[i] for i in asked], k)
            rows[asked, : found_rows.shape[1]], scores[asked, : found_rows.shape[1]] = (
                found_rows,
                found_scores,
            )
        return rows, scores

    def _checked(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        self.calls += 1
        call = f"retriever {self.name}: call {self.calls} ({len(queries)} queries, k {k}, the first {queries[0][:80]!r})"
        try:
            found = self._within_limit(list(queries), k)
        except (Stopped, KeyboardInterrupt):
            raise
        except _Late:
            raise RetrieverError(
                f"{call} took longer than retriever.timeout = {self.timeout:g} s"
            ) from None
        except (
            BaseException
        ) as e:  # sys.exit(), a cancelled coroutine: they too are what the function did
            raise RetrieverError(f"{call} raised {said(e)}") from e
        try:
            rows, scores = found
            rows = np.asarray(rows)
            scores = np.asarray(scores, np.float32)
        except Exception as e:  # numpy asks the object itself
            raise RetrieverError(
                f"{call} must return two arrays, rows and scores, (Q, up to k) each: {said(e)}"
            ) from None
        if fault := _fault(rows, scores, len(queries), k, len(self.doc_ids)):
            raise RetrieverError(f"{call} returned {fault}")
        return rows.astype(np.int64), np.where(rows < 0, -np.inf, scores)

    def _within_limit(self, queries: list[str], k: int):
        if not self.timeout:
            return self._search(queries, k)
        outcome = []

        def call():
            try:
                outcome.append((self._search(queries, k), None))
            except BaseException as e:
                outcome.append((None, e))

        # Python cannot end it; it must not keep the process alive
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(self.timeout)
        if not outcome:
            raise _Late
        [(found, error)] = outcome
        if error is not None:
            raise error
        return found


def nothing(queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
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


def _fault(rows: np.ndarray, scores: np.ndarray, queries: int, k: int, documents: int) -> str:
    """What is wrong with a result; "" when nothing is."""
    if rows.ndim != 2 or rows.shape != scores.shape or len(rows) != queries or rows.shape[1] > k:
        return f"rows {rows.shape} and scores {scores.shape}, must be two of ({queries}, up to {k})"
    if rows.size and rows.dtype.kind not in "iu":
        return f"rows of type {rows.dtype}, must be whole numbers: documents in the corpus' order, from 0"
    hit = rows >= 0
    if rows.size and not -1 <= rows.min() <= rows.max() < documents:
        bad = rows[(rows < -1) | (rows >= documents)][0]
        return f"row {bad}, must be 0 to {documents - 1} (the corpus has {documents} documents), or -1 behind the last hit"
    if (hit[:, 1:] > hit[:, :-1]).any():
        return "a hit behind a row -1, which ends a ranking"
    if not np.isfinite(scores[hit]).all():
        return (
            f"the score {scores[hit & ~np.isfinite(scores)][0]} for a hit, must be a finite number"
        )
    with np.errstate(invalid="ignore"):
        if (hit[:, 1:] & (scores[:, 1:] > scores[:, :-1])).any():
            return "scores that rise, must be best first; a distance is to be turned round"
    ordered = np.sort(rows, 1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        return "a row twice in one ranking"
    return ""
