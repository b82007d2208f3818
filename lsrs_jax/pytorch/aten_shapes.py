"""ATen operations as JAX functions: reshapes, indexing, joining, padding, new tensors and conversions (see `aten`)."""

from typing import Any

import jax
import jax.numpy as jnp

from lsrs_jax.pytorch.aten import Table, register
from lsrs_jax.runtime.errors import UserError

OPERATIONS: Table = {}


# ------------------------------------------------------------------------------------------------------------- reshapes


@register(OPERATIONS, "view.default", "reshape.default", "_unsafe_view.default", "_reshape_copy.default")
def view(x: Any, size: Any) -> Any:
    return jnp.reshape(x, tuple(size))


@register(OPERATIONS, "flatten.using_ints")
def flatten(x: Any, start: int = 0, end: int = -1) -> Any:
    start, end = start % x.ndim, end % x.ndim
    return jnp.reshape(x, (*x.shape[:start], -1, *x.shape[end + 1 :]))


@register(OPERATIONS, "permute.default")
def permute(x: Any, dims: Any) -> Any:
    return jnp.transpose(x, dims)


@register(OPERATIONS, "transpose.int")
def transpose(x: Any, first: int, second: int) -> Any:
    return jnp.swapaxes(x, first, second)


@register(OPERATIONS, "t.default")
def t(x: Any) -> Any:
    return x.T


@register(OPERATIONS, "unsqueeze.default")
def unsqueeze(x: Any, dim: int) -> Any:
    return jnp.expand_dims(x, dim)


@register(OPERATIONS, "squeeze.dim", "squeeze.dims")
def squeeze(x: Any, dims: Any) -> Any:
    dims = dims if isinstance(dims, list) else [dims]
    return jnp.squeeze(x, tuple(dim for dim in dims if x.shape[dim] == 1))


@register(OPERATIONS, "expand.default")
def expand(x: Any, size: Any, implicit: bool = False) -> Any:
    known = (1,) * (len(size) - x.ndim) + x.shape
    return jnp.broadcast_to(x, tuple(old if new == -1 else new for old, new in zip(known, size, strict=True)))


@register(OPERATIONS, "repeat.default")
def repeat(x: Any, repeats: Any) -> Any:
    return jnp.tile(x, tuple(repeats))


@register(OPERATIONS, "clone.default", "contiguous.default", "alias.default", "detach.default")
@register(OPERATIONS, "lift_fresh_copy.default", "lift_fresh.default")
def same(x: Any) -> Any:
    return x


# ---------------------------------------------------------------------------------------------------- parts and indices


