"""The scorers and the two builds on made-up postings, against numpy."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from recr1.retrieval.bm25 import numba_scorer, torch_scorer
from recr1.retrieval.bm25.impacts import build_postings
from recr1.retrieval.bm25.index import BM25Index
from recr1.retrieval.bm25.torch_scorer import TorchScorer

NUM_TERMS = 20

# documents, most postings of a term, levels of impact
SHAPES = [
    (200_000, 30_000, 1000),
    (200_000, 150_000, 3),
    (70_000, 50, 10**6),
    (65_536, 65_536, 40),
    (65_537, 500, 7),
    (3, 3, 3),
]


def build_random_index(num_docs: int, max_postings: int, levels: int, seed: int) -> BM25Index:
    """Build up to max_postings postings a term, impacts of few levels: many ties. Some impacts are
    0 or below, as in okapi.
    """
    rng = np.random.default_rng(seed)
    docs_of_terms = []
    for _ in range(NUM_TERMS):
        size = min(num_docs, rng.integers(max_postings) + 1)
        docs_of_term = rng.choice(num_docs, size, replace=False)
        docs_of_terms.append(np.sort(docs_of_term))
    num_postings = [len(docs_of_term) for docs_of_term in docs_of_terms]
    offsets = np.cumsum([0, *num_postings])
    docs = np.concatenate(docs_of_terms).astype(np.int32)
    impact_levels = rng.integers(-1, levels, offsets[-1])
    impacts = (impact_levels * np.float32(0.37)).astype(np.float32)
    return BM25Index({}, None, None, offsets, docs, impacts)


def sum_impacts(index: BM25Index, num_docs: int, terms, weights, dtype) -> np.ndarray:
    """Return the score (num_docs,) of every document, each sum in the terms' order in dtype."""
    sums = np.zeros(num_docs, dtype)
    for term, weight in zip(terms, weights):
        first = index.offsets[term]
        last = index.offsets[term + 1]
        docs = index.docs[first:last]
        sums[docs] += weight * index.impacts[first:last]
    return sums.astype(np.float32)


@pytest.mark.parametrize("num_docs, max_postings, levels", SHAPES)
def test_scorers_against_a_whole_sort(num_docs, max_postings, levels):
    """Several blocks, edges of blocks, ties at the cut, thresholds that rise: the numba scorer, the
    torch scorer, its GPU path, and numpy.
    """
    index = build_random_index(num_docs, max_postings, levels, seed=num_docs + max_postings)
    arrays = (index.offsets, index.docs, index.impacts, num_docs)
    scorers = [
        (numba_scorer.NumbaScorer(*arrays), np.float64),
        (torch_scorer.TorchScorer(*arrays, max_sum_bytes=2**22), np.float64),
        (torch_scorer.TorchScorer(*arrays, max_sum_bytes=0), np.float32),
    ]

    rng = np.random.default_rng(1)
    query_sizes = [1, 3, 20, 0, 7]
    terms_of_queries = [rng.choice(NUM_TERMS, size, replace=False) for size in query_sizes]
    terms = np.concatenate(terms_of_queries)
    starts = np.cumsum([0, *query_sizes])
    weights = rng.integers(1, 4, len(terms)).astype(np.float32)

    depths = {1, min(10, num_docs), min(1000, num_docs), num_docs}
    for scorer, dtype in scorers:
        for k in depths:
            rows, scores = scorer.find_top_k(terms, weights, starts, k)

            for i in range(len(query_sizes)):
                query = slice(starts[i], starts[i + 1])
                sums = sum_impacts(index, num_docs, terms[query], weights[query], dtype)
                expected_rows = np.argsort(-sums, kind="stable")[:k]
                is_hit = sums[expected_rows] > 0
                expected_rows = expected_rows[is_hit]
                n = len(expected_rows)
                assert np.array_equal(rows[i, :n], expected_rows)
                assert np.array_equal(scores[i, :n], sums[expected_rows])
                assert (rows[i, n:] == -1).all()
                assert (scores[i, n:] == -np.inf).all()


