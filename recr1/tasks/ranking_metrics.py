"""Ranking metrics of one query, and what its list is like. Pure functions.

Everywhere `ranked` holds document ids, best first; `gains` maps judged document id -> gain, and a
document is relevant when its gain is above 0. An unjudged document gains 0. A document that stands
in `ranked` more than once counts at its first place; its repeats gain nothing but keep their ranks,
so they only cost. With no relevant document every metric is 0.0. `k` below 1 raises ValueError.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import log2


def compute_ndcg(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """Normalised discounted cumulative gain at k, in [0, 1]: gain / log2(rank + 1), linear gain,
    rank from 1.

    The ideal ranks the distinct relevant documents by gain and is cut at k too: ndcg_cut of
    trec_eval.
    """
    dcg = _compute_dcg(_list_gains(ranked, gains, k))
    ideal = _compute_dcg(sorted((gain for gain in gains.values() if gain > 0), reverse=True)[:k])
    return dcg / ideal if ideal > 0 else 0.0


def compute_recall(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """Share of the relevant documents that stand in the first k places."""
    found = sum(gain > 0 for gain in _list_gains(ranked, gains, k))
    return found / sum(gain > 0 for gain in gains.values()) if found else 0.0


def compute_reciprocal_rank(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """1 / rank of the first relevant document, 0.0 when there is none in the first k places; its
    mean is MRR@k.
    """
    return next(
        (1 / rank for rank, gain in enumerate(_list_gains(ranked, gains, k), 1) if gain > 0), 0.0
    )


def compute_hit_rate(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """1.0 when a relevant document stands in the first k places, else 0.0."""
    return float(any(gain > 0 for gain in _list_gains(ranked, gains, k)))


def compute_intra_list_distance(
    ranked: Sequence[str], distance: Callable[[str, str], float], k: int
) -> float:
    """Mean distance of all pairs of distinct documents in the first k places, 0.0 where there is no
    pair (ILD: Smyth & McClave 2001).
    """
    pairs = list(combinations(dict.fromkeys(_take_first(ranked, k)), 2))
    return sum(distance(a, b) for a, b in pairs) / len(pairs) if pairs else 0.0


def compute_novelty(
    ranked: Sequence[str], popularity: Mapping[str, float], total: float, k: int
) -> float:
    """Mean of log2(total / popularity), in bits, of the distinct documents in the first k places,
    0.0 where there is none.

    A document's popularity is its part of `total`, all interactions there are; one nobody has
    touched counts as touched once. (Mean self-information: Zhou et al. 2010, who count users;
    Castells, Hurley & Vargas 2015)
    """
    bits = [
        log2(total / max(popularity.get(doc, 0.0), 1.0))
        for doc in dict.fromkeys(_take_first(ranked, k))
    ]
    return sum(bits) / len(bits) if bits else 0.0


def _list_gains(ranked, gains, k):
    """Gain at each of the first k places; a repeat, an unjudged document and a gain below 0 give 0."""
    left = dict(gains)  # pop: the second time a document comes, it is no longer there
    return [max(left.pop(doc, 0.0), 0.0) for doc in _take_first(ranked, k)]


def _take_first(ranked, k):
    if k < 1:
        raise ValueError(f"a metric @k needs k of at least 1, got {k}")
    return ranked[:k]


def _compute_dcg(gains):
    return sum(gain / log2(rank + 1) for rank, gain in enumerate(gains, 1))
