"""Exact singular values of linear layers, and bounds on their float64 rounding errors. NumPy only, no JAX.

**Guarantee**: the singular values are those of the whole operator (not an estimate from below, as power iteration would
give), up to the backward error of LAPACK's SVD and of the FFT, a few hundred units in the last place; `upper_bound`
adds a margin that covers both.
"""

import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Complex, Float, Inexact, Shaped
from threadpoolctl import ThreadpoolController

from lsrs_jax.runtime.validate import array

Pair = tuple[int, int]
Kernel = Shaped[np.ndarray, "kh kw c_in c_out"]
PerFrequency = Float[np.ndarray, "height*width rank"]

_MARGIN = 1e-11
_UNIT = 2.0**-53  # rounding unit of float64
_SMALL = 2**20  # Below this total size of a layer's blocks, threads save no time.
_blas = functools.cache(ThreadpoolController)


class Spectrum(NamedTuple):
    """The extreme singular values of a layer and how they are proven."""

    sigma_max: float  # upper bound on the Lipschitz constant
    sigma_min: float  # lower bound on the smallest of min(inputs, outputs) singular values; 0 if no bound is known
    proof: str

    @classmethod
    def of(cls, sigma: Float[np.ndarray, "..."], proof: str) -> "Spectrum":
        """The `Spectrum` of a layer from all its singular values."""
        return cls(float(sigma.max()), float(sigma.min()), proof)


def dense_singular_values(matrix: Shaped[np.ndarray, "m n"]) -> Float[np.ndarray, " min(m,n)"]:
    """Singular values of one matrix, descending."""
    return np.linalg.svd(np.asarray(array("the matrix", matrix), np.float64), compute_uv=False)


def conv_singular_values(kernel: Kernel, input_hw: Pair, strides: Pair = (1, 1)) -> PerFrequency:
    """All singular values of a circular convolution whose strides divide the image; kh and kw may exceed it.

    Space-to-depth turns a strided circular convolution into an unstrided one. The Fourier transform makes that
    block-diagonal, with one c_out × c_in·sh·sw block per frequency (Sedghi, Gupta and Long 2019).
    """
    kernel = np.asarray(array("the kernel", kernel), np.float64)
    (sh, sw), (height, width) = strides, input_hw
    if height % sh or width % sw:
        raise ValueError(f"strides {strides} do not divide the input size {input_hw}")
    kh, kw, c_in, c_out = kernel.shape
    kernel = np.pad(kernel, ((0, -kh % sh), (0, -kw % sw), (0, 0), (0, 0)))
    phases = kernel.reshape(kernel.shape[0] // sh, sh, kernel.shape[1] // sw, sw, c_in, c_out)
    phases = phases.transpose(0, 2, 1, 3, 4, 5).reshape(*phases.shape[0:3:2], sh * sw * c_in, c_out)
    return frequency_singular_values(frequency_blocks(phases, (height // sh, width // sw)))


def frequency_blocks(kernel: Kernel, hw: Pair) -> Complex[np.ndarray, "height width c_out c_in"]:
    """The blocks, one per frequency, of the unstrided circular convolution with a centred kernel."""
    kernel = np.asarray(kernel, np.float64)
    (kh, kw), (height, width) = kernel.shape[:2], hw
    folded = np.zeros((height, width, *kernel.shape[2:]))
    for i, j in np.ndindex(kh, kw):
        folded[(i - kh // 2) % height, (j - kw // 2) % width] += kernel[i, j]
    # In the Fourier domain, cross-correlation multiplies by the conjugate of the kernel's transform.
    return np.conj(np.fft.fft2(folded, axes=(0, 1))).swapaxes(-1, -2)


def frequency_singular_values(blocks: Inexact[np.ndarray, "height width m n"]) -> PerFrequency:
    """Singular values of the blocks of a convolution, in descending order for each frequency."""
    blocks = blocks.reshape(-1, *blocks.shape[-2:])
    if blocks.size < _SMALL:
        return np.linalg.svd(blocks, compute_uv=False)
    # On shared cores, BLAS threads that wait for each other take a hundred times as long.
    threads = os.cpu_count() or 1
    with _blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        parts = np.array_split(blocks, min(len(blocks), 8 * threads))
        return np.concatenate(list(pool.map(lambda part: np.linalg.svd(part, compute_uv=False), parts)))


def kernel_spectrum(kernel: Kernel, input_hw: Pair, strides: Pair = (1, 1), padding: str = "circular") -> Spectrum:
    """Extreme singular values of `convolve` with this kernel, exact for circular padding.

    A zero-padded convolution embeds the image into a larger torus, convolves there and crops. Its norm is at most the
    norm on a torus of ``size + k − 1``, rounded up to a multiple of the stride (but not on one of the image's size).
    """
    if padding == "circular":
        return Spectrum.of(conv_singular_values(kernel, input_hw, strides), "SVD per frequency of the kernel")
    rows, columns = (-(-(n + k - 1) // s) * s for n, k, s in zip(input_hw, kernel.shape[:2], strides, strict=True))
    largest = conv_singular_values(kernel, (rows, columns), strides).max()
    return Spectrum(float(largest), 0.0, f"SVD per frequency on a torus of {rows}x{columns}")


def upper_bound(sigma_max: float) -> float:
    """`sigma_max` plus a margin far above the numerical error of its computation."""
    return float(sigma_max) * (1 + _MARGIN)


def gamma(terms: int) -> float:
    """Higham's γ_n = nu / (1 − nu): relative error of a sum of products of n terms, in any order (2002, Lemma 3.1)."""
    return terms * _UNIT / (1 - terms * _UNIT)


def product_rounding(terms: int) -> float:
    """ℓ2 error of y = Ax in float64 over ‖A‖‖x‖, for a matrix with at most `terms` entries in each row and column.

    Entrywise the error is at most γ|A||x|, and ‖|A|‖ ≤ √(‖A‖₁‖A‖∞) ≤ √terms · ‖A‖ (Cauchy-Schwarz per row and column).
    """
    return gamma(terms) * math.sqrt(terms)
