"""The shape of a convolution, and the checks that layers share."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.validate import choice

Pair = tuple[int, int]
Images = Float[Array, "batch height width channels"]
Features = Shaped[Array, "*batch channels"]


class ConvShape(NamedTuple):
    """Kernel ``(kh, kw)``, strides ``(sh, sw)``, channels, input size ``(H, W)`` and padding of a convolution."""

    kernel_size: Pair
    strides: Pair
    c_in: int
    c_out: int
    input_hw: Pair
    padding: str = "circular"

    @property
    def phases(self) -> int:
        """Input channels after space-to-depth by the strides."""
        return self.c_in * self.strides[0] * self.strides[1]

    @property
    def taps(self) -> Pair:
        """Kernel size after space-to-depth by the strides, rounded up."""
        return -(-self.kernel_size[0] // self.strides[0]), -(-self.kernel_size[1] // self.strides[1])

    @property
    def output_hw(self) -> Pair:
        return self.input_hw[0] // self.strides[0], self.input_hw[1] // self.strides[1]

    @property
    def output_shape(self) -> tuple[int, int, int]:
        return (*self.output_hw, self.c_out)


def check_divisible(size: Sequence[int], strides: Sequence[int], what: str = "strides") -> None:
    """Raises UserError if a stride or window does not divide the image."""
    if size[0] % strides[0] or size[1] % strides[1]:
        raise UserError(
            f"{what} {tuple(strides)} do not divide the input size {size[0]}x{size[1]}: the layer would not be "
            f"1-Lipschitz, or would ignore pixels; choose a size divisible by them, or other {what}"
        )


def check_float(x: Shaped[Array, "..."], what: str) -> None:
    """Raises UserError for integers: kernels cast to their type would be zero, and their squares overflow."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"{what} takes floating-point inputs, got {x.dtype}: scale images to [0, 1] first")


def check_padding(padding: str) -> None:
    """Raises UserError for a padding other than circular and zero: repeated pixels can stretch distances."""
    if padding not in ("circular", "zero"):
        raise UserError(
            f"unknown padding {padding!r}: choose 'circular' or 'zero' (reflect and edge padding repeat pixels, and "
            "the layer would not be 1-Lipschitz)"
        )


def check_common(shape: ConvShape) -> None:
    """Raises UserError for a shape that no family can build."""
    kernel, strides = shape.kernel_size, shape.strides
    if min(*kernel, *strides, *shape.input_hw, shape.c_in, shape.c_out) < 1:
        raise UserError(f"kernel size, strides, channels and input size must be at least 1, got {tuple(shape)}")
    if kernel[0] < strides[0] or kernel[1] < strides[1]:
        raise UserError(f"kernel size {kernel} is smaller than the strides {strides}: the layer would ignore pixels")
    check_padding(shape.padding)
    check_divisible(shape.input_hw, shape.strides)


def check_mode(mode: str) -> None:
    """Raises UserError for an unknown initializer."""
    choice("initializer", mode, ("identity", "random"))
