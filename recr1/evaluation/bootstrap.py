"""What the mean of per-query values is worth: its bootstrap interval, and a paired test. Pure
functions.
"""

from collections.abc import Sequence

import numpy as np

# resampled values in memory at a time: about 16 MB, whatever n and `samples` are
MAX_VALUES_AT_ONCE = 1_000_000


def compute_bootstrap_ci(
    values: np.ndarray, seed: int = 0, samples: int = 10_000
) -> tuple[float, float]:
    """Compute the 95% percentile bootstrap interval (low, high) of the mean of `values` (n,).

    To compare two systems pass their per-query differences: the interval is then the paired one.
    Raises ValueError when `values` is empty, not one-dimensional or not finite. (Efron & Tibshirani
    1993, ch. 13)
    """
    values = _check_values(values, "bootstrap_ci")
    n = len(values)
    rng = np.random.default_rng(seed)
    chunk_size = max(1, MAX_VALUES_AT_ONCE // n)
    means = []
    for start in range(0, samples, chunk_size):
        num_samples = min(chunk_size, samples - start)
        indices = rng.integers(n, size=(num_samples, n))
        means.append(values[indices].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5]).tolist()
    return low, high


def compute_sign_flip_p(differences: np.ndarray, seed: int = 0, samples: int = 10_000) -> float:
    """Compute the two-sided p-value of the paired randomization test.

    Were both systems the same, each query's difference (n,) could as well have the other sign. The
    p-value is the share of `samples` random signs whose mean lies as far from 0, the observed one
    counted too; 1.0 when no query differs. Raises ValueError as compute_bootstrap_ci does. (Fisher
    1935; Smucker, Allan & Carterette 2007, section 3.1)
    """
    differences = _check_values(differences, "sign_flip_p")
    nonzero = differences[differences != 0]  # the sign of 0 changes nothing
    n = len(nonzero)
    if n == 0:
        return 1.0

    # the same differences summed in another order must count as reached
    threshold = abs(nonzero.sum()) * (1 - 1e-12)
    rng = np.random.default_rng(seed)
    chunk_size = max(1, MAX_VALUES_AT_ONCE // n)
    num_reached = 0
    for start in range(0, samples, chunk_size):
        num_samples = min(chunk_size, samples - start)
        bits = rng.integers(2, size=(num_samples, n), dtype=np.int8)
        signs = bits * 2.0 - 1
        has_reached = np.abs(signs @ nonzero) >= threshold
        num_reached += int(has_reached.sum())
    return (1 + num_reached) / (1 + samples)


def _check_values(values: np.ndarray | Sequence[float], name: str) -> np.ndarray:
    """Return the values in float64. Raises ValueError unless they are (n,), n > 0, and finite."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"{name} needs a non-empty (n,) array of finite values, got shape {values.shape}"
        )
    return values
