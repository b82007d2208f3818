"""The registry of orthogonal convolution families. To add one, write a file here and enter it in `FAMILIES`."""

import collections
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lsrs_jax.orthogonal.families import adaptive, cayley, exponential, paraunitary
from lsrs_jax.orthogonal.families.family import ConvFamily
from lsrs_jax.orthogonal.shape import ConvShape
from lsrs_jax.runtime.validate import choice

FAMILIES: dict[str, ConvFamily] = {
    "adaptive": adaptive.FAMILY,
    "paraunitary": paraunitary.FAMILY,
    "exponential": exponential.FAMILY,
    "cayley": cayley.FAMILY,
}

__all__ = ["FAMILIES", "ConvFamily", "build_kernels", "family"]

# The intermediate matrices of a kernel take about forty times the memory of its raw parameters. For kernels with more
# raw numbers than this (3x3 and about 290 channels), the backward pass computes them again instead of storing them.
_STORED_NUMBERS = 2**18


def family(method: str) -> ConvFamily:
    """The family called `method`; raises UserError for an unknown name."""
    choice("convolution method", method, sorted(FAMILIES))
    return FAMILIES[method]


def build_kernels(convolutions: Sequence[tuple[str, ConvShape, PyTree]]) -> list[PyTree]:
    """Builds the kernels of many convolutions ``(method, shape, raw)`` from their raw parameters, differentiable.

    Returns what ``build(raw, shape)`` of each family returns. One ``vmap`` builds all convolutions of the same method
    and shape: on an accelerator, a stack of small matrix products takes no longer than one of them. Convolutions whose
    family extends them to the same larger shape (`ConvFamily.extend`) are stacked too.
    """
    extended = [family(method).extend(raw, shape) for method, shape, raw in convolutions]
    groups = collections.defaultdict(list)
    for index, (method, _, _) in enumerate(convolutions):
        groups[method, extended[index][1]].append(index)
    kernels: list[Any] = [None] * len(convolutions)
    for (method, common), members in groups.items():
        shapes = [convolutions[index][1] for index in members]
        raws = [extended[index][0] for index in members]
        if len(set(shapes)) == 1:
            common, raws = shapes[0], [convolutions[index][2] for index in members]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *raws)
        build = jax.vmap(lambda raw, method=method, shape=common: family(method).build(raw, shape))
        if sum(leaf.size for leaf in jax.tree.leaves(raws[0])) > _STORED_NUMBERS:
            build = jax.checkpoint(build)
        built = build(stacked)
        for position, (index, shape) in enumerate(zip(members, shapes, strict=True)):
            own = jax.tree.map(lambda leaf, position=position: leaf[position], built)
            kernels[index] = own if shape == common else own[..., : shape.c_in, : shape.c_out]
    return kernels
