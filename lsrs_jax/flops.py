"""What a function computes, moves and holds, counted in its program before anything is compiled."""

import math

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxprs_in_params


def flops(function, *arguments):
    """FLOPs of the convolutions and matrix products of ``function(*arguments)``, by the field's convention.

    Two per multiplication and addition, eight where the factors are complex, those on padding included (circular or
    zero), those on the zeros of a dilated input not; everything else counts nothing. Arguments may be
    `jax.ShapeDtypeStruct`. Loops count each turn where their number is known (``scan``), once where it is not; of a
    condition all branches count.
    """
    return _total(jax.make_jaxpr(function)(*arguments).jaxpr, _flops)


def traffic(function, *arguments):
    """Bytes that the convolutions and matrix products of ``function(*arguments)`` read and write, as in `flops`."""
    return _total(jax.make_jaxpr(function)(*arguments).jaxpr, _moved)


def held(function, *arguments):
    """Bytes alive at the worst moment of ``function(*arguments)``, arguments included.

    As if operations ran one after the other as they are written, each into memory of its own: a compiler that merges
    them needs less.
    """
    return _peak(jax.make_jaxpr(function)(*arguments).jaxpr)


def _total(jaxpr, count):
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            total += count(equation)
        else:
            inner = sum(_total(part, count) for part in jaxprs_in_params(equation.params))
            total += inner * equation.params.get("length", 1) if equation.primitive.name == "scan" else inner
    return total


def _flops(equation):
    out = equation.outvars[0].aval
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        # The output features are in the output already; a dilated input is zeros for the most part.
        features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
        zeros = math.prod(equation.params["lhs_dilation"])
        return _per_product(out) * math.prod(out.shape) * (math.prod(kernel.shape) // features) // zeros
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return _per_product(out) * math.prod(out.shape) * math.prod(left[axis] for axis in contracted)


def _per_product(out):
    return 8 if jnp.issubdtype(out.dtype, jnp.complexfloating) else 2


def _moved(equation):
    return sum(_size(variable) for variable in (*equation.invars, *equation.outvars))


def _size(variable):
    aval = variable.aval
    # Random keys are few and small.
    extended = jnp.issubdtype(getattr(aval, "dtype", None), jax.dtypes.extended)
    return 0 if extended or not hasattr(aval, "shape") else math.prod(aval.shape) * aval.dtype.itemsize


def _beyond(jaxpr):
    """What an inner program holds beside its arguments and results, which the outer one counts."""
    return max(_peak(jaxpr) - sum(map(_size, (*jaxpr.invars, *jaxpr.outvars))), 0)


def _peak(jaxpr):
    last = {variable: len(jaxpr.eqns) for variable in jaxpr.outvars if not isinstance(variable, Literal)}
    for index, equation in reversed(list(enumerate(jaxpr.eqns))):
        for variable in equation.invars:
            if not isinstance(variable, Literal):
                last.setdefault(variable, index)
    live = peak = sum(map(_size, (*jaxpr.invars, *jaxpr.constvars)))
    for index, equation in enumerate(jaxpr.eqns):
        own = sum(map(_size, equation.outvars))
        live += own
        peak = max(peak, live + max(map(_beyond, jaxprs_in_params(equation.params)), default=0))
        for variable in {v for v in equation.invars if not isinstance(v, Literal)}:
            if last[variable] == index and variable not in jaxpr.invars:
                live -= _size(variable)
        live -= sum(_size(variable) for variable in equation.outvars if variable not in last)
    return peak
