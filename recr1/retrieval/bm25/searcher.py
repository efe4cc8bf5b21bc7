"""Search by BM25 (Robertson and Zaragoza 2009) over an inverted index of finished impacts.

A score is one sum per document: for each token of the query, add that token's impacts. What BM25
needs to know (tf, idf, lengths) went into the impacts when the index was built
(retrieval/bm25/impacts.py), so searching knows no formula. One of two scorers over the same arrays
computes the sum.

Legend: Q queries, T terms of all queries together, D documents.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from recr1.retrieval.bm25 import numba_scorer, torch_scorer
from recr1.retrieval.bm25.analyzer import analyze
from recr1.retrieval.bm25.impacts import BM25Parameters
from recr1.retrieval.bm25.index import BM25Index, open_or_build
from recr1.retrieval.interface import make_empty_result

SCORERS = ("torch", "numba")

REPEAT_TERMS = ("count", "once")

CPU = torch.device("cpu")

# queries x documents: below that, starting threads takes longer than they save
WORTH_THREADS = 10**7


class QueryTerms(NamedTuple):
    """The terms of Q queries in one array; query q has terms[starts[q]:starts[q + 1]]."""

    terms: np.ndarray  # (T,) int64, term ids
    weights: np.ndarray  # (T,) float32, how often the query has the term, or 1
    starts: np.ndarray  # (Q + 1,) int64

    @classmethod
    def flatten(cls, term_counts: list[dict[int, int]]) -> QueryTerms:
        """Take {term id: how often} of every query."""
        terms: list[int] = []
        weights: list[int] = []
        for counts in term_counts:
            terms.extend(counts.keys())
            weights.extend(counts.values())
        num_terms = [len(counts) for counts in term_counts]
        return cls(
            terms=np.array(terms, np.int64),
            weights=np.array(weights, np.float32),
            starts=np.cumsum([0, *num_terms]),
        )

    def select(self, query_indices: np.ndarray) -> QueryTerms:
        """Return the terms of these queries only, in their order."""
        first = self.starts[query_indices]
        num_terms = self.starts[query_indices + 1] - first
        starts = np.cumsum([0, *num_terms])
        # from a term's place in the selection to its place among all terms
        shift = np.repeat(first - starts[:-1], num_terms)
        positions = np.arange(starts[-1]) + shift
        return QueryTerms(self.terms[positions], self.weights[positions], starts)


class BM25Searcher:
    """Implement the Retriever interface; rows are the documents in ascending order of their ids.

    Args:
        scorer: "torch", on `device`, or "numba" (extra [fast], CPU): see their files. On a CPU, as
            many threads as torch has share a batch of queries.
        reproduce_upstream_query_bug: search for "(contents:QUERY)" as the published code does.
            Lucene's tokenizer joins letter:letter, so a query that begins with a letter loses its
            first word, and another gains the token `content`.
        repeat_terms: what a token that stands n times in the query counts: "count": n times, as in
            Lucene; "once": like one that stands there once, so that nothing is gained by saying a
            word again.

    Raises ValueError for a scorer that is not there, and for another repeat_terms.
    """

    def __init__(
        self,
        index: BM25Index,
        scorer: str = "torch",
        reproduce_upstream_query_bug: bool = False,
        device: torch.device = CPU,
        repeat_terms: str = "count",
    ):
        check_scorer(scorer)
        check_repeat_terms(repeat_terms)
        self.index = index
        self.doc_ids: Sequence[str] = index.doc_ids
        self.reproduce_upstream_query_bug = reproduce_upstream_query_bug
        self.repeat_terms = repeat_terms
        self.device = device
        arrays = (index.offsets, index.docs, index.impacts, len(index.doc_ids))
        self.scorer: numba_scorer.NumbaScorer | torch_scorer.TorchScorer
        if scorer == "numba":
            self.scorer = numba_scorer.NumbaScorer(*arrays)
            device_type = "cpu"
        else:
            self.scorer = torch_scorer.TorchScorer(*arrays, device)
            device_type = device.type
        options = ", upstream wrapping" if reproduce_upstream_query_bug else ""
        if repeat_terms == "once":
            options += ", repeated terms count once"
        self.description = (
            "bm25 ({variant}, k1 {k1:g}, b {b:g}, length {length}".format(**index.meta)
            + f"{options}; scorer {scorer} on {device_type})"
        )
        cached = lru_cache(maxsize=1 << 16)
        self._find_term_id = cached(index.terms.find)

    @classmethod
    def build(
        cls,
        doc_ids: Sequence[str],
        texts: Sequence[str],
        *,
        scorer: str = "torch",
        reproduce_upstream_query_bug: bool = False,
        repeat_terms: str = "count",
        **parameters: Any,
    ) -> BM25Searcher:
        """Build the searcher of D texts, in memory.

        parameters: those of impacts.BM25Parameters. Raises ValueError as BM25Index.of_texts and
        BM25Parameters do.
        """
        check_scorer(scorer)
        check_repeat_terms(repeat_terms)
        bm25_parameters = BM25Parameters(**parameters)
        index = BM25Index.of_texts(doc_ids, texts, bm25_parameters, scorer == "numba")
        return cls(index, scorer, reproduce_upstream_query_bug, repeat_terms=repeat_terms)

    def search(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows (Q, k) int64 and scores (Q, k) float32, best first.

        Past the last hit the row is -1, the score -inf. A hit has at least one token of the query
        and a score above 0 (in "okapi" a common term may have 0 or less). A token that the query
        repeats counts as often as it occurs, or once (repeat_terms); the order of words does not
        matter. Equal scores are ranked by document id, which also decides which of them are among
        the k. Raises ValueError for k < 1.
        """
        term_counts = [self._count_terms(query) for query in queries]
        return self.rank(term_counts, k)

    def rank(self, term_counts: list[dict[int, int]], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search as `search` does, for Q queries {term id: how often}, ids ascending."""
        num_queries = len(term_counts)
        doc_rows, scores = make_empty_result(num_queries, k)
        query_terms = QueryTerms.flatten(term_counts)
        depth = min(k, len(self.doc_ids))

        def rank_share(query_indices: np.ndarray) -> None:
            share_rows, share_scores = self.scorer.find_top_k(
                *query_terms.select(query_indices), depth
            )
            doc_rows[query_indices, :depth] = share_rows
            scores[query_indices, :depth] = share_scores

        num_threads = self._count_threads(num_queries)
        if num_threads < 2:
            rank_share(np.arange(num_queries))
            return doc_rows, scores

        # Each thread gets as many heavy queries as the others.
        cost = self._count_postings(query_terms)
        heaviest_first = np.argsort(-cost, kind="stable")
        shares = [heaviest_first[first::num_threads] for first in range(num_threads)]

        # torch's number of threads is each thread's own setting.
        with ThreadPoolExecutor(
            num_threads, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            list(pool.map(rank_share, shares))
        # The setting also is what later threads begin with: say ours again.
        torch.set_num_threads(torch.get_num_threads())
        return doc_rows, scores

    def explain(self, query: str, row: int) -> list[tuple[str, float]]:
        """Return (token, what it adds to the score of this row), largest first.

        Lists each distinct token of the query that the document has.
        """
        contributions = []
        for term_id, count in self._count_terms(query).items():
            first, last = self.index.offsets[term_id : term_id + 2]
            posting = first + np.searchsorted(self.index.docs[first:last], row)
            if posting < last and self.index.docs[posting] == row:
                token = self.index.terms[term_id]
                contribution = float(count * self.index.impacts[posting])
                contributions.append((token, contribution))
        return sorted(contributions, key=lambda pair: -pair[1])

    def _count_terms(self, query: str) -> dict[int, int]:
        """Return {term id: how often it counts}, ids ascending, of the query's terms that the index
        has.
        """
        text = f"(contents:{query})" if self.reproduce_upstream_query_bug else query
        token_counts = Counter(analyze(text))
        term_counts = {}
        for token, count in token_counts.items():
            term_id = self._find_term_id(token)
            if term_id >= 0:
                term_counts[term_id] = 1 if self.repeat_terms == "once" else count
        return dict(sorted(term_counts.items()))

    def _count_threads(self, num_queries: int) -> int:
        """Return how many threads share a batch: more than one only on a CPU, for much work."""
        num_sums = num_queries * len(self.doc_ids)
        if self.device.type != "cpu" or num_sums < WORTH_THREADS:
            return 1
        return min(torch.get_num_threads(), num_queries)

    def _count_postings(self, query_terms: QueryTerms) -> np.ndarray:
        """Return (Q,): how many postings a query adds."""
        offsets = self.index.offsets
        per_term = offsets[query_terms.terms + 1] - offsets[query_terms.terms]  # (T,)
        # reduceat takes no start behind the last value, and gives an empty query the next one's
        per_query = np.add.reduceat(np.append(per_term, 0), query_terms.starts[:-1])
        has_terms = np.diff(query_terms.starts) > 0
        return per_query * has_terms


def load_or_build_bm25(
    directory: str | Path | None,
    corpus: str | os.PathLike,
    *,
    on_bad_line: str = "stop",
    scorer: str = "torch",
    reproduce_upstream_query_bug: bool = False,
    device: torch.device = CPU,
    repeat_terms: str = "count",
    **parameters: Any,
) -> BM25Searcher:
    """Return BM25 over the index of a directory.

    Where there is none it is built from the corpus, JSONL[.gz], and saved there. A directory of
    None: in memory. An index that is torn, of a corpus that has changed since, or of other
    parameters is refused (IndexRefused, with the command that makes it anew). Raises DataError,
    ValueError and OSError as well.
    """
    check_scorer(scorer)
    check_repeat_terms(repeat_terms)
    source = (corpus, BM25Parameters(**parameters), on_bad_line, scorer == "numba")
    if directory:
        index = open_or_build(directory, *source)
    else:
        index = BM25Index.of_file(*source)
    return BM25Searcher(index, scorer, reproduce_upstream_query_bug, device, repeat_terms)


def check_repeat_terms(repeat_terms: str) -> None:
    """Raise ValueError for a value that has no meaning."""
    if repeat_terms not in REPEAT_TERMS:
        raise ValueError(
            f"repeat_terms: must be one of {', '.join(REPEAT_TERMS)}, got {repeat_terms!r}"
        )


def check_scorer(scorer: str) -> None:
    """Raise ValueError for a scorer that is not there."""
    if scorer not in SCORERS:
        raise ValueError(f"scorer: must be one of {', '.join(SCORERS)}, got {scorer!r}")
    if scorer == "numba":
        try:
            import numba  # noqa: F401
        except ImportError:
            raise ValueError(
                "scorer: numba needs the package numba, which is not installed here: "
                "pip install 'recr1[fast]'; scorer torch runs without it"
            ) from None
