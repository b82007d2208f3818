"""Confidence bounds for vote counts: Clopper–Pearson in float64. NumPy and SciPy only."""

import numpy as np
from scipy import special  # scipy.stats gives the same numbers, and takes a second to import

from lsrs_jax.arguments import array, numbers, real
from lsrs_jax.errors import UserError

MAX_VOTES = 2**27  # the device's int32 counts stay exact, and so does SciPy's inverse beta function
_SMALLEST_ALPHA = 1e-110  # a share of the smallest alpha of an image


def _check(k, n, alpha):
    k, n, alpha = array("k", k), array("n", n), numbers("alpha", alpha)
    for name, value in (("k", k), ("n", n)):
        if value.dtype.kind not in "iu":
            raise UserError(f"vote counts are integers, got {name} of type {value.dtype}")
    try:
        np.broadcast_shapes(k.shape, n.shape, alpha.shape)
    except ValueError as error:
        raise UserError(f"k, n and alpha do not fit: their shapes are {k.shape}, {n.shape}, {alpha.shape}") from error
    if np.any(n < 1):
        raise UserError("a confidence bound needs at least one vote, got n < 1")
    if np.any(n > MAX_VOTES):
        raise UserError("a confidence bound takes at most 2**27 votes")
    if np.any(k < 0) or np.any(k > n):
        raise UserError("vote counts must satisfy 0 <= k <= n")
    if not np.all((alpha >= _SMALLEST_ALPHA) & (alpha < 1)):
        raise UserError(f"alpha must lie strictly between 0 and 1, and not below {_SMALLEST_ALPHA}, got {alpha}")
    return k.astype(np.int64), n.astype(np.int64), alpha


def check_alpha(alpha):
    """Raises UserError unless 1e-100 <= alpha < 1: a share of it must still be a number that can be computed with."""
    if not 0 < real(alpha) < 1:
        raise UserError(f"alpha must lie strictly between 0 and 1, got {alpha!r}")
    if real(alpha) < 1e-100:
        raise UserError(f"alpha must be at least 1e-100, got {alpha!r}")


# Far above the error of SciPy's inverse beta function, far below anything a radius shows.
_MARGIN = 1e-10
_LOOSE = 1e-8  # no bound is farther than this from the best one
_TINY = 1e-12  # bounds below it are found without SciPy


def _bisect(holds, sound, beyond):
    """Between a `sound` end, where a condition holds, and one `beyond` it, the last number that is seen to hold."""
    for _ in range(100):
        middle = (sound + beyond) / 2
        good = holds(middle)
        sound, beyond = np.where(good, middle, sound), np.where(good, beyond, middle)
    return sound


def lower(k, n, alpha):
    """One-sided lower confidence bound for a probability (Clopper and Pearson 1934).

    Args:
      k: successes, integers, any shape.
      n: trials, integers, broadcastable; from 1 to 2**27.
      alpha: failure probability, broadcastable; at least 1e-110.

    Returns:
      float64 of the broadcast shape; 0 where k = 0.

    **Guarantee**: if k ~ Binomial(n, p) then P[lower(k, n, alpha) > p] ≤ alpha for every p. Numerical error is
    rounded towards 0.
    """
    k, n, alpha = np.broadcast_arrays(*_check(k, n, alpha))
    some = np.maximum(k, 1)
    # The root of (np)^k / k! = alpha, which is at least P[Binomial(n, p) >= k]. SciPy misses so small a bound.
    simple = np.exp((np.log(alpha) + special.gammaln(some + 1)) / some) / n
    tiny = simple < _TINY
    bound = special.betaincinv(np.where(tiny, 1, some), np.where(tiny, 1, n - some + 1), alpha)
    bound = np.where(k == 0, 0.0, np.where(tiny, simple, bound) * (1 - _MARGIN))

    def holds(p, at=...):
        """Whether P[Binomial(n, p) >= k] <= alpha."""
        return special.betainc(some[at], (n - some + 1)[at], p) <= alpha[at]

    # SciPy's inverse beta function is grossly wrong now and then, where a parameter is 1000; the function is right.
    wrong = (k > 0) & ~tiny & ~(holds(bound) & ~holds(bound * (1 + _LOOSE)))
    bound[wrong] = _bisect(lambda p: holds(p, wrong), np.zeros(wrong.sum()), np.ones(wrong.sum())) * (1 - _MARGIN)
    return bound[()]


def upper(k, n, alpha):
    """One-sided upper confidence bound for a probability; the mirror image of `lower`. 1 where k = n.

    **Guarantee**: if k ~ Binomial(n, p) then P[upper(k, n, alpha) < p] ≤ alpha for every p. Numerical error is
    rounded towards 1.
    """
    k, n, alpha = np.broadcast_arrays(*_check(k, n, alpha))
    with np.errstate(invalid="ignore"):
        bound = special.betainccinv(k + 1, n - k, alpha)
    # NaN, where the inverse cannot be found, bounds by 1.
    bound = np.where(k == n, 1.0, np.fmin(bound + _MARGIN, 1.0))

    def holds(p, at=...):
        """Whether P[Binomial(n, p) <= k] <= alpha."""
        return special.betaincc((k + 1)[at], (n - k)[at], p) <= alpha[at]

    wrong = (k < n) & ~(holds(bound) & ~holds(bound - _LOOSE))
    bound[wrong] = np.minimum(
        _bisect(lambda p: holds(p, wrong), np.ones(wrong.sum()), np.zeros(wrong.sum())) + _MARGIN, 1.0
    )
    return bound[()]
