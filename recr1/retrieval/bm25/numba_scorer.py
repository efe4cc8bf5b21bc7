"""Score and build the index with numba (extra [fast]). The build's arrays are numpy's, bit for bit.

Sums are made in float64 and rounded once, as Lucene does: scores are Lucene's whatever the order of
the terms.

Nothing imports numba before it is asked for. Compiled code is kept in __pycache__; numba holds no
threads of its own here: retrieval/bm25/searcher.py gives each of torch's threads its share of the
queries, and the functions release the interpreter.

Legend: D documents, V terms, P postings, Q queries, T query terms, N tokens of the corpus.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

# documents whose sums are made together: half a megabyte of float64, which stays in a core's L2
BLOCK = 1 << 16

LANES = 64  # sums whose largest is compared with the threshold before any of them is looked at

SHIFT = 15  # a bin of the histogram is the upper 17 bits of a score: 1/256 of its size

# the bin of 2 ** -16; smaller scores share it, those above 2 ** 16 the last
LOWEST = (127 - 16) << (23 - SHIFT)

BINS = 32 << (23 - SHIFT)


class NumbaScorer:
    """Find the exact top k of a batch, on one thread.

    Args:
        offsets, docs, impacts: the postings, (V + 1,) int64, (P,) int32, (P,) float32.
        num_docs: D.
    """

    def __init__(self, offsets: np.ndarray, docs: np.ndarray, impacts: np.ndarray, num_docs: int):
        self.arrays = (offsets, docs.view(np.uint32), impacts)
        self.num_docs = num_docs
        self._search = _compile_search()

    def find_top_k(
        self, terms: np.ndarray, weights: np.ndarray, starts: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return rows (Q, k) int64 and scores (Q, k) float32, best first, equal scores by row.

        Past the last hit the row is -1, the score -inf.

        Args:
            terms, weights: (T,) int64, (T,) float32; query q has starts[q]:starts[q + 1] of them.
            starts: (Q + 1,) int64.
            k: at most D.
        """
        num_queries = len(starts) - 1
        doc_rows = np.full((num_queries, k), -1, np.int64)
        scores = np.full((num_queries, k), -np.inf, np.float32)
        score_bits = scores.view(np.uint32)
        self._search(
            *self.arrays, self.num_docs, terms, weights, starts, LANES, doc_rows, score_bits
        )
        return doc_rows, scores


