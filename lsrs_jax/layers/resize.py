"""Resizing as modules: permutations, padding, cropping, pooling; and the scaling of the input."""

import jax.numpy as jnp
import numpy as np

from lsrs_jax.errors import UserError
from lsrs_jax.layers.base import Fixed, Layer, Plain, check_image, check_sizes
from lsrs_jax.orthogonal import resize, spectrum
from lsrs_jax.orthogonal.rounding import gamma, product_rounding
from lsrs_jax.orthogonal.shape import check_divisible, check_float


class SpaceToDepth(Fixed):
    """``(B, H, W, C)`` → ``(B, H/sh, W/sw, sh·sw·C)``. **Guarantee**: an isometry (a permutation of entries)."""

    strides: tuple[int, int] = (2, 2)
    proof = "permutes entries"

    def __call__(self, x):
        self.output_shape(x.shape[1:])
        return resize.space_to_depth(x, tuple(self.strides))

    def output_shape(self, input_shape):
        check_image(input_shape, "SpaceToDepth")
        check_sizes("SpaceToDepth", strides_pair=self.strides)
        (height, width, channels), (sh, sw) = input_shape, self.strides
        check_divisible(height, width, self.strides)
        return (height // sh, width // sw, channels * sh * sw)


class DepthToSpace(Fixed):
    """The inverse of `SpaceToDepth`. **Guarantee**: an isometry (a permutation of entries)."""

    strides: tuple[int, int] = (2, 2)
    proof = "permutes entries"

    def __call__(self, x):
        self.output_shape(x.shape[1:])
        return resize.depth_to_space(x, tuple(self.strides))

    def output_shape(self, input_shape):
        check_image(input_shape, "DepthToSpace")
        check_sizes("DepthToSpace", strides_pair=self.strides)
        (height, width, channels), (sh, sw) = input_shape, self.strides
        if channels % (sh * sw):
            raise UserError(f"DepthToSpace: {channels} channels are not divisible by {sh}x{sw}")
        return (height * sh, width * sw, channels // (sh * sw))


class Haar(Fixed):
    """``(B, H, W, C)`` → ``(B, H/2, W/2, 4·C)``, the Haar transform of 2x2 windows, coarse channels first.

    **Guarantee**: an isometry (an orthonormal matrix whose entries are exact).
    """

    proof = "orthonormal, entries ±1/2"

    def __call__(self, x):
        self.output_shape(x.shape[1:])
        return resize.haar(x)

    def output_shape(self, input_shape):
        check_image(input_shape, "Haar")
        height, width, channels = input_shape
        check_divisible(height, width, (2, 2))
        return (height // 2, width // 2, 4 * channels)

    def materialize(self, params, input_shape):
        return super().materialize(params, input_shape)._replace(rounding=product_rounding(4))


class Channels(Fixed):
    """Pads (zeros) or crops the last axis to `features`. **Guarantee**: 1-Lipschitz; an isometry when it pads."""

    features: int
    proof = "pads or crops"

    def __call__(self, x):
        self.output_shape(x.shape[1:])
        return resize.resize_channels(x, self.features)

    def output_shape(self, input_shape):
        check_sizes("Channels", features=self.features)
        return (*input_shape[:-1], self.features)


class AveragePool(Fixed):
    """Sum over non-overlapping windows over √(h·w). **Guarantee**: all singular values are 1 (a co-isometry)."""

    window: tuple[int, int] = (2, 2)
    proof = "orthonormal rows"

    def __call__(self, x):
        self.output_shape(x.shape[1:])
        return resize.average_pool(x, tuple(self.window))

    def output_shape(self, input_shape):
        check_image(input_shape, type(self).__name__)
        check_sizes(type(self).__name__, window_pair=self.window)
        height, width, channels = input_shape
        check_divisible(height, width, self.window, "windows")
        return (height // self.window[0], width // self.window[1], channels)

    def materialize(self, params, input_shape):
        # Division by √(h·w) rounds in the last place.
        bound, rounding = spectrum.upper_bound(1.0), product_rounding(self.window[0] * self.window[1] + 4)
        plain = super().materialize(params, input_shape)
        return plain._replace(sigma_max=bound, sigma_min=2 - bound, rounding=rounding)


class L2Pool(AveragePool):
    """√(Σ x² + ε) over non-overlapping windows. **Guarantee**: 1-Lipschitz."""

    epsilon: float = 1e-6
    proof = "gradient ‖x‖/√(‖x‖² + ε)"

    def __call__(self, x):
        self.output_shape(x.shape[1:])
        return resize.l2_pool(x, tuple(self.window), self.epsilon)

    def materialize(self, params, input_shape):
        outputs = np.prod(self.output_shape(input_shape), dtype=float)
        offset = float(np.sqrt(outputs * self.epsilon)) * (1 + 1e-9)
        return super().materialize(params, input_shape)._replace(sigma_min=0.0, offset=offset)


class Flatten(Fixed):
    """``(B, …)`` → ``(B, n)``. **Guarantee**: an isometry."""

    proof = "reshapes"

    def __call__(self, x):
        return x.reshape(x.shape[0], -1)

    def output_shape(self, input_shape):
        return (int(np.prod(input_shape)),)


class Normalize(Layer):
    """(x − mean) / std per channel. **Guarantee**: Lipschitz constant 1/min(std), which the report counts.

    Attributes:
      mean, std: one number, or one per channel; std > 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, x):
        check_float(x, "Normalize")
        self.output_shape(x.shape[1:])
        return (x - jnp.asarray(self.mean, x.dtype)) / jnp.asarray(self.std, x.dtype)

    def output_shape(self, input_shape):
        if not all(1e-30 < s < np.inf for s in self.std) or not np.all(np.isfinite(self.mean)):
            raise UserError(f"model.std must be positive and model.mean finite, got {self.std} and {self.mean}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, input_shape[-1]):
                raise UserError(f"model.{name} has {len(values)} entries for images of {input_shape[-1]} channels")
        return tuple(input_shape)

    def materialize(self, params, input_shape):
        self.output_shape(input_shape)
        scale = 1 / np.asarray(self.std, np.float64)
        largest = 1.0 if scale.max() == 1.0 else spectrum.upper_bound(scale.max())
        pixels = float(np.sqrt(input_shape[0] * input_shape[1]))
        mean = np.broadcast_to(np.asarray(self.mean, np.float64) * scale, input_shape[-1:])
        offset = pixels * float(np.linalg.norm(mean)) * (1 + 1e-9)
        return Plain(lambda _, x: self(x), {}, largest, float(scale.min()), "1/min(std)", gamma(4), offset)
