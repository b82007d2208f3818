"""Follows the trace of a network of layers: which entries does each layer read, and which does the output?

Every entry of the network's input and of the layers' outputs has a number, its code. A value between two layers is an
array of codes, on which the trace's reshapes, transposes and slices run as they would on the numbers themselves.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, Primitive
from jaxtyping import Int, PyTree

from lsrs_jax.layers.base import Layer, Shape
from lsrs_jax.layers.moves import MOVES
from lsrs_jax.runtime.calls import CALLS
from lsrs_jax.runtime.errors import UserError, reason

ACCEPTED = (
    "between lsrs_jax.layers only reshapes, transposes, slices and the concatenation of disjoint parts are accepted"
)
_SAME = (  # primitives that return what they get
    "copy", "copy_p", "name", "optimization_barrier", "stop_gradient", "sharding_constraint", "reshard", "mesh_cast",
    "device_put",
)  # fmt: skip
_JOINING = ("concatenate", "stack")
_INDEXED = ("gather", "dynamic_slice")  # pick entries by numbers, which must be known

Codes = Int[np.ndarray, "..."]
Names = tuple[str, ...]


class Call:
    """One call of a layer, the parameter of its equation. Two calls are never equal, so no trace is shared."""

    def __init__(self, layer: Layer, input_shape: Shape, output_shape: Shape, structure: Any) -> None:
        self.layer, self.input_shape, self.output_shape, self.structure = layer, input_shape, output_shape, structure

    def __str__(self) -> str:
        return type(self.layer).__name__


# Takes the input and the leaves of the layer's parameters. It has no rules for derivatives or for vmap: the layer of a
# derivative or of a batch of layers is another function, so tracing one fails.
layer_call = Primitive("lsrs_layer")
layer_call.def_abstract_eval(lambda x, *_, call: x.update(shape=(x.shape[0], *call.output_shape)))


class Step(NamedTuple):
    """One call of a layer that the output depends on."""

    call: Call
    params: PyTree
    reads: Codes  # what the layer reads, in the order of its input
    first: int  # code of the first entry of its output; the others follow


class Program(NamedTuple):
    """A network: its layers in the order of their calls, and what its output reads.

    Node 0 is the input of the network, node k the output of step k − 1.
    """

    steps: tuple[Step, ...]
    output: Codes
    output_shape: Shape

    def nodes(self, codes: Codes) -> Codes:
        """The node of each entry."""
        return np.searchsorted([0, *(step.first for step in self.steps)], codes, "right") - 1


class _Entries(NamedTuple):
    """A value of moved entries: code · batch + row of each."""

    ids: Int[np.ndarray, "..."]


class _Fixed(NamedTuple):
    """A value that does not depend on the input; it is computed when something needs it."""

    get: Callable[[], Any]


class _Refused(NamedTuple):
    """A value that no accepted operation computes: an error only if the output depends on it."""

    why: str


_Value = _Entries | _Fixed | _Refused


def follow(
    traced: ClosedJaxpr, variables: Sequence[Any], input_shape: Shape, batch: int, classes: Mapping[str, str]
) -> Program:
    """The `Program` of a trace of a function (*variables, x[batch, *input_shape]) -> one array.

    `classes` maps the name of a submodule to its class, for messages. Raises UserError, which names the operation, if
    the output depends on the input through anything but layers and moves of entries; if an entry is used twice; or if
    a row of the output depends on another row of the input.
    """
    walk = _Walk(batch, classes)
    inputs = [*(_Fixed(lambda leaf=leaf: leaf) for leaf in variables), walk.new(input_shape)]
    out = walk.run(traced.jaxpr, [_Fixed(lambda c=c: c) for c in traced.consts], inputs, ())[0]
    if isinstance(out, _Refused):
        raise UserError(out.why)
    codes = walk.row(out.ids) if isinstance(out, _Entries) else np.zeros(0, np.int32)
    if codes is None:
        raise UserError(_mixed("the output of the module"))
    if not isinstance(out, _Entries) or not codes.size:
        raise UserError("the output of the module does not depend on its input")
    program = _needed(Program(tuple(walk.steps), codes, out.ids.shape[1:]))
    _check_used_once(program, walk.size)
    return program


def _mixed(reader: str) -> str:
    return f"{reader} mixes or moves the rows of the batch; the first axis must stay the batch, every row treated alike"


def _needed(program: Program) -> Program:
    """The program without the steps that its output does not depend on."""
    needed, waiting = set[int](), [program.output]
    while waiting:
        found = set(program.nodes(waiting.pop()).tolist()) - needed
        needed |= found
        waiting += [program.steps[node - 1].reads for node in found if node]
    return program._replace(steps=tuple(step for node, step in enumerate(program.steps, 1) if node in needed))


def _check_used_once(program: Program, size: int) -> None:
    readers = [*((f"layer {index} {step.call}", step.reads) for index, step in enumerate(program.steps))]
    readers.append(("the output", program.output))
    owner = np.full(size, -1)
    for index, (name, reads) in enumerate(readers):
        taken = reads[owner[reads] >= 0]
        if taken.size:
            node, other = int(program.nodes(taken[0])), readers[owner[taken[0]]][0]
            where = f"the output of {readers[node - 1][0]}" if node else "the input"
            raise UserError(
                f"{other} and {name} both read an entry of {where}, which may be used once only: {ACCEPTED}"
            )
        owner[reads] = index


class _Walk:
    """Runs a trace on codes."""

    def __init__(self, batch: int, classes: Mapping[str, str]) -> None:
        self._batch, self._classes = batch, classes
        self.steps: list[Step] = []
        self.size = 0  # number of codes

    def new(self, shape: Shape) -> _Entries:
        """A value of new entries."""
        first, self.size = self.size, self.size + int(np.prod(shape, dtype=np.int64))
        if self.size * self._batch >= 2**31:
            raise UserError("the network has too many values between its layers: at most 2**29 entries")
        codes = np.arange(first, self.size, dtype=np.int32)
        return _Entries((codes * self._batch + np.arange(self._batch, dtype=np.int32)[:, None]).reshape(-1, *shape))

    def row(self, ids: Int[np.ndarray, "..."]) -> Codes | None:
        """The codes of a row, if the first axis is the batch and all rows have the same codes."""
        if ids.ndim == 0 or len(ids) != self._batch:
            return None
        codes, rows = np.divmod(ids.reshape(self._batch, -1), self._batch)
        same = (rows == np.arange(self._batch)[:, None]).all() and (codes == codes[0]).all()
        return codes[0] if same else None

    def run(self, jaxpr: Any, consts: Sequence[_Value], inputs: Sequence[_Value], where: Names) -> list[_Value]:
        """The outputs of a program; `where` names the functions around it."""
        values = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> _Value:
            return _Fixed(lambda: atom.val) if isinstance(atom, Literal) else values[atom]

        for equation in jaxpr.eqns:
            found = self._equation(equation, [read(atom) for atom in equation.invars], where)
            values.update(zip(equation.outvars, found, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[_Value], where: Names) -> Sequence[_Value]:
        name, params, count = equation.primitive.name, equation.params, len(equation.outvars)
        if name in CALLS:
            inner = params[CALLS[name]]  # a closed program carries its constants, an open one has none
            consts = [_Fixed(lambda c=c: c) for c in getattr(inner, "consts", ())]
            names = (*where, *_scopes(equation), str(params.get("name", "")))
            return self.run(getattr(inner, "jaxpr", inner), consts, inputs, names)
        if all(isinstance(value, _Fixed) for value in inputs):
            return _fixed(equation, inputs)
        if name in _SAME:
            return inputs
        refused = [value for value in inputs if isinstance(value, _Refused)]
        if refused:
            return refused[:1] * count
        if equation.primitive is layer_call:
            return [self._layer(params["call"], inputs)]
        described = self._describe(equation, where)
        if name == "convert_element_type":
            old, new = equation.invars[0].aval.dtype, params["new_dtype"]
            exact = jnp.issubdtype(new, jnp.floating) and np.can_cast(old, new, "safe")
            why = f"{described} casts {old} to {new}, and only casts to wider floats keep all digits: {ACCEPTED}"
            return inputs if exact else [_Refused(why)]
        if name in MOVES or name in _INDEXED:
            return self._move(equation, inputs, described)
        return [_Refused(f"{described} has no proven Lipschitz constant: {ACCEPTED}")] * count

    def _describe(self, equation: Any, where: Names) -> str:
        """The name of an operation and of the modules and functions that it is in."""
        names = [name for name in (*where, *_scopes(equation)) if name]
        names = [name for index, name in enumerate(names) if name not in names[:index]]
        known = self._classes.get(names[-1], names[-1]) if names else ""
        own = f" ({known})" if names and known != names[-1] else ""
        return f"the operation {equation.primitive.name}{' in ' * bool(names)}{'/'.join(names)}{own}"

    def _layer(self, call: Call, inputs: Sequence[_Value]) -> _Value:
        x, leaves = inputs[0], inputs[1:]
        if not isinstance(x, _Entries) or not all(isinstance(leaf, _Fixed) for leaf in leaves):
            return _Refused(f"the parameters of the layer {call} depend on the input of the module")
        reads = self.row(x.ids)
        if reads is None:
            return _Refused(_mixed(f"the input of the layer {call}"))
        params = call.structure.unflatten([_value(leaf, f"the parameters of the layer {call}") for leaf in leaves])
        self.steps.append(Step(call, params, reads, self.size))
        return self.new(call.output_shape)

    def _move(self, equation: Any, inputs: Sequence[_Value], described: str) -> Sequence[_Value]:
        name, params = equation.primitive.name, equation.params
        data, others = (inputs, ()) if name in _JOINING else (inputs[:1], inputs[1:])
        if not all(isinstance(value, _Entries) for value in data):
            return [_Refused(f"{described} has values that do not depend on the input: {ACCEPTED}")]
        if not all(isinstance(value, _Fixed) for value in others):
            return [_Refused(f"{described} picks entries by numbers that depend on the input: {ACCEPTED}")]
        ids = [value.ids for value in data if isinstance(value, _Entries)]
        if name in MOVES:
            found = MOVES[name](*ids, **params)
        else:
            numbers = [_value(value, f"the indices of {described}") for value in others]
            filled = {"fill_value": -1} if params.get("fill_value", None) is not None else {}
            found = [np.asarray(equation.primitive.bind(*ids, *numbers, **params | filled))]
        if name not in (*_JOINING, "gather", "broadcast_in_dim"):
            return [_Entries(part) for part in found]
        if found[0].min(initial=0) < 0 or np.unique(found[0]).size < found[0].size:
            return [_Refused(f"{described} reads an entry twice, or one that does not exist: {ACCEPTED}")]
        return [_Entries(found[0])]


def _scopes(equation: Any) -> list[str]:
    """The names of the modules in which an operation was traced."""
    return str(getattr(getattr(equation, "source_info", None), "name_stack", "")).split("/")


def _fixed(equation: Any, inputs: Sequence[Any]) -> list[_Value]:
    @functools.cache
    def outputs() -> Any:
        found = equation.primitive.bind(*(value.get() for value in inputs), **equation.params)
        return found if equation.primitive.multiple_results else [found]

    return [_Fixed(lambda index=index: outputs()[index]) for index in range(len(equation.outvars))]


def _value(value: Any, what: str) -> Any:
    try:
        return value.get()
    except Exception as error:  # whatever the operations of the module raise
        raise UserError(f"{what} cannot be computed before the network runs: {reason(error)}") from error