def draw_queries(num_queries: int, terms_per_query: int):
    rng = np.random.default_rng(1)
    draws = [rng.choice(NUM_TERMS, terms_per_query, replace=False) for _ in range(num_queries)]
    starts = np.arange(num_queries + 1) * terms_per_query
    weights = rng.integers(1, 4, starts[-1]).astype(np.float32)
    return np.concatenate(draws), weights, starts


def record_added_postings(monkeypatch) -> list[int]:
    """Return a list that gets, of each call of _add_terms, how many postings it adds."""
    counts = []
    add_terms = TorchScorer._add_terms

    def add_and_record(self, sums, terms, *rest):
        counts.append(int((self.offsets[terms + 1] - self.offsets[terms]).sum()))
        add_terms(self, sums, terms, *rest)

    monkeypatch.setattr(TorchScorer, "_add_terms", add_and_record)
    return counts


def test_a_batch_adds_its_postings_piece_by_piece(monkeypatch):
    """Long queries of common words need no more memory than others, and find the same."""
    index = build_random_index(50_000, 20_000, 1000, seed=0)
    arrays = (index.offsets, index.docs, index.impacts, 50_000)
    queries = draw_queries(num_queries=8, terms_per_query=NUM_TERMS)
    counts = record_added_postings(monkeypatch)
    scorer = TorchScorer(*arrays, max_sum_bytes=2**22)
    rows, scores = scorer.find_top_k(*queries, 100)
    assert len(counts) == 1
    most_of_a_term = np.diff(index.offsets).max()

    limit = 30_000
    assert most_of_a_term < limit < counts[0] / 10
    counts.clear()
    monkeypatch.setattr(torch_scorer, "MAX_POSTINGS", limit)
    rows_by_piece, scores_by_piece = scorer.find_top_k(*queries, 100)

    assert max(counts) <= limit
    assert np.array_equal(rows, rows_by_piece)
    assert np.array_equal(scores, scores_by_piece)

    # a term by itself may have more than the limit
    counts.clear()
    monkeypatch.setattr(torch_scorer, "MAX_POSTINGS", 1)
    _, scores_by_term = scorer.find_top_k(*queries, 100)
    assert len(counts) == len(queries[0])
    assert np.array_equal(scores, scores_by_term)


def test_a_gpu_searches_on_a_stream_of_its_own(monkeypatch):
    """A search waits for its stream; on the decode steps' it would wait for those too."""
    index = build_random_index(500, 100, 10, seed=0)
    scorer = TorchScorer(index.offsets, index.docs, index.impacts, 500, max_sum_bytes=2**22)
    queries = draw_queries(num_queries=3, terms_per_query=5)
    streams = []

    @contextmanager
    def on_stream(stream):
        streams.append(stream)
        yield
        streams.pop()

    def check_stream(*arguments):
        assert streams == ["the scorer's"]
        return select_top_k(*arguments)

    select_top_k = torch_scorer._select_top_k
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch_scorer, "_select_top_k", check_stream)
    scorer.stream = "the scorer's"

    scorer.find_top_k(*queries, 10)

    assert not streams


@pytest.mark.parametrize("num_docs", [7, 500])
def test_both_builds_give_the_same_postings(num_docs):
    rng = np.random.default_rng(num_docs)
    lengths = rng.integers(0, 30, num_docs)
    draws = rng.zipf(1.3, lengths.sum())
    tokens = np.minimum(draws, 400).astype(np.int32) - 1
    order = rng.permutation(num_docs)

    numpy_arrays = build_postings(tokens, lengths, order, 450, False)
    numba_arrays = build_postings(tokens, lengths, order, 450, True)

    for numpy_array, numba_array in zip(numpy_arrays, numba_arrays, strict=True):
        assert numpy_array.dtype == numba_array.dtype
        assert np.array_equal(numpy_array, numba_array)
