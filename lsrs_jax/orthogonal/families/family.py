"""What a family of orthogonal convolutions provides."""

from collections.abc import Callable
from typing import Any, NamedTuple

from lsrs_jax.orthogonal.convolve import convolve
from lsrs_jax.orthogonal.rounding import product_rounding
from lsrs_jax.orthogonal.spectrum import kernel_spectrum


def apply_kernel(kernel, x, shape):
    """The convolution itself."""
    return convolve(x, kernel.astype(x.dtype), shape.strides, shape.padding)


def spectrum_of_kernel(kernel, shape):
    """Extreme singular values of `apply_kernel`."""
    return kernel_spectrum(kernel, shape.input_hw, shape.strides, shape.padding)


def rounding_of_kernel(shape):
    """Float64 error of `apply_kernel` over the norm of its input, whatever the kernel, for singular values up to 1."""
    return product_rounding(shape.kernel_size[0] * shape.kernel_size[1] * max(shape.c_in, shape.c_out))


class ConvFamily(NamedTuple):
    """The functions of one family; `shape` is a `ConvShape`, `plain` whatever `build` returns.

    A family whose plain form is a convolution kernel ``(kh, kw, c_in, c_out)`` needs the first three only.
    """

    check: Callable[[Any], None]  # raises UserError where the family cannot be 1-Lipschitz or would be useless
    init: Callable[[Any, Any, str], Any]  # (key, shape, "identity" | "random") -> raw parameters, float32
    build: Callable[[Any, Any], Any]  # (raw, shape) -> plain, differentiable, dtype follows raw
    apply: Callable[[Any, Any, Any], Any] = apply_kernel  # (plain, x, shape) -> y
    spectrum: Callable[[Any, Any], Any] = spectrum_of_kernel  # (plain NumPy, shape) -> Spectrum
    rounding: Callable[[Any], float] = rounding_of_kernel  # (shape) -> float64 error of apply over ‖x‖
    # (raw, shape) -> those of a kernel of which that of `shape` is the first c_in and c_out channels
    widened: Callable[[Any, Any], Any] = lambda raw, shape: (raw, shape)
