"""Certificates: what a set of vote counts proves. NumPy only."""

import dataclasses

import numpy as np

from lsrs_jax.errors import UserError
from lsrs_jax.smoothing import confidence
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
      p_a_lower, p_b_upper: float64, the bounds behind the radius.
      abstain: bool.
    """

    predict: np.ndarray
    radius: np.ndarray
    counts: np.ndarray
    n: np.ndarray
    p_a_lower: np.ndarray
    p_b_upper: np.ndarray
    abstain: np.ndarray


def from_counts(selection, estimation, *, sigma, alpha, lipschitz=1.0, slack=0.0):
    """Certificates from two independent sets of votes (Cohen et al. 2019, CERTIFY).

    Args:
      selection: integers ``(N, K)``; they choose the candidate class (the lowest of equals) and nothing else.
      estimation: integers ``(N, K)`` from fresh noise; each row sums to at least 1.
      sigma, lipschitz, slack: as in `radius.certified_radius`.
      alpha: failure probability per image.

    **Guarantee**: for each image separately, with probability at least 1 − alpha over the estimation votes, the
    smoothed classifier returns ``predict`` everywhere within ``radius`` of the image, or the row abstains. Assumes
    that the votes of an image are independent draws of one distribution, and that selection and estimation votes
    are independent.
    """
    selection, estimation = _counts("selection", selection), _counts("estimation", estimation)
    if selection.shape != estimation.shape:
        raise UserError(f"selection votes {selection.shape} and estimation votes {estimation.shape} differ in shape")
    candidate = selection.argmax(axis=1)
    n = estimation.sum(axis=1)
    k = np.take_along_axis(estimation, candidate[:, None], axis=1)[:, 0]
    p_a = confidence.lower(k, n, alpha)
    p_b = np.minimum(1 - p_a + 1e-15, 1.0)
    radius = certified_radius(p_a, p_b, sigma, lipschitz, slack)
    abstain = ~(radius > 0)
    return Certificates(
        np.where(abstain, -1, candidate), np.where(abstain, 0.0, radius), estimation, n, p_a, p_b, abstain
    )


def _counts(name, counts):
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[1] < 2 or not np.issubdtype(counts.dtype, np.integer):
        raise UserError(
            f"{name} votes must be integers of shape (images, classes >= 2), got {counts.dtype} {counts.shape}"
        )
    if np.any(counts < 0) or np.any(counts.sum(axis=1) < 1):
        raise UserError(f"{name} votes must not be negative, and every image needs at least one")
    return counts.astype(np.int64)
