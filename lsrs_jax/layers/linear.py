"""Orthogonal convolutions and matrices as modules."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax.errors import UserError
from lsrs_jax.layers.base import Layer, Plain, check_image, check_sizes
from lsrs_jax.orthogonal import families, matrix, spectrum
from lsrs_jax.orthogonal.rounding import product_rounding
from lsrs_jax.orthogonal.shape import ConvShape, check_float, check_mode


@functools.partial(jax.jit, static_argnums=(0, 1))
def _build(function, shape, raw):
    return function(raw) if shape is None else function(raw, shape)


def build_float64(function, raw, shape=None):
    """Runs a builder in float64 on the host CPU; returns NumPy arrays. One compilation per function and shape."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        raw = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), raw)
        return jax.tree.map(np.asarray, _build(function, shape, raw))


class OrthogonalConv(Layer):
    """Orthogonal convolution: ``(B, H, W, C)`` → ``(B, H/sh, W/sw, features)``, no bias.

    Attributes:
      features: output channels; any number (isometry or co-isometry).
      kernel_size: ``(kh, kw)``, at least the strides; may exceed the image.
      strides: ``(sh, sw)``; must divide the image.
      method: the family, a name in `lsrs_jax.orthogonal.FAMILIES`.

        * ``"adaptive"``: a plain kernel; any stride (BCOP ∘ RKO; Li et al. 2019, Boissin et al. 2025).
        * ``"paraunitary"``: a plain kernel from matrix exponentials; the strides divide the kernel (Su et al. 2022).
        * ``"exponential"``: eight convolutions with a skew kernel (SOC; Singla and Feizi 2021).
        * ``"cayley"``: a product per frequency, bound to one image size (Trockman and Kolter 2021).
      initializer: ``"identity"`` (exact for ``adaptive`` with k − s even, ``paraunitary`` with odd k/s and
        ``exponential``; approximate otherwise) or ``"random"``.
      padding: ``"circular"`` or, except for ``cayley``, ``"zero"``.

    Raises:
      UserError: where the layer would silently stop being 1-Lipschitz, skip pixels, or be useless.

    **Guarantee**: 1-Lipschitz in ℓ2. Circular: all singular values are 1 up to rounding (≤ 1e-5 in float32), except for
    degenerate weights of ``adaptive`` (zero, or deficient in rank), where some fall below. Zero padding: none exceeds 1
    by more than rounding; those of ``exponential`` still all are 1. What a checkpoint really has is measured by
    ``materialize`` in float64 and multiplied into the certificate.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    method: str = "adaptive"
    initializer: str = "identity"
    padding: str = "circular"

    def conv_shape(self, input_shape):
        """The checked `ConvShape` for inputs ``(H, W, C)``."""
        check_image(input_shape, "OrthogonalConv")
        height, width, channels = input_shape
        check_sizes("OrthogonalConv", kernel_size_pair=self.kernel_size, strides_pair=self.strides)
        check_sizes("OrthogonalConv", features=self.features)
        pair = tuple(self.kernel_size), tuple(self.strides)
        shape = ConvShape(*pair, channels, self.features, (height, width), self.padding)
        families.family(self.method).check(shape)
        check_mode(self.initializer)
        return shape

    def output_shape(self, input_shape):
        return self.conv_shape(input_shape).output_shape

    @nn.compact
    def __call__(self, x, plain=None):
        """Applies the layer; `plain` is what the family's ``build`` gave, where someone has built it already."""
        check_float(x, "OrthogonalConv")
        shape, family = self.conv_shape(x.shape[1:]), families.family(self.method)
        if plain is None:
            plain = family.build(self.param("raw", lambda key: family.init(key, shape, self.initializer)), shape)
        return family.apply(plain, x, shape)

    def materialize(self, params, input_shape):
        shape, family = self.conv_shape(input_shape), families.family(self.method)
        plain = build_float64(family.build, params["raw"], shape)
        found = family.spectrum(plain, shape)
        return Plain(
            lambda plain, x: family.apply(plain, x, shape),
            plain,
            spectrum.upper_bound(found.sigma_max),
            found.sigma_min,
            found.proof,
            family.rounding(shape),
        )


class OrthogonalDense(Layer):
    """Orthogonal linear map on the last axis: ``(B, …, n)`` → ``(B, …, features)``, no bias.

    Attributes:
      features: outputs; any number.
      method: ``"exponential"`` (matrix exponential of a skew matrix) or ``"cayley"``.
      initializer: ``"identity"`` or ``"random"``.

    **Guarantee**: 1-Lipschitz in ℓ2; all singular values are 1 up to rounding (≤ 1e-5 in float32).
    """

    features: int
    method: str = "exponential"
    initializer: str = "random"

    def _matrix(self):
        if self.method not in matrix.METHODS:
            raise UserError(f"unknown dense method {self.method!r}: choose one of {', '.join(sorted(matrix.METHODS))}")
        check_mode(self.initializer)
        return matrix.METHODS[self.method]

    def output_shape(self, input_shape):
        self._matrix()
        check_sizes("OrthogonalDense", features=self.features)
        return (*input_shape[:-1], self.features)

    @nn.compact
    def __call__(self, x):
        check_float(x, "OrthogonalDense")
        self.output_shape(x.shape[1:])
        rows = x.shape[-1]
        std = 0.0 if self.initializer == "identity" else max(rows, self.features) ** -0.5
        raw = self.param("raw", lambda key: std * jax.random.normal(key, (rows, self.features), jnp.float32))
        return x @ self._matrix()(raw).astype(x.dtype)

    def materialize(self, params, input_shape):
        q = build_float64(self._matrix(), params["raw"])
        sigma = spectrum.dense_singular_values(q)
        return Plain(
            lambda q, x: x @ q,
            q,
            spectrum.upper_bound(sigma.max()),
            float(sigma.min()),
            "SVD of the matrix",
            product_rounding(max(q.shape)),
        )
