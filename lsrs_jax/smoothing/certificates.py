"""Certificates from counts that a caller hands in. NumPy only."""

from typing import Any

import numpy as np
from jaxtyping import Int

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.validate import array, numbers
from lsrs_jax.smoothing.confidence import MAX_SAMPLES
from lsrs_jax.smoothing.derivation import Certificates, Derivation

__all__ = ["Certificates", "from_counts"]


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
      selection: integers ``(images, classes)``; they choose the candidate class (the lowest of equals) and, under
        ``"multiclass"``, the buckets; nothing else.
      estimation: integers ``(images, classes)`` from fresh noise; each row sums to at least 1 and at most 2**27. With
        `looks`: for each image the cumulative counts ``(looks reached, classes)``.
      sigma, lipschitz, slack: as in `derivation.certified_radius`.
      alpha: failure probability per image.
      bound: ``"binary"`` (p_B = 1 − p_A) or ``"multiclass"`` (class partitioning; Delattre et al. 2025): each bucket of
        rivals has an upper bound of its own.
      looks: all numbers of samples at which an image may have stopped, fixed beforehand; α is divided evenly over them,
        and each image keeps the best bounds of the looks it reached. None: the sum of each row was fixed beforehand.
      tau: total variation between the sampled noise and the Gaussian; it worsens both probabilities.

    **Guarantee**: for each image separately, with probability at least 1 − alpha over the estimation samples, the
    smoothed classifier returns ``predict`` everywhere within ``radius`` of the image, or the row abstains. Assumes
    that the samples of an image are independent draws of one distribution, within `tau` of the Gaussian's, and that
    selection and estimation samples are independent. With `looks` it holds for any rule of stopping at one of them,
    because all the bounds at all the looks hold together (union bound).
    """
    derivation, slack = Derivation(sigma, alpha, bound, lipschitz, tau), numbers("slack", slack)
    selection = _counts("selection", selection)
    if looks is None:
        rows = _counts("estimation", estimation)
        lengths, share, horizon = np.ones(len(rows), int), 1, rows.sum(axis=1)
    else:
        found = array("looks", looks)
        if found.ndim != 1 or not found.size or found.dtype.kind not in "iu" or not (found[1:] > found[:-1]).all():
            raise UserError(f"from_counts takes looks that grow, whole numbers of samples, got {looks!r}")
        if found[-1] > MAX_SAMPLES:
            raise UserError(f"looks must not be above 2**27 samples, got {found[-1]}")
        rows, lengths = _rows_at_looks(estimation, found)
        share, horizon = len(found), np.full(len(selection), found[-1])
    shape = len(lengths), rows.shape[1]
    if selection.shape != shape:
        raise UserError(f"selection counts {selection.shape} and estimation counts {shape} differ in shape")
    if slack.shape not in ((), shape[:1]) or np.any(~((slack >= 0) & np.isfinite(slack))):
        raise UserError("slack must be finite and not negative, one number or one per image")
    return derivation.derive(selection, rows, lengths, horizon, slack, share)


def _rows_at_looks(
    estimation: Any, looks: Int[np.ndarray, " looks"]
) -> tuple[Int[np.ndarray, "rows classes"], Int[np.ndarray, " images"]]:
    """All rows of all images, and the number of rows of each; raises UserError for rows that no looks give."""
    try:
        parts = [_integers("estimation", part) for part in list(estimation)]
    except TypeError as error:
        raise UserError(f"with looks, estimation counts are cumulative counts for each image: {error}") from error
    if not parts or len({part.shape[1] for part in parts}) > 1:
        raise UserError("estimation counts need the same classes for every image")
    rows, lengths = _counts("estimation", np.concatenate(parts)), np.array([len(part) for part in parts])
    reached = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    wrong = rows.sum(axis=1) != np.append(looks, 0)[np.minimum(reached, len(looks))]
    wrong[1:] |= (np.diff(rows, axis=0) < 0).any(axis=1) & (reached[1:] > 0)
    if wrong.any():
        got = parts[np.repeat(np.arange(len(lengths)), lengths)[wrong.argmax()]].sum(axis=1)
        expected = f"at the first of the looks {looks.tolist()}"
        raise UserError(f"estimation counts must be cumulative counts {expected}, got {got} samples")
    return rows, lengths


def _integers(name: str, counts: Any) -> Int[np.ndarray, "images classes"]:
    counts = array(f"{name} counts", counts, "integers")
    if counts.ndim != 2 or counts.shape[1] < 2 or not len(counts) or counts.dtype.kind not in "iu":
        got = f"{counts.dtype} {counts.shape}"
        raise UserError(f"{name} counts must be integers of shape (images, classes >= 2), got {got}")
    return counts.astype(np.int64)  # a count that does not fit becomes negative


def _counts(name: str, counts: Any) -> Int[np.ndarray, "images classes"]:
    counts = _integers(name, counts)
    total = counts.sum(axis=1)
    # Each entry is checked too: the sum of huge counts may wrap around.
    if np.any(counts < 0) or np.any(counts > MAX_SAMPLES) or np.any((total < 1) | (total > MAX_SAMPLES)):
        raise UserError(f"{name} counts must not be negative, and sum to at least one and at most 2**27 per image")
    return counts
