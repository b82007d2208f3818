"""Replays a program with the axes of images in the order NHWC, in which XLA's CPU back end convolves fast.

In the body of a loop, XLA's CPU back end has a fast convolution (Eigen's) for one order of axes alone: images NHWC and
kernels HWIO (jax-ml/jax#12868). Any other order takes a plain nested loop, ten to thirty times slower. Equinox and
importers of PyTorch write NCHW and OIHW. Here every convolution of such a program gets the fast order, and the
operations between two convolutions work in it too, so that few transposes remain.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jax.lax import ConvDimensionNumbers

from lsrs_jax.runtime.calls import CALLS
from lsrs_jax.smoothing.replay import bind, map_programs, replay, retrace

# In a convolution with groups, Eigen runs once per group. Below so many input channels per group, the nested loop over
# kernels OIHW is faster.
_CHANNELS_PER_GROUP = 8
_NHWC, _HWIO, _OIHW = (0, 3, 1, 2), (3, 2, 0, 1), (0, 1, 2, 3)  # as in `ConvDimensionNumbers`
_ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil", "clamp",
    "convert_element_type", "copy", "cos", "cosh", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
    "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne",
    "neg", "nextafter", "not", "or", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n", "sign", "sin",
    "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
}  # fmt: skip


class _Stored(NamedTuple):
    """An array with its axes in another order: axis i of `array` is axis ``order[i]`` of the value."""

    array: Any
    order: tuple[int, ...]


def other_layouts(program: ClosedJaxpr) -> bool:
    """Whether a program has convolutions that `channels_last` makes faster on a CPU."""
    return any(
        (_reordered(equation) and _fast_kernels(equation) == _HWIO) or any(map(other_layouts, _inner(equation)))
        for equation in program.jaxpr.eqns
    )


def channels_last(program: ClosedJaxpr) -> ClosedJaxpr:
    """The program with all its convolutions of two spatial axes in the order NHWC and HWIO.

    **Guarantee**: the same function up to rounding, because sums may be added in another order. An operation without a
    rule here is replayed as it is, on arrays with their axes in the order of the given program.
    """
    return retrace(program, lambda given, inputs: [_value(out) for out in replay(given, inputs, _rule)])


def _inner(equation: JaxprEqn) -> list[ClosedJaxpr]:
    """The programs in the parameters of an equation that `channels_last` replays too."""
    if (name := CALLS.get(equation.primitive.name)) is not None:
        inner = equation.params[name]
        return [inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())]
    if equation.primitive.name not in ("scan", "while", "cond"):
        return []
    values = [value if isinstance(value, tuple) else (value,) for value in equation.params.values()]
    return [inner for several in values for inner in several if isinstance(inner, ClosedJaxpr)]


def _reordered(equation: JaxprEqn) -> bool:
    """Whether an equation is a convolution of images with axes in another order than NHWC and HWIO."""
    if equation.primitive.name != "conv_general_dilated" or equation.params["batch_group_count"] != 1:
        return False
    given = tuple(map(tuple, equation.params["dimension_numbers"]))
    return len(given[0]) == 4 and given != (_NHWC, _HWIO, _NHWC)


def _fast_kernels(equation: JaxprEqn) -> tuple[int, ...]:
    """The fast order of the kernels of a convolution."""
    per_group = equation.invars[1].aval.shape[equation.params["dimension_numbers"].rhs_spec[1]]  # pyright: ignore[reportAttributeAccessIssue]
    grouped = equation.params["feature_group_count"] > 1 and per_group < _CHANNELS_PER_GROUP
    return _OIHW if grouped else _HWIO


def _stored(value: Any) -> _Stored:
    return value if isinstance(value, _Stored) else _Stored(value, tuple(range(np.ndim(value))))


def _value(value: Any) -> Any:
    """The array of a value, with its axes in order."""
    stored = _stored(value)
    return _ordered(stored, tuple(range(len(stored.order))))


def _ordered(value: _Stored, order: tuple[int, ...]) -> Any:
    """The array of a value with its axes in this order; that of a constant is made here, not in the program."""
    permutation = tuple(value.order.index(axis) for axis in order)
    if permutation == tuple(range(len(order))):
        return value.array
    if isinstance(value.array, np.ndarray):
        return np.ascontiguousarray(value.array.transpose(permutation))
    return jax.lax.transpose(value.array, permutation)


def _common_order(values: list[_Stored]) -> tuple[int, ...]:
    """The order of the largest value, so that the smaller ones are transposed; among equals, one that is not sorted."""
    best = max(values, key=lambda value: (np.size(value.array), value.order != tuple(sorted(value.order))))
    return best.order


def _rule(equation: JaxprEqn, inputs: list[Any]) -> list[Any]:
    """What replaces an equation: its rule, or, without one, the same primitive on values with their axes in order."""
    name, values = equation.primitive.name, [_stored(value) for value in inputs]
    if _reordered(equation):
        return _convolve(equation, values)
    if name in _ELEMENTWISE:
        return _elementwise(equation, values)
    if name in _RULES and values[0].order != ():
        return _RULES[name](equation, values)
    return _unchanged(equation, values)


def _unchanged(equation: JaxprEqn, values: list[_Stored]) -> list[Any]:
    params = equation.params
    if any(map(other_layouts, _inner(equation))):
        params = {key: map_programs(value, channels_last) for key, value in params.items()}
    return bind(equation, [_value(value) for value in values], params)


def _convolve(equation: JaxprEqn, values: list[_Stored]) -> list[Any]:
    images, kernels, out = equation.params["dimension_numbers"]
    fast = _fast_kernels(equation)
    by_name = ConvDimensionNumbers(_NHWC, fast, _NHWC)
    kernel_order = tuple(kernels[fast.index(place)] for place in range(4))  # of the axes out, in, height, width
    operands = [_ordered(values[0], _channels_last(images)), _ordered(values[1], kernel_order)]
    (found,) = bind(equation, operands, equation.params | {"dimension_numbers": by_name})
    return [_Stored(found, _channels_last(out))]


def _channels_last(spec: tuple[int, ...]) -> tuple[int, ...]:
    """Axes (batch, channels, height, width) in the order NHWC."""
    batch, channels, *space = spec
    return (batch, *space, channels)


def _elementwise(equation: JaxprEqn, values: list[_Stored]) -> list[Any]:
    """Inputs have the rank of the output, with sizes of 1 where they are broadcast, or are single numbers."""
    rank = len(equation.outvars[0].aval.shape)  # pyright: ignore[reportAttributeAccessIssue]
    full = [value for value in values if len(value.order) == rank]
    if not full or any(len(value.order) not in (0, rank) for value in values):
        return _unchanged(equation, values)
    order = _common_order(full)
    arrays = [_ordered(value, order) if value.order else value.array for value in values]
    (found,) = bind(equation, arrays, equation.params)
    return [_Stored(found, order)]


def _transpose(equation: JaxprEqn, values: list[_Stored]) -> list[Any]:
    (value,), permutation = values, equation.params["permutation"]
    return [_Stored(value.array, tuple(permutation.index(axis) for axis in value.order))]


def _with_axes(order: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """An order of some of the axes of an array, with the others inserted: each behind the axis before it."""
    found = list(order)
    for axis in range(rank):
        if axis not in order:
            found.insert(found.index(axis - 1) + 1 if axis else 0, axis)
    return tuple(found)


def _broadcast(equation: JaxprEqn, values: list[_Stored]) -> list[Any]:
    value, shape = values[0], equation.params["shape"]
    kept = tuple(equation.params["broadcast_dimensions"][axis] for axis in value.order)
    order = _with_axes(kept, len(shape))
    dimensions = tuple(order.index(axis) for axis in kept)
    changes = {"shape": tuple(shape[axis] for axis in order), "broadcast_dimensions": dimensions}
    (found,) = bind(equation, [value.array], equation.params | changes)
    return [_Stored(found, order)]


def _reshape(equation: JaxprEqn, values: list[_Stored]) -> list[Any]:
    """A reshape whose merged axes lie side by side in the stored array; others transpose it first."""
    value, shape = values[0], equation.outvars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
    permuted = equation.primitive.name == "reshape" and equation.params["dimensions"] is not None
    if 0 in shape or permuted:
        return _unchanged(equation, values)
    sizes = dict(zip(value.order, np.shape(value.array), strict=True))
    old, new = [axis for axis in sorted(sizes) if sizes[axis] != 1], [i for i, size in enumerate(shape) if size != 1]
    places = [axis for axis in value.order if sizes[axis] != 1]
    found: dict[int, list[int]] = {}  # place in the stored array of the first of some merged axes -> what they become
    while old:
        before, after = [old.pop(0)], [new.pop(0)]
        while (gap := math.prod(sizes[a] for a in before) - math.prod(shape[a] for a in after)) != 0:
            (before if gap < 0 else after).append((old if gap < 0 else new).pop(0))
        first = places.index(before[0])
        if places[first : first + len(before)] != before:
            return _unchanged(equation, values)
        found[first] = after
    order = _with_axes(tuple(axis for first in sorted(found) for axis in found[first]), len(shape))
    return [_Stored(jax.lax.reshape(value.array, tuple(shape[axis] for axis in order)), order)]


def _reduce(equation: JaxprEqn, values: list[_Stored]) -> list[Any]:
    (value,), axes = values, equation.params["axes"]
    (found,) = bind(equation, [value.array], equation.params | {"axes": _places(value, axes)})
    kept = [axis for axis in value.order if axis not in axes]
    return [_Stored(found, tuple(sorted(kept).index(axis) for axis in kept))]


def _places(value: _Stored, axes: Any) -> tuple[int, ...]:
    return tuple(sorted(value.order.index(axis) for axis in axes))


def _per_axis(*names: str) -> Callable[[JaxprEqn, list[_Stored]], list[Any]]:
    """The rule of a primitive of one array whose parameters of these names have one entry for each axis."""

    def rule(equation: JaxprEqn, values: list[_Stored]) -> list[Any]:
        first, given = values[0], equation.params
        changes = {key: given[key] and tuple(given[key][axis] for axis in first.order) for key in names}
        arrays = [first.array, *(value.array for value in values[1:])]  # single numbers
        (found,) = bind(equation, arrays, given | changes)
        return [_Stored(found, first.order)]

    return rule


def _along(name: str) -> Callable[[JaxprEqn, list[_Stored]], list[Any]]:
    """The rule of a primitive of arrays of one rank that works along the axis, or the axes, of this parameter."""

    def rule(equation: JaxprEqn, values: list[_Stored]) -> list[Any]:
        order, axis = _common_order(values), equation.params[name]
        place = tuple(map(order.index, axis)) if isinstance(axis, tuple) else order.index(axis)
        found = bind(equation, [_ordered(value, order) for value in values], equation.params | {name: place})
        return [_Stored(array, order) for array in found]

    return rule


_WINDOW = _per_axis("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
_RULES = {
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    **dict.fromkeys(("reshape", "squeeze"), _reshape),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin"), _reduce),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _WINDOW),
    "pad": _per_axis("padding_config"),
    "slice": _per_axis("start_indices", "limit_indices", "strides"),
    "concatenate": _along("dimension"),
    "split": _along("axis"),
    "rev": _along("dimensions"),
}
