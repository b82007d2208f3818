"""A chain of layers."""

import flax.linen as nn
from jaxtyping import Array, Float, PyTree

from lsrs_jax.layers.base import Layer, Shape
from lsrs_jax.layers.linear import OrthogonalConv
from lsrs_jax.orthogonal.kernels import build_kernels


class Encoder(nn.Module):
    """A chain of the modules of this package. **Guarantee**: Lipschitz constant at most the product of theirs.

    The kernels of all its convolutions are built before the first one runs, those of one family and shape in one
    batched computation. An empty chain is the identity: smoothing in input space.
    """

    layers: tuple[nn.Module, ...] = ()

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch ..."]:
        built = {} if self.is_initializing() else self._build(x.shape[1:])
        for index, layer in enumerate(self.layers):
            x = layer(x, built[index]) if index in built else layer(x)
        return x

    def _build(self, shape: Shape) -> dict[int, PyTree]:
        """Index of a convolution → its kernel, for all convolutions whose input shape is known."""
        convolutions = {}
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, Layer):
                break
            if isinstance(layer, OrthogonalConv):
                convolutions[index] = layer.method, layer.conv_shape(shape), layer.get_variable("params", "raw")
            shape = layer.output_shape(shape)
        return dict(zip(convolutions, build_kernels(list(convolutions.values())), strict=True))
