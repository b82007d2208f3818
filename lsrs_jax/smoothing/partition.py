"""Which probabilities are bounded: the class alone, or the class and buckets of its rivals. NumPy only.

The binary bound p_B = 1 − p_A treats all rivals as one. A bound on one rival alone would be unsound: it may not be the
strongest one. So the selection samples divide the rivals into buckets, before any estimation sample is drawn, and every
bucket is bounded from above. The largest bound holds for every rival.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from lsrs_jax.smoothing import confidence

BOUNDS = ("binary", "multiclass")
_MOST_GROUPS = 4  # buckets that the other rivals share; on-disk format
_MOST_SINGLES = 16  # rivals in a bucket of their own; each costs a part of α, and a seventeenth would gain nothing


def partition(
    selection: Int[np.ndarray, "images classes"], n: Int[np.ndarray, " images"], alpha: float, bound: str
) -> tuple[Int[np.ndarray, "images classes"], Int[np.ndarray, " images"]]:
    """Buckets of the classes of each image.

    Args:
      selection: the selection counts.
      n: estimation samples to come; must not depend on the estimation counts themselves.
      alpha: failure probability of all bounds of an image together.
      bound: ``"binary"`` or ``"multiclass"``.

    Returns:
      ``(bucket, count)``: the bucket of every class, and the number of buckets of rivals. Bucket 0 is the candidate
      alone (the lowest of equals); the rivals are in the buckets 1 … count. One bucket is the binary bound.

    ``"multiclass"`` puts the m strongest rivals in buckets of their own and deals all others out to g more: those m and
    g that promise the largest radius if every probability were the share in the selection.
    """
    images, classes = selection.shape
    rows, candidate = np.arange(images)[:, None], selection.argmax(axis=1)
    rivals = selection.astype(float)
    rivals[rows[:, 0], candidate] = np.inf
    order = np.argsort(-rivals, axis=1, kind="stable")  # the candidate, then the rivals by strength
    if bound == "binary":
        of_ranks = np.tile(_dealt(classes, 0, 1), (images, 1))
    else:
        options = list(_options(classes))
        shares = np.take_along_axis(selection, order, axis=1) / selection.sum(axis=1, keepdims=True)
        promise = np.stack([_promise(shares, option, n, alpha) for option in options])
        of_ranks = np.array(options)[promise.argmax(axis=0)]
    ranks = np.empty_like(order)
    ranks[rows, order] = np.arange(classes)
    bucket = np.take_along_axis(of_ranks, ranks, axis=1)
    return bucket, bucket.max(axis=1)


def _options(classes: int) -> Iterator[Int[np.ndarray, " classes"]]:
    for singles in range(min(classes - 1, _MOST_SINGLES + 1)):
        for groups in range(1, min(classes - 1 - singles, _MOST_GROUPS) + 1):
            yield _dealt(classes, singles, groups)


def _dealt(classes: int, singles: int, groups: int) -> Int[np.ndarray, " classes"]:
    """The bucket of every rank: 0, then `singles` alone, then the others, dealt out to and fro over the groups."""
    turn, position = np.divmod(np.arange(classes - 1 - singles), groups)
    dealt = np.where(turn % 2, groups - 1 - position, position)
    return np.concatenate([np.arange(1 + singles), 1 + singles + dealt])


def _promise(
    shares: Float[np.ndarray, "images classes"], option: np.ndarray, n: np.ndarray, alpha: float
) -> Float[np.ndarray, " images"]:
    """Φ⁻¹(p_A) − Φ⁻¹(p_B) if the n samples fell as `shares` (by rank), with the rivals in the buckets `option`."""
    count = option.max()
    largest = np.max([shares[:, option == bucket].sum(axis=1) for bucket in range(1, count + 1)], axis=0)
    each = share_of_alpha(alpha, count)
    p_a = confidence.trusted_lower(np.floor(shares[:, 0] * n).astype(np.int64), n, each)
    p_b = np.minimum(1 - p_a, confidence.trusted_upper(np.floor(largest * n).astype(np.int64), n, each))
    return special.ndtri(p_a) - special.ndtri(p_b)


def share_of_alpha(alpha: float, count: np.ndarray) -> Float[np.ndarray, " images"]:
    """α of each bound where the rivals are in `count` buckets. With one bucket a single bound serves both sides."""
    return np.where(count == 1, alpha, alpha / (1 + count))
