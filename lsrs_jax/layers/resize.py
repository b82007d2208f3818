"""Resizing as modules (permutations, padding, cropping, pooling), and the scaling of the input."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from lsrs_jax.layers.base import Fixed, Layer, Plain, Shape, Sizes, check_image, check_sizes, pair
from lsrs_jax.orthogonal import resize, spectrum
from lsrs_jax.orthogonal.matrix import highest_precision
from lsrs_jax.orthogonal.shape import Features, Images, check_float
from lsrs_jax.orthogonal.spectrum import gamma, product_rounding
from lsrs_jax.runtime.errors import UserError


class SpaceToDepth(Fixed):
    """Moves windows of pixels into the channels. **Guarantee**: an isometry (a permutation of entries)."""

    strides: Sizes = (2, 2)
    proof = "permutes entries"

    def __call__(self, x: Images) -> Float[Array, "batch height/sh width/sw sh*sw*channels"]:
        check_image("SpaceToDepth", x.shape[1:], strides_pair=self.strides)
        return resize.space_to_depth(x, pair(self.strides))


class DepthToSpace(Fixed):
    """The inverse of `SpaceToDepth`. **Guarantee**: an isometry (a permutation of entries)."""

    strides: Sizes = (2, 2)
    proof = "permutes entries"

    def __call__(self, x: Images) -> Float[Array, "batch height*sh width*sw channels/(sh*sw)"]:
        check_image("DepthToSpace", x.shape[1:], strides_pair=self.strides)
        return resize.depth_to_space(x, pair(self.strides))


class Haar(Fixed):
    """2x2 Haar transform, coarse channels first. **Guarantee**: an isometry (orthonormal matrix, all entries exact)."""

    proof = "orthonormal, entries ±1/2"

    def __call__(self, x: Images) -> Float[Array, "batch height/2 width/2 4*channels"]:
        check_image("Haar", x.shape[1:])
        return resize.haar(x)

    def materialize(self, params: PyTree, input_shape: Shape) -> Plain:
        return super().materialize(params, input_shape)._replace(rounding=product_rounding(4))


class Channels(Fixed):
    """Pads (zeros) or crops the last axis to `features`. **Guarantee**: 1-Lipschitz; an isometry when it pads."""

    features: int
    proof = "pads or crops"

    def __call__(self, x: Features) -> Shaped[Array, "*batch features"]:
        check_sizes("Channels", features=self.features)
        return resize.resize_channels(x, self.features)


class AveragePool(Fixed):
    """Sum over non-overlapping windows over √(h·w). **Guarantee**: all singular values are 1 (a co-isometry)."""

    window: Sizes = (2, 2)
    proof = "orthonormal rows"

    def __call__(self, x: Images) -> Float[Array, "batch height/h width/w channels"]:
        check_image("AveragePool", x.shape[1:], window_pair=self.window)
        return resize.average_pool(x, pair(self.window))

    def materialize(self, params: PyTree, input_shape: Shape) -> Plain:
        plain = super().materialize(params, input_shape)
        # Division by √(h·w) rounds in the last place.
        bound, rounding = spectrum.upper_bound(1.0), product_rounding(math.prod(pair(self.window)) + 4)
        return plain._replace(sigma_max=bound, sigma_min=2 - bound, rounding=rounding)


class L2Pool(AveragePool):
    """√(Σ x² + ε) over non-overlapping windows. **Guarantee**: 1-Lipschitz."""

    epsilon: float = 1e-6
    proof = "gradient ‖x‖/√(‖x‖² + ε)"

    def __call__(self, x: Images) -> Float[Array, "batch height/h width/w channels"]:
        check_image("L2Pool", x.shape[1:], window_pair=self.window)
        return resize.l2_pool(x, pair(self.window), self.epsilon)

    def materialize(self, params: PyTree, input_shape: Shape) -> Plain:
        outputs = np.prod(self.output_shape(input_shape), dtype=float)
        offset = float(np.sqrt(outputs * self.epsilon)) * (1 + 1e-9)
        return super().materialize(params, input_shape)._replace(sigma_min=0.0, offset=offset)


class Flatten(Fixed):
    """Reshapes every input to one axis. **Guarantee**: an isometry."""

    proof = "reshapes"

    def __call__(self, x: Shaped[Array, "batch ..."]) -> Shaped[Array, "batch n"]:
        return x.reshape(x.shape[0], -1)


class Normalize(Layer):
    """(x − mean) / std per channel. **Guarantee**: Lipschitz constant 1/min(std), which the report counts."""

    mean: tuple[float, ...]  # one number, or one per channel
    std: tuple[float, ...]  # the same; positive

    @highest_precision
    def __call__(self, x: Features) -> Features:
        check_float(x, "Normalize")
        self.output_shape(x.shape[1:])
        return (x - jnp.asarray(self.mean, x.dtype)) / jnp.asarray(self.std, x.dtype)

    def output_shape(self, input_shape: Shape) -> Shape:
        if not all(1e-30 < s < np.inf for s in self.std) or not np.all(np.isfinite(self.mean)):
            raise UserError(f"model.std must be positive and model.mean finite, got {self.std} and {self.mean}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, input_shape[-1]):
                raise UserError(f"model.{name} has {len(values)} entries for images of {input_shape[-1]} channels")
        return tuple(input_shape)

    def materialize(self, params: PyTree, input_shape: Shape) -> Plain:
        self.output_shape(input_shape)
        scale = 1 / np.asarray(self.std, np.float64)
        largest = 1.0 if scale.max() == 1.0 else spectrum.upper_bound(scale.max())
        mean = np.broadcast_to(np.asarray(self.mean, np.float64) * scale, input_shape[-1:])
        offset = math.sqrt(math.prod(input_shape[:-1])) * float(np.linalg.norm(mean)) * (1 + 1e-9)
        return Plain(lambda _, x: self(x), {}, largest, float(scale.min()), "1/min(std)", gamma(4), offset)
