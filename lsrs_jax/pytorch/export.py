"""Exports a PyTorch module to a graph of ATen operations, and translates the graph for `importer`."""

import contextlib
import io
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lsrs_jax.pytorch import aten, aten_layers, aten_shapes
from lsrs_jax.runtime.errors import UserError, first_line, out_of_memory
from lsrs_jax.runtime.validate import array

OPERATIONS = aten.OPERATIONS | aten_shapes.OPERATIONS | aten_layers.OPERATIONS
# Composite operations that stay whole: their parts would overflow, or have no gradient, at large arguments.
_WHOLE = ("softplus", "mish", "hardswish", "hardsigmoid", "silu", "gelu", "elu", "leaky_relu", "hardtanh", "relu6")
# Python's functions of sizes.
_SIZES = {
    operator.mul, operator.add, operator.sub, operator.floordiv, operator.mod, operator.truediv, operator.neg,
    operator.pow, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_,
    operator.or_,
}  # fmt: skip
_TORCH_SIZES: dict[str, Callable[..., Any]] = {
    "sym_max": max, "sym_min": min, "sym_sum": sum, "sym_float": float, "sym_int": int, "sym_not": operator.not_,
}  # fmt: skip
_STORAGE = ("device", "layout", "memory_format", "pin_memory", "non_blocking")  # arguments that change no number
_DTYPES = {
    "float32": np.float32, "bool": np.bool_, "int64": np.int32, "int32": np.int32, "int16": np.int16, "int8": np.int8,
    "uint8": np.uint8,
}  # fmt: skip
_RANDOM = re.compile(r"rand|dropout|bernoulli|multinomial|normal_|normal\.|poisson|exponential|uniform")
_OTHERWISE = "use torch_callback, which runs any module"


def example(torch: Any, module: Any, given: Any) -> Any:
    """The example of the caller as a float32 tensor of at least two rows, on the device of the module."""
    x = given.detach() if isinstance(given, torch.Tensor) else torch.as_tensor(np.array(array("example_input", given)))
    if x.ndim < 2 or not x.numel() or not x.dtype.is_floating_point:
        found = f"{str(x.dtype).removeprefix('torch.')}{tuple(x.shape)}"
        raise UserError(f"example_input must be a batch (B, ...) of floating point numbers, got {found}")
    tensors = [*module.parameters(), *module.buffers()]
    x = x.to(tensors[0].device if tensors else "cpu", torch.float32)
    return x if len(x) > 1 else torch.cat([x, x])  # torch takes a size of 1 for a fixed one


class Graph:
    """The exported program of a module, functional and of core ATen operations.

    `params`, `tensors`, `names` and `num_classes` are those of `importer.Imported`.
    """

    def __init__(self, torch: Any, program: Any) -> None:
        self.nodes = list(program.graph.nodes)
        self._values = {node.name: node.meta.get("val") for node in self.nodes}
        self.params: dict[str, dict[str, np.ndarray]] = {"parameters": {}, "buffers": {}}
        self.tensors: dict[str, tuple[str, str]] = {}
        self.names = self._name_inputs(torch, program), self._name_logits(program)
        self._batch = self._values[self.names[0]].shape[0]
        logits = self._values[self.names[1]]
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or str(logits.shape[0]) != str(self._batch):
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise UserError(f"the module must return logits (B, K) for a batch of B, got {found}")
        self.num_classes = int(logits.shape[1])

    def _name_inputs(self, torch: Any, program: Any) -> str:
        """Collects the tensors that the graph reads; returns the name of the input."""
        used = {node.name for node in self.nodes if node.op == "placeholder" and node.users}
        stored, inputs = {**program.constants, **program.state_dict}, []
        for spec in program.graph_signature.input_specs:
            name, kind = spec.arg.name, spec.kind.name
            if kind == "USER_INPUT":
                inputs.append(name)
            elif name in used:
                group = "parameters" if kind == "PARAMETER" else "buffers"
                self.tensors[name] = group, spec.target
                self.params[group][spec.target] = _to_numpy(torch, spec.target, stored[spec.target])
        if len(inputs) != 1:
            raise UserError(f"the module must take one tensor, not {len(inputs)}")
        return inputs[0]

    def _name_logits(self, program: Any) -> str:
        outputs = program.graph_signature.output_specs
        changed = [spec.target for spec in outputs if "MUTATION" in spec.kind.name]
        if changed:
            raise UserError(f"the module changes {changed[0]!r} while it runs, so its rows can depend on earlier ones")
        if len(outputs) != 1 or not hasattr(outputs[0].arg, "name"):
            raise UserError(f"the module must return one tensor of logits (B, K), it returns {len(outputs)} values")
        return outputs[0].arg.name

    def shape(self, name: str, batch: int) -> tuple[tuple[int, ...], Any] | None:
        """Shape and dtype that torch derived for a tensor, with this size of the batch."""
        value = self._values[name]
        if not hasattr(value, "shape"):
            return None
        symbol = self._batch.node.expr
        sizes = (s if isinstance(s, int) else int(s.node.expr.subs({symbol: batch})) for s in value.shape)
        return tuple(sizes), np.dtype(_DTYPES[_name_of(value.dtype)])


