"""Add up impacts and select the top k with torch, on CPU and GPU.

Over many documents a CPU takes one query at a time and adds float32 term by term, straight from the
mapped index, always in the terms' order: float64 would double the memory that the additions are
scattered over, and cost 1.7 times the time. A score is then off by a few units in the last place
(1e-7 of it on Lucene's recorded rankings, whose order it keeps); documents that match in the same
way still tie.

Over few documents, and on a GPU, a batch holds as many queries as `max_sum_bytes` bytes of sums
allow, and one call adds the postings of many terms: on a CPU, calls would otherwise cost three
times the work; on a GPU, the atomic additions happen in any order. There the sums are float64,
rounded once at the end, and the result is the numba scorer's to the bit.

On a GPU all that runs on a stream of the scorer's own: a search waits for its own work, not for the
decode steps that another thread has queued.

Legend: D documents, P postings, Q queries, T query terms, n queries of a batch, B blocks of L
documents, H hits.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import ContextManager, Iterator, NamedTuple

import numpy as np
import torch

CPU = torch.device("cpu")

MAX_SUM_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}

# What one call adds at once, at 48 bytes beside each posting. A single term may have more.
MAX_POSTINGS = 1 << 22

FEW_DOCS = 1 << 16

MAX_BLOCK_LEN = 128


class TorchScorer:
    """Find the top k of a batch, on one thread of a CPU or on a GPU.

    Args:
        offsets, docs, impacts: the postings, (V + 1,) int64, (P,) int32, (P,) float32.
        num_docs: D.
        max_sum_bytes: the size of a batch; 0: one query at a time, in float32. None: chosen by
            device and D.
    """

    def __init__(
        self,
        offsets: np.ndarray,
        docs: np.ndarray,
        impacts: np.ndarray,
        num_docs: int,
        device: torch.device = CPU,
        max_sum_bytes: int | None = None,
    ):
        self.offsets = offsets
        self.num_docs = num_docs
        self.device = device
        if max_sum_bytes is None:
            max_sum_bytes = MAX_SUM_BYTES[device.type]
            if device.type == "cpu" and num_docs > FEW_DOCS:
                max_sum_bytes = 0
        self.max_sum_bytes = max_sum_bytes
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with self._on_own_stream():
            self.docs = torch.from_numpy(docs).to(device)
            self.impacts = torch.from_numpy(impacts).to(device)

    def _on_own_stream(self) -> ContextManager:
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

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
        with self._on_own_stream():
            return self._find_top_k(terms, weights, starts, k)

    def _find_top_k(
        self, terms: np.ndarray, weights: np.ndarray, starts: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Do what `find_top_k` does, on the current stream."""
        num_queries = len(starts) - 1
        block_len = self._choose_block_len(k)
        num_blocks = -(-self.num_docs // block_len)
        batch_size = self.max_sum_bytes // (8 * num_blocks * block_len)
        batch_size = max(1, min(num_queries, batch_size))

        # The sums of a batch are made in the same memory as those of the batch before.
        dtype = torch.float64 if self.max_sum_bytes else torch.float32
        sums = torch.empty(batch_size, num_blocks, block_len, dtype=dtype, device=self.device)
        doc_rows = torch.full((num_queries, k), -1, device=self.device)
        scores = torch.full((num_queries, k), -torch.inf, device=self.device)
        add_impacts = self._add_batch if self.max_sum_bytes else self._add_one_query
        for first in range(0, num_queries, batch_size):
            end = min(first + batch_size, num_queries)
            batch_sums = sums[: end - first].zero_()  # (n, B, L)
            batch_terms = slice(starts[first], starts[end])
            add_impacts(
                batch_sums.view(end - first, -1),
                terms[batch_terms],
                weights[batch_terms],
                np.diff(starts[first : end + 1]),
            )
            _select_top_k(batch_sums, doc_rows[first:end], scores[first:end])
        return doc_rows.cpu().numpy(), scores.cpu().numpy()

    def _choose_block_len(self, k: int) -> int:
        """Return L: blocks so large that there are still more than about 4 k of them."""
        block_len = MAX_BLOCK_LEN
        while block_len > 1 and self.num_docs < 4 * k * block_len:
            block_len //= 2
        return block_len

    def _add_one_query(
        self, sums: torch.Tensor, terms: np.ndarray, weights: np.ndarray, _: np.ndarray
    ) -> None:
        """Add the impacts of one query's terms, times the terms' weights, to sums (1, B * L)."""
        starts = self.offsets[terms].tolist()
        ends = self.offsets[terms + 1].tolist()
        for start, end, weight in zip(starts, ends, weights.tolist()):
            impacts = self.impacts[start:end]
            if weight != 1:
                impacts = impacts * weight
            sums[0].index_add_(0, self.docs[start:end], impacts)

    def _add_batch(
        self, sums: torch.Tensor, terms: np.ndarray, weights: np.ndarray, num_terms: np.ndarray
    ) -> None:
        """Add all impacts of n queries, times the terms' weights, to sums (n, B * L).

        num_terms: (n,), how many terms each query has.
        """
        query_start = np.repeat(np.arange(len(num_terms)), num_terms) * sums.shape[1]
        num_postings = self.offsets[terms + 1] - self.offsets[terms]
        for piece in _split_terms(num_postings):
            self._add_terms(sums, terms[piece], weights[piece], query_start[piece])

    def _add_terms(
        self, sums: torch.Tensor, terms: np.ndarray, weights: np.ndarray, query_start: np.ndarray
    ) -> None:
        """Add all impacts of some terms at once.

        query_start: where the sums of each term's query begin in the flat sums.
        """
        # What a posting needs to know of its term: three numbers a term, copied in one go.
        first_posting = self.offsets[terms]
        num_postings = self.offsets[terms + 1] - first_posting
        # from a posting's place among these to its place in the index
        shift = first_posting - (np.cumsum(num_postings) - num_postings)
        table = torch.from_numpy(np.stack([num_postings, shift, query_start])).to(self.device)
        term_weights = torch.from_numpy(weights).to(self.device)

        total = int(num_postings.sum())
        term_indices = torch.arange(len(terms), device=self.device)
        term = torch.repeat_interleave(term_indices, table[0], output_size=total)  # per posting
        posting = torch.arange(total, device=self.device) + table[1][term]
        sum_index = self.docs[posting] + table[2][term]
        weighted_impacts = self.impacts[posting] * term_weights[term]
        sums.view(-1).index_add_(0, sum_index, weighted_impacts.double())


def _split_terms(num_postings: np.ndarray) -> Iterator[slice]:
    """Yield slices of terms that have at most MAX_POSTINGS together, a single term any number."""
    first = 0
    total = 0
    for index, count in enumerate(num_postings.tolist()):
        if index > first and total + count > MAX_POSTINGS:
            yield slice(first, index)
            first = index
            total = 0
        total += count
    yield slice(first, len(num_postings))


class _Hits(NamedTuple):
    """The documents that may be among the best k, by query, then row."""

    query: torch.Tensor  # (H,)
    doc_row: torch.Tensor  # (H,)
    score: torch.Tensor  # (H,) float32


def _select_top_k(sums: torch.Tensor, doc_rows: torch.Tensor, scores: torch.Tensor) -> None:
    """Write the best k of every query of sums (n, B, L) into doc_rows and scores (n, k)."""
    num_queries, k = doc_rows.shape
    hits = _collect_hits(sums, k)
    by_score = hits.score.argsort(descending=True, stable=True)  # equal scores stay in row order
    if num_queries == 1:
        best = by_score[:k]
        doc_rows[0, : len(best)] = hits.doc_row[best]
        scores[0, : len(best)] = hits.score[best]
        return

    # Sort by query, then score; a hit's rank is its distance from its query's first.
    by_query = hits.query[by_score].argsort(stable=True)
    order = by_score[by_query]
    query = hits.query[order]
    num_hits = torch.bincount(query, minlength=num_queries)
    first_hit = num_hits.cumsum(0) - num_hits
    rank = torch.arange(len(order), device=order.device) - first_hit[query]

    is_best = rank < k
    cell = (query[is_best], rank[is_best])
    doc_rows[cell] = hits.doc_row[order][is_best]
    scores[cell] = hits.score[order][is_best]


def _collect_hits(sums: torch.Tensor, k: int) -> _Hits:
    """Return the documents of sums (n, B, L) that reach their query's floor.

    Two levels: the k-th largest of the blocks' maxima is a score that at least k documents reach,
    so only blocks that reach it are looked into.
    """
    _, num_blocks, block_len = sums.shape
    block_maxima = sums.amax(2).float()  # (n, B)
    if k < num_blocks:
        floor = block_maxima.topk(k, sorted=False).values.amin(1)  # (n,)
    else:
        floor = torch.zeros_like(block_maxima[:, 0])
    floor = floor.clamp(min=torch.finfo(torch.float32).tiny)  # a hit's score is above 0

    reaches_floor = block_maxima >= floor[:, None]
    kept_blocks = _find_true(reaches_floor)  # numbers in n * B
    block_query = kept_blocks // num_blocks
    block_scores = sums.view(-1, block_len).index_select(0, kept_blocks).float()  # (kept blocks, L)

    is_hit = block_scores >= floor[block_query, None]
    hit_index = _find_true(is_hit)  # (H,)
    block = kept_blocks[hit_index // block_len]
    return _Hits(
        query=block // num_blocks,
        doc_row=block % num_blocks * block_len + hit_index % block_len,
        score=block_scores.view(-1)[hit_index],
    )


def _find_true(mask: torch.Tensor) -> torch.Tensor:
    """Return the flat indices of the mask's True values, ascending."""
    return mask.view(-1).nonzero().view(-1)
