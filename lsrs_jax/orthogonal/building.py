"""All kernels of a network in one batched computation per family and shape."""

import collections

import jax
import jax.numpy as jnp

from lsrs_jax.orthogonal.families import family

# The intermediate matrices of a kernel take some forty times the room of its raw parameters; from this many raw
# numbers per kernel on (3x3 and some 140 channels) they are computed again in the backward pass instead of stored.
_STORED_NUMBERS = 2**16


def build_kernels(convolutions):
    """Raw parameters → plain forms of many convolutions.

    Args:
      convolutions: a list of ``(method, shape, raw)``, `shape` a `ConvShape`.

    Returns:
      the list of what each family's ``build(raw, shape)`` gives; differentiable. Convolutions of one method and shape
      are stacked and built by one ``vmap``.
    """
    groups = collections.defaultdict(list)
    for index, (method, shape, _) in enumerate(convolutions):
        groups[method, shape].append(index)
    built = [None] * len(convolutions)
    for (method, shape), members in groups.items():
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(convolutions[index][2] for index in members))
        plain = _builder(method, shape, stacked)(stacked)
        for position, index in enumerate(members):
            built[index] = jax.tree.map(lambda leaf, position=position: leaf[position], plain)
    return built


def _builder(method, shape, stacked):
    build, members = family(method).build, jax.tree.leaves(stacked)[0].shape[0]
    numbers = sum(leaf.size for leaf in jax.tree.leaves(stacked)) / members
    batched = jax.vmap(lambda raw: build(raw, shape))
    return jax.checkpoint(batched) if numbers > _STORED_NUMBERS else batched
