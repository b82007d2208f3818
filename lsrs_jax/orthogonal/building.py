"""All kernels of a network in one batched computation per family and shape."""

import collections

import jax
import jax.numpy as jnp

from lsrs_jax.orthogonal.families import family

# The intermediate matrices of a kernel take some forty times the room of its raw parameters; from this many raw
# numbers per kernel on (3x3 and some 290 channels) they are computed again in the backward pass instead of stored.
_STORED_NUMBERS = 2**18


def build_kernels(convolutions):
    """Raw parameters → plain forms of many convolutions.

    Args:
      convolutions: a list of ``(method, shape, raw)``, `shape` a `ConvShape`.

    Returns:
      the list of what each family's ``build(raw, shape)`` gives; differentiable. Convolutions of one method and shape
      are stacked and built by one ``vmap``, and those that are parts of one shape with them: on an accelerator a small
      matrix product takes as long as a stack of them.
    """
    widened = [family(method).widened(raw, shape) for method, shape, raw in convolutions]
    groups = collections.defaultdict(list)
    for index, (method, _, _) in enumerate(convolutions):
        groups[method, widened[index][1]].append(index)
    built = [None] * len(convolutions)
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


def _builder(method, shape, stacked):
    build, members = family(method).build, jax.tree.leaves(stacked)[0].shape[0]
    numbers = sum(leaf.size for leaf in jax.tree.leaves(stacked)) / members
    batched = jax.vmap(lambda raw: build(raw, shape))
    return jax.checkpoint(batched) if numbers > _STORED_NUMBERS else batched
