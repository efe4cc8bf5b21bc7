"""rank_bm25 behind the interface: readable, slow (hundreds of times slower than retrieval/bm25/searcher.py), a
baseline. A pattern for functions of your own.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from recr1.retrieval.bm25.analyzer import analyze


def make_rank_bm25_search(doc_ids: list[str], texts: list[str], k1: float, b: float):
    """rank_bm25.BM25Okapi over Lucene's tokens -> search(queries, k). A hit has a score above 0;
    equal scores stand in the corpus' order.
    """
    from rank_bm25 import BM25Okapi

    return partial(_search, BM25Okapi([analyze(text) for text in texts], k1=k1, b=b))


def _search(index, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = np.stack([index.get_scores(analyze(query)) for query in queries])  # (Q, D)
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(scores, rows, 1)
    return np.where(scores > 0, rows, -1), scores
