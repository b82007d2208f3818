"""Runs a program of JAX again, equation by equation, with a rule that says what becomes of each equation."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from lsrs_jax.runtime.calls import CALLS

Rule = Callable[[JaxprEqn, list[Any]], list[Any]]


def parts(program: Any) -> Iterator[tuple[Jaxpr, Any]]:
    """A jaxpr and those inside it, each with its constants."""
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    yield jaxpr, program.consts if isinstance(program, ClosedJaxpr) else ()
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, Jaxpr | ClosedJaxpr):
                    yield from parts(inner)


def retrace(program: ClosedJaxpr, run: Callable[[ClosedJaxpr, Any], list[Any]]) -> ClosedJaxpr:
    """The trace of `run`, a function of a program and its inputs that returns the outputs, for this program."""
    sizes = [
        jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype, weak_type=variable.aval.weak_type)  # pyright: ignore[reportAttributeAccessIssue]
        for variable in program.jaxpr.invars
    ]
    return jax.make_jaxpr(lambda *inputs: run(program, inputs))(*sizes)


def replay(program: ClosedJaxpr, inputs: Any, rule: Rule) -> list[Any]:
    """Runs a program; `rule` maps an equation and the values of its inputs to the values of its outputs.

    Calls of functions are replaced by what is in them. The values may be of any type that the rule accepts; literals
    and constants are arrays.
    """
    jaxpr = program.jaxpr
    values = dict(zip(jaxpr.constvars, map(_local, program.consts), strict=True))
    values |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atoms: Any) -> list[Any]:
        return [_local(atom.val) if isinstance(atom, Literal) else values[atom] for atom in atoms]

    for equation in jaxpr.eqns:
        name, inputs = equation.primitive.name, read(equation.invars)
        if name in CALLS:
            inner = equation.params[CALLS[name]]
            outputs = replay(inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ()), inputs, rule)
        else:
            outputs = rule(equation, inputs)
        values |= dict(zip(equation.outvars, outputs, strict=True))
    return read(jaxpr.outvars)


def bind(equation: JaxprEqn, inputs: Any, params: dict[str, Any]) -> list[Any]:
    """The outputs of the primitive of an equation for these inputs and parameters."""
    outputs = equation.primitive.bind(*inputs, **params)
    return outputs if equation.primitive.multiple_results else [outputs]


def map_programs(value: Any, function: Callable[[ClosedJaxpr], ClosedJaxpr]) -> Any:
    """A parameter of a primitive, with each program in it, such as the body of a loop, replaced."""
    if isinstance(value, tuple) and any(isinstance(inner, ClosedJaxpr) for inner in value):
        return tuple(map_programs(inner, function) for inner in value)
    return function(value) if isinstance(value, ClosedJaxpr) else value


def _local(constant: Any) -> Any:
    """A constant or literal whose type names no device and no mesh; random keys cannot leave theirs."""
    is_key = isinstance(constant, jax.Array) and jnp.issubdtype(constant.dtype, jax.dtypes.extended)
    return np.asarray(constant) if hasattr(constant, "__array__") and not is_key else constant
