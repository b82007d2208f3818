"""From bounds on class probabilities to a radius around the image. NumPy and SciPy only."""

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import special

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.validate import numbers, real

# Relative; covers the rounding of the quantile function and of the arithmetic here.
_MARGIN = 1e-12  # on-disk format: tables are compared digit by digit


def check_sigma(sigma: Any) -> None:
    """Raises UserError unless sigma is a positive number that float32 holds with full precision."""
    if not 2.0**-60 <= real(sigma) <= 2.0**60:
        raise UserError(f"sigma must be a positive number (between 1e-18 and 1e18), got {sigma!r}")


def sampled_sigma(sigma: float) -> float:
    """The σ a certificate may claim when noise is scaled in float32: the smaller of σ and its float32 neighbour."""
    check_sigma(sigma)
    return min(float(sigma), float(np.float32(sigma)))


def check_lipschitz(lipschitz: Any) -> None:
    """Raises UserError unless the Lipschitz constant is a positive number by which a radius can be divided."""
    if not 2.0**-200 <= real(lipschitz) <= 2.0**200:
        raise UserError(f"the Lipschitz constant must be a positive number (between 1e-60 and 1e60), got {lipschitz!r}")


def certified_radius(
    p_a_lower: Any, p_b_upper: Any, sigma: float, lipschitz: float = 1.0, slack: Any = 0.0
) -> Float[np.ndarray, "..."]:
    """R = max(0, (σ/2 (Φ⁻¹(p_A) − Φ⁻¹(p_B)) − slack) / L)  (Cohen et al. 2019, Theorem 1, carried through an encoder).

    Args:
      p_a_lower: lower bound on the probability of the class.
      p_b_upper: upper bound on the probability of every other class; 1 − p_a_lower gives the binary bound σΦ⁻¹(p_A).
      sigma: standard deviation of the noise that was sampled, in units of the latent (`sampled_sigma`).
      lipschitz: constant of the encoder from images to latents.
      slack: ℓ2 distance in the latent that is subtracted for rounding, per image or one number.

    Returns:
      float64, 0 wherever nothing is certified.

    **Guarantee**: if both bounds hold and ``encoder`` is ``lipschitz``-Lipschitz, the smoothed classifier keeps its
    class within this ℓ2 distance of the image. Numerical error is rounded towards 0. NaN bounds raise.
    """
    check_sigma(sigma)
    check_lipschitz(lipschitz)
    p_a, p_b = numbers("probabilities", p_a_lower), numbers("probabilities", p_b_upper)
    slack = numbers("slack", slack)
    try:
        np.broadcast_shapes(p_a.shape, p_b.shape, slack.shape)
    except ValueError as error:
        shapes = f"{p_a.shape}, {p_b.shape}, {slack.shape}"
        raise UserError(f"probabilities and slack do not fit: their shapes are {shapes}") from error
    if np.any(~((p_a >= 0) & (p_a <= 1) & (p_b >= 0) & (p_b <= 1))) or np.any(~((slack >= 0) & np.isfinite(slack))):
        raise UserError("probabilities must lie in [0, 1] and slack must be finite and not negative")
    # A lower bound of exactly 1 or an upper bound of exactly 0 would be an infinite radius: no count proves it.
    if np.any(p_a == 1) or np.any(p_b == 0):
        raise UserError("a bound of exactly 1 (or 0) certifies everything and cannot come from counts")
    return trusted_radius(p_a, p_b, float(sigma), float(lipschitz), slack)


def trusted_radius(
    p_a: np.ndarray, p_b: np.ndarray, sigma: float, lipschitz: float, slack: np.ndarray
) -> Float[np.ndarray, "..."]:
    """`certified_radius` of float64 arguments that were checked."""
    both_sides = np.where(p_b < p_a, special.ndtri(p_a) - special.ndtri(p_b), -np.inf)
    latent = sigma / 2 * both_sides * (1 - _MARGIN) - slack
    return np.maximum(latent, 0.0) / lipschitz * (1 - _MARGIN)


def float32_slack(latents: Float[np.ndarray, "images *latent"], sigma: float) -> Float[np.ndarray, " images"]:
    """How far rounding to float32 may move latents, in ℓ2: a slack for `certified_radius`.

    Args:
      latents: float64, as the encoder returned them.
      sigma: noise standard deviation; no radius in the latent exceeds 10σ.

    **Guarantee**: covers the rounding of the certified latent and of any other latent within the certified ball
    (each at most 2⁻²⁴ of its norm), twice over, which leaves room for the float64 encoder's own rounding (about
    1e-10). It does not cover the rounding of latent + noise inside the sampling loop, nor the 23-bit distribution of
    float32 normals: with float32 arithmetic the theorem holds for real-valued noise, and the program approximates it.
    """
    flat = np.asarray(latents, np.float64).reshape(len(latents), -1)
    return 2.0**-22 * (np.linalg.norm(flat, axis=1) + 10 * sigma) + 2.0**-140
