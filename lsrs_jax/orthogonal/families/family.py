"""What a family of orthogonal convolutions provides, and the convolution that the families share."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from lsrs_jax.orthogonal.shape import ConvShape, Images, Pair, check_divisible, check_float, check_padding
from lsrs_jax.orthogonal.spectrum import Spectrum, kernel_spectrum, product_rounding

Kernel = Float[Array, "kh kw c_in c_out"]
Raw = dict[str, Float[Array, "..."]]


def gaussian(key: PRNGKeyArray, *size: int) -> Float[Array, "*size"]:
    """Normal float32 numbers of variance 1/m, for a stack of matrices ``(…, m, n)``."""
    return size[-2] ** -0.5 * jax.random.normal(key, size, jnp.float32)


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
    # XLA on CPU has a fast path for padded convolutions only (compare jax-ml/jax#12868). Zeros at the bottom select it;
    # the extra row of output is cut off. Remove this when benchmarks/orthogonal.py is as fast without it.
    bottom = ((0, strides[0]), (0, 0))
    return jax.lax.conv_general_dilated(x, kernel, strides, bottom, dimension_numbers=layout)[:, :-1]


def apply_kernel(kernel: Kernel, x: Images, shape: ConvShape) -> Images:
    return convolve(x, kernel.astype(x.dtype), shape.strides, shape.padding)


def spectrum_of_kernel(kernel: Float[np.ndarray, "kh kw c_in c_out"], shape: ConvShape) -> Spectrum:
    return kernel_spectrum(kernel, shape.input_hw, shape.strides, shape.padding)


def rounding_of_kernel(shape: ConvShape) -> float:
    return product_rounding(shape.kernel_size[0] * shape.kernel_size[1] * max(shape.c_in, shape.c_out))


class ConvFamily(NamedTuple):
    """The functions of one family. A family that builds a convolution kernel needs the first three only.

    Raw parameters are unconstrained: they are what training changes. `build` makes the built form of the layer from
    them (a kernel, or another tree of arrays), which `apply` and `spectrum` take.
    """

    check: Callable[[ConvShape], None]  # raises UserError if the layer would be useless or not 1-Lipschitz
    init: Callable[[PRNGKeyArray, ConvShape, str], PyTree]  # (key, shape, "identity" | "random") -> raw, float32
    build: Callable[[PyTree, ConvShape], PyTree]  # (raw, shape) -> built, differentiable, in the dtype of raw
    apply: Callable[[PyTree, Images, ConvShape], Images] = apply_kernel  # (built, x, shape) -> y
    spectrum: Callable[[PyTree, ConvShape], Spectrum] = spectrum_of_kernel  # (built as NumPy arrays, shape)
    rounding: Callable[[ConvShape], float] = rounding_of_kernel  # float64 error of `apply` over ‖x‖, for σ_max up to 1
    # (raw, shape) -> raw parameters and shape of a larger kernel, whose first c_in and c_out channels are this kernel
    extend: Callable[[PyTree, ConvShape], tuple[PyTree, ConvShape]] = lambda raw, shape: (raw, shape)
