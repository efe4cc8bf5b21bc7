"""Ranking metrics of one query, and how diverse and novel its list is. Pure functions.

Everywhere `ranked` holds document ids, best first, and `gains` maps a judged document id to its
gain. A document is relevant when its gain is above 0; an unjudged document has gain 0. A document
that occurs in `ranked` more than once counts at its first place; its repeats gain nothing but keep
their ranks, so they only cost. With no relevant document every metric is 0.0. `k` below 1 raises
ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from math import log2


def compute_ndcg(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """Compute the normalized discounted cumulative gain at k, in [0, 1].

    The gain is linear, the discount 1 / log2(rank + 1) with ranks from 1. The ideal list has the
    distinct relevant documents in order of gain and is cut at k too: ndcg_cut of trec_eval.
    """
    dcg = _compute_dcg(_list_gains(ranked, gains, k))
    relevant_gains = [gain for gain in gains.values() if gain > 0]
    relevant_gains.sort(reverse=True)
    ideal_dcg = _compute_dcg(relevant_gains[:k])
    if ideal_dcg > 0:
        return dcg / ideal_dcg
    return 0.0


def compute_recall(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """Compute the share of the relevant documents that are in the first k places."""
    num_hits = _count_positive(_list_gains(ranked, gains, k))
    if num_hits == 0:
        return 0.0
    return num_hits / _count_positive(gains.values())


def compute_reciprocal_rank(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """Compute 1 / rank of the first relevant document, 0.0 when the first k places have none.

    Its mean over queries is MRR@k.
    """
    for rank, gain in enumerate(_list_gains(ranked, gains, k), 1):
        if gain > 0:
            return 1 / rank
    return 0.0


def compute_hit_rate(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """Return 1.0 when a relevant document is in the first k places, else 0.0."""
    listed_gains = _list_gains(ranked, gains, k)
    return float(any(gain > 0 for gain in listed_gains))


def compute_intra_list_distance(
    ranked: Sequence[str], distance: Callable[[str, str], float], k: int
) -> float:
    """Compute the mean distance of all pairs of distinct documents in the first k places.

    0.0 where there is no pair (ILD: Smyth & McClave 2001).
    """
    distinct = dict.fromkeys(_take_first(ranked, k))
    distances = [distance(a, b) for a, b in combinations(distinct, 2)]
    if not distances:
        return 0.0
    return sum(distances) / len(distances)


def compute_novelty(
    ranked: Sequence[str], popularity: Mapping[str, float], total: float, k: int
) -> float:
    """Compute the mean of log2(total / popularity), in bits, over the distinct documents in the
    first k places; 0.0 where there is none.

    `total` counts all interactions, a document's popularity is its own number of them; a document
    that nobody has touched counts as touched once. (Mean self-information: Zhou et al. 2010, who
    count users; Castells, Hurley & Vargas 2015.)
    """
    information = []  # bits
    for doc_id in dict.fromkeys(_take_first(ranked, k)):
        num_interactions = max(popularity.get(doc_id, 0.0), 1.0)
        information.append(log2(total / num_interactions))
    if not information:
        return 0.0
    return sum(information) / len(information)


def _list_gains(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> list[float]:
    """List the gain of each of the first k places.

    A repeat, an unjudged document and a gain below 0 give 0.
    """
    remaining_gains = dict(gains)
    listed_gains = []
    for doc_id in _take_first(ranked, k):
        gain = remaining_gains.pop(doc_id, 0.0)  # pop: a repeat finds nothing
        listed_gains.append(max(gain, 0.0))
    return listed_gains


def _take_first(ranked: Sequence[str], k: int) -> Sequence[str]:
    if k < 1:
        raise ValueError(f"a metric @k needs k of at least 1, got {k}")
    return ranked[:k]


def _count_positive(gains: Iterable[float]) -> int:
    return sum(gain > 0 for gain in gains)


def _compute_dcg(gains: Iterable[float]) -> float:
    return sum(gain / log2(rank + 1) for rank, gain in enumerate(gains, 1))
