"""Make a retriever of a user's own function: any function, checked at every call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from recr1.retrieval.interface import (
    RetrieverError,
    check_corpus,
    make_empty_result,
    select_nonempty,
)
from recr1.utils.interrupts import Stopped
from recr1.utils.terminal import describe_exception

# search(queries, k) of a user: returns anything that numpy reads as rows and scores
UserSearch = Callable[[list[str], int], Any]


class _TookTooLong(Exception):
    pass


class UserRetriever:
    """Put anybody's function behind the Retriever interface.

    Whatever the function does wrong becomes one RetrieverError here. `make(doc_ids, texts)` is
    called once per process and returns search(queries, k), which gives rows (numbers of documents
    in the corpus' order) and scores, as anything that numpy reads as two arrays (Q, up to k); hits
    come first, higher scores are better. A call that raises, takes longer than `timeout` seconds
    (0: no limit) or returns anything else is not repeated and never counts as "no hits": the policy
    would learn from a reward of 0 that is only a fault of the machinery.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[list[str], Sequence[str]], UserSearch],
        doc_ids: Sequence[str],
        texts: Sequence[str],
        timeout: float = 0.0,
    ):
        self.name = name
        self.description = name
        self.doc_ids = check_corpus(doc_ids, texts)
        self.timeout = timeout
        self.calls = 0
        self._search = self._make_search(make, texts)

    def search(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search as Retriever.search does. Raises RetrieverError."""
        doc_rows, scores = make_empty_result(len(queries), k)
        nonempty = select_nonempty(queries)
        if nonempty:
            nonempty_queries = [queries[index] for index in nonempty]
            hit_rows, hit_scores = self._search_and_check(nonempty_queries, k)
            num_places = hit_rows.shape[1]
            doc_rows[nonempty, :num_places] = hit_rows
            scores[nonempty, :num_places] = hit_scores
        return doc_rows, scores

    def _make_search(
        self, make: Callable[[list[str], Sequence[str]], UserSearch], texts: Sequence[str]
    ) -> UserSearch:
        """Call the user's `make` with the corpus. Raises RetrieverError."""
        try:
            # a copy: our rows stand for these ids, whatever the function does to its list
            search = make(list(self.doc_ids), texts)
        except (Stopped, KeyboardInterrupt):
            raise
        except BaseException as e:
            raise RetrieverError(
                f"retriever {self.name}: called with the corpus "
                f"({len(self.doc_ids)} documents) it raised {describe_exception(e)}"
            ) from e
        if not callable(search):
            raise RetrieverError(
                f"retriever {self.name}: called with the corpus it must return a function "
                f"search(queries, k), it returned {type(search).__name__}"
            )
        return search

    def _search_and_check(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows (Q, up to k) int64 and scores of the user's search, once they are proved fit.

        Raises RetrieverError for a call that fails and for a result that is no ranking.
        """
        self.calls += 1
        call = (
            f"retriever {self.name}: call {self.calls} ({len(queries)} queries, k {k}, "
            f"the first {queries[0][:80]!r})"
        )

        # sys.exit() and a cancelled coroutine are the function's fault as well: BaseException.
        try:
            result = self._search_within_timeout(list(queries), k)
        except (Stopped, KeyboardInterrupt):
            raise
        except _TookTooLong:
            raise RetrieverError(
                f"{call} took longer than retriever.timeout = {self.timeout:g} s"
            ) from None
        except BaseException as e:
            raise RetrieverError(f"{call} raised {describe_exception(e)}") from e

        # numpy calls methods of the user's object, which can raise anything.
        try:
            doc_rows, scores = result
            doc_rows = np.asarray(doc_rows)
            scores = np.asarray(scores, np.float32)
        except Exception as e:
            raise RetrieverError(
                f"{call} must return two arrays, rows and scores, (Q, up to k) each: "
                f"{describe_exception(e)}"
            ) from None

        fault = _explain_bad_result(
            doc_rows, scores, num_queries=len(queries), k=k, num_docs=len(self.doc_ids)
        )
        if fault:
            raise RetrieverError(f"{call} returned {fault}")
        return doc_rows.astype(np.int64), np.where(doc_rows < 0, -np.inf, scores)

    def _search_within_timeout(self, queries: list[str], k: int) -> Any:
        """Return the user's result. Raises what the user's function raises, and _TookTooLong."""
        if not self.timeout:
            return self._search(queries, k)

        results = []
        errors = []

        def call() -> None:
            try:
                results.append(self._search(queries, k))
            except BaseException as e:
                errors.append(e)

        # Python cannot end a thread; a daemon at least does not keep the process alive.
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(self.timeout)
        if errors:
            raise errors[0]
        if not results:
            raise _TookTooLong
        return results[0]


def _explain_bad_result(
    doc_rows: np.ndarray, scores: np.ndarray, *, num_queries: int, k: int, num_docs: int
) -> str:
    """Say what is wrong with a result; return "" when nothing is."""
    fault = _explain_bad_shape(doc_rows, scores, num_queries, k)
    if fault:
        return fault
    fault = _explain_bad_rows(doc_rows, num_docs)
    if fault:
        return fault
    fault = _explain_bad_scores(doc_rows >= 0, scores)
    if fault:
        return fault

    # Row -1 may repeat, a document may not.
    ordered = np.sort(doc_rows, 1)
    repeats = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if repeats.any():
        return "a row twice in one ranking"
    return ""


def _explain_bad_shape(doc_rows: np.ndarray, scores: np.ndarray, num_queries: int, k: int) -> str:
    is_table = doc_rows.ndim == 2 and doc_rows.shape == scores.shape
    if not is_table or len(doc_rows) != num_queries or doc_rows.shape[1] > k:
        return (
            f"rows {doc_rows.shape} and scores {scores.shape}, "
            f"must be two of ({num_queries}, up to {k})"
        )
    return ""


def _explain_bad_rows(doc_rows: np.ndarray, num_docs: int) -> str:
    if not doc_rows.size:
        return ""
    if doc_rows.dtype.kind not in "iu":
        return (
            f"rows of type {doc_rows.dtype}, must be whole numbers: "
            "documents in the corpus' order, from 0"
        )
    is_outside = (doc_rows < -1) | (doc_rows >= num_docs)
    if is_outside.any():
        return (
            f"row {doc_rows[is_outside][0]}, must be 0 to {num_docs - 1} "
            f"(the corpus has {num_docs} documents), or -1 behind the last hit"
        )
    is_hit = doc_rows >= 0
    if (is_hit[:, 1:] > is_hit[:, :-1]).any():
        return "a hit behind a row -1, which ends a ranking"
    return ""


def _explain_bad_scores(is_hit: np.ndarray, scores: np.ndarray) -> str:
    is_bad = is_hit & ~np.isfinite(scores)
    if is_bad.any():
        return f"the score {scores[is_bad][0]} for a hit, must be a finite number"
    # behind the last hit any score is allowed, NaN too
    with np.errstate(invalid="ignore"):
        rises = is_hit[:, 1:] & (scores[:, 1:] > scores[:, :-1])
    if rises.any():
        return "scores that rise, must be best first; a distance is to be turned round"
    return ""
