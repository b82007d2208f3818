"""Confidence bounds for counts: Clopper–Pearson in float64. NumPy and SciPy only."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import special  # scipy.stats gives the same numbers, and takes a second to import

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.validate import array, numbers, real

MAX_SAMPLES = 2**27  # the device's int32 counts stay exact, and so does SciPy's inverse beta function
_SMALLEST_ALPHA = 1e-110  # a share of the smallest alpha of an image


def _check(k: Any, n: Any, alpha: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    k, n, alpha = array("k", k), array("n", n), numbers("alpha", alpha)
    for name, value in (("k", k), ("n", n)):
        if value.dtype.kind not in "iu":
            raise UserError(f"counts are integers, got {name} of type {value.dtype}")
    try:
        np.broadcast_shapes(k.shape, n.shape, alpha.shape)
    except ValueError as error:
        raise UserError(f"k, n and alpha do not fit: their shapes are {k.shape}, {n.shape}, {alpha.shape}") from error
    if np.any(n < 1):
        raise UserError("a confidence bound needs at least one sample, got n < 1")
    if np.any(n > MAX_SAMPLES):
        raise UserError("a confidence bound takes at most 2**27 samples")
    if np.any(k < 0) or np.any(k > n):
        raise UserError("counts must satisfy 0 <= k <= n")
    if not np.all((alpha >= _SMALLEST_ALPHA) & (alpha < 1)):
        raise UserError(f"alpha must lie strictly between 0 and 1, and not below {_SMALLEST_ALPHA}, got {alpha}")
    return k.astype(np.int64), n.astype(np.int64), alpha


def check_alpha(alpha: Any) -> None:
    """Raises UserError unless 1e-100 <= alpha < 1: SciPy must still be able to compute with a share of it."""
    if not 0 < real(alpha) < 1:
        raise UserError(f"alpha must lie strictly between 0 and 1, got {alpha!r}")
    if real(alpha) < 1e-100:
        raise UserError(f"alpha must be at least 1e-100, got {alpha!r}")


# On-disk format: tables are compared digit by digit. The margins are far above the error of SciPy's inverse beta
# function, and far below what changes a printed radius.
_MARGIN = 1e-10
_LOOSE = 1e-8  # no bound is farther than this from the best possible one
_TINY = 1e-12  # bounds below it are computed without SciPy


def _bisect(holds: Callable[[np.ndarray], np.ndarray], sound: np.ndarray, beyond: np.ndarray) -> np.ndarray:
    """The last number, between `sound` and `beyond`, at which a condition that holds at `sound` was seen to hold."""
    for _ in range(100):
        middle = (sound + beyond) / 2
        good = holds(middle)
        sound, beyond = np.where(good, middle, sound), np.where(good, beyond, middle)
    return sound


def lower(k: Any, n: Any, alpha: Any) -> Float[np.ndarray, "..."]:
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
    return trusted_lower(*_check(k, n, alpha))


def trusted_lower(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Float[np.ndarray, "..."]:
    """`lower` of int64 counts and float64 levels that were checked."""
    k, n, alpha = np.broadcast_arrays(k, n, alpha)
    some = np.maximum(k, 1)
    # The root of (np)^k / k! = alpha, which is at least P[Binomial(n, p) >= k]. SciPy fails for so small a bound.
    simple = np.exp((np.log(alpha) + special.gammaln(some + 1)) / some) / n
    tiny = simple < _TINY
    bound = special.betaincinv(np.where(tiny, 1, some), np.where(tiny, 1, n - some + 1), alpha)
    bound = np.where(k == 0, 0.0, np.where(tiny, simple, bound) * (1 - _MARGIN))

    def holds(p: np.ndarray, at: Any = ...) -> np.ndarray:
        """Whether P[Binomial(n, p) >= k] <= alpha."""
        return special.betainc(some[at], (n - some + 1)[at], p) <= alpha[at]

    # SciPy's inverse beta function is grossly wrong for some parameters (scipy/scipy#21725; seen at 1000).
    # The beta function is right, so every bound is checked with it. To go when SciPy contains boostorg/math#1259.
    wrong = (k > 0) & ~tiny & ~(holds(bound) & ~holds(bound * (1 + _LOOSE)))
    bound[wrong] = _bisect(lambda p: holds(p, wrong), np.zeros(wrong.sum()), np.ones(wrong.sum())) * (1 - _MARGIN)
    return bound[()]


def upper(k: Any, n: Any, alpha: Any) -> Float[np.ndarray, "..."]:
    """One-sided upper confidence bound for a probability; the mirror image of `lower`. 1 where k = n.

    **Guarantee**: if k ~ Binomial(n, p) then P[upper(k, n, alpha) < p] ≤ alpha for every p. Numerical error is
    rounded towards 1.
    """
    return trusted_upper(*_check(k, n, alpha))


def trusted_upper(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Float[np.ndarray, "..."]:
    """`upper` of int64 counts and float64 levels that were checked."""
    k, n, alpha = np.broadcast_arrays(k, n, alpha)
    with np.errstate(invalid="ignore"):
        bound = special.betainccinv(k + 1, n - k, alpha)
    # Where SciPy finds no inverse it returns NaN; the bound is then 1.
    bound = np.where(k == n, 1.0, np.fmin(bound + _MARGIN, 1.0))

    def holds(p: np.ndarray, at: Any = ...) -> np.ndarray:
        """Whether P[Binomial(n, p) <= k] <= alpha."""
        return special.betaincc((k + 1)[at], (n - k)[at], p) <= alpha[at]

    wrong = (k < n) & ~(holds(bound) & ~holds(bound - _LOOSE))
    bound[wrong] = np.minimum(
        _bisect(lambda p: holds(p, wrong), np.ones(wrong.sum()), np.zeros(wrong.sum())) + _MARGIN, 1.0
    )
    return bound[()]
