"""Skew orthogonal convolutions: the exponential of a skew-symmetric convolution (Singla and Feizi 2021).

The layer is y = Σ_{i ≤ T} Lⁱx / i!, computed by T convolutions (Horner's rule). The built form is the kernel L, which
equals minus its own flipped transpose, so that the convolution is skew-symmetric under circular and zero padding.
Space-to-depth makes the strides; the layer pads the channels to C = max(c_out, c_in·s·s) and crops them at the end.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from numpy.polynomial import polynomial

from lsrs_jax.orthogonal import spectrum
from lsrs_jax.orthogonal.families.family import ConvFamily, Raw, convolve, spectrum_of_kernel
from lsrs_jax.orthogonal.matrix import adjoint, gram_bound, highest_precision
from lsrs_jax.orthogonal.resize import resize_channels, space_to_depth
from lsrs_jax.orthogonal.shape import ConvShape, Images, check_common, check_mode
from lsrs_jax.runtime.errors import UserError

# A multiple of 4: then |p(iλ)| ≤ 1 for λ ≤ 3.3, and 1 − |p(iλ)| ≤ 2.2e-6 for λ ≤ 1.
TERMS: int = 8


def _width(shape: ConvShape) -> int:
    return max(shape.c_out, shape.phases)


def _taps(shape: ConvShape) -> list[int]:
    """Kernel size on the space-to-depth grid, where even sizes become odd by one more tap."""
    return [count + 1 - count % 2 for count in shape.taps]


def init(key: PRNGKeyArray, shape: ConvShape, mode: str) -> Raw:
    """Raw parameters: a kernel ``(kh, kw, C, C)`` of odd size on the space-to-depth grid.

    ``mode="identity"`` starts at L = 0, the identity (cropped or zero-padded in the channels).
    """
    check_mode(mode)
    taps, width = _taps(shape), _width(shape)
    std = (math.prod(taps) * width) ** -0.5 * (mode != "identity")
    return {"kernel": std * jax.random.normal(key, (*taps, width, width), jnp.float32)}


def _norm_bound(kernel: Float[Array, "kh kw C C"]) -> Float[Array, ""]:
    """Bounds the norm of the convolution under either padding by those of its unfoldings (Singla and Feizi 2021b)."""
    # The four unfoldings of an antisymmetric kernel have only two different norms.
    kh, kw, width, _ = kernel.shape
    flat = kernel.transpose(2, 0, 1, 3).reshape(width, kh * kw * width)
    crossed = kernel.transpose(0, 2, 1, 3).reshape(kh * width, kw * width)
    return math.sqrt(kh * kw) * jnp.minimum(gram_bound(flat), gram_bound(crossed))


@highest_precision
def build(raw: Raw, shape: ConvShape) -> Float[Array, "kh kw C C"]:
    """Builds the skew kernel L with ‖L‖ ≤ 1 from raw parameters, differentiable.

    **Guarantee**: L is exactly antisymmetric, hence has purely imaginary eigenvalues, and its norm is at most 1 up to
    rounding; the singular values of `apply` then lie in [1 − 2.2e-6, 1] up to rounding.
    """
    kernel = raw["kernel"]
    kernel = 0.5 * (kernel - jnp.flip(adjoint(kernel), (0, 1)))
    return kernel * (1.0 / jnp.maximum(_norm_bound(kernel), 1.0))


@functools.partial(jax.checkpoint, static_argnums=2)
def _taylor(kernel: Float[Array, "kh kw C C"], x: Images, padding: str) -> Images:
    """Σ_{i ≤ T} Lⁱx / i!. Only x is stored for the backward pass, which computes the intermediate images again."""
    z = x
    for term in range(TERMS, 0, -1):
        z = x + convolve(z, kernel, padding=padding) / term
    return z


def apply(kernel: Float[Array, "kh kw C C"], x: Images, shape: ConvShape) -> Images:
    """Applies space-to-depth, pads the channels to C, convolves T times and crops the channels to c_out."""
    x = resize_channels(space_to_depth(x, shape.strides), _width(shape))
    return resize_channels(_taylor(kernel.astype(x.dtype), x, shape.padding), shape.c_out)


def _taylor_range(norm: float) -> tuple[float, float]:
    """Minimum and maximum of |Σ_{j ≤ T} (iλ)ʲ/j!| over |λ| ≤ norm, from the critical points of its square."""
    terms = [(-1) ** (j // 2) / math.factorial(j) for j in range(TERMS + 1)]
    # Polynomials in u = λ²: the real part is even in λ, the imaginary part is λ times an even polynomial.
    real, imaginary = (polynomial.polymul(part, part) for part in (terms[::2], terms[1::2]))
    square = polynomial.polyadd(real, polynomial.polymulx(imaginary))
    critical = polynomial.polyroots(polynomial.polyder(square)).real
    points = np.concatenate([[0.0, norm**2], critical[(critical > 0) & (critical < norm**2)]])
    values = np.sqrt(polynomial.polyval(points, square))
    return values.min(), values.max()


def _spectrum(kernel: Float[np.ndarray, "kh kw C C"], shape: ConvShape) -> spectrum.Spectrum:
    """Circular padding: SVD of p(L̂) per frequency. Zero padding: range of |p(iλ)|, |λ| ≤ ‖L‖, for antisymmetric L."""
    if shape.padding == "circular":
        blocks = spectrum.frequency_blocks(kernel, shape.output_hw)
        total = identity = np.eye(blocks.shape[-1])
        for term in range(TERMS, 0, -1):
            total = identity + blocks @ total / term
        sigma = spectrum.frequency_singular_values(total[..., : shape.c_out, : shape.phases])
        return spectrum.Spectrum.of(sigma, "SVD per frequency of the Taylor polynomial")
    if not np.array_equal(kernel, -np.flip(np.swapaxes(kernel, -1, -2), (0, 1))):
        raise UserError("exponential: the kernel is not antisymmetric, so it has no bound under zero padding")
    norm = spectrum_of_kernel(kernel, shape._replace(input_hw=shape.output_hw, strides=(1, 1))).sigma_max
    low, high = _taylor_range(spectrum.upper_bound(norm))
    return spectrum.Spectrum(high, low, f"Taylor polynomial over skew spectra of norm {norm:.3g}")


def rounding(shape: ConvShape) -> float:
    """Float64 error of `apply` over ‖x‖: T products with L, each with a division and a sum, of norm at most e‖x‖."""
    return TERMS * math.e * (spectrum.product_rounding(math.prod(_taps(shape)) * _width(shape)) + spectrum.gamma(4))


FAMILY: ConvFamily = ConvFamily(check_common, init, build, apply, _spectrum, rounding)
