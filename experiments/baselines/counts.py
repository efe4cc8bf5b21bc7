"""Recommend by counts alone: baselines of sequential recommendation.

They are popularity, the last title as a BM25 query, what followed the last item, and item-kNN. Each
is a Scorer: histories (Q lists of item numbers) and texts (Q) -> scores (Q, D), higher is better;
-inf: the method knows nothing about that item and does not rank it. Counts are over train without
its validation tenth. Legend: D items, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sequences import Sequence

from recr1.retrieval.bm25.searcher import BM25Searcher

Scorer = Callable[[list[list[int]], list[str]], np.ndarray]


def make_popularity(counts: list[int]) -> Scorer:
    """Score items by their interactions in train, the same for everybody."""
    row = mask_unranked(np.array(counts, np.float32))
    return lambda histories, texts: np.tile(row, (len(histories), 1))


def make_last_title(items: list[str], contents: list[str]) -> Scorer:
    """Search by BM25 with the last item's title: what Rec-R1's raw baseline is for sequences."""
    index = BM25Searcher.build(items, contents)
    number = {id: n for n, id in enumerate(items)}
    rows = np.array([number[id] for id in index.doc_ids])

    def scores(histories: list[list[int]], texts: list[str]) -> np.ndarray:
        found, values = index.search(texts, len(items))
        out = np.full((len(texts), len(items)), -np.inf, np.float32)
        for q in range(len(texts)):
            hits = found[q] >= 0
            out[q, rows[found[q, hits]]] = values[q, hits]
        return out

    return scores


def make_last_item(sequences: list[Sequence], n_items: int) -> Scorer:
    """How often an item followed the last one directly in train: a Markov chain of first order (the
    MC of Rendle et al. 2010).
    """
    follows: dict[int, np.ndarray] = {}
    pairs = [(a, b) for s in sequences for a, b, t in zip(s.items, s.items[1:], s.trained[1:]) if t]
    for a, b in pairs:
        follows.setdefault(a, np.zeros(n_items, np.float32))[b] += 1
    nothing = np.zeros(n_items, np.float32)
    return lambda histories, texts: mask_unranked(
        np.stack([follows.get(history[-1], nothing) for history in histories])
    )


def make_item_knn(sequences: list[list[Sequence]], n_items: int) -> Scorer:
    """Sum over the history of the cosine between items, each a 0/1 vector over the train users who
    have it (Sarwar et al. 2001); every neighbour counts.

    sequences: by user, one list each.
    """
    users = [
        np.unique([item for s in parts for item, t in zip(s.items, s.trained) if t]).astype(
            np.int64
        )
        for parts in sequences
    ]
    users = [row for row in users if len(row)]
    # (2, interactions): user, item
    pairs = np.concatenate(
        [np.stack([np.full(len(row), u), row]) for u, row in enumerate(users)], axis=1
    )
    n_users = np.bincount(pairs[1], minlength=n_items)  # (D,)
    order = np.argsort(pairs[1], kind="stable")
    of_item = np.split(pairs[0][order], np.cumsum(n_users)[:-1])  # users of each item
    norm = 1 / np.sqrt(np.maximum(n_users, 1))

    def scores(histories: list[list[int]], texts: list[str]) -> np.ndarray:
        out = np.zeros((len(histories), n_items), np.float32)
        for q, history in enumerate(histories):
            for item in set(history):
                if n_users[item]:
                    # users who have this one too
                    both = np.bincount(
                        np.concatenate([users[u] for u in of_item[item]]), minlength=n_items
                    )
                    both[item] = 0  # itself is no neighbour
                    out[q] += both * (norm * norm[item])
        return mask_unranked(out)

    return scores


def mask_unranked(scores: np.ndarray) -> np.ndarray:
    """Replace 0 by -inf: nothing speaks for that item."""
    return np.where(scores > 0, scores, -np.inf).astype(np.float32)
