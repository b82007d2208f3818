"""Orthogonal convolutions and matrices as modules."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from lsrs_jax.layers.base import Layer, Plain, Shape, check_image, check_sizes, matrix_plain
from lsrs_jax.orthogonal import families, matrix, spectrum
from lsrs_jax.orthogonal.shape import ConvShape, Features, Images, check_float, check_mode
from lsrs_jax.runtime.errors import UserError


@functools.partial(jax.jit, static_argnums=(0, 1))
def _build(function: Callable[..., PyTree], shape: ConvShape | None, raw: PyTree) -> PyTree:
    return function(raw) if shape is None else function(raw, shape)


def build_float64(function: Callable[..., PyTree], raw: PyTree, shape: ConvShape | None = None) -> PyTree:
    """Runs a builder in float64 on the host CPU; returns NumPy arrays. Each function and shape is compiled once."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        raw = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), raw)
        return jax.tree.map(np.asarray, _build(function, shape, raw))


class OrthogonalConv(Layer):
    """Orthogonal convolution without bias.

    `method` names a family in `lsrs_jax.orthogonal.FAMILIES`:

    * ``"adaptive"``: a plain kernel; any stride (BCOP ∘ RKO; Li et al. 2019, Boissin et al. 2025).
    * ``"paraunitary"``: a plain kernel from matrix exponentials; the strides divide the kernel (Su et al. 2022).
    * ``"exponential"``: eight convolutions with a skew kernel (SOC; Singla and Feizi 2021).
    * ``"cayley"``: a product per frequency, bound to one image size (Trockman and Kolter 2021).

    `initializer` is ``"identity"`` (exact for ``adaptive`` with k − s even, ``paraunitary`` with odd k/s and
    ``exponential``; approximate otherwise) or ``"random"``.

    Raises:
      UserError: where the layer would silently stop being 1-Lipschitz, skip pixels, or be useless.

    **Guarantee**: 1-Lipschitz in ℓ2. Circular: all singular values are 1 up to rounding (≤ 1e-5 in float32), except for
    degenerate weights of ``adaptive`` (zero, or deficient in rank), where some fall below. Zero padding: none exceeds 1
    by more than rounding; those of ``exponential`` are still all 1. ``materialize`` computes the singular values of the
    trained layer in float64, and the Lipschitz constant of a certificate includes the largest one.
    """

    features: int  # output channels; any number (isometry or co-isometry)
    kernel_size: tuple[int, int]  # (kh, kw), at least the strides; may exceed the image
    strides: tuple[int, int] = (1, 1)  # (sh, sw); must divide the image
    method: str = "adaptive"
    initializer: str = "identity"
    padding: str = "circular"  # or, except for "cayley", "zero"

    def conv_shape(self, input_shape: Shape) -> ConvShape:
        """The checked `ConvShape` for inputs ``(H, W, C)``."""
        check_image("OrthogonalConv", input_shape, kernel_size_pair=self.kernel_size, strides_pair=self.strides)
        check_sizes("OrthogonalConv", features=self.features)
        (height, width, channels), (kh, kw), (sh, sw) = input_shape, self.kernel_size, self.strides
        shape = ConvShape((kh, kw), (sh, sw), channels, self.features, (height, width), self.padding)
        families.family(self.method).check(shape)
        check_mode(self.initializer)
        return shape

    def output_shape(self, input_shape: Shape) -> Shape:
        return self.conv_shape(input_shape).output_shape

    @nn.compact
    def __call__(self, x: Images, plain: PyTree = None) -> Float[Array, "batch height/sh width/sw features"]:
        """Applies the layer; `plain` is what the family's ``build`` returned, if the caller has built it already."""
        check_float(x, "OrthogonalConv")
        shape, family = self.conv_shape(x.shape[1:]), families.family(self.method)
        if plain is None:
            plain = family.build(self.param("raw", lambda key: family.init(key, shape, self.initializer)), shape)
        return family.apply(plain, x, shape)

    def materialize(self, params: PyTree, input_shape: Shape) -> Plain:
        shape, family = self.conv_shape(input_shape), families.family(self.method)
        plain = build_float64(family.build, params["raw"], shape)
        found = family.spectrum(plain, shape)
        bound, rounding = spectrum.upper_bound(found.sigma_max), family.rounding(shape)
        return Plain(lambda p, x: family.apply(p, x, shape), plain, bound, found.sigma_min, found.proof, rounding)


class OrthogonalDense(Layer):
    """Orthogonal linear map on the last axis, without bias.

    **Guarantee**: 1-Lipschitz in ℓ2; all singular values are 1 up to rounding (≤ 1e-5 in float32).
    """

    features: int  # outputs; any number
    method: str = "exponential"  # or "cayley"
    initializer: str = "random"  # or "identity"

    def _matrix(self) -> Callable[[matrix.Matrix], matrix.Matrix]:
        if self.method not in matrix.METHODS:
            raise UserError(f"unknown dense method {self.method!r}: choose one of {', '.join(sorted(matrix.METHODS))}")
        check_mode(self.initializer)
        return matrix.METHODS[self.method]

    def output_shape(self, input_shape: Shape) -> Shape:
        self._matrix()
        check_sizes("OrthogonalDense", features=self.features)
        return (*input_shape[:-1], self.features)

    @nn.compact
    def __call__(self, x: Features) -> Shaped[Array, "*batch features"]:
        check_float(x, "OrthogonalDense")
        self.output_shape(x.shape[1:])
        rows = x.shape[-1]
        std = 0.0 if self.initializer == "identity" else max(rows, self.features) ** -0.5
        raw = self.param("raw", lambda key: std * jax.random.normal(key, (rows, self.features), jnp.float32))
        return x @ self._matrix()(raw).astype(x.dtype)

    def materialize(self, params: PyTree, input_shape: Shape) -> Plain:
        return matrix_plain(lambda q, x: x @ q, build_float64(self._matrix(), params["raw"]))
