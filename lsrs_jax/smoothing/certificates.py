"""Certificates: what a set of vote counts proves. NumPy only."""

import dataclasses

import numpy as np

from lsrs_jax.arguments import array, numbers, real
from lsrs_jax.errors import UserError
from lsrs_jax.smoothing import confidence
from lsrs_jax.smoothing.partition import check_bound, partition, share_of_alpha
from lsrs_jax.smoothing.radius import certified_radius


@dataclasses.dataclass(frozen=True)
class Certificates:
    """Arrays over images.

    Attributes:
      predict: int64, the class, or −1 on abstention.
      radius: float64, ℓ2, in units of the array the votes came from divided by the Lipschitz constant; 0 on
        abstention.
      counts: int64 ``(N, K)``, estimation votes per class.
      n: int64, estimation votes per image.
      p_a_lower, p_b_upper: float64, the bounds behind the radius, τ included.
      abstain: bool.
    """

    predict: np.ndarray
    radius: np.ndarray
    counts: np.ndarray
    n: np.ndarray
    p_a_lower: np.ndarray
    p_b_upper: np.ndarray
    abstain: np.ndarray

    def __len__(self):
        return len(self.predict)


def from_counts(selection, estimation, *, sigma, alpha, bound="binary", looks=None, lipschitz=1.0, slack=0.0, tau=0.0):
    """Certificates from two independent sets of votes (Cohen et al. 2019, CERTIFY).

    Args:
      selection: integers ``(N, K)``; they choose the candidate class (the lowest of equals), under ``"multiclass"`` the
        buckets, and nothing else.
      estimation: integers ``(N, K)`` from fresh noise; each row sums to at least 1 and at most 2**27. With `looks`: for
        each image the cumulative counts ``(looks reached, K)``.
      sigma, lipschitz, slack: as in `radius.certified_radius`.
      alpha: failure probability per image.
      bound: ``"binary"`` (p_B = 1 − p_A) or ``"multiclass"`` (class partitioning; Delattre et al. 2025): each bucket of
        rivals has an upper bound of its own.
      looks: the numbers of votes at which an image may have stopped, all of them, fixed beforehand; α is divided
        evenly over them, and each image keeps the best bounds of the looks it reached. None: a number of votes fixed
        beforehand, the sum of each row.
      tau: total variation between the sampled noise and the Gaussian, charged to both probabilities.

    **Guarantee**: for each image separately, with probability at least 1 − alpha over the estimation votes, the
    smoothed classifier returns ``predict`` everywhere within ``radius`` of the image, or the row abstains. Assumes
    that the votes of an image are independent draws of one distribution, within `tau` of the Gaussian's, and that
    selection and estimation votes are independent. With `looks` it holds for any rule of stopping at one of them, for
    all the bounds at all the looks hold together (union bound).
    """
    confidence.check_alpha(alpha)
    check_bound(bound)
    check_tau(tau)
    alpha, tau = float(alpha), float(tau)
    slack = numbers("slack", slack)
    selection = _counts("selection", selection)
    if looks is None:
        last = rows = _counts("estimation", estimation)
        owner, share, horizon = np.arange(len(rows)), alpha, rows.sum(axis=1)
    else:
        looks = _check_looks(looks)
        rows, owner = _rows_at_looks(estimation, looks)
        share, horizon = alpha / len(looks), np.full(len(selection), looks[-1])
        last = rows[np.flatnonzero(np.diff(owner, append=-1))]
    if selection.shape != last.shape:
        raise UserError(f"selection votes {selection.shape} and estimation votes {last.shape} differ in shape")
    if slack.shape not in ((), selection.shape[:1]):
        raise UserError(f"slack must be one number, or one per image, got shape {slack.shape}")
    bucket, count = partition(selection, horizon, share, bound)
    p_a, p_b = _bounds(rows, bucket[owner], count[owner], share)
    p_a = np.maximum.reduceat(p_a, np.searchsorted(owner, np.arange(len(last))))
    p_b = np.minimum.reduceat(p_b, np.searchsorted(owner, np.arange(len(last))))
    # The last places: τ must not vanish in a rounding.
    p_a = np.maximum(p_a - tau * (1 + 1e-9), 0.0)
    p_b = np.minimum(np.minimum(p_b + tau * (1 + 1e-9), 1 - p_a) + 1e-15, 1.0)
    radius = certified_radius(p_a, p_b, sigma, lipschitz, slack)
    abstain = ~(radius > 0)
    candidate = selection.argmax(axis=1)
    return Certificates(
        np.where(abstain, -1, candidate), np.where(abstain, 0.0, radius), last, last.sum(axis=1), p_a, p_b, abstain
    )


