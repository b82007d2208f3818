"""Certificates: what a set of counts proves. NumPy only."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.validate import array, choice, numbers, real
from lsrs_jax.smoothing import confidence
from lsrs_jax.smoothing.counts import Counts
from lsrs_jax.smoothing.partition import BOUNDS, partition, share_of_alpha
from lsrs_jax.smoothing.radius import check_lipschitz, check_sigma, trusted_radius


@dataclasses.dataclass(frozen=True)
class Certificates:
    """Arrays over images.

    Attributes:
      predict: int64, the class, or −1 on abstention.
      radius: ℓ2, in units of the array that noise was added to, divided by the Lipschitz constant; 0 on abstention.
      counts: estimation samples per class.
      n: estimation samples per image.
      p_a_lower, p_b_upper: the bounds behind the radius, τ included.
      samples: all counts behind the certificates, where `SmoothedClassifier.certify` drew them; to go on from.
    """

    predict: Int[np.ndarray, " images"]
    radius: Float[np.ndarray, " images"]
    counts: Int[np.ndarray, "images classes"]
    n: Int[np.ndarray, " images"]
    p_a_lower: Float[np.ndarray, " images"]
    p_b_upper: Float[np.ndarray, " images"]
    abstain: Bool[np.ndarray, " images"]
    samples: Counts | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.predict)


def from_counts(
    selection: Any,
    estimation: Any,
    *,
    sigma: float,
    alpha: float,
    bound: str = "binary",
    looks: Any = None,
    lipschitz: float = 1.0,
    slack: Any = 0.0,
    tau: float = 0.0,
) -> Certificates:
    """Certificates from two independent sets of counts (Cohen et al. 2019, CERTIFY).

    Args:
      selection: integers ``(images, classes)``; they choose the candidate class (the lowest of equals), under
        ``"multiclass"`` the buckets, and nothing else.
      estimation: integers ``(images, classes)`` from fresh noise; each row sums to at least 1 and at most 2**27. With
        `looks`: for each image the cumulative counts ``(looks reached, classes)``.
      sigma, lipschitz, slack: as in `radius.certified_radius`.
      alpha: failure probability per image.
      bound: ``"binary"`` (p_B = 1 − p_A) or ``"multiclass"`` (class partitioning; Delattre et al. 2025): each bucket of
        rivals has an upper bound of its own.
      looks: the numbers of samples at which an image may have stopped, all of them, fixed beforehand; α is divided
        evenly over them, and each image keeps the best bounds of the looks it reached. None: a number of samples fixed
        beforehand, the sum of each row.
      tau: total variation between the sampled noise and the Gaussian; it worsens both probabilities.

    **Guarantee**: for each image separately, with probability at least 1 − alpha over the estimation samples, the
    smoothed classifier returns ``predict`` everywhere within ``radius`` of the image, or the row abstains. Assumes
    that the samples of an image are independent draws of one distribution, within `tau` of the Gaussian's, and that
    selection and estimation samples are independent. With `looks` it holds for any rule of stopping at one of them,
    because all the bounds at all the looks hold together (union bound).
    """
    confidence.check_alpha(alpha)
    choice("bound", bound, BOUNDS)
    check_sigma(sigma)
    check_lipschitz(lipschitz)
    check_tau(tau)
    alpha, slack = float(alpha), numbers("slack", slack)
    selection = _counts("selection", selection)
    if looks is None:
        rows = _counts("estimation", estimation)
        lengths, share, horizon = np.ones(len(rows), int), alpha, rows.sum(axis=1)
    else:
        looks = _check_looks(looks)
        rows, lengths = _rows_at_looks(estimation, looks)
        share, horizon = alpha / len(looks), np.full(len(selection), looks[-1])
    if selection.shape != (len(lengths), rows.shape[1]):
        shape = len(lengths), rows.shape[1]
        raise UserError(f"selection counts {selection.shape} and estimation counts {shape} differ in shape")
    if slack.shape not in ((), selection.shape[:1]):
        raise UserError(f"slack must be one number, or one per image, got shape {slack.shape}")
    if np.any(~((slack >= 0) & np.isfinite(slack))):
        raise UserError("slack must be finite and not negative")
    return derive(
        *(selection, rows, lengths, horizon, share),
        bound=bound,
        sigma=float(sigma),
        lipschitz=float(lipschitz),
        slack=slack,
        tau=float(tau),
    )


def derive(
    selection: Int[np.ndarray, "images classes"],
    rows: Int[np.ndarray, "rows classes"],
    lengths: Int[np.ndarray, " images"],
    horizon: Int[np.ndarray, " images"],
    share: float,
    *,
    bound: str,
    sigma: float,
    lipschitz: float,
    slack: np.ndarray,
    tau: float,
) -> Certificates:
    """`from_counts` of arguments that were checked.

    Args:
      rows: estimation counts of all images, `lengths` of them in a row per image, cumulative.
      horizon: estimation samples at the last look.
      share: the part of alpha that each row has.
    """
    owner, starts = np.repeat(np.arange(len(lengths)), lengths), np.cumsum(lengths) - lengths
    bucket, count = partition(selection, horizon, share, bound)
    p_a, p_b = _bounds(rows, bucket[owner], count[owner], share)
    # A factor above 1: τ must not vanish in a rounding.
    p_a = np.maximum(np.maximum.reduceat(p_a, starts) - tau * (1 + 1e-9), 0.0)
    p_b = np.minimum(np.minimum.reduceat(p_b, starts) + tau * (1 + 1e-9), 1 - p_a)
    p_b = np.minimum(p_b + 1e-15, 1.0)
    radius = trusted_radius(p_a, p_b, sigma, lipschitz, slack)
    abstain, last = ~(radius > 0), rows[starts + lengths - 1]
    predict = np.where(abstain, -1, selection.argmax(axis=1))
    return Certificates(predict, np.where(abstain, 0.0, radius), last, last.sum(axis=1), p_a, p_b, abstain)


def _bounds(counts: np.ndarray, bucket: np.ndarray, count: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Lower bound of the candidate and upper bound of its strongest rival, per row of counts, together at level α."""
    n, each = counts.sum(axis=1), share_of_alpha(alpha, count)
    p_a = confidence.trusted_lower(np.where(bucket == 0, counts, 0).sum(axis=1), n, each)
    p_b = 1 - p_a
    several = np.flatnonzero(count > 1)
    largest = np.zeros(len(counts))
    for number in range(1, int(count[several].max(initial=0)) + 1):
        rows = several[count[several] >= number]
        samples = np.where(bucket[rows] == number, counts[rows], 0).sum(axis=1)
        largest[rows] = np.maximum(largest[rows], confidence.trusted_upper(samples, n[rows], each[rows]))
    p_b[several] = np.minimum(p_b[several], largest[several])
    return p_a, p_b


