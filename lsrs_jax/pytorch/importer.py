"""A PyTorch module as a JAX function: the ATen graph of `torch.export`, run with the operations of `aten`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax.pytorch import export
from lsrs_jax.pytorch.library import check_module, load_torch
from lsrs_jax.runtime.errors import UserError, first_line

_AGREE = 1e-3  # how far logits may differ when they are compared, as a share of the largest: a fault moves them more
Params = Mapping[str, Mapping[str, Any]]


class Value(NamedTuple):
    """In the arguments of a step: the result of an earlier step."""

    name: str


class Step(NamedTuple):
    """One operation of the graph."""

    name: str
    target: str  # the operation in torch, for messages
    function: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    dtype: Any  # of a tensor that results, else None


@dataclasses.dataclass(frozen=True, eq=False)
class Imported:
    """A classifier of PyTorch as a JAX function ``(B, *input_shape)`` float32 → logits ``(B, K)`` float32.

    It can be differentiated and transformed as any JAX function; call it inside `jax.jit`. It is made by `from_torch`,
    and needs no PyTorch afterwards.

    Attributes:
      params: ``{"parameters": {name: array}, "buffers": {name: array}}``, NumPy arrays under the names of the
        state_dict. Buffers are running statistics, and tensors that the module has made itself.
      input_shape: shape of one input as the caller passes it, without the batch.
      num_classes: K.
      layout: ``"NCHW"`` or ``"NHWC"``: what the caller passes.
    """

    params: Params
    input_shape: tuple[int, ...]
    num_classes: int
    layout: str
    steps: tuple[Step, ...] = dataclasses.field(repr=False)
    tensors: Mapping[str, tuple[str, str]] = dataclasses.field(repr=False)  # name in the graph → keys of `params`
    names: tuple[str, str] = dataclasses.field(repr=False)  # of the input and of the logits in the graph

    def __call__(self, x: Any) -> jax.Array:
        """Logits ``(B, K)`` of inputs ``(B, *input_shape)`` with the parameters of the module."""
        return self.apply(self.params, x)

    def apply(self, params: Any, x: Any) -> jax.Array:
        """Logits ``(B, K)`` with other parameters of the same structure; buffers get no gradient."""
        return self._run(params, x, None)

    def _run(self, params: Any, x: Any, seen: Callable[[Step, Any], None] | None) -> jax.Array:
        x = jnp.asarray(x, jnp.float32)
        if x.shape[1:] != self.input_shape:
            raise UserError(f"this network takes inputs of shape (B, {_listed(self.input_shape)}), got {x.shape}")
        values: dict[str, Any] = {self.names[0]: jnp.transpose(x, (0, 3, 1, 2)) if self.layout == "NHWC" else x}
        for name, (kind, key) in self.tensors.items():
            tensor = jnp.asarray(params[kind][key])
            values[name] = jax.lax.stop_gradient(tensor) if kind == "buffers" else tensor
        for step in self.steps:
            args, kwargs = _filled(step.args, values), _filled(step.kwargs, values)
            result = step.function(*args, **kwargs)
            if step.dtype is not None and getattr(result, "dtype", step.dtype) != step.dtype:
                result = result.astype(step.dtype)  # under jax_enable_x64, Python's numbers widen others
            values[step.name] = result
            if seen is not None:
                seen(step, result)
        return values[self.names[1]]


def from_torch(module: Any, example_input: Any, *, layout: str = "NCHW") -> Imported:
    """Makes a JAX function of a PyTorch classifier, through `torch.export`.

    Args:
      module: a `torch.nn.Module` in eval mode and float32, that returns one tensor of logits ``(B, K)``.
      example_input: a batch as the module takes it, so images as ``(B, C, H, W)``: a tensor or an array. The shape
        without the batch is fixed afterwards; the batch is free. Of the values, only the size matters: logits are
        compared on them, with noise.
      layout: what the caller of the result passes: ``"NCHW"``, as the module takes it, or ``"NHWC"``, which is
        transposed once at the start.

    Whole numbers of 64 bits have 32 bits in JAX.

    Returns an `Imported`. Raises UserError for a module that cannot be imported: in training mode; with control flow
    that depends on the values; with a batch that cannot be dynamic; with random operations; in another precision; or
    with operations that the importer does not know, which are all named. `torch_callback` takes these modules.

    **Guarantee**: every tensor of the graph has the shape and type that PyTorch derives, for a batch of another size
    than the example, and the logits of the example with noise agree with PyTorch's to 0.1 % of the largest; otherwise
    the module is refused. Rounding differs, so the classifier certified is the JAX function, not the module.
    """
    torch = load_torch("from_torch")
    check_module(torch, module, layout)
    x = export.example(torch, module, example_input)
    if layout == "NHWC" and x.ndim != 4:
        raise UserError(f'layout="NHWC" is for images, given as (B, C, H, W) in the example; got {tuple(x.shape)}')
    graph = export.export(torch, module, x)
    batch, *shape = x.shape
    imported = Imported(
        graph.params,
        (*shape[1:], shape[0]) if layout == "NHWC" else tuple(shape),
        graph.num_classes,
        layout,
        tuple(Step(*step) for step in export.steps(torch, graph, Value)),
        graph.tensors,
        graph.names,
    )
    _check_shapes(imported, graph, batch + 1)
    _check_logits(torch, imported, module, x)
    return imported


def _listed(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


def _filled(argument: Any, values: Mapping[str, Any]) -> Any:
    """An argument of a step with results in place of their names."""
    if isinstance(argument, Value):
        return values[argument.name]
    if isinstance(argument, list | tuple):
        return type(argument)(_filled(inner, values) for inner in argument)
    if isinstance(argument, dict):
        return {key: _filled(inner, values) for key, inner in argument.items()}
    return argument


def _check_shapes(imported: Imported, graph: Any, batch: int) -> None:
    """Traces the function for a batch, and compares every tensor with what torch derived."""
    done: list[Step] = []

    def compare(step: Step, result: Any) -> None:
        expected = graph.shape(step.name, batch)
        if expected is not None and (getattr(result, "shape", None), getattr(result, "dtype", None)) != expected:
            found = f"{getattr(result, 'dtype', type(result).__name__)}{getattr(result, 'shape', '')}"
            wanted = f"{expected[1]}{expected[0]}"
            raise UserError(f"the importer's {step.target} returns {found} where torch says {wanted}")
        done.append(step)

    inputs = jax.ShapeDtypeStruct((batch, *imported.input_shape), jnp.float32)
    try:
        jax.eval_shape(lambda params, x: imported._run(params, x, compare), imported.params, inputs)
    except UserError:
        raise
    except Exception as error:  # whatever JAX raises for arguments that an operation here does not take
        failed = imported.steps[len(done)].target if len(done) < len(imported.steps) else "the module"
        message = f"the importer cannot run {failed} with its arguments in this module: {first_line(error)}"
        raise UserError(f"{message}; use torch_callback") from error


def _check_logits(torch: Any, imported: Imported, module: Any, x: Any) -> None:
    """Compares the logits of the example with noise, as the sampler will add it."""
    noise = np.random.default_rng(0).standard_normal(tuple(x.shape)).astype(np.float32)
    x = x + torch.from_numpy(noise).to(x.device)
    try:
        with torch.inference_mode():
            expected = module(x).cpu().numpy()
    except Exception as error:  # whatever the module raises
        raise UserError(f"the module fails on its example with noise: {first_line(error)}") from error
    images = x.cpu().numpy()
    images = images.transpose(0, 2, 3, 1) if imported.layout == "NHWC" else images
    with jax.default_matmul_precision("highest"):
        found = np.asarray(jax.jit(imported.apply)(imported.params, images))
    difference, largest = np.abs(found - expected).max(), np.abs(expected).max()
    if not difference <= _AGREE * largest and not np.array_equal(found, expected, equal_nan=True):
        raise UserError(
            f"the imported function differs from the module by {difference:.2g} on noisy inputs, whose largest logit "
            f"is {largest:.2g}; use torch_callback"
        )
