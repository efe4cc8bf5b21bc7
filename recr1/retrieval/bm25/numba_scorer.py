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
def _compile_search() -> Callable[..., None]:
    """Compile the search.

    It is one long function: numba never finds a function in its cache that calls another one
    compiled here, and compiling takes most of a minute.

    Indices are unsigned: a signed one would be tested for being negative at every access. Positive
    floats ascend as their bits do, so sums are compared as integers.
    """
    from numba import njit

    @njit(nogil=True, error_model="numpy", cache=True)
    def search_batch(
        offsets, docs, impacts, D, terms, weights, starts, lanes, top_rows, top_score_bits
    ):
        """Write the best of every query into top_rows (Q, k) and top_score_bits (Q, k).

        Adds term by term into BLOCK sums; of a block, only what may still be among the best k is
        kept. The threshold is the lower edge of the histogram bin in which the k-th best of the
        scores so far lies. lanes is LANES: a loop of constant length would be unrolled, and then
        not vectorized.
        """
        k = top_rows.shape[1]
        sums = np.zeros(BLOCK, np.float64)
        sum_bits = sums.view(np.int64)
        # only what is written takes memory
        kept_bits = np.empty(D, np.uint32)
        kept_rows = np.empty(D, np.int32)
        kept_scores = kept_bits.view(np.float32)
        histogram = np.empty(BINS, np.int32)
        digit_counts = np.empty(2048, np.int64)
        edge = np.empty(1, np.uint32)
        floor = np.empty(1, np.float64)
        one = np.uint64(1)
        lanes = np.uint64(lanes)
        for q in range(len(starts) - 1):
            # The cursor of a term is its next posting.
            first_term = starts[q]
            num_terms = starts[q + 1] - starts[q]
            cursor = np.empty(num_terms, np.uint64)
            end = np.empty(num_terms, np.uint64)
            for t in range(num_terms):
                cursor[t] = offsets[terms[first_term + t]]
                end[t] = offsets[terms[first_term + t] + 1]

            histogram[:] = 0
            num_kept = np.uint64(0)
            num_above = np.int64(0)  # scores kept in lowest_bin and the bins above it
            lowest_bin = np.int64(0)
            threshold = np.int64(0)
            for begin in range(0, D, BLOCK):
                # Add the terms' postings within this block of documents.
                base = np.uint32(begin)
                width = np.uint32(min(BLOCK, D - begin))
                touched = False
                for t in range(num_terms):
                    p = cursor[t]
                    stop = end[t]
                    weight = weights[first_term + t]
                    while p < stop:
                        x = np.uint32(docs[p] - base)
                        if x >= width:
                            break
                        sums[np.uint64(x)] += np.float32(weight * impacts[p])
                        p += one
                    touched |= p > cursor[t]
                    cursor[t] = p
                if not touched:
                    continue

                # Keep the sums above the threshold; most runs of lanes have none.
                for c in range(np.uint64(0), np.uint64(width), lanes):
                    largest = np.int64(0)
                    for x in range(c, c + lanes):
                        largest = max(largest, sum_bits[x])
                    if largest > threshold:
                        for x in range(c, c + lanes):
                            if sum_bits[x] > threshold:
                                kept_scores[num_kept] = np.float32(sums[x])
                                kept_rows[num_kept] = np.int32(begin + np.int64(x))
                                upper_bits = np.int64(kept_bits[num_kept] >> np.uint32(SHIFT))
                                score_bin = min(max(upper_bits - LOWEST, 0), BINS - 1)
                                histogram[np.uint64(score_bin)] += 1
                                num_above += score_bin >= lowest_bin
                                num_kept += one
                        # Raise the threshold while the bins above the lowest still hold k scores.
                        if num_above - histogram[np.uint64(lowest_bin)] >= k:
                            while num_above - histogram[np.uint64(lowest_bin)] >= k:
                                num_above -= histogram[np.uint64(lowest_bin)]
                                lowest_bin += 1
                            # a sum just below the edge is rounded up to it: compare with the
                            # float32 before
                            edge_bits = np.uint32(lowest_bin + LOWEST) << np.uint32(SHIFT)
                            edge[0] = edge_bits - np.uint32(1)
                            floor[0] = edge.view(np.float32)[0]
                            threshold = floor.view(np.int64)[0]
                    for x in range(c, c + lanes):
                        sum_bits[x] = 0

            # Drop what was kept under an earlier, lower threshold.
            if lowest_bin > 0:
                limit = np.uint32(lowest_bin + LOWEST) << np.uint32(SHIFT)
                num_left = np.uint64(0)
                for i in range(num_kept):
                    if kept_bits[i] >= limit:
                        kept_bits[num_left] = kept_bits[i]
                        kept_rows[num_left] = kept_rows[i]
                        num_left += one
                num_kept = num_left

            # Radix sort, 11 bits at a time, stable: equal scores stay in the order of their rows.
            # Inverted bits ascend where scores descend.
            keys = np.empty(num_kept, np.uint32)
            order = np.empty(num_kept, np.int32)
            sorted_keys = np.empty(num_kept, np.uint32)
            sorted_order = np.empty(num_kept, np.int32)
            for i in range(num_kept):
                keys[i] = ~kept_bits[i]
                order[i] = kept_rows[i]
            for shift in range(0, 33, 11):
                digit_counts[:] = 0
                for i in range(num_kept):
                    digit = np.uint64((keys[i] >> np.uint32(shift)) & np.uint32(2047))
                    digit_counts[digit] += 1
                # from each digit's count to where its first key goes
                total = 0
                for d in range(2048):
                    count = digit_counts[d]
                    digit_counts[d] = total
                    total = total + count
                for i in range(num_kept):
                    digit = np.uint64((keys[i] >> np.uint32(shift)) & np.uint32(2047))
                    place = np.uint64(digit_counts[digit])
                    sorted_keys[place] = keys[i]
                    sorted_order[place] = order[i]
                    digit_counts[digit] += 1
                keys, sorted_keys = sorted_keys, keys
                order, sorted_order = sorted_order, order

            for i in range(min(np.int64(num_kept), k)):
                top_rows[q, i] = order[i]
                top_score_bits[q, i] = ~keys[i]

    return search_batch


