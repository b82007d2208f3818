"""The static description of one convolution."""

from typing import NamedTuple

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


def check_divisible(height, width, strides):
    """Raises where a stride does not divide the image: on a torus the layer would then not be 1-Lipschitz."""
    if height % strides[0] or width % strides[1]:
        raise UserError(
            f"strides {tuple(strides)} do not divide the input size {height}x{width}: with circular padding the "
            "layer would not be 1-Lipschitz; choose a size divisible by the strides, or other strides"
        )


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
