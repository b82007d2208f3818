"""ATen operations as JAX functions: arithmetic, comparisons, activations, reductions and matrix products.

`OPERATIONS` maps an overload, such as ``aten.add.Tensor``, to a function of the same arguments. Arguments that say
where or how a tensor is stored (device, layout, memory format) are left out by the importer. Operations with several
results return a tuple; if a result is missing in it, a network that uses that result is refused.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lsrs_jax.runtime.errors import UserError

Operation = Callable[..., Any]
Table = dict[str, Operation]
OPERATIONS: Table = {}


def register(table: Table, *overloads: str) -> Callable[[Operation], Operation]:
    """A decorator that enters a function into a table, under names such as ``add.Tensor``."""

    def enter(function: Operation) -> Operation:
        table.update({f"aten.{overload}": function for overload in overloads})
        return function

    return enter


def _rounded(x: Any, decimals: int = 0) -> Any:
    return jnp.round(x, decimals)


_ELEMENTWISE: Table = {
    "abs": jnp.abs, "neg": jnp.negative, "sign": jnp.sign, "exp": jnp.exp, "expm1": jnp.expm1, "log": jnp.log,
    "log1p": jnp.log1p, "log2": jnp.log2, "log10": jnp.log10, "sqrt": jnp.sqrt, "rsqrt": jax.lax.rsqrt,
    "reciprocal": jnp.reciprocal, "square": jnp.square, "sin": jnp.sin, "cos": jnp.cos, "tan": jnp.tan,
    "tanh": jnp.tanh, "atan": jnp.arctan, "erf": jax.lax.erf, "floor": jnp.floor, "ceil": jnp.ceil, "trunc": jnp.trunc,
    "round": _rounded, "isnan": jnp.isnan, "isinf": jnp.isinf, "logical_not": jnp.logical_not,
    "bitwise_not": jnp.bitwise_not, "relu": jax.nn.relu, "relu6": jax.nn.relu6, "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu, "log_sigmoid_forward": lambda x: (jax.nn.log_sigmoid(x),),
    "maximum": jnp.maximum, "minimum": jnp.minimum, "logical_and": jnp.logical_and, "logical_or": jnp.logical_or,
    "logical_xor": jnp.logical_xor,
}  # fmt: skip
OPERATIONS |= {f"aten.{name}.default": function for name, function in _ELEMENTWISE.items()}

_PAIRS: Table = {
    "mul": jnp.multiply, "eq": jnp.equal, "ne": jnp.not_equal, "lt": jnp.less, "le": jnp.less_equal, "gt": jnp.greater,
    "ge": jnp.greater_equal, "fmod": jnp.fmod, "remainder": jnp.remainder, "bitwise_and": jnp.bitwise_and,
    "bitwise_or": jnp.bitwise_or,
}  # fmt: skip
OPERATIONS |= {f"aten.{name}.{kind}": pair for name, pair in _PAIRS.items() for kind in ("Tensor", "Scalar")}


# ---------------------------------------------------------------------------------------------------------- arithmetic


@register(OPERATIONS, "add.Tensor", "add.Scalar")
def add(x: Any, y: Any, alpha: Any = 1) -> Any:
    return x + y if alpha == 1 else x + alpha * y


@register(OPERATIONS, "sub.Tensor", "sub.Scalar")
def subtract(x: Any, y: Any, alpha: Any = 1) -> Any:
    return x - y if alpha == 1 else x - alpha * y


@register(OPERATIONS, "rsub.Tensor", "rsub.Scalar")
def subtract_from(x: Any, y: Any, alpha: Any = 1) -> Any:
    return subtract(y, x, alpha)


@register(OPERATIONS, "div.Tensor", "div.Scalar", "div.Tensor_mode", "div.Scalar_mode")
def divide(x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode == "floor":
        return jnp.floor_divide(x, y)
    quotient = jnp.true_divide(x, y)
    if rounding_mode is None:
        return quotient
    if not jnp.issubdtype(jnp.result_type(x, y), jnp.floating):
        raise UserError("the importer divides whole numbers with rounding_mode 'floor' or none, not 'trunc'")
    return jnp.trunc(quotient)


@register(OPERATIONS, "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")
def power(x: Any, exponent: Any) -> Any:
    if isinstance(exponent, float) and exponent.is_integer() and abs(exponent) <= 8:
        whole = int(exponent)  # repeated products are exact to rounding, and have gradients for negative numbers
        return jnp.asarray(x) ** whole
    return jnp.power(x, exponent)


@register(OPERATIONS, "clamp.default", "clamp.Tensor")
def clamp(x: Any, least: Any = None, most: Any = None) -> Any:
    x = x if least is None else jnp.maximum(x, least)
    return x if most is None else jnp.minimum(x, most)  # in this order: `most` wins if it is below `least`


@register(OPERATIONS, "clamp_min.default", "clamp_min.Tensor")
def clamp_min(x: Any, least: Any) -> Any:
    return jnp.maximum(x, least)


@register(OPERATIONS, "clamp_max.default", "clamp_max.Tensor")
def clamp_max(x: Any, most: Any) -> Any:
    return jnp.minimum(x, most)


@register(OPERATIONS, "where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def where(condition: Any, x: Any, y: Any) -> Any:
    return jnp.where(condition, x, y)


@register(OPERATIONS, "masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(x: Any, mask: Any, value: Any) -> Any:
    return jnp.where(mask, jnp.asarray(value, x.dtype), x)


# --------------------------------------------------------------------------------------------------------- activations


@register(OPERATIONS, "hardtanh.default")
def hardtanh(x: Any, least: float = -1.0, most: float = 1.0) -> Any:
    return jnp.clip(x, least, most)


@register(OPERATIONS, "leaky_relu.default")
def leaky_relu(x: Any, slope: float = 0.01) -> Any:
    return jnp.where(x > 0, x, slope * x)


@register(OPERATIONS, "_prelu_kernel.default")
def prelu(x: Any, slopes: Any) -> Any:
    return jnp.where(x > 0, x, slopes * x)


@register(OPERATIONS, "elu.default")
def elu(x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    negative = alpha * jnp.expm1(jnp.where(x > 0, 0, x) * input_scale)
    return scale * jnp.where(x > 0, x, negative)


@register(OPERATIONS, "gelu.default")
def gelu(x: Any, approximate: str = "none") -> Any:
    return jax.nn.gelu(x, approximate=approximate == "tanh")


@register(OPERATIONS, "hardsigmoid.default")
def hardsigmoid(x: Any) -> Any:
    return jnp.clip(x + 3, 0, 6) / 6


@register(OPERATIONS, "hardswish.default")
def hardswish(x: Any) -> Any:
    return x * hardsigmoid(x)


@register(OPERATIONS, "softplus.default")
def softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    scaled = x * beta
    return jnp.where(scaled > threshold, x, jax.nn.softplus(jnp.minimum(scaled, threshold)) / beta)


@register(OPERATIONS, "mish.default")
def mish(x: Any) -> Any:
    return x * jnp.tanh(softplus(x))


@register(OPERATIONS, "_softmax.default", "_safe_softmax.default", "softmax.int")
def softmax(x: Any, dim: int, *_: Any, dtype: Any = None) -> Any:
    return jax.nn.softmax(x, axis=dim)


@register(OPERATIONS, "_log_softmax.default", "log_softmax.int")
def log_softmax(x: Any, dim: int, *_: Any, dtype: Any = None) -> Any:
    return jax.nn.log_softmax(x, axis=dim)


# ---------------------------------------------------------------------------------------------------------- reductions


def axes(dim: Any) -> Any:
    """The axes of a reduction as JAX takes them; torch means all of them by None, and by an empty list."""
    return None if dim is None or dim == [] else tuple(dim) if isinstance(dim, list) else dim


@register(OPERATIONS, "mean.default", "mean.dim")
def mean(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return jnp.mean(x, axes(dim), dtype, keepdims=keepdim)


@register(OPERATIONS, "sum.default", "sum.dim_IntList")
def total(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return jnp.sum(x, axes(dim), dtype, keepdims=keepdim)


@register(OPERATIONS, "prod.default", "prod.dim_int")
def product(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return jnp.prod(x, axes(dim), dtype, keepdims=keepdim)


@register(OPERATIONS, "amax.default", "max.default")
def amax(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return jnp.max(x, axes(dim), keepdims=keepdim)


@register(OPERATIONS, "amin.default", "min.default")
def amin(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return jnp.min(x, axes(dim), keepdims=keepdim)


@register(OPERATIONS, "max.dim")
def max_of_axis(x: Any, dim: int, keepdim: bool = False) -> Any:
    return jnp.max(x, dim, keepdims=keepdim), jnp.argmax(x, dim, keepdims=keepdim)


@register(OPERATIONS, "min.dim")
def min_of_axis(x: Any, dim: int, keepdim: bool = False) -> Any:
    return jnp.min(x, dim, keepdims=keepdim), jnp.argmin(x, dim, keepdims=keepdim)


@register(OPERATIONS, "argmax.default")
def argmax(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return jnp.argmax(x, dim, keepdims=keepdim)


@register(OPERATIONS, "any.default", "any.dim", "any.dims")
def any_of(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return jnp.any(x, axes(dim), keepdims=keepdim)


@register(OPERATIONS, "all.default", "all.dim", "all.dims")
def all_of(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return jnp.all(x, axes(dim), keepdims=keepdim)


@register(OPERATIONS, "var.correction")
def variance(x: Any, dim: Any = None, *, correction: int | None = 1, keepdim: bool = False) -> Any:
    return jnp.var(x, axes(dim), ddof=1 if correction is None else correction, keepdims=keepdim)


@register(OPERATIONS, "var.dim")
def variance_of_axes(x: Any, dim: Any, unbiased: bool = True, keepdim: bool = False) -> Any:
    return jnp.var(x, axes(dim), ddof=int(unbiased), keepdims=keepdim)


@register(OPERATIONS, "var_mean.correction")
def variance_and_mean(x: Any, dim: Any = None, *, correction: int | None = 1, keepdim: bool = False) -> Any:
    return variance(x, dim, correction=correction, keepdim=keepdim), jnp.mean(x, axes(dim), keepdims=keepdim)


@register(OPERATIONS, "linalg_vector_norm.default")
def vector_norm(x: Any, order: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if order == 2:
        return jnp.sqrt(jnp.sum(x * x, axes(dim), keepdims=keepdim))
    if order == 1:
        return jnp.sum(jnp.abs(x), axes(dim), keepdims=keepdim)
    if order == float("inf"):
        return jnp.max(jnp.abs(x), axes(dim), keepdims=keepdim)
    raise UserError(f"the importer knows vector norms of order 1, 2 and infinity, not {order}")


@register(OPERATIONS, "cumsum.default")
def cumulated(x: Any, dim: int, *, dtype: Any = None) -> Any:
    return jnp.cumsum(x, dim, dtype)


# ----------------------------------------------------------------------------------------------------- matrix products


@register(OPERATIONS, "mm.default", "bmm.default", "mv.default", "dot.default", "matmul.default")
def matmul(x: Any, y: Any) -> Any:
    return x @ y


@register(OPERATIONS, "addmm.default", "baddbmm.default")
def addmm(bias: Any, x: Any, y: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    product = x @ y if alpha == 1 else alpha * (x @ y)
    return product + bias if beta == 1 else product + beta * bias


@register(OPERATIONS, "linear.default")
def linear(x: Any, weights: Any, bias: Any = None) -> Any:
    return x @ weights.T if bias is None else x @ weights.T + bias
