"""BM25 (Robertson and Zaragoza 2009) over an inverted index that holds every term's finished
contribution to a score.

A score is one sum per document: for each token of the query, add that token's impacts. What BM25
needs to know (tf, idf, lengths) went into the impacts when the index was built (retrieval/bm25/impacts.py), so
searching knows no formula. The sum is made by one of two scorers over the same arrays.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from recr1.retrieval.bm25 import numba_scorer, torch_scorer
from recr1.retrieval.bm25.analyzer import analyze
from recr1.retrieval.bm25.impacts import BM25Parameters
from recr1.retrieval.bm25.index import BM25Index, open_or_build

SCORERS = ("torch", "numba")

# queries x documents: below that, starting threads takes longer than they save
WORTH_THREADS = 10**7


class BM25Searcher:
    """A Retriever. doc_ids: the id of every row, ascending.

    scorer: "torch", on `device`, or "numba" (extra [fast], CPU): see their files. On a CPU as many
    threads as torch has share a batch of queries. upstream_wrapping: search for "(contents:QUERY)"
    as the published code does. Lucene's tokenizer joins letter:letter, so a query that begins with
        a letter loses its first word, and another gains the token `content`.
    Raises ValueError for a scorer that is not there.
    """

    def __init__(
        self,
        index: BM25Index,
        scorer: str = "torch",
        upstream_wrapping: bool = False,
        device: torch.device = torch.device("cpu"),
    ):
        check_scorer(scorer)
        self.index = index
        self.doc_ids = index.doc_ids
        self.wrapped = upstream_wrapping
        self.device = device
        arrays = index.offsets, index.docs, index.impacts, len(index.doc_ids)
        self.scorer = (
            numba_scorer.NumbaScorer(*arrays)
            if scorer == "numba"
            else torch_scorer.TorchScorer(*arrays, device)
        )
        self.description = "bm25 ({variant}, k1 {k1:g}, b {b:g}, length {length}{wrapped}; scorer {scorer} on {device})".format(
            **index.meta,
            wrapped=", upstream wrapping" if upstream_wrapping else "",
            scorer=scorer,
            device="cpu" if scorer == "numba" else device.type,
        )
        self._number = lru_cache(maxsize=1 << 16)(index.terms.find)

    @classmethod
    def build(
        cls,
        doc_ids: Sequence[str],
        texts: Sequence[str],
        *,
        scorer: str = "torch",
        upstream_wrapping: bool = False,
        **parameters,
    ) -> "BM25Searcher":
        """Of D texts, in memory; parameters are those of impacts.BM25Parameters. Raises ValueError as
        Index.of_texts and BM25 do.
        """
        check_scorer(scorer)
        return cls(
            BM25Index.of_texts(doc_ids, texts, BM25Parameters(**parameters), scorer == "numba"),
            scorer,
            upstream_wrapping,
        )

    def search(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Q texts -> rows (Q, k) int64 and scores (Q, k) float32, best first; past the last hit row
        -1, score -inf.

        A hit has at least one token of the query and a score above 0 (in "okapi" a common term may
        have 0 or less). A token that the query repeats counts as often as it stands there; the
        order of words does not matter. Equal scores are ranked by document id, which also decides
        which of them are among the k. Raises ValueError for k < 1.
        """
        return self.rank([self._terms(query) for query in queries], k)

    def rank(self, found: list[dict[int, int]], k: int) -> tuple[np.ndarray, np.ndarray]:
        """`search` for Q queries that are terms' numbers already: {number: how often}, ascending."""
        if k < 1:
            raise ValueError(f"k: must be at least 1, got {k}")
        rows = np.full((len(found), k), -1, np.int64)
        scores = np.full((len(found), k), -np.inf, np.float32)
        starts = np.cumsum([0, *map(len, found)])
        terms = np.array([t for part in found for t in part], np.int64)
        weights = np.array([count for part in found for count in part.values()], np.float32)
        depth = min(k, len(self.doc_ids))
        offsets = self.index.offsets

        def share(part: np.ndarray):
            places = (
                np.concatenate([np.arange(starts[q], starts[q + 1]) for q in part])
                if len(part)
                else np.empty(0, np.int64)
            )
            lengths = np.cumsum([0, *(starts[part + 1] - starts[part])])
            rows[part, :depth], scores[part, :depth] = self.scorer.top(
                terms[places], weights[places], lengths, depth
            )

        many = self.device.type == "cpu" and len(found) * len(self.doc_ids) >= WORTH_THREADS
        threads = min(torch.get_num_threads(), len(found)) if many else 1
        if threads < 2:
            share(np.arange(len(found)))
            return rows, scores
        cost = np.add.reduceat(np.append(offsets[terms + 1] - offsets[terms], 0), starts[:-1]) * (
            np.diff(starts) > 0
        )
        heaviest = np.argsort(-cost, kind="stable")
        # it is each thread's own
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(share, (heaviest[i::threads] for i in range(threads))))
        # what threads that are made later begin with
        torch.set_num_threads(torch.get_num_threads())
        return rows, scores

    def explain(self, query: str, row: int) -> list[tuple[str, float]]:
        """What each distinct token of the query adds to the score of this row, largest first; only
        tokens it has.
        """
        parts = []
        for t, count in self._terms(query).items():
            first, last = self.index.offsets[t : t + 2]
            at = first + np.searchsorted(self.index.docs[first:last], row)
            if at < last and self.index.docs[at] == row:
                parts.append((self.index.terms[t], float(count * self.index.impacts[at])))
        return sorted(parts, key=lambda part: -part[1])

    def _terms(self, query: str) -> dict[int, int]:
        """{term's number: how often the query has it}, of the tokens that the index has, in
        ascending order.
        """
        counts = Counter(analyze(f"(contents:{query})" if self.wrapped else query))
        return dict(
            sorted((t, count) for token, count in counts.items() if (t := self._number(token)) >= 0)
        )


def load_or_build_bm25(
    directory: str | Path | None,
    corpus: str | os.PathLike,
    *,
    on_bad_line: str = "stop",
    scorer: str = "torch",
    upstream_wrapping: bool = False,
    device: torch.device = torch.device("cpu"),
    **parameters,
) -> BM25Searcher:
    """BM25 over the index that lies in the directory; where there is none it is made from the
    corpus, JSONL[.gz], and left there. None: in memory.

    An index that is torn, of a corpus that has changed since, or of other parameters is refused
    (IndexRefused, with the command that makes it anew). Raises DataError, ValueError and OSError as
    well.
    """
    check_scorer(scorer)
    made_of = corpus, BM25Parameters(**parameters), on_bad_line, scorer == "numba"
    return BM25Searcher(
        open_or_build(directory, *made_of) if directory else BM25Index.of_file(*made_of),
        scorer,
        upstream_wrapping,
        device,
    )


def check_scorer(scorer: str) -> None:
    """Raises ValueError for a scorer that is not there."""
    if scorer not in SCORERS:
        raise ValueError(f"scorer: must be one of {', '.join(SCORERS)}, got {scorer!r}")
    if scorer == "numba":
        try:
            import numba  # noqa: F401
        except ImportError:
            raise ValueError(
                "scorer: numba needs the package numba, which is not installed here: pip install 'recr1[fast]'; "
                "scorer torch runs without it"
            ) from None