@cache
def _compile_search():
    from numba import njit

    @njit(nogil=True, error_model="numpy", cache=True)
    def search(offsets, docs, impacts, D, terms, weights, starts, lanes, rows, scores):
        """Term by term into BLOCK sums; of a block only what may still be among the best k is kept.

        The threshold is the lower edge of the histogram bin in which the k-th best of the scores so
        far lies. Unsigned indices: a signed one would be tested for being negative at every access.
        Positive floats ascend as their bits do, so sums are compared as integers. lanes is LANES: a
        loop of constant length would be unrolled, and then not vectorised.
        """
        k = rows.shape[1]
        sums = np.zeros(BLOCK, np.float64)
        sum_bits = sums.view(np.int64)
        # only what is written takes memory
        kept_bits = np.empty(D, np.uint32)
        kept_rows = np.empty(D, np.int32)
        kept = kept_bits.view(np.float32)
        histogram = np.empty(BINS, np.int32)
        digits = np.empty(2048, np.int64)
        edge = np.empty(1, np.uint32)
        floor = np.empty(1, np.float64)
        one = np.uint64(1)
        lanes = np.uint64(lanes)
        for q in range(len(starts) - 1):
            first = starts[q]
            n_terms = starts[q + 1] - starts[q]
            at = np.empty(n_terms, np.uint64)
            end = np.empty(n_terms, np.uint64)
            for t in range(n_terms):
                at[t], end[t] = offsets[terms[first + t]], offsets[terms[first + t] + 1]
            histogram[:] = 0
            n = np.uint64(0)
            above = np.int64(0)
            lowest = np.int64(0)
            threshold = np.int64(0)
            for begin in range(0, D, BLOCK):
                base = np.uint32(begin)
                width = np.uint32(min(BLOCK, D - begin))
                touched = False
                for t in range(n_terms):
                    p = at[t]
                    stop = end[t]
                    weight = weights[first + t]
                    while p < stop:
                        x = np.uint32(docs[p] - base)
                        if x >= width:
                            break
                        sums[np.uint64(x)] += np.float32(weight * impacts[p])
                        p += one
                    touched |= p > at[t]
                    at[t] = p
                if not touched:
                    continue
                for c in range(np.uint64(0), np.uint64(width), lanes):
                    largest = np.int64(0)
                    for x in range(c, c + lanes):
                        largest = max(largest, sum_bits[x])
                    if largest > threshold:
                        for x in range(c, c + lanes):
                            if sum_bits[x] > threshold:
                                kept[n], kept_rows[n] = (
                                    np.float32(sums[x]),
                                    np.int32(begin + np.int64(x)),
                                )
                                bin = min(
                                    max(np.int64(kept_bits[n] >> np.uint32(SHIFT)) - LOWEST, 0),
                                    BINS - 1,
                                )
                                histogram[np.uint64(bin)] += 1
                                above += bin >= lowest
                                n += one
                        if above - histogram[np.uint64(lowest)] >= k:
                            while above - histogram[np.uint64(lowest)] >= k:
                                above -= histogram[np.uint64(lowest)]
                                lowest += 1
                            # a sum just below the edge is rounded up to it: compare with the
                            # float32 before
                            edge[0] = (np.uint32(lowest + LOWEST) << np.uint32(SHIFT)) - np.uint32(
                                1
                            )
                            floor[0] = edge.view(np.float32)[0]
                            threshold = floor.view(np.int64)[0]
                    for x in range(c, c + lanes):
                        sum_bits[x] = 0

            if lowest > 0:  # what was kept under an earlier, lower threshold
                limit = np.uint32(lowest + LOWEST) << np.uint32(SHIFT)
                m = np.uint64(0)
                for i in range(n):
                    if kept_bits[i] >= limit:
                        kept_bits[m], kept_rows[m] = kept_bits[i], kept_rows[i]
                        m += one
                n = m
            # radix sort, 11 bits at a time, stable: equal scores stay in the order of their rows
            keys = np.empty(n, np.uint32)
            order = np.empty(n, np.int32)
            keys2 = np.empty(n, np.uint32)
            order2 = np.empty(n, np.int32)
            for i in range(n):
                keys[i], order[i] = ~kept_bits[i], kept_rows[i]
            for shift in range(0, 33, 11):
                digits[:] = 0
                for i in range(n):
                    digits[np.uint64((keys[i] >> np.uint32(shift)) & np.uint32(2047))] += 1
                total = 0
                for d in range(2048):
                    digits[d], total = total, total + digits[d]
                for i in range(n):
                    d = np.uint64((keys[i] >> np.uint32(shift)) & np.uint32(2047))
                    keys2[np.uint64(digits[d])], order2[np.uint64(digits[d])] = keys[i], order[i]
                    digits[d] += 1
                keys, keys2, order, order2 = keys2, keys, order2, order
            for i in range(min(np.int64(n), k)):
                rows[q, i], scores[q, i] = order[i], ~keys[i]

    return search


@cache
def compile_postings():
    """postings(tokens (N,) int32, starts (D + 1,) int64, order (D,), V) -> offsets (V + 1,) int64,
    docs (P,) int32, tf (P,) int32; row r is document order[r], whose tokens stand in
    starts[order[r]]:starts[order[r] + 1]. Counts, then fills: no sort.
    """
    from numba import njit

    @njit(nogil=True, error_model="numpy", cache=True)
    def postings(tokens, starts, order, V):
        D = len(order)
        offsets = np.zeros(V + 1, np.int64)
        last = np.full(V, -1, np.int32)
        for r in range(D):
            for i in range(starts[order[r]], starts[order[r] + 1]):
                t = np.uint64(tokens[i])
                offsets[t + np.uint64(1)] += last[t] != r
                last[t] = r
        offsets = np.cumsum(offsets)
        at = offsets[:-1].copy()
        docs = np.empty(offsets[-1], np.int32)
        tf = np.empty(offsets[-1], np.int32)
        last[:] = -1
        for r in range(D):
            for i in range(starts[order[r]], starts[order[r] + 1]):
                t = np.uint64(tokens[i])
                p = np.uint64(at[t])
                if last[t] == r:
                    tf[p - np.uint64(1)] += 1
                else:
                    docs[p], tf[p], last[t] = r, 1, r
                    at[t] += 1
        return offsets, docs, tf

    return postings
