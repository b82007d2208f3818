"""Bounds for a probability that hold at all numbers of samples together, by betting. NumPy and SciPy only.

Somebody who believes that a probability is at most p would sell bets on the samples at fair odds. A bet at q > p
multiplies the stake by q/p at every success and by (1 − q)/(1 − p) at every failure. If the probability is p, the
wealth of every such bet is a martingale, and so is the wealth M_n(p) of a mixture of bets. It starts at 1, so it ever
reaches 1/α with probability at most α (Ville 1939). The lower bound after n samples is the smallest p that these n
samples do not refute, that is with M_n(p) < 1/α.

A bet at q is best against a p where the samples give it log(1/α) in as few as possible. Bet j = 0, 1, … is made for
m = horizon / 2^j samples: with the angles p = sin²a and q = sin²(a + h), a sample is worth about 2h² on average for
every p, so h = √((log(1/α) + 3) / 2m). Its stake is proportional to √m: most samples are spent on images that need
many. The selection samples have no part in it. They are too few: a prior from 100 of them (a Beta distribution around
their share, with a tenth or a third of the stake) saved nothing in simulations on published logs.
"""

import functools

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from lsrs_jax.smoothing import confidence

# All on-disk format: tables are compared digit by digit.
_BETS = 16  # the last one is made for horizon / 2^15 samples
_MORE = 3.0  # what a bet has to win beyond log(1/α), because its stake is a part of 1
_AT_HORIZON = 0.25  # of α: for the bound of Clopper and Pearson at the horizon, the one number that is fixed beforehand
_MARGIN = 1e-10  # relative; far above the rounding errors of the wealth, far below what changes a printed radius
_HALVINGS = 64


def lower(k: ArrayLike, n: ArrayLike, alpha: ArrayLike, horizon: int) -> Float[np.ndarray, "..."]:
    """One-sided lower confidence bound for a probability from k successes in n samples; 0 where k = 0.

    Takes int64 counts and float64 levels that were checked, and broadcasts them. `horizon` is a number of samples that
    was fixed beforehand, and at least n.

    **Guarantee**: if samples 1, 2, … are independent successes with probability p, and k_n are the successes among the
    first n, then P[lower(k_n, n, alpha, horizon) > p for some n ≤ horizon] ≤ alpha for every p. So the bound holds at
    every stopping time. Numerical error is rounded towards 0.
    """
    parts = np.broadcast_arrays(k, n, alpha)
    columns = np.stack([part.ravel() for part in parts]).astype(float)  # counts up to 2**27 are exact
    found, inverse = np.unique(columns, axis=1, return_inverse=True)
    hits, size, level = found
    bound = _not_refuted(hits, size, (1 - _AT_HORIZON) * level, horizon) * (1 - _MARGIN)
    end = np.flatnonzero(size == horizon)
    at_end = confidence.trusted_lower(hits[end].astype(np.int64), horizon, _AT_HORIZON * level[end])
    bound[end] = np.maximum(bound[end], at_end)
    return bound[inverse.ravel()].reshape(parts[0].shape)


def upper(k: ArrayLike, n: ArrayLike, alpha: ArrayLike, horizon: int) -> Float[np.ndarray, "..."]:
    """One-sided upper confidence bound for a probability: `lower` for the failures, rounded towards 1."""
    return np.minimum(1 - lower(np.subtract(n, k), n, alpha, horizon) + _MARGIN, 1.0)


def limits(horizon: int) -> confidence.Limits:
    """`lower` and `upper` for this horizon."""
    return functools.partial(lower, horizon=horizon), functools.partial(upper, horizon=horizon)


def _not_refuted(k: np.ndarray, n: np.ndarray, alpha: np.ndarray, horizon: int) -> np.ndarray:
    """The largest p for which the wealth M_n(p) is still 1/alpha, by bisection of its angle.

    The wealth falls in p: the logarithm of a bet's has the derivative 2k (cot(a + h) − cot a) − 2(n − k) (tan(a + h) −
    tan a) in the angle a. At p = k/n no bet has won anything, so the bound lies below.
    """
    need = -np.log(alpha)
    low, high = np.zeros(len(k)), np.arcsin(np.sqrt(k / n))
    for _ in range(_HALVINGS):
        angle = (low + high) / 2
        refuted = _log_wealth(angle, k, n, need, horizon) >= need
        low, high = np.where(refuted, angle, low), np.where(refuted, high, angle)
    return np.sin(low) ** 2


def _log_wealth(angle: np.ndarray, k: np.ndarray, n: np.ndarray, need: np.ndarray, horizon: int) -> np.ndarray:
    """log M_n(sin² angle) of bets that are to win exp(need)."""
    number = np.arange(_BETS)[:, None]
    stakes = 0.5 ** (number / 2)
    turn = np.minimum(np.sqrt((need + _MORE) / (2 * horizon * 0.5**number)), np.pi / 2)
    sin, cos, small = np.sin(angle), np.cos(angle), 2 * np.sin(turn / 2) ** 2  # 1 − cos(turn), without cancellation
    certain = angle + turn >= np.pi / 2  # the bet is at q = 1
    with np.errstate(divide="ignore", invalid="ignore"):  # the angle is 0 only if k is
        success = np.where(certain, -np.log(sin), np.log1p(cos / sin * np.sin(turn) - small))
        failure = np.log1p(np.where(certain, -1.0, np.maximum(-sin / cos * np.sin(turn) - small, -1.0)))
        won = 2 * k * success + np.where(k == n, 0.0, 2 * (n - k) * failure)
        return np.logaddexp.reduce(np.log(stakes / stakes.sum()) + won, axis=0)
