"""What every layer of an encoder provides beside ``__call__``."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from lsrs_jax.orthogonal import spectrum
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.validate import is_whole

Shape = tuple[int, ...]
Sizes = int | tuple[int, int]  # of rows and columns; one number for both


class Plain(NamedTuple):
    """A layer as a pure function of float64 arrays, with proven singular values and a bound on its rounding error.

    The rounding bounds assume that XLA's float64 products and convolutions are sums of products, in any order.
    """

    apply: Callable[[PyTree, Array], Array]  # (params, x[B, ...]) -> y, in the dtype of x and params
    params: PyTree[Float[np.ndarray, "..."]]  # float64; for an orthogonal layer the built form, not the raw parameters
    sigma_max: float  # upper bound on the Lipschitz constant
    sigma_min: float  # lower bound on the smallest of min(inputs, outputs) singular values; 0 if no bound is known
    proof: str
    rounding: float = 0.0  # ℓ2 error of apply in float64 over sigma_max · ‖x‖ + offset
    offset: float = 0.0  # upper bound on ‖apply(0)‖


def matrix_plain(apply: Callable[[PyTree, Array], Array], matrix: Float[np.ndarray, "m n"]) -> Plain:
    """The `Plain` of a product with a matrix, whose singular values are computed here."""
    sigma, rounding = spectrum.dense_singular_values(matrix), spectrum.product_rounding(max(matrix.shape))
    return Plain(apply, matrix, spectrum.upper_bound(sigma.max()), float(sigma.min()), "SVD of the matrix", rounding)


class Layer(nn.Module):
    """A Linen module with a known Lipschitz constant. All trainable variables are in the collection ``params``.

    Raises UserError for the name of a field that the layer does not have.
    """

    def __new__(cls, *_: Any, **named: Any) -> "Layer":
        known = [field.name for field in dataclasses.fields(cls) if field.init]
        if unknown := [name for name in named if name not in known]:
            fields = ", ".join(name for name in known if name not in ("parent", "name")) or "nothing"
            raise UserError(f"{cls.__name__} has no {unknown[0]!r}, only {fields}; no layer has groups or dilation")
        return super().__new__(cls)

    def output_shape(self, input_shape: Shape) -> Shape:
        """Shape of the output without the batch axis; raises UserError for an input that the layer cannot take."""
        raise NotImplementedError

    def materialize(self, params: PyTree, input_shape: Shape) -> Plain:
        """The same layer as a `Plain`, whose constant is proven on exactly the arrays that it holds."""
        raise NotImplementedError


class Fixed(Layer):
    """A layer without parameters. All its singular values (of its Jacobian, if it is not linear) are 1."""

    proof: ClassVar[str] = ""

    def output_shape(self, input_shape: Shape) -> Shape:
        # Traces ``__call__``, which raises UserError for an input that the layer cannot take.
        layer = self.clone(parent=None)
        return jax.eval_shape(lambda x: layer(x), jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)).shape[1:]

    def materialize(self, params: PyTree, input_shape: Shape) -> Plain:
        self.output_shape(input_shape)
        return Plain(lambda _, x: self(x), {}, 1.0, 1.0, self.proof)


def check_sizes(layer: str, **sizes: object) -> None:
    """Raises UserError unless every value is a positive integer; one whose name ends in ``_pair`` may also be two."""
    for name, value in sizes.items():
        pair = name.endswith("_pair")
        values = tuple(value) if pair and isinstance(value, tuple | list) else (value,) * (1 + pair)
        if len(values) != 1 + pair or not all(is_whole(v) and v >= 1 for v in values):  # pyright: ignore[reportOperatorIssue]
            wanted = "two positive integers, or one for both," if pair else "a positive integer"
            raise UserError(f"{layer}: {name.removesuffix('_pair')} must be {wanted}, got {value!r}")


def pair(sizes: Sizes) -> tuple[int, int]:
    """The sizes of rows and columns, of a field that `check_sizes` has checked."""
    return sizes if isinstance(sizes, tuple | list) else (sizes, sizes)


def check_image(layer: str, shape: Shape, **sizes: object) -> None:
    """Raises UserError unless `shape` is ``(H, W, C)`` and the sizes pass `check_sizes`."""
    if len(shape) != 3:
        raise UserError(f"{layer} takes images (B, H, W, C), got an input of shape (B, {', '.join(map(str, shape))})")
    check_sizes(layer, **sizes)
