"""Gradient-norm-preserving activations as modules."""

import flax.linen as nn
import numpy as np

from lsrs_jax.layers.base import Fixed, Layer, Plain
from lsrs_jax.orthogonal import activation, spectrum
from lsrs_jax.orthogonal.rounding import gamma


class MaxMin(Fixed):
    """MaxMin over channel halves (GroupSort of two; Anil, Lucas and Grosse 2019). **Guarantee**: 1-Lipschitz."""

    proof = "sorts pairs"

    def __call__(self, x):
        return activation.maxmin(x)

    def output_shape(self, input_shape):
        return tuple(input_shape)


class GroupSort(Fixed):
    """Sorts groups of `group_size` channels (Anil, Lucas and Grosse 2019). **Guarantee**: 1-Lipschitz.

    Attributes:
      group_size: at least 2 (then it is `MaxMin`); channels beyond a multiple of it pass through.
    """

    group_size: int = 2
    proof = "sorts groups"

    def __call__(self, x):
        return activation.group_sort(x, self.group_size)

    def output_shape(self, input_shape):
        return tuple(input_shape)


class Householder(Layer):
    """Reflects channel pairs across a learnable line (Singla, Singla and Feizi 2021). **Guarantee**: 1-Lipschitz.

    One angle per pair of channels, π/2 at the start, where the layer is `MaxMin`.
    """

    @nn.compact
    def __call__(self, x):
        return activation.householder(x, self.param("theta", nn.initializers.constant(np.pi / 2), (x.shape[-1] // 2,)))

    def output_shape(self, input_shape):
        return tuple(input_shape)

    def materialize(self, params, input_shape):
        theta = np.asarray(params["theta"], np.float64)
        # [[cos θ, sin θ], [sin θ, −cos θ]] is a reflection up to the last place of its entries.
        bound = spectrum.upper_bound(1.0)
        # Two products of sines and cosines that are themselves rounded.
        return Plain(lambda t, x: activation.householder(x, t), theta, bound, 2 - bound, "reflects pairs", gamma(16))
