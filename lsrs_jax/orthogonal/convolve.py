"""The convolution that every kernel family runs: on a torus, or zero-padded. NHWC, HWIO, cross-correlation."""

import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax.orthogonal.shape import check_divisible, check_float, check_padding


def convolve(x, kernel, strides=(1, 1), padding="circular"):
    """``(B, H, W, C_in)`` with an HWIO kernel → ``(B, H/s, W/s, C_out)``, the kernel centred as in ``SAME``.

    Output (i, j) reads inputs ``i·s + t − (k−s)//2``, t = 0 … k−1: modulo the size when circular (k may exceed it),
    zeros outside the image otherwise. Exact singular values: `spectrum.kernel_spectrum`.
    """
    check_float(x, "a convolution")
    check_padding(padding)
    height, width = x.shape[1:3]
    check_divisible(height, width, strides)
    margins = [(max(k - s, 0) // 2, max(k - s, 0)) for k, s in zip(kernel.shape[:2], strides, strict=True)]
    around = [(before, total - before) for before, total in margins]
    layout = ("NHWC", "HWIO", "NHWC")
    if padding == "zero":
        return jax.lax.conv_general_dilated(x, kernel, strides, around, dimension_numbers=layout)
    if np.any(around):
        x = jnp.pad(x, ((0, 0), *around, (0, 0)), mode="wrap")
    # XLA's CPU back end has no fast path for unpadded convolutions: one wasted row of output buys it.
    wasted = ((0, strides[0]), (0, 0))
    y = jax.lax.conv_general_dilated(x, kernel, strides, wasted, dimension_numbers=layout)
    return y[:, : height // strides[0], : width // strides[1]]
