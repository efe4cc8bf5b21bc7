"""The torch scorer, on CPU and GPU: the same results as the numba scorer, bit for bit.

A CPU takes one query at a time, term by term out of the mapped index; a GPU as many as `at_once` bytes of sums hold, all their postings in one call.

Legend: D documents, P postings, Q queries, T query terms, n queries at once, B blocks of L documents.
"""
from __future__ import annotations

import numpy as np
import torch

AT_ONCE = 1 << 28          # bytes


class Scorer:
    """Exact top k of a batch, on one thread of a CPU or on a GPU. offsets (V + 1,) int64, docs (P,) int32, impacts (P,) float32."""

    def __init__(self, offsets: np.ndarray, docs: np.ndarray, impacts: np.ndarray, documents: int,
                 device: torch.device = torch.device("cpu"), at_once: int | None = None):
        self.offsets, self.documents, self.device = offsets, documents, device
        self.at_once = (0 if device.type == "cpu" else AT_ONCE) if at_once is None else at_once
        self.docs, self.impacts = torch.from_numpy(docs).to(device), torch.from_numpy(impacts).to(device)

    def top(self, terms: np.ndarray, weights: np.ndarray, starts: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Query q has the terms starts[q]:starts[q + 1] of terms (T,) int64, weights (T,) float32 -> rows (Q, k) int64, scores (Q, k) float32.

        k <= D. Best first, equal scores by row; past the last hit row -1, score -inf.
        """
        Q, L = len(starts) - 1, 64
        while L > 1 and self.documents < 4 * k * L:
            L //= 2
        B = -(-self.documents // L)
        n = max(1, min(Q, self.at_once // (8 * B * L)))
        # float64, rounded once at the end: any order of the terms, and of a GPU's atomic additions, gives the same score
        sums = torch.empty(n, B, L, dtype=torch.float64, device=self.device)
        rows = torch.full((Q, k), -1, device=self.device)
        scores = torch.full((Q, k), -torch.inf, device=self.device)
        for q in range(0, Q, n):
            part = sums[:min(n, Q - q)].zero_()
            self._add(part.view(-1), B * L, terms, weights, starts[q:q + len(part) + 1])
            _best(part, rows[q:q + n], scores[q:q + n])
        return rows.cpu().numpy(), scores.cpu().numpy()

    def _add(self, sums: torch.Tensor, width: int, terms: np.ndarray, weights: np.ndarray, starts: np.ndarray) -> None:
        """Every posting of the queries' terms, times the term's weight, into sums (n * width,)."""
        t = terms[starts[0]:starts[-1]]
        first, last = self.offsets[t], self.offsets[t + 1]
        if not self.at_once:
            for a, b, weight in zip(first.tolist(), last.tolist(), weights[starts[0]:starts[-1]].tolist()):
                impacts = self.impacts[a:b] if weight == 1 else self.impacts[a:b] * weight
                sums.index_add_(0, self.docs[a:b], impacts.double())
            return
        query = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        shift = first - np.concatenate([[0], np.cumsum(last - first)[:-1]])          # from a posting's place among all to its place in the index
        table = torch.from_numpy(np.stack([last - first, shift, query * width])).to(self.device)
        weight = torch.from_numpy(weights[starts[0]:starts[-1]]).to(self.device)
        total = int((last - first).sum())
        term = torch.repeat_interleave(torch.arange(len(t), device=self.device), table[0], output_size=total)
        place = torch.arange(total, device=self.device) + table[1][term]
        sums.index_add_(0, self.docs[place] + table[2][term], (self.impacts[place] * weight[term]).double())


def _best(sums: torch.Tensor, rows: torch.Tensor, scores: torch.Tensor) -> None:
    """The best k of every query of sums (n, B, L) into rows and scores (n, k).

    Two levels: the k-th largest of the blocks' maxima is a score that at least k documents reach, so only blocks that reach it are looked into.
    """
    k = rows.shape[1]
    maxima = sums.amax(2).float()                                                                     # (n, B)
    floor = maxima.topk(k).values[:, -1:] if k < maxima.shape[1] else torch.zeros_like(maxima[:, :1])
    query, block = ((maxima >= floor) & (maxima > 0)).nonzero(as_tuple=True)
    values = sums[query, block].float()                                                               # (blocks kept, L)
    at, lane = ((values >= floor[query]) & (values > 0)).nonzero(as_tuple=True)
    found, query, row = values[at, lane], query[at], block[at] * sums.shape[2] + lane                 # by query, then row
    order = found.argsort(descending=True, stable=True)                                               # equal scores stay in the order of their rows
    order = order[query[order].argsort(stable=True)] if len(sums) > 1 else order
    query, counts = query[order], torch.bincount(query, minlength=len(sums))
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[query]
    kept = rank < k
    query, rank = query[kept], rank[kept]
    rows[query, rank], scores[query, rank] = row[order][kept], found[order][kept]
