"""ATen operations as JAX functions: convolution, normalisation, pooling, resizing and attention (see `aten`)."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax.pytorch.aten import Table, register
from lsrs_jax.runtime.errors import UserError

OPERATIONS: Table = {}


def _each(value: Any, count: int) -> list[int]:
    """A setting per spatial axis; torch gives one number for all of them as a list of one."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * count if len(values) == 1 else values


def _channels(vector: Any, ndim: int) -> Any:
    """A vector over the channels, to be combined with ``(B, C, …)``."""
    return jnp.reshape(vector, (1, -1, *[1] * (ndim - 2)))


# --------------------------------------------------------------------------------------------------------- convolution


@register(OPERATIONS, "convolution.default")
def convolution(
    x: Any, weights: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, extra: Any, groups: int
) -> Any:
    """`extra` is the output padding of a transposed convolution."""
    spatial = weights.ndim - 2
    if x.ndim != weights.ndim or spatial not in (1, 2, 3):
        raise UserError(f"the importer knows convolutions of (B, C, ...) over 1 to 3 axes, got {x.shape}")
    stride, padding, dilation = (_each(value, spatial) for value in (stride, padding, dilation))
    pads, lhs_dilation = [(size, size) for size in padding], [1] * spatial
    if transposed:
        weights = _swap_channels(weights, groups)
        reach = [step * (size - 1) for step, size in zip(dilation, weights.shape[2:], strict=True)]
        settings = zip(reach, padding, _each(extra, spatial), strict=True)
        pads = [(far - near, far - near + more) for far, near, more in settings]
        stride, lhs_dilation = lhs_dilation, stride
    letters = "DHW"[3 - spatial :]
    numbers = (f"NC{letters}", f"OI{letters}", f"NC{letters}")
    y = jax.lax.conv_general_dilated(
        x, weights, stride, pads, lhs_dilation, dilation, numbers, feature_group_count=groups
    )
    return y if bias is None else y + _channels(bias, y.ndim)


def _swap_channels(weights: Any, groups: int) -> Any:
    """The kernel ``(in, out/groups, …)`` of a transposed convolution as that of the convolution it is."""
    size = weights.shape[2:]
    grouped = weights.reshape(groups, -1, *weights.shape[1:])
    swapped = jnp.swapaxes(grouped, 1, 2).reshape(-1, grouped.shape[1], *size)
    return jnp.flip(swapped, tuple(range(2, weights.ndim)))


# -------------------------------------------------------------------------------------------------------- normalisation


@register(OPERATIONS, "_native_batch_norm_legit_no_training.default")
def batch_norm(x: Any, weight: Any, bias: Any, mean: Any, variance: Any, momentum: Any, epsilon: float) -> Any:
    """Batch norm with stored statistics: one scale and one shift per channel."""
    scale = jax.lax.rsqrt(variance + epsilon)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return (x * _channels(scale, x.ndim) + _channels(shift, x.ndim),)


@register(OPERATIONS, "_native_batch_norm_legit.no_stats")
def instance_norm(x: Any, weight: Any, bias: Any, training: bool, momentum: Any, epsilon: float) -> Any:
    """Instance norm as torch calls it: a batch of one, whose channels are those of all images."""
    if x.shape[0] != 1:
        raise UserError("the module normalises with statistics of the batch: use a batch norm with running statistics")
    y = _standardized(x, tuple(range(2, x.ndim)), epsilon)
    y = y if weight is None else y * _channels(weight, x.ndim)
    return (y if bias is None else y + _channels(bias, x.ndim),)


@register(OPERATIONS, "native_layer_norm.default")
def layer_norm(x: Any, shape: Any, weight: Any, bias: Any, epsilon: float) -> Any:
    y = _standardized(x, tuple(range(-len(shape), 0)), epsilon)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias,)


@register(OPERATIONS, "native_group_norm.default")
def group_norm(
    x: Any, weight: Any, bias: Any, rows: int, channels: int, positions: int, groups: int, epsilon: float
) -> Any:
    y = _standardized(x.reshape(x.shape[0], groups, -1), (2,), epsilon).reshape(x.shape)
    y = y if weight is None else y * _channels(weight, x.ndim)
    return (y if bias is None else y + _channels(bias, x.ndim),)


