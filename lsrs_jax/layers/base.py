"""What every layer of an encoder provides beside ``__call__``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from lsrs_jax.errors import UserError


class Plain(NamedTuple):
    """A layer for certification: plain arrays, proven singular values, and what float64 arithmetic adds.

    The rounding bounds assume that XLA's float64 products and convolutions are sums of products, in any order.
    """

    apply: Callable[[Any, Any], Any]  # (params, x[B, ...]) -> y, in the dtype of x and params
    params: Any  # NumPy float64
    sigma_max: float  # upper bound on the Lipschitz constant
    sigma_min: float  # lower bound on the smallest of min(inputs, outputs) singular values; 0 where none is known
    proof: str
    rounding: float = 0.0  # ℓ2 error of apply in float64 over sigma_max · ‖x‖ + offset
    offset: float = 0.0  # upper bound on ‖apply(0)‖


class Layer(nn.Module):
    """A Linen module with a known Lipschitz constant. All trainable variables live in the collection ``params``."""

    def output_shape(self, input_shape):
        """Shape of the output, without the batch axis; raises UserError for an input the layer cannot take."""
        raise NotImplementedError

    def materialize(self, params, input_shape):
        """The same layer as a `Plain`: its constant is proven on the very arrays in it."""
        raise NotImplementedError


class Fixed(Layer):
    """A layer without parameters whose singular values are all 1 (of its Jacobian, where it is not linear)."""

    proof = ""

    def materialize(self, params, input_shape):
        self.output_shape(input_shape)
        return Plain(lambda _, x: self(x), {}, 1.0, 1.0, self.proof)


def check_sizes(layer, **sizes):
    """Raises unless every value is a positive integer, or a pair of them where its name ends in ``_pair``."""
    for name, value in sizes.items():
        values = tuple(value) if name.endswith("_pair") and isinstance(value, tuple | list) else (value,)
        wanted = 2 if name.endswith("_pair") else 1
        if len(values) != wanted or not all(isinstance(v, int | np.integer) and v >= 1 for v in values):
            name = name.removesuffix("_pair")
            raise UserError(
                f"{layer}: {name} must be {'two positive integers' if wanted == 2 else 'a positive integer'}, "
                f"got {value!r}"
            )


def check_image(shape, layer):
    """Raises unless `shape` is ``(H, W, C)``."""
    if len(shape) != 3:
        raise UserError(f"{layer} takes images (B, H, W, C), got an input of shape (B, {', '.join(map(str, shape))})")
