"""What a family of orthogonal convolutions provides."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from lsrs_jax.orthogonal.convolve import convolve
from lsrs_jax.orthogonal.shape import ConvShape, Images
from lsrs_jax.orthogonal.spectrum import Spectrum, kernel_spectrum, product_rounding

Kernel = Float[Array, "kh kw c_in c_out"]
Raw = dict[str, Float[Array, "..."]]


def gaussian(key: PRNGKeyArray, *size: int) -> Float[Array, "*size"]:
    """Normal float32 numbers of variance 1/m, for a stack of matrices ``(…, m, n)``."""
    return size[-2] ** -0.5 * jax.random.normal(key, size, jnp.float32)


def apply_kernel(kernel: Kernel, x: Images, shape: ConvShape) -> Images:
    """The convolution itself."""
    return convolve(x, kernel.astype(x.dtype), shape.strides, shape.padding)


def spectrum_of_kernel(kernel: Float[np.ndarray, "kh kw c_in c_out"], shape: ConvShape) -> Spectrum:
    """Extreme singular values of `apply_kernel`."""
    return kernel_spectrum(kernel, shape.input_hw, shape.strides, shape.padding)


def rounding_of_kernel(shape: ConvShape) -> float:
    """Float64 error of `apply_kernel` over the norm of its input, for every kernel with singular values up to 1."""
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
    rounding: Callable[[ConvShape], float] = rounding_of_kernel  # float64 error of `apply` over ‖x‖
    # (raw, shape) -> raw parameters and shape of a larger kernel, whose first c_in and c_out channels are this kernel
    extend: Callable[[PyTree, ConvShape], tuple[PyTree, ConvShape]] = lambda raw, shape: (raw, shape)
