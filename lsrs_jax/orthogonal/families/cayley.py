"""Orthogonal convolutions by the Cayley transform in the Fourier domain (Trockman and Kolter 2021).

Circular padding only; space-to-depth makes the strides. The built form is a stack of orthogonal matrices, one per
frequency of the half spectrum, so it belongs to one input size.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lsrs_jax.orthogonal import fourier
from lsrs_jax.orthogonal.families.family import ConvFamily, Raw
from lsrs_jax.orthogonal.matrix import adjoint, cayley, highest_precision
from lsrs_jax.orthogonal.resize import space_to_depth
from lsrs_jax.orthogonal.shape import ConvShape, Images, check_common, check_float, check_mode
from lsrs_jax.orthogonal.spectrum import Spectrum, frequency_singular_values, product_rounding
from lsrs_jax.runtime.errors import UserError


def check(shape: ConvShape) -> None:
    """Raises UserError for zero padding, which the Fourier transform cannot express."""
    check_common(shape)
    if shape.padding != "circular":
        raise UserError("cayley needs padding='circular'; use method='adaptive' for zero padding")


def init(key: PRNGKeyArray, shape: ConvShape, mode: str) -> Raw:
    """Raw parameters: a kernel on the space-to-depth grid and the norm to which it is scaled.

    ``mode="identity"`` starts with a small norm, so that the Cayley transform is close to the identity (cropped or
    zero-padded in the channels). ``"random"`` starts with the norm of a Gaussian kernel.
    """
    check_mode(mode)
    std = (shape.taps[0] * shape.taps[1] * max(shape.phases, shape.c_out)) ** -0.5
    kernel = std * jax.random.normal(key, (*shape.taps, shape.phases, shape.c_out), jnp.float32)
    norm = jnp.sqrt(jnp.sum(kernel**2))
    return {"kernel": kernel, "norm": norm * (0.1 if mode == "identity" else 1.0)}


@highest_precision
def build(raw: Raw, shape: ConvShape) -> dict[str, Float[Array, "height/sh width/sw//2+1 c_out c_in*sh*sw"]]:
    """Builds the ``"real"`` and ``"imag"`` parts of the blocks of the half spectrum, differentiable.

    **Guarantee**: every block is semi-orthogonal up to rounding. The operator that `apply` runs averages each block
    with the conjugate of its mirror frequency (equal up to rounding), so no singular value exceeds the largest of the
    blocks.
    """
    kernel = raw["kernel"]
    # The constant keeps the gradient finite at a zero kernel.
    kernel = kernel * (raw["norm"] * jax.lax.rsqrt(jnp.sum(kernel**2) + 1e-12))
    kh, kw, inputs, outputs = kernel.shape
    taps = fourier.transform(kernel.reshape(kh, kw, -1), shape.output_hw, (kh // 2, kw // 2))
    blocks = cayley(adjoint(taps.reshape(*taps.shape[:2], inputs, outputs)))
    return {"real": blocks.real, "imag": blocks.imag}


@highest_precision
def apply(built: dict[str, Float[Array, "..."]], x: Images, shape: ConvShape) -> Images:
    """Multiplies every frequency of the input by its block, in float32 if the input has less precision."""
    check_float(x, "a convolution")
    dtype = x.dtype
    x = space_to_depth(x, shape.strides).astype(jnp.promote_types(dtype, jnp.float32))
    blocks = jax.lax.complex(built["real"].astype(x.dtype), built["imag"].astype(x.dtype))
    spectrum = jnp.einsum("hwoi,bhwi->bhwo", blocks, fourier.transform(x, shape.output_hw))
    return fourier.inverse(spectrum, shape.output_hw[1]).astype(dtype)


def spectrum(built: dict[str, Float[np.ndarray, "..."]], shape: ConvShape) -> Spectrum:
    """Extreme singular values of all blocks of the half spectrum, computed in float64."""
    blocks = np.asarray(built["real"], np.float64) + 1j * np.asarray(built["imag"], np.float64)
    return Spectrum.of(frequency_singular_values(blocks), "SVD per frequency of the spectrum")


def rounding(shape: ConvShape) -> float:
    """Float64 error of `apply` over ‖x‖: two transforms, the blocks, two inverse transforms.

    Complex products have twice the terms. The factor 8 covers the two parts of a complex number, the half spectrum (√2
    in each direction) and the rounded entries of the transforms.
    """
    sizes = (*shape.output_hw, max(shape.phases, shape.c_out), *shape.output_hw)
    return sum(8 * product_rounding(2 * size + 4) for size in sizes)


FAMILY: ConvFamily = ConvFamily(check, init, build, apply, spectrum, rounding)
