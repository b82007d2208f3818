"""Exact singular values of the linear layers, in float64 NumPy. No JAX, no configuration.

**Guarantee**: the singular values are those of the whole operator (not an estimate from below, as power iteration would
give), up to the backward error of LAPACK's SVD and of the FFT, a few hundred units in the last place; `upper_bound`
adds a margin that covers both.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

_MARGIN = 1e-11
_SMALL = 2**20  # numbers in the blocks of a layer, below which threads are not worth their while


class Spectrum(NamedTuple):
    """The extreme singular values of a layer and how they are proven.

    `sigma_max` bounds the Lipschitz constant from above. `sigma_min` bounds the smallest of the min(inputs, outputs)
    singular values from below; 0 where nothing is known.
    """

    sigma_max: float
    sigma_min: float
    proof: str

    @classmethod
    def of(cls, sigma, proof):
        """From all singular values."""
        return cls(float(sigma.max()), float(sigma.min()), proof)


def dense_singular_values(matrix):
    """Singular values of one matrix ``(m, n)``, descending."""
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)


def conv_singular_values(kernel, input_hw, strides=(1, 1)):
    """All singular values of a circular (torus) convolution, strided or not.

    Args:
      kernel: HWIO ``(kh, kw, c_in, c_out)``; kh and kw may exceed the image.
      input_hw: ``(H, W)``, divisible by the strides.
      strides: ``(sh, sw)``.

    Returns:
      float64 ``(H/sh · W/sw, min(c_out, c_in·sh·sw))``: per frequency, descending.

    A strided circular convolution is an unstrided one on the sh·sw phases of its input; that one is block-diagonal
    under the Fourier transform (Sedghi, Gupta and Long 2019), one c_out × c_in·sh·sw block per frequency.
    """
    kernel = np.asarray(kernel, np.float64)
    (sh, sw), (height, width) = strides, input_hw
    if height % sh or width % sw:
        raise ValueError(f"strides {strides} do not divide the input size {input_hw}")
    kh, kw, c_in, c_out = kernel.shape
    kernel = np.pad(kernel, ((0, -kh % sh), (0, -kw % sw), (0, 0), (0, 0)))
    phases = kernel.reshape(kernel.shape[0] // sh, sh, kernel.shape[1] // sw, sw, c_in, c_out)
    phases = phases.transpose(0, 2, 1, 3, 4, 5).reshape(*phases.shape[0:3:2], sh * sw * c_in, c_out)
    return frequency_singular_values(frequency_blocks(phases, (height // sh, width // sw)))


def frequency_blocks(kernel, hw):
    """Blocks ``(H, W, c_out, c_in)`` of the unstrided circular convolution with an HWIO kernel, centred."""
    kernel = np.asarray(kernel, np.float64)
    (kh, kw), (height, width) = kernel.shape[:2], hw
    folded = np.zeros((height, width, *kernel.shape[2:]))
    for i in range(kh):
        for j in range(kw):
            folded[(i - kh // 2) % height, (j - kw // 2) % width] += kernel[i, j]
    # Cross-correlation multiplies by the conjugate of the kernel's transform.
    return np.conj(np.fft.fft2(folded, axes=(0, 1))).swapaxes(-1, -2)


def frequency_singular_values(blocks):
    """Singular values per frequency of blocks ``(rows, columns, m, n)`` → ``(rows·columns, min(m, n))``."""
    blocks = np.asarray(blocks)
    blocks = blocks.reshape(-1, *blocks.shape[-2:])
    if blocks.size < _SMALL:
        return np.linalg.svd(blocks, compute_uv=False)
    # Threads of BLAS that wait for each other take a hundred times as long where the cores are shared.
    with _blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = np.array_split(blocks, min(len(blocks), 8 * os.cpu_count()))
        return np.concatenate(list(pool.map(lambda part: np.linalg.svd(part, compute_uv=False), parts)))


@functools.cache
def _blas():
    return ThreadpoolController()


def kernel_spectrum(kernel, input_hw, strides=(1, 1), padding="circular"):
    """Extreme singular values of `convolve.convolve` with this HWIO kernel.

    Exact for circular padding. A zero-padded convolution embeds the image into a larger torus, convolves there and
    crops, so the norm on a torus of at least ``size + k − 1`` (rounded up to a multiple of the stride) bounds it; the
    norm on a torus of the image's own size would not.
    """
    if padding == "circular":
        return Spectrum.of(conv_singular_values(kernel, input_hw, strides), "SVD per frequency of the kernel")
    around = [-(-(n + k - 1) // s) * s for n, k, s in zip(input_hw, kernel.shape[:2], strides, strict=True)]
    largest = conv_singular_values(kernel, around, strides).max()
    return Spectrum(float(largest), 0.0, f"SVD per frequency on a torus of {around[0]}x{around[1]}")


def upper_bound(sigma_max):
    """`sigma_max` plus a margin far above the numerical error of its computation."""
    return float(sigma_max) * (1 + _MARGIN)
