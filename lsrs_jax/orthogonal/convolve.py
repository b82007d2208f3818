"""The convolution that all kernel families share (a cross-correlation), circular or zero-padded."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lsrs_jax.orthogonal.shape import Images, Pair, check_divisible, check_float, check_padding


def convolve(
    x: Images, kernel: Float[Array, "kh kw c_in c_out"], strides: Pair = (1, 1), padding: str = "circular"
) -> Float[Array, "batch height/sh width/sw c_out"]:
    """Convolves images with a kernel that is centred as in ``SAME`` padding.

    Output i of an axis reads inputs ``i·s + t − (k−s)//2``, t = 0 … k−1. Circular padding takes these positions modulo
    the image size (k may exceed it); zero padding reads zeros outside the image.
    """
    check_float(x, "a convolution")
    check_padding(padding)
    check_divisible(x.shape[1:3], strides)
    margins = [max(k - s, 0) for k, s in zip(kernel.shape[:2], strides, strict=True)]
    around = [(margin // 2, margin - margin // 2) for margin in margins]
    layout = ("NHWC", "HWIO", "NHWC")
    if padding == "zero":
        return jax.lax.conv_general_dilated(x, kernel, strides, around, dimension_numbers=layout)
    if np.any(around):
        x = jnp.pad(x, ((0, 0), *around, (0, 0)), mode="wrap")
    # XLA on CPU has a fast path for padded convolutions only (compare jax-ml/jax#12868). One row of zeros at the bottom
    # selects it; the extra row of output is cut off. Remove this when benchmarks/orthogonal.py is as fast without it.
    bottom = ((0, strides[0]), (0, 0))
    return jax.lax.conv_general_dilated(x, kernel, strides, bottom, dimension_numbers=layout)[:, :-1]
