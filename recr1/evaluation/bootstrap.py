"""What the mean of per-query values is worth: its bootstrap interval, and a paired test. Pure
functions.
"""

import numpy as np

# resampled values in memory at a time: about 16 MB, whatever n and `samples` are
AT_ONCE = 1_000_000


def compute_bootstrap_ci(
    values: np.ndarray, seed: int = 0, samples: int = 10_000
) -> tuple[float, float]:
    """95% percentile bootstrap interval (low, high) of the mean of `values` (n,).

    To compare two systems pass their per-query differences: the interval is then the paired one.
    Raises ValueError when `values` is empty, not one-dimensional or not finite. (Efron & Tibshirani
    1993, ch. 13)
    """
    values = _check_values(values, "bootstrap_ci")
    n = len(values)
    rng = np.random.default_rng(seed)
    rows = max(1, AT_ONCE // n)
    means = [
        values[rng.integers(n, size=(min(rows, samples - start), n))].mean(axis=1)
        for start in range(0, samples, rows)
    ]
    return tuple(np.percentile(np.concatenate(means), [2.5, 97.5]).tolist())


def compute_sign_flip_p(differences: np.ndarray, seed: int = 0, samples: int = 10_000) -> float:
    """Two-sided p-value of the paired randomisation test: were both systems the same, each query's
    difference (n,) could as well have the other sign. The share of `samples` random signs whose
    mean lies as far from 0, the observed one counted too.

    1.0 when no query differs. ValueError as for bootstrap_ci. (Fisher 1935; Smucker, Allan &
    Carterette 2007, section 3.1)
    """
    differences = _check_values(differences, "sign_flip_p")
    moved = differences[differences != 0]  # the sign of 0 changes nothing
    if not len(moved):
        return 1.0
    rng = np.random.default_rng(seed)
    rows = max(1, AT_ONCE // len(moved))
    reached = 0
    # the same differences summed in another order must count as reached
    least = abs(moved.sum()) * (1 - 1e-12)
    for start in range(0, samples, rows):
        signs = (
            rng.integers(2, size=(min(rows, samples - start), len(moved)), dtype=np.int8) * 2.0 - 1
        )
        reached += int((np.abs(signs @ moved) >= least).sum())
    return (1 + reached) / (1 + samples)


def _check_values(values, name):
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"{name} needs a non-empty (n,) array of finite values, got shape {values.shape}"
        )
    return values
