"""Traces a head in the mesh of its caller, and makes a function of the trace that runs without that mesh."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jax.sharding import AxisType, Mesh, NamedSharding

from lsrs_jax.runtime.errors import UserError, out_of_memory, reason
from lsrs_jax.runtime.mesh import callers_mesh

_PLACING = ("sharding_constraint", "reshard", "mesh_cast", "device_put")  # primitives that move data, not change it
_CALLS = {  # primitives that call one function, and the parameter that holds it
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "remat2": "jaxpr",
    "checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
}  # fmt: skip
_TRAIN_MODE = {  # class of an error of Flax -> what to do
    "TraceContextError": "a module of NNX in train mode changes its state: call its method eval() first",
    "ModifyScopeVariableError": "a module of Linen in train mode changes its state: give use_running_average=True",
    "InvalidRngError": "a module of Linen in train mode draws random numbers: give deterministic=True",
}


@contextlib.contextmanager
def calling(what: str) -> Iterator[None]:
    """Makes one line of an error in a call of the head; `what` says which call it was."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever the caller's function raises
        if out_of_memory(error):
            raise
        remedy = _TRAIN_MODE.get(type(error).__name__)
        raise UserError(f"the head failed {what}: {reason(error)}{f'; {remedy}' if remedy else ''}") from error


class TracedHead:
    """A head, traced each time as its caller would trace it: in the mesh that is set when this object is made.

    Sharding constraints say where numbers are, not what they are. The sampling loop has a mesh of its own, in which the
    names of the caller's axes mean nothing; so heads that depend on a mesh are replaced by their traces without it.
    """

    def __init__(self, head: Callable[[Any], Any]) -> None:
        self.original, mesh = head, callers_mesh()
        # Constraints of Flax fail in a mesh of explicit axes where the latents are not divided over them.
        automatic = mesh and Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
        self._meshes, self.depends_on_mesh = ([mesh, automatic] if mesh else [None]), mesh is not None

    def trace(self, shape: tuple[int, ...]) -> Any:
        """Traces the head anew: JAX may remember the head from another context."""
        latents = jax.ShapeDtypeStruct(shape, jnp.float32)
        traced = self._trace_in_mesh(latents)
        self.depends_on_mesh = self.depends_on_mesh or _has_placement(traced.jaxpr)
        if not self.depends_on_mesh:
            return traced
        function, structure = jaxpr_as_fun(_without_meshes(traced.jaxpr)), jax.tree.structure(traced.out_info)
        return jax.jit(lambda z: jax.tree.unflatten(structure, function(z))).trace(latents)

    def _trace_in_mesh(self, latents: jax.ShapeDtypeStruct) -> Any:
        errors = []
        for mesh in self._meshes:
            try:
                with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
                    return jax.jit(lambda z: self.original(z)).trace(latents)
            except Exception as error:  # whatever the caller's function raises
                errors.append(error)
        raise errors[0]

    def for_loop(self, shape: tuple[int, ...]) -> Callable[[Any], Any]:
        """A function latents → logits that can be traced in any mesh: the head, or a trace of it without its mesh."""
        if not self.depends_on_mesh:
            return self.original
        function = jaxpr_as_fun(self.trace(shape).jaxpr)
        return lambda z: function(z)[0]


def parts(program: Any) -> Iterator[tuple[Jaxpr, Any]]:
    """A jaxpr and those inside it, each with its constants."""
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    yield jaxpr, program.consts if isinstance(program, ClosedJaxpr) else ()
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, Jaxpr | ClosedJaxpr):
                    yield from parts(inner)


def _has_placement(program: ClosedJaxpr) -> bool:
    """Whether a trace names a mesh, or reads arrays whose type does."""
    for jaxpr, constants in parts(program):
        explicit = (
            AxisType.Explicit in array.sharding.mesh.axis_types
            for array in constants
            if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding)
        )
        if any(equation.primitive.name in _PLACING[:3] for equation in jaxpr.eqns) or any(explicit):
            return True
    return False


def _without_meshes(program: ClosedJaxpr) -> ClosedJaxpr:
    """Traces a program again without what it says about meshes; the caller's mesh must not be set any more."""
    sizes = [
        jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype, weak_type=variable.aval.weak_type)  # pyright: ignore[reportAttributeAccessIssue]
        for variable in program.jaxpr.invars
    ]
    return jax.make_jaxpr(lambda *inputs: _run(program.jaxpr, program.consts, inputs))(*sizes)


def _run(jaxpr: Jaxpr, constants: Any, inputs: Any) -> list[Any]:
    values = dict(zip(jaxpr.constvars, map(_local, constants), strict=True))
    values |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atoms: Any) -> list[Any]:
        return [atom.val if isinstance(atom, Literal) else values[atom] for atom in atoms]

    for equation in jaxpr.eqns:
        name, inputs = equation.primitive.name, read(equation.invars)
        if name in _PLACING:
            outputs = inputs
        elif name in _CALLS:
            inner = equation.params[_CALLS[name]]
            closed = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
            outputs = _run(closed.jaxpr, closed.consts, inputs)
        else:
            params = {key: _clean(key, value) for key, value in equation.params.items()}
            outputs = equation.primitive.bind(*inputs, **params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values |= dict(zip(equation.outvars, outputs, strict=True))
    return read(jaxpr.outvars)


def _clean(name: str, value: Any) -> Any:
    """A parameter of a primitive without shardings."""
    if isinstance(value, tuple) and any(isinstance(inner, ClosedJaxpr) for inner in value):
        return tuple(_clean(name, inner) for inner in value)
    if isinstance(value, ClosedJaxpr):
        return _without_meshes(value)
    return None if name in ("sharding", "out_sharding") else value


def _local(constant: Any) -> Any:
    """A constant that no device owns; random keys cannot leave theirs."""
    placed = isinstance(constant, jax.Array) and not jnp.issubdtype(constant.dtype, jax.dtypes.extended)
    return np.asarray(constant) if placed else constant
