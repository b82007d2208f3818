"""The convolution that all kernel families share, circular (on a torus) or zero-padded. It is a cross-correlation."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lsrs_jax.orthogonal.shape import Images, Pair, check_divisible, check_float, check_padding


def convolve(
    x: Images, kernel: Float[Array, "kh kw c_in c_out"], strides: Pair = (1, 1), padding: str = "circular"
) -> Float[Array, "batch height/sh width/sw c_out"]:
    """Convolves images with a kernel that is centred as in ``SAME`` padding.

    Output (i, j) reads inputs ``i·s + t − (k−s)//2``, t = 0 … k−1. These positions are taken modulo the image size for
    circular padding (k may exceed the size); for zero padding, inputs outside the image are zeros.
    `spectrum.kernel_spectrum` computes the exact singular values.
    """
    check_float(x, "a convolution")
    check_padding(padding)
    height, width = x.shape[1:3]
    check_divisible((height, width), strides)
    margins = [max(k - s, 0) for k, s in zip(kernel.shape[:2], strides, strict=True)]
    around = [(margin // 2, margin - margin // 2) for margin in margins]
    layout = ("NHWC", "HWIO", "NHWC")
    if padding == "zero":
        return jax.lax.conv_general_dilated(x, kernel, strides, around, dimension_numbers=layout)
    if np.any(around):
        x = jnp.pad(x, ((0, 0), *around, (0, 0)), mode="wrap")
    # XLA on CPU has a fast path for padded convolutions only (compare jax-ml/jax#12868): a wasted row of output selects
    # it. To go when benchmarks/orthogonal.py runs as fast without.
    wasted = ((0, strides[0]), (0, 0))
    y = jax.lax.conv_general_dilated(x, kernel, strides, wasted, dimension_numbers=layout)
    return y[:, : height // strides[0], : width // strides[1]]
