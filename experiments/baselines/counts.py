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
    item_numbers = {id: number for number, id in enumerate(items)}
    item_of_row = np.array([item_numbers[id] for id in index.doc_ids])

    def score(histories: list[list[int]], texts: list[str]) -> np.ndarray:
        hits, hit_scores = index.search(texts, len(items))
        scores = np.full((len(texts), len(items)), -np.inf, np.float32)
        for query in range(len(texts)):
            is_hit = hits[query] >= 0
            hit_items = item_of_row[hits[query, is_hit]]
            scores[query, hit_items] = hit_scores[query, is_hit]
        return scores

    return score


def make_last_item(sequences: list[Sequence], n_items: int) -> Scorer:
    """Count how often an item followed the last one directly in train.

    It is a Markov chain of first order (the MC of Rendle et al. 2010).
    """
    followers: dict[int, np.ndarray] = {}
    for sequence in sequences:
        next_items = sequence.items[1:]
        for item, next_item, is_train in zip(sequence.items, next_items, sequence.trained[1:]):
            if is_train:
                counts = followers.setdefault(item, np.zeros(n_items, np.float32))
                counts[next_item] += 1
    no_followers = np.zeros(n_items, np.float32)

    def score(histories: list[list[int]], texts: list[str]) -> np.ndarray:
        rows = [followers.get(history[-1], no_followers) for history in histories]
        return mask_unranked(np.stack(rows))

    return score


def make_item_knn(sequences: list[list[Sequence]], n_items: int) -> Scorer:
    """Sum over the history the cosine between items (Sarwar et al. 2001); every neighbor counts.

    An item is a 0/1 vector over the train users who have it.

    sequences: by user, one list each.
    """
    user_items = []  # each user's train items, each once
    for user_sequences in sequences:
        items = list_train_items(user_sequences)
        if items:
            user_items.append(np.unique(items).astype(np.int64))
    interactions = []
    for user, items in enumerate(user_items):
        interactions.append(np.stack([np.full(len(items), user), items]))
    users, items = np.concatenate(interactions, axis=1)  # (interactions,) each
    num_users = np.bincount(items, minlength=n_items)  # (D,)
    by_item = np.argsort(items, kind="stable")
    users_of_item = np.split(users[by_item], np.cumsum(num_users)[:-1])
    norm = 1 / np.sqrt(np.maximum(num_users, 1))

    def score(histories: list[list[int]], texts: list[str]) -> np.ndarray:
        scores = np.zeros((len(histories), n_items), np.float32)
        for query, history in enumerate(histories):
            for item in set(history):
                if num_users[item]:
                    neighbors = np.concatenate([user_items[user] for user in users_of_item[item]])
                    num_common_users = np.bincount(neighbors, minlength=n_items)
                    num_common_users[item] = 0  # an item is no neighbor of itself
                    scores[query] += num_common_users * (norm * norm[item])
        return mask_unranked(scores)

    return score


def list_train_items(sequences: list[Sequence]) -> list[int]:
    """Return the items of the sequences that are train data."""
    items = []
    for sequence in sequences:
        for item, is_train in zip(sequence.items, sequence.trained):
            if is_train:
                items.append(item)
    return items


def mask_unranked(scores: np.ndarray) -> np.ndarray:
    """Replace 0 by -inf: nothing speaks for that item."""
    return np.where(scores > 0, scores, -np.inf).astype(np.float32)
