"""Confidence bounds and a test for counts; the partition of classes into buckets. NumPy and SciPy only.

The bounds are those of Clopper and Pearson, in float64. The binary bound p_B = 1 − p_A treats all rivals as one. A
bound on one rival alone would be unsound: it may not be the strongest one. So the selection samples divide the rivals
into buckets, before any estimation sample is drawn, and every bucket is bounded from above. The largest bound holds for
every rival.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from scipy import special  # scipy.stats gives the same numbers, and takes a second to import

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.validate import array, numbers, real

MAX_SAMPLES = 2**27  # the device's int32 counts stay exact, and so does SciPy's inverse beta function
_SMALLEST_ALPHA = 1e-110  # smaller than a share of the smallest alpha that `check_alpha` allows


def _check(k: Any, n: Any, alpha: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    k, n, alpha = array("k", k), array("n", n), numbers("alpha", alpha)
    if k.dtype.kind not in "iu" or n.dtype.kind not in "iu":
        raise UserError(f"k and n must be integers, got the types {k.dtype} and {n.dtype}")
    try:
        np.broadcast_shapes(k.shape, n.shape, alpha.shape)
    except ValueError as error:
        raise UserError(f"k, n and alpha do not fit: their shapes are {k.shape}, {n.shape}, {alpha.shape}") from error
    if np.any(n < 1) or np.any(n > MAX_SAMPLES) or np.any(k < 0) or np.any(k > n):
        raise UserError("counts must satisfy 0 <= k <= n, and n must lie between 1 and 2**27")
    if not np.all((alpha >= _SMALLEST_ALPHA) & (alpha < 1)):
        raise UserError(f"alpha must be at least {_SMALLEST_ALPHA} and below 1, got {alpha}")
    return k.astype(np.int64), n.astype(np.int64), alpha


def check_alpha(alpha: Any) -> None:
    """Raises UserError unless 1e-100 <= alpha < 1: SciPy must still be able to compute with a share of it."""
    if not 1e-100 <= real(alpha) < 1:
        raise UserError(f"alpha must be at least 1e-100 and below 1, got {alpha!r}")


# On-disk format: tables are compared digit by digit. The margins are far above the error of SciPy's inverse beta
# function, and far below what changes a printed radius.
_MARGIN = 1e-10
_LOOSE = 1e-8  # no bound is farther than this from the best possible one
_TINY = 1e-12  # bounds below it are computed without SciPy


def _bisect(holds: Callable[[np.ndarray], np.ndarray], sound: np.ndarray, beyond: np.ndarray) -> np.ndarray:
    """Bisects between `sound`, where a condition holds, and `beyond`; returns the last number where it held."""
    for _ in range(100 if sound.size else 0):
        middle = (sound + beyond) / 2
        good = holds(middle)
        sound, beyond = np.where(good, middle, sound), np.where(good, beyond, middle)
    return sound


def lower(k: Any, n: Any, alpha: Any) -> Float[np.ndarray, "..."]:
    """One-sided lower confidence bound for a probability (Clopper and Pearson 1934); 0 where k = 0.

    Takes arrays that broadcast: k successes in n trials (integers, n from 1 to 2**27), failure probability alpha.

    **Guarantee**: if k ~ Binomial(n, p) then P[lower(k, n, alpha) > p] ≤ alpha for every p. Numerical error is
    rounded towards 0.
    """
    return trusted_lower(*_check(k, n, alpha))


def trusted_lower(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Float[np.ndarray, "..."]:
    """`lower` of int64 counts and float64 levels that were checked."""
    k, n, alpha = np.broadcast_arrays(k, n, alpha)
    some = np.maximum(k, 1)
    # The root of (np)^k / k! = alpha; the left side is at least P[Binomial(n, p) >= k]. SciPy fails for tiny bounds.
    simple = np.exp((np.log(alpha) + special.gammaln(some + 1)) / some) / n
    tiny = simple < _TINY
    bound = special.betaincinv(np.where(tiny, 1, some), np.where(tiny, 1, n - some + 1), alpha)
    bound = np.where(k == 0, 0.0, np.where(tiny, simple, bound) * (1 - _MARGIN))

    def holds(p: np.ndarray, at: Any = ...) -> np.ndarray:
        """Whether P[Binomial(n, p) >= k] <= alpha."""
        return special.betainc(some[at], (n - some + 1)[at], p) <= alpha[at]

    # SciPy's inverse beta function is grossly wrong for some parameters (scipy/scipy#21725; seen at 1000). The beta
    # function is right, so it checks every bound. Remove this check when SciPy contains boostorg/math#1259.
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
    bound = np.where(k == n, 1.0, np.fmin(bound + _MARGIN, 1.0))  # 1 also for a NaN, where SciPy finds no inverse

    def holds(p: np.ndarray, at: Any = ...) -> np.ndarray:
        """Whether P[Binomial(n, p) <= k] <= alpha."""
        return special.betaincc((k + 1)[at], (n - k)[at], p) <= alpha[at]

    wrong = (k < n) & ~(holds(bound) & ~holds(bound - _LOOSE))
    found = _bisect(lambda p: holds(p, wrong), np.ones(wrong.sum()), np.zeros(wrong.sum()))
    bound[wrong] = np.minimum(found + _MARGIN, 1.0)
    return bound[()]


# A lower and an upper bound: functions of successes, samples and failure probability, which broadcast.
Limits = tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]
CLOPPER_PEARSON: Limits = (trusted_lower, trusted_upper)

BOUNDS = ("binary", "multiclass")
_MOST_GROUPS = 4  # buckets that the other rivals share; on-disk format
_MOST_SINGLES = 16  # rivals in a bucket of their own; each costs a part of α, so a seventeenth would gain nothing


def partition(
    selection: Int[np.ndarray, "images classes"], n: Int[np.ndarray, " images"], alpha: float, bound: str
) -> tuple[Int[np.ndarray, "images classes"], Int[np.ndarray, " images"]]:
    """Divides the classes of each image into buckets by its `selection` counts.

    `n` is the number of estimation samples to come, which must not depend on the estimation counts themselves; `alpha`
    is the failure probability of all bounds of an image together.

    Returns ``(bucket, count)``: the bucket of every class, and the number of buckets of rivals. Bucket 0 is the
    candidate alone (the lowest of equals); the rivals are in the buckets 1 … count. One bucket is the ``"binary"``
    bound. ``"multiclass"`` puts the m strongest rivals in buckets of their own and deals all others out to g more. It
    takes the m and g with the largest radius under the assumption that probabilities are the shares in the selection.
    """
    images, classes = selection.shape
    rows, candidate = np.arange(images)[:, None], selection.argmax(axis=1)
    rivals = selection.astype(float)
    rivals[rows[:, 0], candidate] = np.inf
    order = np.argsort(-rivals, axis=1, kind="stable")  # the candidate, then the rivals by strength
    if bound == "binary":
        of_ranks = np.tile(_dealt(classes, 0, 1), (images, 1))
    else:
        options = [
            _dealt(classes, singles, groups)
            for singles in range(min(classes - 1, _MOST_SINGLES + 1))
            for groups in range(1, min(classes - 1 - singles, _MOST_GROUPS) + 1)
        ]
        shares = np.take_along_axis(selection, order, axis=1) / selection.sum(axis=1, keepdims=True)
        promise = np.stack([_promise(shares, option, n, alpha) for option in options])
        of_ranks = np.array(options)[promise.argmax(axis=0)]
    bucket = np.empty_like(order)
    bucket[rows, order] = of_ranks
    return bucket, bucket.max(axis=1)


def _dealt(classes: int, singles: int, groups: int) -> Int[np.ndarray, " classes"]:
    """The bucket of every rank: 0, then `singles` alone, then the others, dealt out to the groups back and forth."""
    turn, position = np.divmod(np.arange(classes - 1 - singles), groups)
    dealt = np.where(turn % 2, groups - 1 - position, position)
    return np.concatenate([np.arange(1 + singles), 1 + singles + dealt])


def _promise(
    shares: Float[np.ndarray, "images classes"], option: np.ndarray, n: np.ndarray, alpha: float
) -> Float[np.ndarray, " images"]:
    """Φ⁻¹(p_A) − Φ⁻¹(p_B) if the n samples had the `shares` (by rank), with the rivals in the buckets `option`."""
    count, seen, nothing = option.max(), int((shares > 0).sum(axis=1).max(initial=0)), np.zeros(len(shares))
    # One column after another: `sum` adds in another order for one image than for several. On-disk format. Ranks
    # without samples, of a thousand classes most of them, would add zeros.
    columns, option = shares[:, :seen], option[:seen]
    sums = (functools.reduce(np.add, columns[:, option == bucket].T, nothing) for bucket in range(1, count + 1))
    largest = np.max(list(sums), axis=0)
    each = share_of_alpha(alpha, count)
    p_a = trusted_lower(np.floor(shares[:, 0] * n).astype(np.int64), n, each)
    p_b = np.minimum(1 - p_a, trusted_upper(np.floor(largest * n).astype(np.int64), n, each))
    return special.ndtri(p_a) - special.ndtri(p_b)


def share_of_alpha(alpha: float, count: np.ndarray) -> Float[np.ndarray, " images"]:
    """α of each bound, for rivals in `count` buckets. With one bucket, one bound serves both p_A and p_B."""
    return np.where(count == 1, alpha, alpha / (1 + count))


def bounds(
    counts: np.ndarray, bucket: np.ndarray, count: np.ndarray, alpha: float, limits: Limits = CLOPPER_PEARSON
) -> tuple[np.ndarray, np.ndarray]:
    """Lower bound of the candidate and upper bound of its strongest rival, per row of counts, together at level α."""
    n, each = counts.sum(axis=1), share_of_alpha(alpha, count)
    p_a = limits[0](np.where(bucket == 0, counts, 0).sum(axis=1), n, each)
    p_b = 1 - p_a
    several = np.flatnonzero(count > 1)
    if len(several):
        numbers = range(1, int(count[several].max()) + 1)
        owners = [several[count[several] >= number] for number in numbers]
        samples = [
            np.where(bucket[own] == number, counts[own], 0).sum(axis=1)
            for number, own in zip(numbers, owners, strict=True)
        ]
        rows, largest = np.concatenate(owners), np.zeros(len(counts))
        np.maximum.at(largest, rows, limits[1](np.concatenate(samples), n[rows], each[rows]))  # all buckets at once
        p_b[several] = np.minimum(p_b[several], largest[several])
    return p_a, p_b


def leaders(counts: Int[np.ndarray, "images classes"], alpha: float, tau: float) -> Int[np.ndarray, " images"]:
    """The class with the most samples, or −1 where the second has not significantly fewer (PREDICT, Cohen et al. 2019).

    If two classes are equally probable, each gets half of the samples that fall in either. τ can move that half by at
    most τ over the probability of the two together. A hundredth of the level pays for a lower bound on that
    probability, for all pairs of classes at once, because the samples themselves choose the pair.
    """
    rows, leader = np.arange(len(counts)), counts.argmax(axis=1)
    first, others = counts[rows, leader], counts.copy()
    others[rows, leader] = -1
    both = first + others.max(axis=1)
    return np.where(is_ahead(first, both, counts.sum(axis=1), counts.shape[1], alpha, tau), leader, -1)


def is_ahead(
    first: Int[np.ndarray, " images"],
    both: Int[np.ndarray, " images"],
    n: Int[np.ndarray, " images"],
    classes: int,
    alpha: float,
    tau: float,
) -> Bool[np.ndarray, " images"]:
    """The test of `leaders`: whether `first` of `both` samples of the two leading classes, of n in all, are enough."""
    half, level = np.float64(0.5), alpha
    if tau:
        together = trusted_lower(both, n, alpha / 100 / math.comb(classes, 2))
        half = 0.5 + tau / np.maximum(together - tau, 1e-300)
        level = 0.99 * alpha
    # P[at least `first` of `both`]
    return 2 * special.betainc(first, both - first + 1, np.minimum(half, 1.0)) <= level
