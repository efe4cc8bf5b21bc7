"""A retriever of a user's own: any function behind the interface, checked at every call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from recr1.retrieval.interface import RetrieverError, check_corpus, make_empty_result
from recr1.utils.interrupts import Stopped
from recr1.utils.terminal import describe_exception


class _TookTooLong(Exception):
    pass


class UserRetriever:
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
        self.description = name
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
                f"retriever {name}: called with the corpus ({len(doc_ids)} documents) it raised {describe_exception(e)}"
            ) from e
        if not callable(self._search):
            raise RetrieverError(
                f"retriever {name}: called with the corpus it must return a function search(queries, k), "
                f"it returned {type(self._search).__name__}"
            )

    def search(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """As Retriever.search. Raises RetrieverError."""
        rows, scores = make_empty_result(len(queries), k)
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
        except _TookTooLong:
            raise RetrieverError(
                f"{call} took longer than retriever.timeout = {self.timeout:g} s"
            ) from None
        except (
            BaseException
        ) as e:  # sys.exit(), a cancelled coroutine: they too are what the function did
            raise RetrieverError(f"{call} raised {describe_exception(e)}") from e
        try:
            rows, scores = found
            rows = np.asarray(rows)
            scores = np.asarray(scores, np.float32)
        except Exception as e:  # numpy asks the object itself
            raise RetrieverError(
                f"{call} must return two arrays, rows and scores, (Q, up to k) each: {describe_exception(e)}"
            ) from None
        if fault := _explain_bad_result(rows, scores, len(queries), k, len(self.doc_ids)):
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
            raise _TookTooLong
        [(found, error)] = outcome
        if error is not None:
            raise error
        return found


def _explain_bad_result(
    rows: np.ndarray, scores: np.ndarray, queries: int, k: int, documents: int
) -> str:
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
