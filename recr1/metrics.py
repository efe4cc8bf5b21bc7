"""Ranking metrics of one query, and the interval of a mean over queries. Pure functions.

Everywhere `ranked` holds document ids, best first; `gains` maps judged document id -> gain, and a document
is relevant when its gain is above 0. An unjudged document gains 0. A document that stands in `ranked` more
than once counts at its first place; its repeats gain nothing but keep their ranks, so they only cost.
With no relevant document every metric is 0.0. `k` below 1 raises ValueError.
"""
from collections.abc import Mapping, Sequence
from math import log2

import numpy as np


def ndcg(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """Normalised discounted cumulative gain at k, in [0, 1]: gain / log2(rank + 1), linear gain, rank from 1.

    The ideal ranks the distinct relevant documents by gain and is cut at k too: ndcg_cut of trec_eval.
    """
    dcg = _dcg(_gains_by_rank(ranked, gains, k))
    ideal = _dcg(sorted((gain for gain in gains.values() if gain > 0), reverse=True)[:k])
    return dcg / ideal if ideal > 0 else 0.0


def recall(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """Share of the relevant documents that stand in the first k places."""
    found = sum(gain > 0 for gain in _gains_by_rank(ranked, gains, k))
    return found / sum(gain > 0 for gain in gains.values()) if found else 0.0


def reciprocal_rank(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """1 / rank of the first relevant document, 0.0 when there is none in the first k places; its mean is MRR@k."""
    return next((1 / rank for rank, gain in enumerate(_gains_by_rank(ranked, gains, k), 1) if gain > 0), 0.0)


def hit_rate(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """1.0 when a relevant document stands in the first k places, else 0.0."""
    return float(any(gain > 0 for gain in _gains_by_rank(ranked, gains, k)))


def bootstrap_ci(values: np.ndarray, seed: int = 0, samples: int = 10_000) -> tuple[float, float]:
    """95% percentile bootstrap interval (low, high) of the mean of `values` (n,).

    To compare two systems pass their per-query differences: the interval is then the paired one.
    Raises ValueError when `values` is empty, not one-dimensional or not finite. (Efron & Tibshirani 1993, ch. 13)
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"bootstrap_ci needs a non-empty (n,) array of finite values, got shape {values.shape}")
    n, rng = len(values), np.random.default_rng(seed)
    rows = max(1, 1_000_000 // n)       # resamples at a time: about 16 MB, whatever n and `samples` are
    means = [values[rng.integers(n, size=(min(rows, samples - start), n))].mean(axis=1) for start in range(0, samples, rows)]
    return tuple(np.percentile(np.concatenate(means), [2.5, 97.5]).tolist())


def _gains_by_rank(ranked, gains, k):
    """Gain at each of the first k places; a repeat, an unjudged document and a gain below 0 give 0."""
    if k < 1:
        raise ValueError(f"a metric @k needs k of at least 1, got {k}")
    left = dict(gains)                  # pop: the second time a document comes, it is no longer there
    return [max(left.pop(doc, 0.0), 0.0) for doc in ranked[:k]]


def _dcg(gains):
    return sum(gain / log2(rank + 1) for rank, gain in enumerate(gains, 1))
