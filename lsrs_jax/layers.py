"""Linen modules over `lsrs_jax.orthogonal`, each 1-Lipschitz unless its docstring says otherwise.

Every module here has, beside ``__call__``, a method ``materialize(params, input_shape)`` that returns a `Plain`: the
same layer as a plain function of plain arrays, with its singular values proven on those very arrays. All trainable
variables live in the collection ``params``; none of the modules has another one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax.errors import UserError
from lsrs_jax.orthogonal import convolution, matrix, reshape, spectrum
from lsrs_jax.orthogonal.shape import ConvShape


class Plain(NamedTuple):
    """A layer for certification: plain arrays and proven singular values."""

    apply: Callable[[Any, Any], Any]  # (params, x[B, ...]) -> y, in the dtype of x and params
    params: Any  # NumPy float64
    output_shape: tuple[int, ...]  # without the batch axis
    sigma_max: float  # upper bound on the Lipschitz constant
    sigma_min: float
    proof: str


def _isometry(apply, output_shape, proof):
    return Plain(lambda _, x: apply(x), {}, tuple(output_shape), 1.0, 1.0, proof)


def build_float64(build, raw):
    """Runs `build` in float64 on the host CPU; returns NumPy arrays."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        raw = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), raw)
        return jax.tree.map(np.asarray, jax.jit(build)(raw))


def _image_shape(shape, layer):
    if len(shape) != 3:
        raise UserError(f"{layer} takes images (B, H, W, C), got an input of shape (B, {', '.join(map(str, shape))})")


class OrthogonalConv(nn.Module):
    """Orthogonal convolution on a torus: ``(B, H, W, C)`` → ``(B, H/sh, W/sw, features)``, no bias.

    Attributes:
      features: output channels; any number (isometry or co-isometry).
      kernel_size: ``(kh, kw)``, at least the strides; may exceed the image.
      strides: ``(sh, sw)``; must divide the image.
      method: ``"paraunitary"`` (a plain kernel from matrix exponentials; Su et al. 2022) or ``"cayley"`` (Cayley
        transform in the Fourier domain; Trockman and Kolter 2021).
      initializer: ``"identity"`` (exact for odd paraunitary kernels, approximate otherwise) or ``"random"``.

    Raises:
      UserError: where the layer would silently stop being 1-Lipschitz, or skip pixels.

    **Guarantee**: 1-Lipschitz in ℓ2; all singular values are 1 up to rounding (≤ 1e-5 in float32). What a checkpoint
    really has is measured by ``materialize`` in float64 and multiplied into the certificate.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    method: str = "paraunitary"
    initializer: str = "identity"

    def _shape(self, input_shape):
        _image_shape(input_shape, "OrthogonalConv")
        height, width, channels = input_shape
        pair = tuple(self.kernel_size), tuple(self.strides)
        if len(pair[0]) != 2 or len(pair[1]) != 2:
            raise UserError(f"kernel_size and strides need two numbers each, got {pair[0]} and {pair[1]}")
        shape = ConvShape(*pair, channels, self.features, (height, width))
        family = convolution.family(self.method)
        family.check(shape)
        _check_initializer(self.initializer)
        return family, shape

    @nn.compact
    def __call__(self, x):
        family, shape = self._shape(x.shape[1:])
        raw = self.param("raw", lambda key: family.init(key, shape, self.initializer))
        plain = jax.tree.map(lambda leaf: leaf.astype(x.dtype), family.build(raw, shape))
        return family.apply(plain, x, shape)

    def materialize(self, params, input_shape):
        family, shape = self._shape(input_shape)
        plain = build_float64(lambda raw: family.build(raw, shape), params["raw"])
        sigma = family.singular_values(plain, shape)
        return Plain(
            lambda kernel, x: family.apply(kernel, x, shape),
            plain,
            shape.output_shape,
            spectrum.upper_bound(sigma.max()),
            float(sigma.min()),
            family.proof,
        )


class OrthogonalDense(nn.Module):
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
        _check_initializer(self.initializer)
        return matrix.METHODS[self.method]

    @nn.compact
    def __call__(self, x):
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
            (*input_shape[:-1], self.features),
            spectrum.upper_bound(sigma.max()),
            float(sigma.min()),
            "SVD of the matrix",
        )


def _check_initializer(name):
    if name not in ("identity", "random"):
        raise UserError(f"unknown initializer {name!r}: choose 'identity' or 'random'")


class MaxMin(nn.Module):
    """MaxMin over channel halves (GroupSort of two; Anil, Lucas and Grosse 2019). **Guarantee**: 1-Lipschitz."""

    def __call__(self, x):
        return reshape.maxmin(x)

    def materialize(self, params, input_shape):
        return _isometry(reshape.maxmin, input_shape, "sorts pairs")


class SpaceToDepth(nn.Module):
    """``(B, H, W, C)`` → ``(B, H/sh, W/sw, sh·sw·C)``. **Guarantee**: an isometry (a permutation of entries)."""

    strides: tuple[int, int] = (2, 2)

    def __call__(self, x):
        _image_shape(x.shape[1:], "SpaceToDepth")
        return reshape.space_to_depth(x, tuple(self.strides))

    def materialize(self, params, input_shape):
        _image_shape(input_shape, "SpaceToDepth")
        (height, width, channels), (sh, sw) = input_shape, self.strides
        reshape.check_divisible(height, width, self.strides)
        output = (height // sh, width // sw, channels * sh * sw)
        return _isometry(self.__call__, output, "permutes entries")


class Channels(nn.Module):
    """Pads (zeros) or crops the last axis to `features`. **Guarantee**: 1-Lipschitz; an isometry when it pads."""

    features: int

    def __call__(self, x):
        return reshape.resize_channels(x, self.features)

    def materialize(self, params, input_shape):
        pads = self.features >= input_shape[-1]
        plain = _isometry(self.__call__, (*input_shape[:-1], self.features), "pads" if pads else "crops")
        return plain if pads else plain._replace(sigma_min=0.0)


class Flatten(nn.Module):
    """``(B, …)`` → ``(B, n)``. **Guarantee**: an isometry."""

    def __call__(self, x):
        return x.reshape(x.shape[0], -1)

    def materialize(self, params, input_shape):
        return _isometry(self.__call__, (int(np.prod(input_shape)),), "reshapes")


class Normalize(nn.Module):
    """(x − mean) / std per channel. **Guarantee**: Lipschitz constant 1/min(std), which the report counts.

    Attributes:
      mean, std: one number, or one per channel; std > 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, x):
        self._check(x.shape[1:])
        return (x - jnp.asarray(self.mean, x.dtype)) / jnp.asarray(self.std, x.dtype)

    def _check(self, shape):
        if not all(0 < s < np.inf for s in self.std) or not np.all(np.isfinite(self.mean)):
            raise UserError(f"model.std must be positive and model.mean finite, got {self.std} and {self.mean}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, shape[-1]):
                raise UserError(f"model.{name} has {len(values)} entries for images of {shape[-1]} channels")

    def materialize(self, params, input_shape):
        self._check(input_shape)
        scale = 1 / np.asarray(self.std, np.float64)
        plain = _isometry(self.__call__, input_shape, "1/min(std)")
        largest = 1.0 if scale.max() == 1.0 else spectrum.upper_bound(scale.max())
        return plain._replace(sigma_max=largest, sigma_min=float(scale.min()))


class Encoder(nn.Module):
    """A chain of the modules above. **Guarantee**: Lipschitz constant at most the product of theirs.

    An empty chain is the identity: smoothing in input space.
    """

    layers: tuple[nn.Module, ...] = ()

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
