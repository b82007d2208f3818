"""Skew orthogonal convolutions: the exponential of a skew-symmetric convolution (Singla and Feizi 2021).

The layer is y = Σ_{i ≤ T} Lⁱx / i!, T convolutions by Horner's rule, with a kernel L that equals minus its own flipped
transpose: its Jacobian is skew-symmetric under circular and under zero padding alike. Strides by space-to-depth,
channels padded and cropped to max(c_out, c_in·s·s). The plain form is L.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import polynomial

from lsrs_jax.errors import UserError
from lsrs_jax.orthogonal.convolve import convolve
from lsrs_jax.orthogonal.families.family import ConvFamily
from lsrs_jax.orthogonal.matrix import adjoint, gram_bound, highest_precision
from lsrs_jax.orthogonal.resize import resize_channels, space_to_depth
from lsrs_jax.orthogonal.rounding import gamma, product_rounding
from lsrs_jax.orthogonal.shape import check_common, check_mode
from lsrs_jax.orthogonal.spectrum import (
    Spectrum,
    frequency_blocks,
    frequency_singular_values,
    kernel_spectrum,
    upper_bound,
)

# A multiple of 4: then |p(iλ)| ≤ 1 while λ ≤ 3.3, and 1 − |p(iλ)| ≤ 2.2e-6 for λ ≤ 1.
TERMS = 8
_NORM = 1.0

check = check_common


def _width(shape):
    return max(shape.c_out, shape.phases)


def init(key, shape, mode):
    """Raw parameters: a kernel ``(kh, kw, C, C)`` of odd size (even ones grow by one tap) on the space-to-depth grid.

    ``mode="identity"`` starts at L = 0, the identity (cropped or zero-padded in the channels).
    """
    check_mode(mode)
    taps = [count + 1 - count % 2 for count in shape.taps]
    width = _width(shape)
    std = (math.prod(taps) * width) ** -0.5 * (mode != "identity")
    return {"kernel": std * jax.random.normal(key, (*taps, width, width), jnp.float32)}


def _norm_bound(kernel):
    """A bound on the norm of the convolution under either padding: √(kh·kw) · min over unfoldings.

    Singla and Feizi 2021b. By antisymmetry the four unfoldings have two norms; `gram_bound` never underestimates them.
    """
    kh, kw, width, _ = kernel.shape
    flat = kernel.transpose(2, 0, 1, 3).reshape(width, kh * kw * width)
    crossed = kernel.transpose(0, 2, 1, 3).reshape(kh * width, kw * width)
    return math.sqrt(kh * kw) * jnp.minimum(gram_bound(flat), gram_bound(crossed))


@highest_precision
def build(raw, shape):
    """Raw parameters → the skew kernel L ``(kh, kw, C, C)`` with ‖L‖ ≤ 1, differentiable.

    **Guarantee**: L is exactly antisymmetric, hence has purely imaginary eigenvalues, and its norm is at most 1 up to
    rounding; the singular values of `apply` then lie in [1 − 2.2e-6, 1] up to rounding.
    """
    kernel = raw["kernel"]
    kernel = 0.5 * (kernel - jnp.flip(adjoint(kernel), (0, 1)))
    return kernel * (_NORM / jnp.maximum(_norm_bound(kernel), _NORM))


@functools.partial(jax.checkpoint, static_argnums=2)
def _taylor(kernel, x, padding):
    """Σ_{i ≤ T} Lⁱx / i!. Only x is kept for the backward pass; the T intermediate images are computed again."""
    z = x
    for term in range(TERMS, 0, -1):
        z = x + convolve(z, kernel, padding=padding) / term
    return z


def apply(kernel, x, shape):
    """T convolutions between a space-to-depth, a zero padding and a cropping of the channels."""
    x = resize_channels(space_to_depth(x, shape.strides), _width(shape))
    return resize_channels(_taylor(kernel.astype(x.dtype), x, shape.padding), shape.c_out)


def _taylor_range(norm):
    """Minimum and maximum of |Σ_{j ≤ T} (iλ)ʲ/j!| over |λ| ≤ norm, from the critical points of its square."""
    terms = [1 / math.factorial(j) for j in range(TERMS + 1)]
    # In u = λ²: the real part is even in λ, the imaginary part λ times an even polynomial.
    real = [terms[j] * (-1) ** (j // 2) for j in range(0, TERMS + 1, 2)]
    imaginary = [terms[j] * (-1) ** (j // 2) for j in range(1, TERMS + 1, 2)]
    square = polynomial.polyadd(
        polynomial.polymul(real, real), polynomial.polymulx(polynomial.polymul(imaginary, imaginary))
    )
    critical = polynomial.polyroots(polynomial.polyder(square)).real
    points = np.concatenate([[0.0, norm**2], critical[(critical > 0) & (critical < norm**2)]])
    values = np.sqrt(polynomial.polyval(points, square))
    return values.min(), values.max()


def spectrum(kernel, shape):
    """Circular: SVD of p(L̂) per frequency. Zero padding: |p(iλ)| over all |λ| ≤ ‖L‖, for L must be skew-symmetric."""
    if shape.padding == "circular":
        blocks = frequency_blocks(kernel, shape.output_hw)
        total = identity = np.eye(blocks.shape[-1])
        for term in range(TERMS, 0, -1):
            total = identity + blocks @ total / term
        cropped = total[..., : shape.c_out, : shape.phases]
        return Spectrum.of(frequency_singular_values(cropped), "SVD per frequency of the Taylor polynomial")
    if not np.array_equal(kernel, -np.flip(np.swapaxes(kernel, -1, -2), (0, 1))):
        raise UserError("exponential: the kernel is not antisymmetric, so nothing bounds it under zero padding")
    norm = kernel_spectrum(kernel, shape.output_hw, (1, 1), "zero").sigma_max
    low, high = _taylor_range(upper_bound(norm))
    return Spectrum(high, low, f"Taylor polynomial over skew spectra of norm {norm:.3g}")


def rounding(shape):
    """Float64 error of `apply` over ‖x‖: T products with L, each with a division and a sum, of norms up to e‖x‖."""
    taps = [count + 1 - count % 2 for count in shape.taps]
    return TERMS * math.e * (product_rounding(math.prod(taps) * _width(shape)) + gamma(4))


FAMILY = ConvFamily(check, init, build, apply, spectrum, rounding)