def _standardized(x: Any, axes: tuple[int, ...], epsilon: float) -> Any:
    centred = x - jnp.mean(x, axes, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axes, keepdims=True) + epsilon)


# -------------------------------------------------------------------------------------------------------------- pooling


class _Windows:
    """The windows of a pooling over the last axes of a tensor, as torch places them."""

    def __init__(self, x: Any, size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> None:
        count = len(size) if isinstance(size, list | tuple) and len(size) > 1 else min(x.ndim - 2, 2)
        self.sizes, self.space = _each(size, count), x.shape[x.ndim - count :]
        self.strides = _each(stride, count) if stride else self.sizes
        self.padding, self.dilation = _each(padding, count), _each(dilation, count)
        axes = zip(self.space, self.sizes, self.strides, self.padding, self.dilation, strict=True)
        self.counts, self.pads = zip(*(self._axis(*axis, ceil_mode) for axis in axes), strict=True)

    @staticmethod
    def _axis(length: int, size: int, stride: int, pad: int, dilation: int, ceil_mode: bool) -> tuple[int, Any]:
        """The number of windows along an axis, and what is padded before and after it."""
        reach = dilation * (size - 1) + 1
        free = length + 2 * pad - reach
        count = (-(-free // stride) if ceil_mode else free // stride) + 1
        if ceil_mode and (count - 1) * stride >= length + pad:  # a window must not begin in the padding on the right
            count -= 1
        return count, (pad, max(pad, (count - 1) * stride + reach - length - pad))

    def reduce(self, x: Any, initial: Any, function: Any) -> Any:
        lead = x.ndim - len(self.sizes)
        ones = (1,) * lead
        return jax.lax.reduce_window(
            x, initial, function, (*ones, *self.sizes), (*ones, *self.strides), (*[(0, 0)] * lead, *self.pads),
            window_dilation=(*ones, *self.dilation),
        )  # fmt: skip

    def is_whole(self) -> bool:
        """Whether one window covers everything."""
        return tuple(self.sizes) == tuple(self.space) and not any(self.padding)

    def members(self, include_padding: bool) -> np.ndarray:
        """The number by which the sum of each window is divided."""
        total: Any = 1
        for axis, length in enumerate(self.space):
            starts = np.arange(self.counts[axis]) * self.strides[axis] - self.padding[axis]
            ends = np.minimum(starts + self.sizes[axis], length + self.padding[axis])
            if not include_padding:
                starts, ends = np.maximum(starts, 0), np.minimum(ends, length)
            total = np.multiply.outer(total, ends - starts)
        return np.asarray(total, np.float32)


@register(OPERATIONS, "max_pool2d_with_indices.default")
def max_pool_with_indices(
    x: Any, size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Any:
    return (max_pool(x, size, stride, padding, dilation, ceil_mode),)


@register(OPERATIONS, "max_pool1d.default", "max_pool2d.default")
def max_pool(x: Any, size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False) -> Any:
    windows = _Windows(x, size, stride, padding, dilation, ceil_mode)
    return windows.reduce(x, -jnp.inf, jax.lax.max)


@register(OPERATIONS, "avg_pool1d.default", "avg_pool2d.default")
def avg_pool(
    x: Any,
    size: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    include_padding: bool = True,
    divisor: int | None = None,
) -> Any:
    windows = _Windows(x, size, stride, padding, 1, ceil_mode)
    if windows.is_whole() and divisor is None:
        return jnp.mean(x, tuple(range(-len(windows.sizes), 0)), keepdims=True)
    return windows.reduce(x, 0.0, jax.lax.add) / (windows.members(include_padding) if divisor is None else divisor)


@register(OPERATIONS, "_adaptive_avg_pool2d.default", "adaptive_avg_pool2d.default", "adaptive_avg_pool1d.default")
def adaptive_avg_pool(x: Any, size: Any) -> Any:
    return _adaptive(x, size, jnp.mean)


@register(OPERATIONS, "adaptive_max_pool2d.default", "adaptive_max_pool1d.default")
def adaptive_max_pool(x: Any, size: Any) -> Any:
    return (_adaptive(x, size, jnp.max),)


def _adaptive(x: Any, size: Any, reduce: Callable[..., Any]) -> Any:
    """Along each axis, one part per output; parts overlap where the sizes do not divide."""
    for axis, count in enumerate(size, start=x.ndim - len(size)):
        length = x.shape[axis]
        bounds = [(number * length // count, -(-(number + 1) * length // count)) for number in range(count)]
        parts = [reduce(jax.lax.slice_in_dim(x, *pair, axis=axis), axis, keepdims=True) for pair in bounds]
        x = jnp.concatenate(parts, axis)
    return x


# ------------------------------------------------------------------------------------------------------------- resizing


@register(OPERATIONS, "upsample_nearest2d.vec")
def upsample_nearest_by(x: Any, size: Any, factors: Any) -> Any:
    return upsample_nearest(x, *_sizes(x, size, factors))


@register(OPERATIONS, "upsample_nearest2d.default")
def upsample_nearest(x: Any, size: Any, *factors: float | None) -> Any:
    for axis, count, factor in _resized(x, size, factors):
        scale = np.float32(1 / factor if factor else x.shape[axis] / count)
        chosen = np.minimum((np.arange(count, dtype=np.float32) * scale).astype(np.int32), x.shape[axis] - 1)
        x = jnp.take(x, chosen, axis=axis)
    return x


@register(OPERATIONS, "upsample_bilinear2d.vec")
def upsample_bilinear_by(x: Any, size: Any, align_corners: bool, factors: Any) -> Any:
    size, *each = _sizes(x, size, factors)
    return upsample_bilinear(x, size, align_corners, *each)


@register(OPERATIONS, "upsample_bilinear2d.default")
def upsample_bilinear(x: Any, size: Any, align_corners: bool, *factors: float | None) -> Any:
    for axis, count, factor in _resized(x, size, factors):
        length = x.shape[axis]
        if align_corners:
            places = np.arange(count, dtype=np.float32) * np.float32((length - 1) / max(count - 1, 1))
        else:
            scale = np.float32(1 / factor if factor else length / count)
            places = np.maximum(scale * (np.arange(count, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
        before = np.minimum(places.astype(np.int32), length - 1)
        after = np.minimum(before + 1, length - 1)
        share = (places - before).reshape(-1, *[1] * (x.ndim - 1 - axis))
        x = jnp.take(x, before, axis=axis) * (1 - share) + jnp.take(x, after, axis=axis) * share
    return x


def _sizes(x: Any, size: Any, factors: Any) -> tuple[Any, ...]:
    """The size of the result, and the factor per axis, of which the caller gave one."""
    if size is not None:
        return (size, *[None] * len(size))
    lengths = x.shape[x.ndim - len(factors) :]
    return ([math.floor(length * factor) for length, factor in zip(lengths, factors, strict=True)], *factors)


def _resized(x: Any, size: Any, factors: Any) -> Any:
    factors = factors or [None] * len(size)
    return zip(range(x.ndim - len(size), x.ndim), size, factors, strict=True)


# ------------------------------------------------------------------------------------------------------------ attention


@register(OPERATIONS, "_scaled_dot_product_flash_attention_for_cpu.default")
def flash_attention(
    queries: Any, keys: Any, values: Any, dropout: float = 0.0, is_causal: bool = False, *, attn_mask: Any = None,
    scale: float | None = None,
) -> Any:  # fmt: skip
    if dropout:
        raise UserError("dropout is active in an attention: call module.eval() first")
    scale = 1 / math.sqrt(queries.shape[-1]) if scale is None else scale
    scores = (queries * scale) @ jnp.swapaxes(keys, -1, -2)
    if is_causal:
        scores = jnp.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -jnp.inf)
    return (jax.nn.softmax(scores if attn_mask is None else scores + attn_mask, axis=-1) @ values,)
