"""Put rank_bm25 behind the interface: a baseline, and a pattern for functions of your own.

It is readable and slow (hundreds of times slower than retrieval/bm25/searcher.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from recr1.retrieval.bm25.analyzer import analyze

Search = Callable[[list[str], int], tuple[np.ndarray, np.ndarray]]


def make_rank_bm25_search(
    doc_ids: Sequence[str],
    texts: Sequence[str],
    k1: float,
    b: float,
    repeat_terms: str = "count",
) -> Search:
    """Return search(queries, k) of rank_bm25.BM25Okapi over Lucene's tokens.

    A hit has a score above 0; equal scores are ranked in the corpus' order.

    repeat_terms: a token that stands n times in the query counts n times ("count"), or "once".
    """
    from rank_bm25 import BM25Okapi

    tokens_per_doc = [analyze(text) for text in texts]
    index = BM25Okapi(tokens_per_doc, k1=k1, b=b)
    return partial(_search, index, repeat_terms)


def _search(
    index: Any, repeat_terms: str, queries: list[str], k: int
) -> tuple[np.ndarray, np.ndarray]:
    all_scores = np.stack(
        [_score_documents(index, query, repeat_terms) for query in queries]
    )  # (Q, D)
    doc_rows = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(all_scores, doc_rows, 1)
    return np.where(scores > 0, doc_rows, -1), scores


def _score_documents(index: Any, query: str, repeat_terms: str) -> np.ndarray:
    tokens = analyze(query)
    if repeat_terms == "once":
        tokens = list(dict.fromkeys(tokens))  # the first of each, in order
    return index.get_scores(tokens)  # (D,)
