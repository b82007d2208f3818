"""The static description of one convolution."""

from typing import NamedTuple

from lsrs_jax.errors import UserError
from lsrs_jax.orthogonal.reshape import check_divisible


class ConvShape(NamedTuple):
    """Kernel ``(kh, kw)``, strides ``(sh, sw)``, channels and input size ``(H, W)`` of one convolution."""

    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    c_in: int
    c_out: int
    input_hw: tuple[int, int]

    @property
    def phases(self):
        """Input channels after space-to-depth by the strides."""
        return self.c_in * self.strides[0] * self.strides[1]

    @property
    def output_shape(self):
        return (self.input_hw[0] // self.strides[0], self.input_hw[1] // self.strides[1], self.c_out)


def check_common(shape):
    """Raises UserError for the mistakes no family survives."""
    if min(*shape.kernel_size, *shape.strides, *shape.input_hw, shape.c_in, shape.c_out) < 1:
        raise UserError(f"kernel size, strides, channels and input size must be at least 1, got {tuple(shape)}")
    if shape.kernel_size[0] < shape.strides[0] or shape.kernel_size[1] < shape.strides[1]:
        raise UserError(
            f"kernel size {shape.kernel_size} is smaller than the strides {shape.strides}: pixels would be skipped; "
            "use a kernel at least as large as the strides"
        )
    check_divisible(*shape.input_hw, shape.strides)