def check_tau(tau: Any) -> None:
    """Raises UserError unless tau is a number in [0, 1)."""
    if not 0 <= real(tau) < 1:
        raise UserError(f"tau must lie in [0, 1), got {tau!r}")


def _check_looks(looks: Any) -> Int[np.ndarray, " looks"]:
    found = array("looks", looks)
    if found.ndim != 1 or not found.size or found.dtype.kind not in "iu" or not (found[1:] > found[:-1]).all():
        raise UserError(f"from_counts takes looks that grow, whole numbers of samples, got {looks!r}")
    return found


def _rows_at_looks(
    estimation: Any, looks: Int[np.ndarray, " looks"]
) -> tuple[Int[np.ndarray, "rows classes"], Int[np.ndarray, " images"]]:
    """All rows of all images, and how many each image has; an image's rows must be those of its looks."""
    try:
        parts: Sequence[Any] = list(estimation)
    except TypeError as error:
        raise UserError(f"with looks, estimation counts are cumulative counts for each image: {error}") from error
    parts = [_integers("estimation", part) for part in parts]
    if not parts or len({part.shape[1] for part in parts}) > 1:
        raise UserError("estimation counts need the same classes for every image")
    rows, lengths = _counts("estimation", np.concatenate(parts)), np.array([len(part) for part in parts])
    reached = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    wrong = rows.sum(axis=1) != np.append(looks, 0)[np.minimum(reached, len(looks))]
    wrong[1:] |= (np.diff(rows, axis=0) < 0).any(axis=1) & (reached[1:] > 0)
    if wrong.any():
        part = parts[np.repeat(np.arange(len(lengths)), lengths)[wrong.argmax()]]
        raise UserError(
            f"estimation counts must be cumulative counts at the first of the looks {looks.tolist()}, got "
            f"{part.sum(axis=1)} samples"
        )
    return rows, lengths


def _integers(name: str, counts: Any) -> Int[np.ndarray, "images classes"]:
    counts = array(f"{name} counts", counts, "integers")
    if counts.ndim != 2 or counts.shape[1] < 2 or not len(counts) or counts.dtype.kind not in "iu":
        raise UserError(
            f"{name} counts must be integers of shape (images, classes >= 2), got {counts.dtype} {counts.shape}"
        )
    return counts.astype(np.int64)  # a count that does not fit becomes negative


def _counts(name: str, counts: Any) -> Int[np.ndarray, "images classes"]:
    counts = _integers(name, counts)
    if np.any(counts < 0) or np.any(counts > confidence.MAX_SAMPLES) or np.any(counts.sum(axis=1) < 1):
        raise UserError(f"{name} counts must not be negative, nor above 2**27, and every image needs at least one")
    return counts
