"""Orthogonal convolutions by the Cayley transform in the Fourier domain (Trockman and Kolter 2021).

Circular padding only; space-to-depth makes the strides. The built form is a stack of orthogonal matrices, one per
frequency of the half spectrum, so it belongs to one input size.

The Fourier transforms are matrix products, which are about as fast as an FFT for usual image sizes and run on every
accelerator. XLA's FFT on CPU waits for the thread pool it runs on, so that concurrent transforms can deadlock (jax
0.10; openxla/xla#46345 adds a guard). Try the FFT again when the oldest supported jax contains that guard.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int, PRNGKeyArray

from lsrs_jax.orthogonal.families.family import ConvFamily, Raw
from lsrs_jax.orthogonal.matrix import adjoint, cayley, highest_precision
from lsrs_jax.orthogonal.resize import space_to_depth
from lsrs_jax.orthogonal.shape import ConvShape, Images, Pair, check_common, check_float, check_mode
from lsrs_jax.orthogonal.spectrum import Spectrum, frequency_singular_values, product_rounding
from lsrs_jax.runtime.errors import UserError

HalfSpectrum = Complex[Array, "*batch height width//2+1 c"]


def _phases(
    positions: Int[np.ndarray, " m"], frequencies: Int[np.ndarray, " n"], period: int
) -> Complex[np.ndarray, "m n"]:
    """exp(−2πi·position·frequency / period), exact to the last place of float64."""
    return np.exp(-2j * np.pi * (np.outer(positions, frequencies) % period) / period)


def transform(x: Float[Array, "*batch h w c"], size: Pair, offset: Pair = (0, 0)) -> HalfSpectrum:
    """The half spectrum of a real signal on a torus of `size` (height, width).

    Entry (i, j) sits at position (i, j) − offset modulo the size; h and w may be smaller or larger than the torus.
    """
    (height, width), (rows, columns) = size, x.shape[-3:-1]
    dtype = jnp.result_type(x.dtype, jnp.complex64)
    along = jnp.asarray(_phases(np.arange(columns) - offset[1], np.arange(width // 2 + 1), width), dtype)
    across = jnp.asarray(_phases(np.arange(rows) - offset[0], np.arange(height), height), dtype)
    real = jnp.einsum("...wc,wk->...kc", x, along.real)
    imaginary = jnp.einsum("...wc,wk->...kc", x, along.imag)
    return jnp.einsum("hf,...hkc->...fkc", across, jax.lax.complex(real, imaginary))


def inverse(spectrum: HalfSpectrum, width: int) -> Float[Array, "*batch height width c"]:
    """The real signal of a half spectrum; `width` may be even or odd."""
    height, half = spectrum.shape[-3:-1]
    across = jnp.asarray(np.conj(_phases(np.arange(height), np.arange(height), height)) / height, spectrum.dtype)
    # Every frequency counts twice, for itself and for its mirror image, except those that are their own mirror image.
    twice = np.where((np.arange(half) == 0) | (2 * np.arange(half) == width), 1.0, 2.0)
    along = np.conj(_phases(np.arange(half), np.arange(width), width)) * twice[:, None] / width
    rows = jnp.einsum("fh,...fkc->...hkc", across, spectrum)
    real = jnp.einsum("...kc,kw->...wc", rows.real, jnp.asarray(along.real, rows.real.dtype))
    return real - jnp.einsum("...kc,kw->...wc", rows.imag, jnp.asarray(along.imag, rows.real.dtype))


def check(shape: ConvShape) -> None:
    """Raises UserError for zero padding, which the Fourier transform cannot express."""
    check_common(shape)
    if shape.padding != "circular":
        raise UserError("cayley needs padding='circular'; use method='adaptive' for zero padding")


def init(key: PRNGKeyArray, shape: ConvShape, mode: str) -> Raw:
    """Raw parameters: a kernel on the space-to-depth grid and the norm to which it is scaled.

    ``mode="identity"`` starts with a small norm, near the identity (cropped or zero-padded in the channels).
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
    taps = transform(kernel.reshape(kh, kw, -1), shape.output_hw, (kh // 2, kw // 2))
    blocks = cayley(adjoint(taps.reshape(*taps.shape[:2], inputs, outputs)))
    return {"real": blocks.real, "imag": blocks.imag}


@highest_precision
def apply(built: dict[str, Float[Array, "..."]], x: Images, shape: ConvShape) -> Images:
    """Multiplies every frequency of the input by its block, in float32 if the input has less precision."""
    check_float(x, "a convolution")
    dtype = x.dtype
    x = space_to_depth(x, shape.strides).astype(jnp.promote_types(dtype, jnp.float32))
    blocks = jax.lax.complex(built["real"].astype(x.dtype), built["imag"].astype(x.dtype))
    spectrum = jnp.einsum("hwoi,bhwi->bhwo", blocks, transform(x, shape.output_hw))
    return inverse(spectrum, shape.output_hw[1]).astype(dtype)


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
