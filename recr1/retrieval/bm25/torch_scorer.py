"""The torch scorer, on CPU and GPU.

Over many documents a CPU takes one query at a time and adds float32 term by term, straight from the
mapped index, always in the terms' order: float64 would double the memory that the additions are
scattered over, and cost 1.7 times the time. A score is then off by a few units in the last place
(1e-7 of it on Lucene's recorded rankings, whose order it keeps); documents that match in the same
way still tie. Over few documents, and on a GPU, as many queries as `at_once` bytes of sums hold are
taken together, all their postings in one call: on a CPU calls would else cost three times the work,
on a GPU the atomic additions come in any order. There the sums are float64, rounded once at the
end, and the result is the numba scorer's to the bit.

Legend: D documents, P postings, Q queries, T query terms, n queries at once, B blocks of L
documents.
"""

from __future__ import annotations

import numpy as np
import torch

AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 28}  # bytes

FEW = 1 << 16  # documents


class TorchScorer:
    """Top k of a batch, on one thread of a CPU or on a GPU. offsets (V + 1,) int64, docs (P,)
    int32, impacts (P,) float32.
    """

    def __init__(
        self,
        offsets: np.ndarray,
        docs: np.ndarray,
        impacts: np.ndarray,
        documents: int,
        device: torch.device = torch.device("cpu"),
        at_once: int | None = None,
    ):
        self.offsets = offsets
        self.documents = documents
        self.device = device
        one_by_one = device.type == "cpu" and documents > FEW
        self.at_once = (0 if one_by_one else AT_ONCE[device.type]) if at_once is None else at_once
        self.docs = torch.from_numpy(docs).to(device)
        self.impacts = torch.from_numpy(impacts).to(device)

    def top(
        self, terms: np.ndarray, weights: np.ndarray, starts: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Query q has the terms starts[q]:starts[q + 1] of terms (T,) int64, weights (T,) float32
        -> rows (Q, k) int64, scores (Q, k) float32.

        k <= D. Best first, equal scores by row; past the last hit row -1, score -inf.
        """
        Q = len(starts) - 1
        L = 128
        while L > 1 and self.documents < 4 * k * L:
            L //= 2
        B = -(-self.documents // L)
        n = max(1, min(Q, self.at_once // (8 * B * L)))
        sums = torch.empty(
            n, B, L, dtype=torch.float64 if self.at_once else torch.float32, device=self.device
        )
        rows = torch.full((Q, k), -1, device=self.device)
        scores = torch.full((Q, k), -torch.inf, device=self.device)
        add = self._add_at_once if self.at_once else self._add
        for q in range(0, Q, n):
            part = sums[: min(n, Q - q)].zero_()
            within = slice(starts[q], starts[q + len(part)])
            add(
                part.view(len(part), -1),
                terms[within],
                weights[within],
                np.diff(starts[q : q + len(part) + 1]),
            )
            _select_best(part, rows[q : q + n], scores[q : q + n])
        return rows.cpu().numpy(), scores.cpu().numpy()

    def _add(self, sums: torch.Tensor, terms: np.ndarray, weights: np.ndarray, _) -> None:
        """The postings of one query's terms, times the terms' weights, into sums (1, width)."""
        for a, b, weight in zip(
            self.offsets[terms].tolist(), self.offsets[terms + 1].tolist(), weights.tolist()
        ):
            sums[0].index_add_(
                0, self.docs[a:b], self.impacts[a:b] if weight == 1 else self.impacts[a:b] * weight
            )

    def _add_at_once(
        self, sums: torch.Tensor, terms: np.ndarray, weights: np.ndarray, sizes: np.ndarray
    ) -> None:
        """All postings of n queries of `sizes` terms each, times the terms' weights, into sums (n,
        width).
        """
        first = self.offsets[terms]
        counts = self.offsets[terms + 1] - self.offsets[terms]
        # from a posting's place among all of these to its place in the index
        shift = first - (np.cumsum(counts) - counts)
        table = torch.from_numpy(
            np.stack([counts, shift, np.repeat(np.arange(len(sizes)), sizes) * sums.shape[1]])
        ).to(self.device)
        total = int(counts.sum())
        weight = torch.from_numpy(weights).to(self.device)
        term = torch.repeat_interleave(
            torch.arange(len(terms), device=self.device), table[0], output_size=total
        )
        place = torch.arange(total, device=self.device) + table[1][term]
        sums.view(-1).index_add_(
            0, self.docs[place] + table[2][term], (self.impacts[place] * weight[term]).double()
        )


def _select_best(sums: torch.Tensor, rows: torch.Tensor, scores: torch.Tensor) -> None:
    """The best k of every query of sums (n, B, L) into rows and scores (n, k).

    Two levels: the k-th largest of the blocks' maxima is a score that at least k documents reach,
    so only blocks that reach it are looked into.
    """
    (n, B, L), k = sums.shape, rows.shape[1]
    maxima = sums.amax(2).float()  # (n, B)
    # (n,)
    floor = maxima.topk(k, sorted=False).values.amin(1) if k < B else torch.zeros_like(maxima[:, 0])
    floor = floor.clamp(min=torch.finfo(torch.float32).tiny)  # a hit's score is above 0
    block = (maxima >= floor[:, None]).view(-1).nonzero().view(-1)
    query = block // B
    values = sums.view(-1, L).index_select(0, block).float()  # (blocks kept, L)
    at = (values >= floor[query, None]).view(-1).nonzero().view(-1)
    found = values.view(-1)[at]
    block = block[at // L]
    # by query, then row
    query = block // B
    row = block % B * L + at % L
    # equal scores stay in the order of their rows
    order = found.argsort(descending=True, stable=True)
    if n == 1:
        order = order[:k]
        rows[0, : len(order)], scores[0, : len(order)] = row[order], found[order]
        return
    order = order[query[order].argsort(stable=True)]
    query, counts = query[order], torch.bincount(query, minlength=n)
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[query]
    kept = rank < k
    rows[query[kept], rank[kept]], scores[query[kept], rank[kept]] = (
        row[order][kept],
        found[order][kept],
    )
