"""The scorers and the two builds on made-up postings, against numpy."""

import numpy as np
import pytest

from recr1.retrieval.bm25 import numba_scorer, torch_scorer
from recr1.retrieval.bm25.impacts import build_postings
from recr1.retrieval.bm25.index import BM25Index


def random_index(D: int, V: int, n: int, levels: int, seed: int) -> BM25Index:
    """n postings a term, impacts of few levels: many ties. Some impacts are 0 or below, as in
    okapi.
    """
    rng = np.random.default_rng(seed)
    docs = [np.sort(rng.choice(D, min(D, rng.integers(n) + 1), replace=False)) for _ in range(V)]
    offsets = np.cumsum([0, *map(len, docs)])
    impacts = (rng.integers(-1, levels, offsets[-1]) * np.float32(0.37)).astype(np.float32)
    return BM25Index({}, None, None, offsets, np.concatenate(docs).astype(np.int32), impacts)


@pytest.mark.parametrize(
    "D, n, levels",
    [
        (200_000, 30_000, 1000),
        (200_000, 150_000, 3),
        (70_000, 50, 10**6),
        (65_536, 65_536, 40),
        (65_537, 500, 7),
        (3, 3, 3),
    ],
)
def test_scorers_against_a_whole_sort(D, n, levels):
    """Several blocks, edges of blocks, ties at the cut, thresholds that rise: the numba scorer, the
    torch scorer, its GPU path, and numpy.
    """
    found = random_index(D, 20, n, levels, D + n)
    arrays = found.offsets, found.docs, found.impacts, D
    rng = np.random.default_rng(1)
    sizes = [1, 3, 20, 0, 7]
    terms = np.concatenate([rng.choice(20, s, replace=False) for s in sizes])
    starts = np.cumsum([0, *sizes])
    weights = rng.integers(1, 4, len(terms)).astype(np.float32)
    for scorer, kind in (
        (numba_scorer.NumbaScorer(*arrays), np.float64),
        (torch_scorer.TorchScorer(*arrays, max_sum_bytes=2**22), np.float64),
        (torch_scorer.TorchScorer(*arrays, max_sum_bytes=0), np.float32),
    ):
        for k in {1, min(10, D), min(1000, D), D}:
            rows, scores = scorer.find_top_k(terms, weights, starts, k)
            for q in range(5):
                sums = np.zeros(D, kind)
                for t, w in zip(
                    terms[starts[q] : starts[q + 1]], weights[starts[q] : starts[q + 1]]
                ):
                    at = slice(found.offsets[t], found.offsets[t + 1])
                    sums[found.docs[at]] += w * found.impacts[at]
                order = np.argsort(-sums.astype(np.float32), kind="stable")[:k]
                order = order[sums[order].astype(np.float32) > 0]
                n = len(order)
                assert np.array_equal(rows[q, :n], order)
                assert np.array_equal(scores[q, :n], sums[order].astype(np.float32))
                assert (rows[q, n:] == -1).all()
                assert (scores[q, n:] == -np.inf).all()


@pytest.mark.parametrize("D", [7, 500])
def test_both_builds_give_the_same_postings(D):
    rng = np.random.default_rng(D)
    lengths = rng.integers(0, 30, D)
    tokens = np.minimum(rng.zipf(1.3, lengths.sum()), 400).astype(np.int32) - 1
    order = rng.permutation(D)
    for one, other in zip(
        build_postings(tokens, lengths, order, 450, False),
        build_postings(tokens, lengths, order, 450, True),
    ):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
