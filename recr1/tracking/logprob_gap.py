"""How far the sampler's log-probs are from the trainer's, over a step and over a run."""

from __future__ import annotations

import numpy as np

# 1.15% wide: percentiles of |sampler - trainer| over a whole run
HISTOGRAM_BINS = np.concatenate([[0.0], np.logspace(-9, 2, 2201)])


class LogpDiffHistogram:
    """|sampler - trainer| log-probs: exact mean and maximum, percentile from a histogram (the upper
    edge of its bin).
    """

    def __init__(self):
        self.counts = np.zeros(len(HISTOGRAM_BINS), dtype=np.int64)
        self.total = 0.0
        self.largest = 0.0

    def merge(self, other: LogpDiffHistogram) -> None:
        self.counts = self.counts + other.counts
        self.total = self.total + other.total
        self.largest = max(self.largest, other.largest)

    def add(self, gaps: np.ndarray) -> None:
        self.counts += np.bincount(
            np.searchsorted(HISTOGRAM_BINS, gaps).clip(max=len(HISTOGRAM_BINS) - 1),
            minlength=len(HISTOGRAM_BINS),
        )
        self.total = self.total + float(gaps.sum(dtype=np.float64))
        self.largest = max(self.largest, float(gaps.max(initial=0)))

    def state(self) -> dict:
        """As JSON; the histogram by its bins that hold something."""
        bins = np.flatnonzero(self.counts)
        return dict(
            bins=bins.tolist(),
            counts=self.counts[bins].tolist(),
            total=self.total,
            largest=self.largest,
        )

    @classmethod
    def restored(cls, state: dict) -> LogpDiffHistogram:
        gaps = cls()
        gaps.counts[state["bins"]], gaps.total, gaps.largest = (
            state["counts"],
            float(state["total"]),
            float(state["largest"]),
        )
        return gaps

    def figures(self) -> dict[str, float]:
        n = int(self.counts.sum())
        at = int(np.searchsorted(self.counts.cumsum(), 0.999 * n)) if n else 0
        return dict(
            logprob_gap_mean=self.total / max(1, n),
            logprob_gap_p999=min(float(HISTOGRAM_BINS[at]), self.largest),
            max_logprob_gap=self.largest,
        )
