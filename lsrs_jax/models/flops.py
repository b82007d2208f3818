"""FLOPs, memory traffic and live memory of a function, counted in its jaxpr before anything is compiled."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params


def flops(function: Callable[..., Any], *arguments: Any) -> int:
    """FLOPs of the convolutions and matrix products of ``function(*arguments)``; nothing else is counted.

    A multiply-add counts 2, or 8 if complex. Products with padding count, products with the zeros of a dilated input do
    not. The body of a ``scan`` counts once per iteration, the body of another loop once; all branches of a condition
    count. The arguments may be `jax.ShapeDtypeStruct`.
    """
    return _total(jax.make_jaxpr(function)(*arguments).jaxpr, _flops)


def traffic(function: Callable[..., Any], *arguments: Any) -> int:
    """Bytes that the convolutions and matrix products of ``function(*arguments)`` read and write; see `flops`."""
    return _total(jax.make_jaxpr(function)(*arguments).jaxpr, lambda eqn: _sizes((*eqn.invars, *eqn.outvars)))


def peak_memory(function: Callable[..., Any], *arguments: Any) -> int:
    """Peak of the bytes alive if the operations of ``function(*arguments)`` run in program order, without fusion."""
    return _peak_bytes(jax.make_jaxpr(function)(*arguments).jaxpr)


def _total(jaxpr: Jaxpr, count: Callable[[JaxprEqn], int]) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            total += count(equation)
        else:
            inner = sum(_total(part, count) for part in jaxprs_in_params(equation.params))
            total += inner * equation.params.get("length", 1) if equation.primitive.name == "scan" else inner
    return total


def _flops(equation: JaxprEqn) -> int:
    out: Any = equation.outvars[0].aval
    left, right = (operand.aval.shape for operand in equation.invars[:2])  # pyright: ignore[reportAttributeAccessIssue]
    per_product = 8 if jnp.issubdtype(out.dtype, jnp.complexfloating) else 2
    if equation.primitive.name == "conv_general_dilated":
        # The size of the output includes the output features. A dilated input has one nonzero entry in `dilation`.
        features = right[equation.params["dimension_numbers"].rhs_spec[0]]
        dilation = math.prod(equation.params["lhs_dilation"])
        return per_product * math.prod(out.shape) * (math.prod(right) // features) // dilation
    (contracted, _), _ = equation.params["dimension_numbers"]
    return per_product * math.prod(out.shape) * math.prod(left[axis] for axis in contracted)


def _sizes(variables: Iterable[Any]) -> int:
    """Bytes of arrays; random keys, which are few and small, are left out."""
    avals = [variable.aval for variable in variables if hasattr(variable.aval, "shape")]
    arrays = [aval for aval in avals if not jnp.issubdtype(aval.dtype, jax.dtypes.extended)]
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in arrays)


def _peak_bytes(jaxpr: Jaxpr) -> int:
    """Most bytes of variables alive at once. A variable is freed after its last use, an argument never."""
    last = {variable: len(jaxpr.eqns) for variable in jaxpr.outvars if not isinstance(variable, Literal)}
    for index, equation in reversed(list(enumerate(jaxpr.eqns))):
        for variable in equation.invars:
            if not isinstance(variable, Literal):
                last.setdefault(variable, index)
    live = peak = _sizes(jaxpr.invars) + _sizes(jaxpr.constvars)
    for index, equation in enumerate(jaxpr.eqns):
        live += _sizes(equation.outvars)
        parts = jaxprs_in_params(equation.params)  # Their arguments and results are already counted here.
        inner = [_peak_bytes(part) - _sizes((*part.invars, *part.outvars)) for part in parts]
        peak = max(peak, live + max([0, *inner]))
        used = {variable for variable in equation.invars if not isinstance(variable, Literal)}
        live -= _sizes(variable for variable in used if last[variable] == index and variable not in jaxpr.invars)
        live -= _sizes(variable for variable in equation.outvars if variable not in last)
    return peak
