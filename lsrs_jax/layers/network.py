"""Proves a Lipschitz constant of a network written by its user with the layers of this package, in Linen or NNX.

The network is traced once, with each call of a layer as one operation. What certification runs is not the network's
own code but the program that the trace shows: the layers in float64, and between them the entries that each of them
reads. So the function that is proven and the function that runs are the same.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from lsrs_jax.layers.base import Layer, Plain, Shape
from lsrs_jax.layers.linear import Encoder
from lsrs_jax.layers.lipschitz import LayerBound, LipschitzReport, Materialized, materialize_layer
from lsrs_jax.layers.program import Call, Codes, Program, follow, layer_call
from lsrs_jax.runtime.errors import UserError, reason
from lsrs_jax.runtime.validate import is_whole, refuse_masked

_BATCHES = (2, 3)  # more than one row, to see whether rows mix; two sizes, to see whether the program depends on them
_LEAST = Fraction(1, 2**200)  # stands for the constant 0, by which nothing can be divided
# JAX keeps the traces of inner functions; in this context it neither finds those of other calls nor leaves its own.
_tracing = jax.make_user_context(None)


def lipschitz_report(module: Any, variables: PyTree, input_shape: Sequence[int]) -> LipschitzReport:
    """The proven Lipschitz constant of a network, and that of each of its layers: `materialize_network` without it."""
    return materialize_network(module, variables, input_shape).report


def materialize_network(module: Any, variables: PyTree, input_shape: Sequence[int]) -> Materialized:
    """Turns a network of `lsrs_jax.layers` and its parameters into a `Materialized`.

    Args:
      module: a Linen module, or an NNX module with the layers in ``nnx.bridge.ToNNX``. Its layers may be called several
        times, also the same one, and in any order. Between them it may reshape, transpose, flip and slice, pick entries
        by fixed numbers, and concatenate disjoint parts; casts to a wider type change nothing.
      variables: of a Linen module (or their ``params`` collection); None for an NNX module, which holds its own.
      input_shape: of one input, without the batch axis. ``apply`` refuses inputs of another shape.

    The report has one line for each call of a layer on which the output depends, in the order of the calls. In a chain,
    σ_max of a line is that of its layer. In a network with branches it is the factor by which the call raises the
    largest constant of all values that are still needed; so the product is the largest constant of the output's parts.

    Raises:
      UserError: for anything else between the layers, by its name; for an entry that is used twice, such as in
        ``concatenate([x, layer(x)])``; for a module that mixes the rows of its batch, returns anything but one array or
        depends on the size of the batch; and for what `lipschitz.materialize` refuses.

    **Guarantee**: ``apply`` is ``constant``-Lipschitz. Row by row it computes what the module computes in exact
    arithmetic on batches of 2 and 3.

    *Proof.* Every entry, of the input or of a layer's output, is used at most once. So after each call the values that
    are still needed are disjoint blocks b. With c_b = 1 for the input, Σ_b ‖Δ_b‖²/c_b² ≤ ‖Δx‖² holds before the first
    call, and every call keeps it: one that reads from the blocks B replaces what it reads by a block with
    ‖Δ‖²/(σ·max_B c)² ≤ Σ_B ‖Δ_b‖²/c_b², whose c is σ·max_B c. So M, the largest c of the blocks that are needed, bounds
    the constant, and the report has the factors by which M grows. Measured in the norm √Σ_b ‖·‖²/c_b², a call adds at
    most offset/c to the norm of the values and ``rounding`` · (norm + error + offset/c) to their error. Times M, these
    are the terms of `LipschitzReport.rounding`, because the line has the offset · M/c.
    """
    shape = tuple(input_shape)
    if not shape or not all(is_whole(size) and size >= 1 for size in shape):
        raise UserError(f"input_shape must be the shape of one input, without the batch, got {input_shape}")
    function, leaves, name = _function(module, variables)
    refuse_masked("the parameters of the network", leaves)
    program, other = (_trace(function, leaves, name, shape, batch) for batch in _BATCHES)
    if not _same(program, other):
        raise UserError(f"{name} is another function for batches of {_BATCHES[0]} and of {_BATCHES[1]}")
    names = [f"{index} {step.call}" for index, step in enumerate(program.steps)]
    plains = [
        materialize_layer(name, step.call.layer, step.params, step.call.input_shape)
        for name, step in zip(names, program.steps, strict=True)
    ]
    report = LipschitzReport(tuple(_bounds(program, names, plains)), shape, program.output_shape)
    readers = [_reader(program, shape, step.reads, step.call.input_shape) for step in program.steps]
    read_output = _reader(program, shape, program.output, program.output_shape)

    def apply(params: PyTree, x: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        if x.shape[1:] != shape:
            raise UserError(f"this encoder was materialized for inputs {shape}, got {x.shape[1:]}")
        nodes = [x.reshape(x.shape[0], -1)]
        for plain, values, read in zip(plains, params, readers, strict=True):
            y = plain.apply(values, read(nodes))
            nodes.append(y.reshape(y.shape[0], -1))
        return read_output(nodes)

    return Materialized(apply, tuple(plain.params for plain in plains), report)


def _function(module: Any, variables: PyTree) -> tuple[Callable[[Any, Any], Any], list[Any], str]:
    """A function (leaves, x) -> what the module returns; the leaves of its variables; and the name of its class."""
    name = type(module).__name__
    if isinstance(module, nn.Module):
        if not isinstance(variables, dict) and not hasattr(variables, "items"):
            raise UserError(f"{name} needs its variables, a mapping, got {type(variables).__name__}")
        variables = variables if "params" in variables or not variables else {"params": variables}
        leaves, structure = jax.tree.flatten(variables)
        return lambda leaves, x: module.apply(structure.unflatten(leaves), x), leaves, name
    from flax import nnx

    if not isinstance(module, nnx.Module):
        raise UserError(f"a proven constant needs a module of Linen or NNX, got {name}")
    if variables is not None:
        raise UserError(f"{name} is a module of NNX, which holds its variables: pass None for them")
    definition, state = nnx.split(module)
    leaves, structure = jax.tree.flatten(state)
    # A copy, because a module may change its state only in the trace that it belongs to.
    return lambda leaves, x: nnx.merge(definition, structure.unflatten(leaves))(x), leaves, name  # pyright: ignore[reportCallIssue]


class _Marker:
    """A Flax interceptor that makes one operation of each call of a layer."""

    def __init__(self) -> None:
        self.classes: dict[str, str] = {}  # name of a module -> its class
        self._asking = False  # whether a layer is computing its output shape, for which it may call itself

    def __call__(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module, method = context.module, context.method_name
        if isinstance(module, Encoder) and method == "_build":
            return {}  # every layer builds its own
        if self._asking or method != "__call__":
            return call(*args, **kwargs)
        if not isinstance(module, Layer):
            self.classes[module.name or ""] = type(module).__name__
            return call(*args, **kwargs)
        name = type(module).__name__
        given = [value for value in (*args, *kwargs.values()) if value is not None]
        if len(given) != 1 or not getattr(given[0], "ndim", 0):
            raise UserError(f"the layer {name} is called with more than one batch of inputs")
        x, layer = jnp.asarray(given[0]), module.clone(parent=None)
        self._asking = True
        try:
            output_shape = tuple(layer.output_shape(x.shape[1:]))
        finally:
            self._asking = False
        params = module.variables.get("params", {}) if module.scope is not None else {}
        leaves, structure = jax.tree.flatten(params)
        return layer_call.bind(x, *leaves, call=Call(layer, x.shape[1:], output_shape, structure))


def _trace(function: Callable[..., Any], leaves: list[Any], name: str, shape: Shape, batch: int) -> Program:
    x, marker = jax.ShapeDtypeStruct((batch, *shape), jnp.float32), _Marker()
    try:
        with _tracing(object()), nn.intercept_methods(marker):
            traced, out = jax.make_jaxpr(function, return_shape=True)(leaves, x)
    except UserError:
        raise
    except Exception as error:  # whatever the module raises
        raise UserError(f"{name} cannot be traced for inputs {x.shape}: {reason(error)}") from error
    if not isinstance(out, jax.ShapeDtypeStruct):
        kind = type(out).__name__
        raise UserError(f"{name} must return one array, whose constant is to be proven, got {kind}")
    return follow(traced, leaves, shape, batch, marker.classes)


def _same(first: Program, second: Program) -> bool:
    """Whether two programs are equal."""
    if len(first.steps) != len(second.steps) or first.output_shape != second.output_shape:
        return False
    pairs = [(first.output, second.output)]
    for one, two in zip(first.steps, second.steps, strict=True):
        if repr(one.call.layer) != repr(two.call.layer) or one.call.input_shape != two.call.input_shape:
            return False
        pairs += [(one.reads, two.reads), *zip(*map(jax.tree.leaves, (one.params, two.params)), strict=True)]
    return all(np.array_equal(one, two, equal_nan=True) for one, two in pairs)


def _bounds(program: Program, names: list[str], plains: list[Plain]) -> Iterator[LayerBound]:
    """The lines of the report, by the rule that `materialize_network` proves."""
    read = [set(program.nodes(step.reads).tolist()) for step in program.steps]
    read.append(set(program.nodes(program.output).tolist()))
    last = {node: index for index, nodes in enumerate(read) for node in nodes}  # the last call that needs each node
    constants, largest = [Fraction(1)], Fraction(1)
    for index, (name, plain) in enumerate(zip(names, plains, strict=True)):
        if not (0 <= plain.sigma_max < math.inf and 0 <= plain.offset < math.inf):
            raise UserError(f"layer {name} of the encoder has no finite Lipschitz constant")
        own = max(Fraction(plain.sigma_max), _LEAST) * max(constants[node] for node in read[index])
        constants.append(own)
        before, largest = largest, max(constants[node] for node in range(index + 2) if last[node] > index)
        factor, offset = _up(largest / before), _up(Fraction(plain.offset) * largest / own)
        note = "" if factor == plain.sigma_max else f"; σ_max {plain.sigma_max:.6g} in its branch"
        least = min(plain.sigma_min, factor)
        yield LayerBound(name, factor, least, plain.proof + note, plain.rounding, offset)


def _up(number: Fraction) -> float:
    """The number as a float, rounded up."""
    nearest = float(number)
    return nearest if nearest >= number else math.nextafter(nearest, math.inf)


def _reader(program: Program, shape: Shape, codes: Codes, target: Shape) -> Callable[[list[Array]], Array]:
    """A function from the flat values of all nodes to those with these codes, in the shape of `target`."""
    firsts = [0, *(step.first for step in program.steps)]
    sizes = [math.prod(shape), *(math.prod(step.call.output_shape) for step in program.steps)]
    owners = program.nodes(codes)
    nodes = np.unique(owners)
    starts = np.cumsum([0, *(sizes[node] for node in nodes)])  # of the nodes, one after the other
    places = (codes - np.asarray(firsts)[owners] + starts[np.searchsorted(nodes, owners)]).astype(np.int32)
    in_order = np.array_equal(places, np.arange(starts[-1]))

    def read(values: list[Array]) -> Array:
        flat = jnp.concatenate([values[node] for node in nodes], axis=1) if len(nodes) > 1 else values[nodes[0]]
        if not in_order:
            flat = flat.at[:, places].get(mode="promise_in_bounds", unique_indices=True)
        return flat.reshape(flat.shape[0], *target)

    return read
