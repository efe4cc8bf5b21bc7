"""How far the sampler's log-probs are from the trainer's, over a step and over a run."""

from __future__ import annotations

import numpy as np

# 1.15% wide: percentiles of |sampler - trainer| over a whole run
HISTOGRAM_BINS = np.concatenate([[0.0], np.logspace(-9, 2, 2201)])


class LogpDiffHistogram:
    """|sampler - trainer| log-probs: exact mean and maximum, percentiles from a histogram.

    A percentile is the upper edge of its bin.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(len(HISTOGRAM_BINS), dtype=np.int64)
        self.total = 0.0
        self.largest = 0.0

    def merge(self, other: LogpDiffHistogram) -> None:
        """Count what another rank or step has counted."""
        self.counts = self.counts + other.counts
        self.total = self.total + other.total
        self.largest = max(self.largest, other.largest)

    def add(self, differences: np.ndarray) -> None:
        """Count the differences (n,) of a micro-batch's tokens."""
        num_bins = len(HISTOGRAM_BINS)
        bins = np.searchsorted(HISTOGRAM_BINS, differences).clip(max=num_bins - 1)
        self.counts += np.bincount(bins, minlength=num_bins)
        self.total = self.total + float(differences.sum(dtype=np.float64))
        self.largest = max(self.largest, float(differences.max(initial=0)))

    def state(self) -> dict:
        """Return the histogram as JSON: the bins that hold something, and their counts."""
        bins = np.flatnonzero(self.counts)
        return dict(
            bins=bins.tolist(),
            counts=self.counts[bins].tolist(),
            total=self.total,
            largest=self.largest,
        )

    @classmethod
    def restored(cls, state: dict) -> LogpDiffHistogram:
        """Make the histogram anew of what `state` has returned."""
        histogram = cls()
        histogram.counts[state["bins"]] = state["counts"]
        histogram.total = float(state["total"])
        histogram.largest = float(state["largest"])
        return histogram

    def figures(self) -> dict[str, float]:
        """Return the mean, the 99.9th percentile and the maximum, as they are logged."""
        num_tokens = int(self.counts.sum())
        p999_bin = 0
        if num_tokens:
            p999_bin = int(np.searchsorted(self.counts.cumsum(), 0.999 * num_tokens))
        return dict(
            sampling_logp_diff_mean=self.total / max(1, num_tokens),
            sampling_logp_diff_p999=min(float(HISTOGRAM_BINS[p999_bin]), self.largest),
            sampling_logp_diff_max=self.largest,
        )
