"""Traces a head in the mesh of its caller, and makes a function of the trace that runs without that mesh."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, jaxpr_as_fun
from jax.sharding import AxisType, Mesh, NamedSharding

from lsrs_jax.runtime.errors import UserError, out_of_memory, reason
from lsrs_jax.runtime.mesh import callers_mesh
from lsrs_jax.smoothing.channels_last import channels_last, other_layouts
from lsrs_jax.smoothing.head_hints import remedy
from lsrs_jax.smoothing.replay import bind, map_programs, parts, replay, retrace

_PLACING = ("sharding_constraint", "reshard", "mesh_cast", "device_put")  # primitives that move data, not change it

CHANNELS_LAST = "channels_last"  # the name of the program; on-disk format


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
        hint = remedy(error)
        raise UserError(f"the head failed {what}: {reason(error)}{f'; {hint}' if hint else ''}") from error


class TracedHead:
    """A head, traced each time as its caller would trace it: in the mesh that is set when this object is made.

    Sharding constraints say where numbers are, not what they are. The sampling loop has a mesh of its own, in which the
    names of the caller's axes mean nothing; so heads that depend on a mesh are replaced by their traces without it.

    With `channels_last`, a head with convolutions in another layout is replaced by `channels_last.channels_last` of it.
    """

    def __init__(self, head: Callable[[Any], Any], channels_last: bool = False) -> None:
        self.original, mesh = head, callers_mesh()
        self._may_reorder, self._reordered = channels_last, False
        # Constraints of Flax fail in a mesh of explicit axes where the latents are not divided over them.
        automatic = mesh and Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
        self._meshes, self.depends_on_mesh = ([mesh, automatic] if mesh else [None]), mesh is not None

    def trace(self, shape: tuple[int, ...]) -> Any:
        """Traces the head anew: JAX may remember the head from another context."""
        latents = jax.ShapeDtypeStruct(shape, jnp.float32)
        traced = self._trace_in_mesh(latents)
        self.depends_on_mesh = self.depends_on_mesh or _has_placement(traced.jaxpr)
        program = _without_meshes(traced.jaxpr) if self.depends_on_mesh else traced.jaxpr
        self._reordered = self._reordered or (self._may_reorder and other_layouts(program))
        program = channels_last(program) if self._reordered else program
        if program is traced.jaxpr:
            return traced
        function, structure = jaxpr_as_fun(program), jax.tree.structure(traced.out_info)
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

    @property
    def program(self) -> str:
        """``"channels_last"`` if the traces are those of `channels_last.channels_last`, else ``"plain"``."""
        return CHANNELS_LAST if self._reordered else "plain"

    def for_loop(self, shape: tuple[int, ...]) -> Callable[[Any], Any]:
        """A function latents → logits that can be traced in any mesh: the head, or its trace by `trace`."""
        if not (self.depends_on_mesh or self._reordered):
            return self.original
        function = jaxpr_as_fun(self.trace(shape).jaxpr)
        return lambda z: function(z)[0]


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
    return retrace(program, lambda given, inputs: replay(given, inputs, _unplaced))


def _unplaced(equation: JaxprEqn, inputs: list[Any]) -> list[Any]:
    """The outputs of an equation without shardings."""
    if equation.primitive.name in _PLACING:
        return inputs
    params = {key: map_programs(value, _without_meshes) for key, value in equation.params.items()}
    return bind(equation, inputs, params | dict.fromkeys({"sharding", "out_sharding"} & set(params)))
