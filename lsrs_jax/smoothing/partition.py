"""Which probabilities are bounded: the class alone, or the class and buckets of its rivals. NumPy only.

The binary bound p_B = 1 − p_A gives away what the rivals share among them. Bounding one rival alone would be unsound:
it may not be the strongest one. So the rivals are divided into buckets by the selection votes, before any estimation
vote is cast, and every bucket is bounded from above; the largest bound holds for every rival.
"""

import numpy as np
from scipy import special

from lsrs_jax.errors import UserError
from lsrs_jax.smoothing import confidence

BOUNDS = ("binary", "multiclass")
_MOST_GROUPS = 4  # of the other rivals, so that none is as large as all of them
_MOST_SINGLES = 16  # rivals in a bucket of their own; each costs α, and the sixteenth gains nothing any more


def check_bound(bound):
    """Raises UserError for an unknown bound."""
    if not isinstance(bound, str) or bound not in BOUNDS:
        raise UserError(f"unknown bound {bound!r}: choose one of {', '.join(BOUNDS)}")


def partition(selection, n, alpha, bound):
    """Buckets of the classes of each image.

    Args:
      selection: integers ``(N, K)``, the selection votes.
      n: estimation votes to come, integers ``(N,)``; must not depend on the estimation votes themselves.
      alpha: failure probability of all bounds of an image together.
      bound: ``"binary"`` or ``"multiclass"``.

    Returns:
      ``(bucket, count)``: integers ``(N, K)`` and ``(N,)``. Bucket 0 is the candidate (the lowest of equals) alone; the
      rivals are in the buckets 1 … count. One bucket of all rivals is the binary bound.

    ``"multiclass"`` puts the m strongest rivals in buckets of their own and deals all others out to g more: those m and
    g that promise the largest radius if every probability were what the selection votes suggest.
    """
    check_bound(bound)
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


def _options(classes):
    for singles in range(min(classes - 1, _MOST_SINGLES + 1)):
        for groups in range(1, min(classes - 1 - singles, _MOST_GROUPS) + 1):
            yield _dealt(classes, singles, groups)


def _dealt(classes, singles, groups):
    """The bucket of every rank: 0, then `singles` alone, the others to and fro over so many groups."""
    turn, place = np.divmod(np.arange(classes - 1 - singles), groups)
    dealt = np.where(turn % 2, groups - 1 - place, place)
    return np.concatenate([np.arange(1 + singles), 1 + singles + dealt])


def _promise(shares, option, n, alpha):
    """Φ⁻¹(p_A) − Φ⁻¹(p_B) if the n votes fell as `shares` (by rank), with the rivals in such buckets."""
    count = option.max()
    largest = np.max([shares[:, option == bucket].sum(axis=1) for bucket in range(1, count + 1)], axis=0)
    each = share_of_alpha(alpha, count)
    p_a = confidence.lower(np.floor(shares[:, 0] * n).astype(np.int64), n, each)
    p_b = np.minimum(1 - p_a, confidence.upper(np.floor(largest * n).astype(np.int64), n, each))
    return special.ndtri(p_a) - special.ndtri(p_b)


def share_of_alpha(alpha, count):
    """α of each bound where the rivals are in `count` buckets: with one of them a single bound serves both sides."""
    return np.where(count == 1, alpha, alpha / (1 + count))