def export(torch: Any, module: Any, x: Any) -> Graph:
    """Exports a module for batches of any size. Raises UserError for what cannot be exported or is not float32."""
    try:
        with _quiet(torch), torch.no_grad():
            sizes = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(module, (x,), dynamic_shapes=sizes, strict=False)
            table = torch.export.default_decompositions()
            for name in _WHOLE:
                table.pop(getattr(torch.ops.aten, name).default, None)
            program = program.run_decompositions(table)
    except Exception as error:  # whatever the module or torch.export raises
        if out_of_memory(error):
            raise
        raise UserError(f"{_why(error)}; {_OTHERWISE}") from error
    _check_operations(torch, program)
    return Graph(torch, program)


@contextlib.contextmanager
def _quiet(torch: Any) -> Iterator[None]:
    """Without warnings about torch's own code, and without the listings that it logs before an error."""
    logger = logging.getLogger("torch")
    loggers = [logger, *(each for name, each in logging.root.manager.loggerDict.items() if name.startswith("torch."))]
    found = [each for each in loggers if isinstance(each, logging.Logger) and not each.disabled]
    for each in found:
        each.disabled = True
    try:
        # torch prints the graph to stderr where control flow depends on values.
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for each in found:
            each.disabled = False


def _why(error: Exception) -> str:
    text = f"{type(error).__name__} {error}"
    if "data-dependent" in text or "DataDependent" in text:
        return "the module's control flow or shapes depend on the values of its input: only a fixed graph is imported"
    if "Constraints violated" in text or "specialized" in text:
        return "the module accepts only its example's batch size (write x.shape[0] or -1 instead of a number)"
    return f"torch.export cannot export the module: {first_line(error)}"


def _check_operations(torch: Any, program: Any) -> None:
    """Raises UserError for operations that are unknown, random, data-dependent or of another precision."""
    calls = [node for node in program.graph.nodes if node.op not in ("placeholder", "output")]
    unknown = sorted({_target(node) for node in calls if _function(torch, node) is None})
    random = [name for name in unknown if _RANDOM.search(name)]
    if random:
        why = "draws random numbers (active dropout?)"
        raise UserError(f"the module {why}, also in eval mode: {', '.join(random)}; a classifier must be deterministic")
    if any(_depends_on_values(node.meta.get("val")) for node in calls):
        raise UserError(f"the module's shapes or control flow depend on the values of its input; {_OTHERWISE}")
    if unknown:
        raise UserError(f"the importer does not know these operations: {', '.join(unknown)}; {_OTHERWISE}")
    for node in program.graph.nodes:
        values = node.meta.get("val")
        for value in values if isinstance(values, list | tuple) else [values]:
            if isinstance(value, torch.Tensor) and node.users and _name_of(value.dtype) not in _DTYPES:
                what = f"{_name_of(value.dtype)} at {node.name}"
                raise UserError(f"the importer computes in float32, the module has {what}: call module.float() first")


def _depends_on_values(values: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return any(
        value is not None and free_unbacked_symbols(value)
        for value in (values if isinstance(values, list | tuple) else [values])
    )


def steps(torch: Any, graph: Graph, value: Callable[[str], Any]) -> Iterator[tuple[Any, ...]]:
    """The fields of `importer.Step` for every operation of a graph; `value` marks results of earlier steps."""

    def translated(argument: Any) -> Any:
        if isinstance(argument, torch.fx.Node):
            return value(argument.name)
        if isinstance(argument, torch.dtype):
            return np.dtype(_DTYPES[_name_of(argument)])
        if isinstance(argument, list | tuple):
            return [translated(inner) for inner in argument]
        return argument

    for node in graph.nodes:
        if node.op == "call_function":
            kwargs = {key: translated(each) for key, each in node.kwargs.items() if key not in _STORAGE}
            known = graph.shape(node.name, 1)
            dtype = known[1] if known else None
            yield node.name, _target(node), _function(torch, node), translated(node.args), kwargs, dtype


def _function(torch: Any, node: Any) -> Any:
    """The function of JAX or Python for a node, or None."""
    if node.target is operator.getitem:
        return _result
    if node.target in _SIZES:
        return node.target
    for name, function in _TORCH_SIZES.items():
        if node.target is getattr(torch, name, None):
            return function
    return OPERATIONS.get(_target(node)) if node.op == "call_function" else None


def _result(results: Any, number: int) -> Any:
    if number >= len(results):
        raise UserError(f"the module uses result {number} of an operation of which the importer knows {len(results)}")
    return results[number]


def _target(node: Any) -> str:
    """The name of a node's operation."""
    return str(node.target) if "." in str(node.target) else getattr(node.target, "__name__", str(node.target))


def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _to_numpy(torch: Any, name: str, tensor: Any) -> np.ndarray:
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"the module holds {name!r}, a {type(tensor).__name__} that is no tensor; {_OTHERWISE}")
    kind = _name_of(tensor.dtype)
    if kind not in _DTYPES:
        raise UserError(f"the importer computes in float32, but {name!r} is {kind}: call module.float() first")
    found = tensor.detach().cpu().numpy()
    converted = found.astype(_DTYPES[kind])
    if not np.array_equal(found, converted, equal_nan=found.dtype.kind == "f"):
        raise UserError(f"{name!r} holds whole numbers beyond 32 bits; {_OTHERWISE}")
    return converted
