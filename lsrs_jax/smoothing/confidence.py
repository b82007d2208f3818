"""Confidence bounds for vote counts: Clopper–Pearson in float64. NumPy and SciPy only."""

import numpy as np
from scipy import stats

from lsrs_jax.errors import UserError


def _check(k, n, alpha):
    k, n = np.asarray(k), np.asarray(n)
    for name, value in (("k", k), ("n", n)):
        if not np.issubdtype(value.dtype, np.integer):
            raise UserError(f"vote counts are integers, got {name} of type {value.dtype}")
    if np.any(n < 1):
        raise UserError("a confidence bound needs at least one vote, got n < 1")
    if np.any(k < 0) or np.any(k > n):
        raise UserError("vote counts must satisfy 0 <= k <= n")
    if not np.all((np.asarray(alpha) > 0) & (np.asarray(alpha) < 1)):
        raise UserError(f"alpha must lie strictly between 0 and 1, got {alpha!r}")
    return k.astype(np.int64), n.astype(np.int64)


def check_alpha(alpha):
    """Raises UserError unless 1e-100 <= alpha < 1: a share of it must still be a number that can be computed with."""
    if not isinstance(alpha, int | float | np.number) or not 0 < alpha < 1:
        raise UserError(f"alpha must lie strictly between 0 and 1, got {alpha!r}")
    if alpha < 1e-100:
        raise UserError(f"alpha must be at least 1e-100, got {alpha!r}")


# Far above the error of SciPy's inverse beta function, far below anything a radius shows.
_MARGIN = 1e-10


def lower(k, n, alpha):
    """One-sided lower confidence bound for a probability (Clopper and Pearson 1934).

    Args:
      k: successes, integers, any shape.
      n: trials, integers, broadcastable; at least 1.
      alpha: failure probability, broadcastable.

    Returns:
      float64 of the broadcast shape; 0 where k = 0.

    **Guarantee**: if k ~ Binomial(n, p) then P[lower(k, n, alpha) > p] ≤ alpha for every p. Numerical error is
    rounded towards 0.
    """
    k, n = _check(k, n, alpha)
    with np.errstate(invalid="ignore"):
        bound = stats.beta.ppf(alpha, k, n - k + 1)
    return np.where(k == 0, 0.0, bound * (1 - _MARGIN))


def upper(k, n, alpha):
    """One-sided upper confidence bound for a probability; the mirror image of `lower`. 1 where k = n.

    **Guarantee**: if k ~ Binomial(n, p) then P[upper(k, n, alpha) < p] ≤ alpha for every p. Numerical error is
    rounded towards 1.
    """
    k, n = _check(k, n, alpha)
    with np.errstate(invalid="ignore"):
        bound = stats.beta.isf(alpha, k + 1, n - k)
    return np.where(k == n, 1.0, np.minimum(bound + _MARGIN, 1.0))