def _bounds(counts, bucket, count, alpha):
    """Lower bound of the candidate and upper bound of its strongest rival, per row of counts, together at level α."""
    n, each = counts.sum(axis=1), share_of_alpha(alpha, count)
    p_a = confidence.lower(np.where(bucket == 0, counts, 0).sum(axis=1), n, each)
    p_b = 1 - p_a
    several = np.flatnonzero(count > 1)
    largest = np.zeros(len(counts))
    for number in range(1, int(count[several].max(initial=0)) + 1):
        rows = several[count[several] >= number]
        votes = np.where(bucket[rows] == number, counts[rows], 0).sum(axis=1)
        largest[rows] = np.maximum(largest[rows], confidence.upper(votes, n[rows], each[rows]))
    p_b[several] = np.minimum(p_b[several], largest[several])
    return p_a, p_b


def check_tau(tau):
    """Raises UserError unless tau is a number in [0, 1)."""
    if not 0 <= real(tau) < 1:
        raise UserError(f"tau must lie in [0, 1), got {tau!r}")


def _check_looks(looks):
    found = array("looks", looks)
    if found.ndim != 1 or not found.size or found.dtype.kind not in "iu" or not (found[1:] > found[:-1]).all():
        raise UserError(f"from_counts takes looks that grow, whole numbers of votes, got {looks!r}")
    return found


def _rows_at_looks(estimation, looks):
    """All rows ``(M, K)`` of all images with their owners ``(M,)``; each image's rows must be those of its looks."""
    try:
        estimation = list(estimation)
    except TypeError as error:
        raise UserError(f"with looks, estimation votes are cumulative counts for each image: {error}") from error
    estimation = [_integers("estimation", part) for part in estimation]
    if not estimation or len({part.shape[1] for part in estimation}) > 1:
        raise UserError("estimation votes need the same classes for every image")
    rows, lengths = _counts("estimation", np.concatenate(estimation)), np.array([len(part) for part in estimation])
    owner = np.repeat(np.arange(len(lengths)), lengths)
    reached = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    wrong = rows.sum(axis=1) != np.append(looks, 0)[np.minimum(reached, len(looks))]
    wrong[1:] |= (np.diff(rows, axis=0) < 0).any(axis=1) & (reached[1:] > 0)
    if wrong.any():
        part = estimation[owner[wrong.argmax()]]
        raise UserError(
            f"estimation votes must be cumulative counts at the first of the looks {looks.tolist()}, got "
            f"{part.sum(axis=1)} votes"
        )
    return rows, owner


def _integers(name, counts):
    counts = array(f"{name} votes", counts, "integers")
    if counts.ndim != 2 or counts.shape[1] < 2 or not len(counts) or counts.dtype.kind not in "iu":
        raise UserError(
            f"{name} votes must be integers of shape (images, classes >= 2), got {counts.dtype} {counts.shape}"
        )
    return counts.astype(np.int64)  # what does not fit becomes negative


def _counts(name, counts):
    counts = _integers(name, counts)
    if np.any(counts < 0) or np.any(counts > confidence.MAX_VOTES) or np.any(counts.sum(axis=1) < 1):
        raise UserError(f"{name} votes must not be negative, nor above 2**27, and every image needs at least one")
    return counts
