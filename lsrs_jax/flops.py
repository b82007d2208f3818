"""FLOPs of a function by the field's convention, counted in its program before anything is compiled."""

import math

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params


def flops(function, *arguments):
    """FLOPs of the convolutions and matrix products of ``function(*arguments)``.

    Two per multiplication and addition, those on padding included (circular or zero), eight where the factors are
    complex; everything else counts nothing. Arguments may be `jax.ShapeDtypeStruct`. Loops count each turn where their
    number is known (``scan``), once where it is not; of a condition all branches count.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        name, out = equation.primitive.name, equation.outvars[0].aval if equation.outvars else None
        if name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            # The output features are in the output already.
            features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
            total += _per_product(out) * math.prod(out.shape) * (math.prod(kernel.shape) // features)
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += _per_product(out) * math.prod(out.shape) * math.prod(left[axis] for axis in contracted)
        else:
            inner = sum(_count(part) for part in jaxprs_in_params(equation.params))
            total += inner * equation.params.get("length", 1) if name == "scan" else inner
    return total


def _per_product(out):
    return 8 if jnp.issubdtype(out.dtype, jnp.complexfloating) else 2
