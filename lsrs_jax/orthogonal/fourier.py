"""Two-dimensional Fourier transforms of real signals as matrix products, over the axes −3 and −2.

Matrix products are about as fast as an FFT for usual image sizes, and run on every accelerator. XLA's FFT on CPU waits
for the thread pool it runs on, so that concurrent transforms can deadlock (jax 0.10; openxla/xla#46345 adds a guard).
Try the FFT again when the oldest supported jax contains that guard.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from lsrs_jax.orthogonal.shape import Pair

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
