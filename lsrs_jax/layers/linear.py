"""Orthogonal convolutions and matrices as modules, and the chain of layers that builds its convolutions together.

The raw parameters ``raw`` of a layer are unconstrained: they are what training changes and what a checkpoint holds. The
built form (a kernel, a matrix, or another tree of arrays) is what ``build`` makes of them; the layer applies it.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from lsrs_jax.layers.base import Layer, Plain, Shape, Sizes, check_image, check_sizes, matrix_plain, pair
from lsrs_jax.orthogonal import families, matrix, spectrum
from lsrs_jax.orthogonal.shape import ConvShape, Features, Images, check_float, check_mode
from lsrs_jax.runtime.rng import standard_flags
from lsrs_jax.runtime.validate import choice


@functools.partial(jax.jit, static_argnums=(0, 2))
def _compiled(function: Callable[..., PyTree], raw: PyTree, shape: tuple[ConvShape, ...]) -> PyTree:
    return function(raw, *shape)


def _build_float64(function: Callable[..., PyTree], raw: PyTree, *shape: ConvShape) -> PyTree:
    """Returns ``function(raw, *shape)`` as NumPy arrays, computed in float64 on the host CPU."""
    with standard_flags(), jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        raw = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), raw)
        return jax.tree.map(np.asarray, _compiled(function, raw, shape))


class OrthogonalConv(Layer):
    """Orthogonal convolution without bias; `method` names a family in `lsrs_jax.orthogonal.FAMILIES`.

    `initializer` is ``"identity"`` (exact for ``adaptive`` with k − s even, ``paraunitary`` with odd k/s and
    ``exponential``; approximate otherwise) or ``"random"``.

    A shape raises UserError if the layer would not be 1-Lipschitz, would ignore pixels, or would be useless.

    **Guarantee**: 1-Lipschitz in ℓ2. Circular: all singular values are 1 up to rounding (≤ 1e-5 in float32), except for
    degenerate weights of ``adaptive`` (zero, or deficient in rank), where some fall below. Zero padding: none exceeds 1
    by more than rounding; those of ``exponential`` are still all 1. ``materialize`` computes the singular values of the
    trained layer in float64, and the Lipschitz constant of a certificate includes the largest one.
    """

    features: int  # output channels; any number (isometry or co-isometry)
    kernel_size: Sizes  # (kh, kw), at least the strides; may exceed the image
    strides: Sizes = (1, 1)  # (sh, sw); must divide the image
    method: str = "adaptive"  # or "paraunitary", "exponential", "cayley"
    initializer: str = "identity"
    padding: str = "circular"  # or, except for "cayley", "zero"

    def conv_shape(self, input_shape: Shape) -> ConvShape:
        """The checked `ConvShape` for inputs ``(H, W, C)``."""
        check_image("OrthogonalConv", input_shape, kernel_size_pair=self.kernel_size, strides_pair=self.strides)
        check_sizes("OrthogonalConv", features=self.features)
        (height, width, channels), kernel_size, strides = input_shape, pair(self.kernel_size), pair(self.strides)
        shape = ConvShape(kernel_size, strides, channels, self.features, (height, width), self.padding)
        families.family(self.method).check(shape)
        check_mode(self.initializer)
        return shape

    def output_shape(self, input_shape: Shape) -> Shape:
        return self.conv_shape(input_shape).output_shape

    @nn.compact
    def __call__(self, x: Images, built: PyTree = None) -> Float[Array, "batch height/sh width/sw features"]:
        """Applies the layer; `built` is what the family's ``build`` returned, if the caller has already called it."""
        check_float(x, "OrthogonalConv")
        shape, family = self.conv_shape(x.shape[1:]), families.family(self.method)
        if built is None:
            built = family.build(self.param("raw", lambda key: family.init(key, shape, self.initializer)), shape)
        return family.apply(built, x, shape)

    def materialize(self, params: PyTree, input_shape: Shape) -> Plain:
        shape, family = self.conv_shape(input_shape), families.family(self.method)
        built = _build_float64(family.build, params["raw"], shape)
        found = family.spectrum(built, shape)
        bound, rounding = spectrum.upper_bound(found.sigma_max), family.rounding(shape)
        return Plain(lambda p, x: family.apply(p, x, shape), built, bound, found.sigma_min, found.proof, rounding)


class OrthogonalDense(Layer):
    """Orthogonal linear map on the last axis, without bias.

    **Guarantee**: 1-Lipschitz in ℓ2; all singular values are 1 up to rounding (≤ 1e-5 in float32).
    """

    features: int  # outputs; any number
    method: str = "exponential"  # or "cayley"
    initializer: str = "random"  # or "identity"

    def output_shape(self, input_shape: Shape) -> Shape:
        choice("dense method", self.method, sorted(matrix.METHODS))
        check_mode(self.initializer)
        check_sizes("OrthogonalDense", features=self.features)
        return (*input_shape[:-1], self.features)

    @nn.compact
    def __call__(self, x: Features) -> Shaped[Array, "*batch features"]:
        check_float(x, "OrthogonalDense")
        self.output_shape(x.shape[1:])
        rows = x.shape[-1]
        std = 0.0 if self.initializer == "identity" else max(rows, self.features) ** -0.5
        raw = self.param("raw", lambda key: std * jax.random.normal(key, (rows, self.features), jnp.float32))
        return x @ matrix.METHODS[self.method](raw).astype(x.dtype)

    def materialize(self, params: PyTree, input_shape: Shape) -> Plain:
        self.output_shape(input_shape)
        return matrix_plain(lambda q, x: x @ q, _build_float64(matrix.METHODS[self.method], params["raw"]))


class Encoder(nn.Module):
    """A chain of the modules of this package. **Guarantee**: Lipschitz constant at most the product of theirs.

    It builds all its kernels together, before the first layer runs. An empty chain is the identity.
    """

    layers: tuple[nn.Module, ...] = ()

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch ..."]:
        built = {} if self.is_initializing() else self._build(x.shape[1:])
        for index, layer in enumerate(self.layers):
            x = layer(x, built[index]) if index in built else layer(x)
        return x

    def _build(self, shape: Shape) -> dict[int, PyTree]:
        """Index of a convolution → its built form, for all convolutions whose input shape is known."""
        convolutions = {}
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, Layer):
                break
            if isinstance(layer, OrthogonalConv):
                convolutions[index] = layer.method, layer.conv_shape(shape), layer.get_variable("params", "raw")
            shape = layer.output_shape(shape)
        return dict(zip(convolutions, families.build_kernels(list(convolutions.values())), strict=True))
