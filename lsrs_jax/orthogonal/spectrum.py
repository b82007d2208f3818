"""Exact singular values of the linear layers, in float64 NumPy. No JAX, no configuration.

**Guarantee**: each function returns *all* singular values of the operator (not an estimate from below, as power
iteration would give), up to the backward error of LAPACK's SVD and of the FFT, a few hundred units in the last place;
`upper_bound` adds a margin that covers both.
"""

import numpy as np

_MARGIN = 1e-11


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
    rows, columns = height // sh, width // sw
    folded = np.zeros((rows, columns, sh * sw * c_in, c_out))
    for i in range(phases.shape[0]):
        for j in range(phases.shape[1]):
            folded[i % rows, j % columns] += phases[i, j]
    return frequency_singular_values(np.fft.fft2(folded, axes=(0, 1)))


def frequency_singular_values(blocks):
    """Singular values per frequency of blocks ``(rows, columns, m, n)`` → ``(rows·columns, min(m, n))``."""
    blocks = np.asarray(blocks)
    return np.linalg.svd(blocks.reshape(-1, *blocks.shape[-2:]), compute_uv=False)


def upper_bound(sigma_max):
    """`sigma_max` plus a margin far above the numerical error of its computation."""
    return float(sigma_max) * (1 + _MARGIN)
