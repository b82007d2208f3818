"""Builds all kernels of a network, with one batched computation per family and shape."""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lsrs_jax.orthogonal.families import family
from lsrs_jax.orthogonal.shape import ConvShape

# The intermediate matrices of a kernel take about forty times the memory of its raw parameters. From this many raw
# numbers per kernel on (3x3 and about 290 channels), the backward pass computes them again instead of storing them.
_STORED_NUMBERS = 2**18


def build_kernels(convolutions: Sequence[tuple[str, ConvShape, PyTree]]) -> list[PyTree]:
    """Builds the kernels of many convolutions ``(method, shape, raw)`` from their raw parameters, differentiable.

    Returns what ``build(raw, shape)`` of each family returns. Convolutions of one method and shape are stacked and
    built by one ``vmap``: on an accelerator one small matrix product takes as long as a stack of them. A family may
    build convolutions of different shapes as parts of one larger kernel (its ``widened``); they are stacked too.
    """
    widened = [family(method).widened(raw, shape) for method, shape, raw in convolutions]
    groups = collections.defaultdict(list)
    for index, (method, _, _) in enumerate(convolutions):
        groups[method, widened[index][1]].append(index)
    built: list[Any] = [None] * len(convolutions)
    for (method, common), members in groups.items():
        shapes = [convolutions[index][1] for index in members]
        raws = [widened[index][0] for index in members]
        if len(set(shapes)) == 1:
            common, raws = shapes[0], [convolutions[index][2] for index in members]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *raws)
        plain = _builder(method, common, stacked)(stacked)
        for position, (index, shape) in enumerate(zip(members, shapes, strict=True)):
            own = jax.tree.map(lambda leaf, position=position: leaf[position], plain)
            built[index] = own if shape == common else own[..., : shape.c_in, : shape.c_out]
    return built


def _builder(method: str, shape: ConvShape, stacked: PyTree) -> Callable[[PyTree], PyTree]:
    leaves = jax.tree.leaves(stacked)
    batched = jax.vmap(lambda raw: family(method).build(raw, shape))
    numbers = sum(leaf.size for leaf in leaves) / leaves[0].shape[0]
    return jax.checkpoint(batched) if numbers > _STORED_NUMBERS else batched
