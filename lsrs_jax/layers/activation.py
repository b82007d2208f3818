"""Activations as modules that preserve the norm of gradients."""

import flax.linen as nn
import numpy as np
from jaxtyping import PyTree

from lsrs_jax.layers.base import Fixed, Layer, Plain, Shape
from lsrs_jax.orthogonal import activation, spectrum
from lsrs_jax.orthogonal.shape import Features
from lsrs_jax.orthogonal.spectrum import gamma


class MaxMin(Fixed):
    """MaxMin over channel halves (GroupSort of two; Anil, Lucas and Grosse 2019). **Guarantee**: 1-Lipschitz."""

    proof = "sorts pairs"

    def __call__(self, x: Features) -> Features:
        return activation.maxmin(x)


class GroupSort(Fixed):
    """Sorts groups of `group_size` channels (Anil, Lucas and Grosse 2019). **Guarantee**: 1-Lipschitz."""

    group_size: int = 2  # at least 2 (then it is `MaxMin`); channels beyond a multiple of it pass through unchanged
    proof = "sorts groups"

    def __call__(self, x: Features) -> Features:
        return activation.group_sort(x, self.group_size)


class Householder(Layer):
    """Reflects channel pairs across a learnable line (Singla, Singla and Feizi 2021). **Guarantee**: 1-Lipschitz."""

    @nn.compact
    def __call__(self, x: Features) -> Features:
        # One angle per pair of channels; at π/2 the layer is `MaxMin`.
        return activation.householder(x, self.param("theta", nn.initializers.constant(np.pi / 2), (x.shape[-1] // 2,)))

    def output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def materialize(self, params: PyTree, input_shape: Shape) -> Plain:
        theta = np.asarray(params["theta"], np.float64)
        # [[cos θ, sin θ], [sin θ, −cos θ]] is a reflection up to the last place of its entries.
        bound = spectrum.upper_bound(1.0)
        # γ(16): two products of sines and cosines, which are themselves rounded.
        return Plain(lambda t, x: activation.householder(x, t), theta, bound, 2 - bound, "reflects pairs", gamma(16))
