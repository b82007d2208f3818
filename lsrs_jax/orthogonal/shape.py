"""The static description of one convolution."""

from typing import NamedTuple

import jax.numpy as jnp

from lsrs_jax.errors import UserError

PADDINGS = ("circular", "zero")


class ConvShape(NamedTuple):
    """Kernel ``(kh, kw)``, strides ``(sh, sw)``, channels, input size ``(H, W)`` and padding of one convolution."""

    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    c_in: int
    c_out: int
    input_hw: tuple[int, int]
    padding: str = "circular"

    @property
    def phases(self):
        """Input channels after space-to-depth by the strides."""
        return self.c_in * self.strides[0] * self.strides[1]

    @property
    def taps(self):
        """Kernel size on the space-to-depth grid, rounded up."""
        return tuple(-(-k // s) for k, s in zip(self.kernel_size, self.strides, strict=True))

    @property
    def output_hw(self):
        return (self.input_hw[0] // self.strides[0], self.input_hw[1] // self.strides[1])

    @property
    def output_shape(self):
        return (*self.output_hw, self.c_out)


def check_divisible(height, width, strides, what="strides"):
    """Raises where a stride or window does not divide the image: on a torus such a layer is not 1-Lipschitz."""
    if height % strides[0] or width % strides[1]:
        raise UserError(
            f"{what} {tuple(strides)} do not divide the input size {height}x{width}, and the layer would lose its "
            f"guarantee or cut off pixels; choose a size divisible by them, or other {what}"
        )


def check_float(x, what):
    """Raises for integers: a kernel in their type would be all zeros, and their squares overflow."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"{what} takes floating-point inputs, got {x.dtype}: scale images to [0, 1] first")


def check_padding(padding):
    """Raises for every padding that repeats pixels outside the torus: such a layer can stretch by up to 2."""
    if padding not in PADDINGS:
        raise UserError(
            f"unknown padding {padding!r}: choose 'circular' or 'zero' (reflect and edge padding repeat pixels, and "
            "the layer would not be 1-Lipschitz)"
        )


def check_common(shape):
    """Raises UserError for the mistakes no family survives."""
    if min(*shape.kernel_size, *shape.strides, *shape.input_hw, shape.c_in, shape.c_out) < 1:
        raise UserError(f"kernel size, strides, channels and input size must be at least 1, got {tuple(shape)}")
    if shape.kernel_size[0] < shape.strides[0] or shape.kernel_size[1] < shape.strides[1]:
        raise UserError(
            f"kernel size {shape.kernel_size} is smaller than the strides {shape.strides}: pixels would be skipped; "
            "use a kernel at least as large as the strides"
        )
    check_padding(shape.padding)
    check_divisible(*shape.input_hw, shape.strides)


def check_mode(mode):
    """Raises for an unknown way of initialising."""
    if mode not in ("identity", "random"):
        raise UserError(f"unknown initializer {mode!r}: choose 'identity' or 'random'")
