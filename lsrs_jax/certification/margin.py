"""Deterministic certificates: the margin of a linear head behind a Lipschitz encoder. NumPy only.

The baseline without noise (Tsuzuku, Sato and Sugiyama 2018): with logits Wᵀz + b and an L-Lipschitz encoder, class y
cannot lose to class j within the distance (logit_y − logit_j) / (L ‖w_y − w_j‖).
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.validate import numbers
from lsrs_jax.smoothing.derivation import check_lipschitz

_MARGIN = 1e-12  # covers the rounding of norms, differences and the division
_LARGEST = 1e300  # limit of logits and weights: their differences and norms must not overflow
_SMALLEST = 1e-140  # least distance, relative to the largest weight: squares of smaller ones underflow


def certified_margin(
    logits: Any, weights: Any = None, *, lipschitz: float = 1.0, slack: Any = 0.0
) -> tuple[Int[np.ndarray, " images"], Float[np.ndarray, " images"]]:
    """Prediction (the lowest class of equals) and certified ℓ2 radius (0 where nothing is certified) without noise.

    Args:
      logits: ``(N, K)``, of the clean inputs.
      weights: ``(d, K)``, the last layer; its columns have the distances ‖w_y − w_j‖. None for logits that are jointly
        1-Lipschitz in the latent, as after an orthogonal last layer: the distance is then √2 for every pair.
      lipschitz: constant of the encoder in front of the last layer.
      slack: ℓ2 distance in the latent that is subtracted for rounding, per image or one number.

    Raises UserError for shapes that do not fit, numbers beyond 1e300 or not finite, or two classes of equal weights.

    **Guarantee**: if the encoder is ``lipschitz``-Lipschitz in ℓ2 and `slack` covers the rounding of the logits, the
    classifier returns ``predict`` everywhere within ``radius`` of the input. Radii are rounded down.
    """
    check_lipschitz(lipschitz)
    logits, slack = numbers("logits", logits), numbers("slack", slack)
    if logits.ndim != 2 or logits.shape[1] < 2 or not np.all(np.abs(logits) <= _LARGEST):
        raise UserError(f"logits must be finite numbers of shape (images, classes >= 2), <= 1e300, got {logits.shape}")
    if slack.shape not in ((), logits.shape[:1]) or np.any(~((slack >= 0) & np.isfinite(slack))):
        raise UserError("slack must be finite and not negative, one number or one per image")
    apart = distances(weights, logits.shape[1])
    predict, rows = logits.argmax(axis=1), np.arange(len(logits))
    with np.errstate(over="ignore"):
        latent = (logits[rows, predict, None] - logits) / apart[predict]
        latent[rows, predict] = np.inf
        nearest = latent.min(axis=1)
        # Floating-point numbers next to 0 are too far apart for this rounding down.
        nearest = np.where(nearest > 1e-200, nearest, 0.0)
        radius = np.maximum(nearest * (1 - _MARGIN) - slack, 0.0) / float(lipschitz) * (1 - _MARGIN)
    if not np.isfinite(radius).all():
        raise UserError("a radius is too large for float64: scale the logits")
    return predict, radius


def _scaled(weights: np.ndarray) -> tuple[float, np.ndarray]:
    """``(scale, weights / scale)`` for a power of two with which no square overflows or underflows."""
    scale = 2.0 ** float(np.frexp(np.abs(weights).max())[1])
    return scale, weights / scale


def distances(weights: Any, classes: int) -> Float[np.ndarray, "classes classes"]:
    """‖w_i − w_j‖ ``(K, K)``, rounded up; ∞ on the diagonal."""
    if weights is None:
        found = np.full((classes, classes), np.sqrt(2.0))
    else:
        weights = numbers("weights", weights)
        fits = weights.ndim == 2 and weights.shape[1] == classes and len(weights)
        if not fits or not np.all(np.abs(weights) <= _LARGEST):
            raise UserError(f"weights must be finite numbers of shape (d, {classes}), <= 1e300, got {weights.shape}")
        scale, weights = _scaled(weights)
        found = np.stack([np.linalg.norm(weights - column[:, None], axis=0) for column in weights.T])
        found = np.where(found > _SMALLEST, scale * found, 0.0)
    np.fill_diagonal(found, np.inf)
    if not np.all(found > 1e-290):
        raise UserError("two classes have equal weights in the last layer: no finite margin separates them")
    return found * (1 + _MARGIN)


def float64_slack(
    rounding: Any,
    latents: Float[np.ndarray, "images d"],
    weights: Float[np.ndarray, "d classes"],
    bias: Float[np.ndarray, " classes"],
    reach: Any,
) -> Float[np.ndarray, " images"]:
    """The slack for `certified_margin` that covers float64 rounding of latents and logits, as ℓ2 in the latent.

    Per image or one number, `rounding` is an ℓ2 bound on the rounding of the encoder at the clean and at any perturbed
    image (`lipschitz.LipschitzReport.rounding`), and `reach` the largest certified distance in the latent: the radius
    that `certified_margin` gives without a slack, times the Lipschitz constant.

    **Guarantee**: holds for certificates within `reach`. It covers four roundings: those of the encoder at the clean
    and at the perturbed image, and those of the two logits that are compared at either of them. For each logit it
    counts twice the bound for a sum of d + 1 terms.
    """
    farthest = np.linalg.norm(latents, axis=1) + reach
    scale, scaled = _scaled(weights)
    terms = scale * np.linalg.norm(scaled, axis=0).max() * farthest + np.abs(bias).max()
    rounded = 8 * (len(weights) + 1) * (2.0**-53 * terms + 2.0**-1074)  # 2⁻¹⁰⁷⁴ for products that underflow
    return 2 * rounding + rounded / distances(weights, weights.shape[1]).min()
