"""The operations of JAX that only move the entries of arrays, in NumPy."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def _broadcast(x: np.ndarray, *, shape: Any, broadcast_dimensions: Any, **_: Any) -> list[np.ndarray]:
    new = [axis for axis in range(len(shape)) if axis not in broadcast_dimensions]
    return [np.broadcast_to(np.expand_dims(x, new), shape)]


def _reshape(x: np.ndarray, *, new_sizes: Any, dimensions: Any = None, **_: Any) -> list[np.ndarray]:
    return [np.reshape(x if dimensions is None else np.transpose(x, dimensions), new_sizes)]


def _slice(x: np.ndarray, *, start_indices: Any, limit_indices: Any, strides: Any) -> list[np.ndarray]:
    return [x[tuple(map(slice, start_indices, limit_indices, strides or (1,) * x.ndim))]]


# Primitive of JAX -> its results, from its operands and parameters. `broadcast_in_dim` alone repeats entries.
MOVES: dict[str, Callable[..., Sequence[np.ndarray]]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda *parts, dimension: [np.concatenate(parts, dimension)],
    "reshape": _reshape,
    "rev": lambda x, *, dimensions: [np.flip(x, dimensions)],
    "slice": _slice,
    "split": lambda x, *, sizes, axis: np.split(x, np.cumsum(sizes)[:-1], axis),
    "squeeze": lambda x, *, dimensions: [np.squeeze(x, dimensions)],
    "stack": lambda *parts, axis: [np.stack(parts, axis)],
    "transpose": lambda x, *, permutation: [np.transpose(x, permutation)],
    "unstack": lambda x, *, axis: list(np.moveaxis(x, axis, 0)),
}