@register(OPERATIONS, "slice.Tensor", "slice_copy.Tensor")
def part(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    return x[_along(x, dim, slice(start, end, step))]


def _along(x: Any, dim: int, index: Any) -> tuple[Any, ...]:
    return (*[slice(None)] * (dim % x.ndim), index)


@register(OPERATIONS, "select.int", "select_copy.int")
def select(x: Any, dim: int, index: int) -> Any:
    return x[_along(x, dim, index)]


@register(OPERATIONS, "slice_scatter.default")
def put_part(x: Any, source: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    return x.at[_along(x, dim, slice(start, end, step))].set(source)


@register(OPERATIONS, "select_scatter.default")
def put_selected(x: Any, source: Any, dim: int, index: int) -> Any:
    return x.at[_along(x, dim, index)].set(source)


@register(OPERATIONS, "copy.default")
def copy(x: Any, source: Any, non_blocking: bool = False) -> Any:
    return jnp.broadcast_to(source, x.shape).astype(x.dtype)


@register(OPERATIONS, "split.Tensor")
def split(x: Any, size: int, dim: int = 0) -> Any:
    return tuple(part(x, dim, start, start + size) for start in range(0, x.shape[dim], size))


@register(OPERATIONS, "split_with_sizes.default")
def split_with_sizes(x: Any, sizes: Any, dim: int = 0) -> Any:
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return tuple(part(x, dim, end - size, end) for size, end in zip(sizes, ends, strict=True))


@register(OPERATIONS, "unbind.int")
def unbind(x: Any, dim: int = 0) -> Any:
    return tuple(select(x, dim, index) for index in range(x.shape[dim]))


@register(OPERATIONS, "index.Tensor")
def index(x: Any, indices: Any) -> Any:
    # torch fails at an index that is too large; a NaN is refused by the sampler.
    return x.at[tuple(slice(None) if one is None else one for one in indices)].get(mode="fill")


@register(OPERATIONS, "index_select.default")
def index_select(x: Any, dim: int, chosen: Any) -> Any:
    return jnp.take(x, chosen, axis=dim, mode="fill")


@register(OPERATIONS, "gather.default")
def gather(x: Any, dim: int, chosen: Any, sparse_grad: bool = False) -> Any:
    if any(x.shape[other] != chosen.shape[other] for other in range(x.ndim) if other != dim % x.ndim):
        raise UserError("the importer knows gather only for indices that cover the other axes")
    return jnp.take_along_axis(x, chosen, axis=dim, mode="fill")


@register(OPERATIONS, "embedding.default")
def embedding(weights: Any, indices: Any, *_: Any) -> Any:
    return jnp.take(weights, jnp.where(indices < 0, len(weights), indices), axis=0, mode="fill")


@register(OPERATIONS, "unfold.default")
def unfold(x: Any, dim: int, size: int, step: int) -> Any:
    starts = range(0, x.shape[dim] - size + 1, step)
    windows = jnp.stack([part(x, dim, start, start + size) for start in starts], axis=dim % x.ndim)
    return jnp.moveaxis(windows, dim % x.ndim + 1, -1)


# -------------------------------------------------------------------------------------------------- joining and padding


@register(OPERATIONS, "cat.default")
def cat(parts: Any, dim: int = 0) -> Any:
    return jnp.concatenate(parts, axis=dim)


@register(OPERATIONS, "stack.default")
def stack(parts: Any, dim: int = 0) -> Any:
    return jnp.stack(parts, axis=dim)


@register(OPERATIONS, "constant_pad_nd.default")
def pad(x: Any, widths: Any, value: Any = 0) -> Any:
    pairs = [(widths[number], widths[number + 1], 0) for number in range(0, len(widths), 2)]
    before = [(0, 0, 0)] * (x.ndim - len(pairs))
    return jax.lax.pad(x, jnp.asarray(value, x.dtype), (*before, *reversed(pairs)))


@register(OPERATIONS, "reflection_pad1d.default", "reflection_pad2d.default")
def reflection_pad(x: Any, widths: Any) -> Any:
    return jnp.pad(x, _pairs(x, widths), mode="reflect")


@register(OPERATIONS, "replication_pad1d.default", "replication_pad2d.default")
def replication_pad(x: Any, widths: Any) -> Any:
    return jnp.pad(x, _pairs(x, widths), mode="edge")


def _pairs(x: Any, widths: Any) -> list[tuple[int, int]]:
    pairs = [(widths[number], widths[number + 1]) for number in range(0, len(widths), 2)]
    return [(0, 0)] * (x.ndim - len(pairs)) + pairs[::-1]


@register(OPERATIONS, "flip.default")
def flip(x: Any, dims: Any) -> Any:
    return jnp.flip(x, tuple(dims))


@register(OPERATIONS, "roll.default")
def roll(x: Any, shifts: Any, dims: Any = None) -> Any:
    return jnp.roll(x, tuple(shifts), tuple(dims)) if dims else jnp.roll(x, shifts[0])


# --------------------------------------------------------------------------------------------- new tensors, conversions


@register(OPERATIONS, "full.default")
def full(size: Any, value: Any, *, dtype: Any = None) -> Any:
    return jnp.full(tuple(size), value, dtype)


@register(OPERATIONS, "full_like.default")
def full_like(x: Any, value: Any, *, dtype: Any = None) -> Any:
    return jnp.full_like(x, value, dtype=dtype)


@register(OPERATIONS, "new_full.default")
def new_full(x: Any, size: Any, value: Any, *, dtype: Any = None) -> Any:
    return jnp.full(tuple(size), value, dtype or x.dtype)


@register(OPERATIONS, "zeros.default")
def zeros(size: Any, *, dtype: Any = None) -> Any:
    return jnp.zeros(tuple(size), dtype)


@register(OPERATIONS, "ones.default")
def ones(size: Any, *, dtype: Any = None) -> Any:
    return jnp.ones(tuple(size), dtype)


@register(OPERATIONS, "new_zeros.default")
def new_zeros(x: Any, size: Any, *, dtype: Any = None) -> Any:
    return jnp.zeros(tuple(size), dtype or x.dtype)


@register(OPERATIONS, "new_ones.default")
def new_ones(x: Any, size: Any, *, dtype: Any = None) -> Any:
    return jnp.ones(tuple(size), dtype or x.dtype)


@register(OPERATIONS, "zeros_like.default")
def zeros_like(x: Any, *, dtype: Any = None) -> Any:
    return jnp.zeros_like(x, dtype=dtype)


@register(OPERATIONS, "ones_like.default")
def ones_like(x: Any, *, dtype: Any = None) -> Any:
    return jnp.ones_like(x, dtype=dtype)


@register(OPERATIONS, "scalar_tensor.default")
def scalar_tensor(value: Any, *, dtype: Any = None) -> Any:
    return jnp.asarray(value, dtype)


@register(OPERATIONS, "arange.default", "arange.start", "arange.start_step")
def arange(*bounds: Any, dtype: Any = None) -> Any:
    return jnp.arange(*bounds, dtype=dtype)


@register(OPERATIONS, "_to_copy.default", "to.dtype")
def convert(x: Any, *_: Any, dtype: Any = None, **__: Any) -> Any:
    return x if dtype is None else x.astype(dtype)


@register(OPERATIONS, "sym_size.int")
def size_of(x: Any, dim: int) -> int:
    return x.shape[dim]


@register(OPERATIONS, "_assert_tensor_metadata.default")
def no_check(*_: Any, **__: Any) -> None:
    """What torch asserts here, the importer compares itself for every tensor."""


@register(OPERATIONS, "_assert_scalar.default")
def check_sizes(condition: Any, message: str = "") -> None:
    if not condition:
        raise UserError(f"the module does not accept this batch: {message}")