@cache
def compile_postings() -> Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Compile fill_postings(tokens, starts, order, V) -> offsets, docs, tf; see build_postings.

    tokens (N,) int32, starts (D + 1,) int64, order (D,); offsets (V + 1,) int64, docs (P,) int32,
    tf (P,) int32. Row r is document order[r], whose tokens are starts[order[r]]:starts[order[r] +
    1] of `tokens`. It counts, then fills: no sort.
    """
    from numba import njit

    @njit(nogil=True, error_model="numpy", cache=True)
    def fill_postings(tokens, starts, order, V):
        D = len(order)

        # Count a term's documents: a document counts where it is not the term's last one.
        offsets = np.zeros(V + 1, np.int64)
        last_row = np.full(V, -1, np.int32)
        for r in range(D):
            for i in range(starts[order[r]], starts[order[r] + 1]):
                t = np.uint64(tokens[i])
                offsets[t + np.uint64(1)] += last_row[t] != r
                last_row[t] = r
        offsets = np.cumsum(offsets)

        # Fill each term's postings from its cursor on.
        cursor = offsets[:-1].copy()
        docs = np.empty(offsets[-1], np.int32)
        tf = np.empty(offsets[-1], np.int32)
        last_row[:] = -1
        for r in range(D):
            for i in range(starts[order[r]], starts[order[r] + 1]):
                t = np.uint64(tokens[i])
                p = np.uint64(cursor[t])
                if last_row[t] == r:
                    tf[p - np.uint64(1)] += 1
                else:
                    docs[p] = r
                    tf[p] = 1
                    last_row[t] = r
                    cursor[t] += 1
        return offsets, docs, tf

    return fill_postings
