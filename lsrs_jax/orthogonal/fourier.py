"""Two-dimensional Fourier transforms of real signals as matrix products, over the axes −3 and −2.

For the image sizes of networks products are about as fast as an FFT, run on every accelerator, and keep clear of XLA's
FFT on CPU, where several concurrent transforms can wait for each other for ever (as of jax 0.10).
"""

import jax
import jax.numpy as jnp
import numpy as np


def _phases(positions, frequencies, period):
    """exp(−2πi·position·frequency / period), cosine and sine exact to the last place of float64."""
    turns = np.outer(positions, frequencies) % period
    return np.exp(-2j * np.pi * turns / period)


def transform(x, size, offset=(0, 0)):
    """``(…, h, w, C)`` real → the half spectrum ``(…, H, W//2 + 1, C)`` on a torus of `size` (H, W).

    Entry (i, j) sits at position (i, j) − offset modulo the size; h and w may be smaller or larger than the torus.
    """
    (height, width), (rows, columns) = size, x.shape[-3:-1]
    dtype = jnp.result_type(x.dtype, jnp.complex64)
    along = jnp.asarray(_phases(np.arange(columns) - offset[1], np.arange(width // 2 + 1), width), dtype)
    across = jnp.asarray(_phases(np.arange(rows) - offset[0], np.arange(height), height), dtype)
    real = jnp.einsum("...wc,wk->...kc", x, along.real)
    imaginary = jnp.einsum("...wc,wk->...kc", x, along.imag)
    return jnp.einsum("hf,...hkc->...fkc", across, jax.lax.complex(real, imaginary))


def inverse(spectrum, width):
    """The half spectrum ``(…, H, W//2 + 1, C)`` → the real signal ``(…, H, W, C)``, W = `width` (even or odd)."""
    height, half = spectrum.shape[-3:-1]
    across = jnp.asarray(np.conj(_phases(np.arange(height), np.arange(height), height)) / height, spectrum.dtype)
    # Every frequency but those that are their own mirror image stands for two.
    twice = np.where((np.arange(half) == 0) | (2 * np.arange(half) == width), 1.0, 2.0)
    along = np.conj(_phases(np.arange(half), np.arange(width), width)) * twice[:, None] / width
    rows = jnp.einsum("fh,...fkc->...hkc", across, spectrum)
    real = jnp.einsum("...kc,kw->...wc", rows.real, jnp.asarray(along.real, rows.real.dtype))
    return real - jnp.einsum("...kc,kw->...wc", rows.imag, jnp.asarray(along.imag, rows.real.dtype))
