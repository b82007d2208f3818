"""Activations over the last axis that preserve the norm of gradients."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lsrs_jax.orthogonal.matrix import highest_precision
from lsrs_jax.orthogonal.shape import Features, check_float
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.validate import is_whole


def maxmin(x: Features) -> Features:
    """Sorts pairs (c, c + C//2): all maxima come first, then all minima (Anil, Lucas and Grosse 2019).

    **Guarantee**: 1-Lipschitz, and an isometry wherever it is differentiable (its Jacobian is a permutation). The
    last channel of an odd number passes through unchanged.
    """
    half = x.shape[-1] // 2
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b), rest], axis=-1)


def group_sort(x: Features, size: int) -> Features:
    """Sorts groups of `size` channels (c, c + C//size, …), largest first (Anil, Lucas and Grosse 2019).

    ``size=2`` is `maxmin`. Channels beyond a multiple of `size` pass through unchanged.

    **Guarantee**: 1-Lipschitz, and an isometry wherever it is differentiable (its Jacobian is a permutation).
    """
    if not is_whole(size) or size < 2:
        raise UserError(f"group_sort needs groups of at least 2 channels, a whole number, got {size!r}")
    if size == 2:
        return maxmin(x)
    groups = x.shape[-1] // size
    sorted_part = x[..., : groups * size].reshape(*x.shape[:-1], size, groups)
    sorted_part = jnp.flip(jnp.sort(sorted_part, axis=-2), axis=-2).reshape(*x.shape[:-1], groups * size)
    return jnp.concatenate([sorted_part, x[..., groups * size :]], axis=-1)


@highest_precision
def householder(x: Features, theta: Float[Array, " channels//2"]) -> Features:
    """Reflects each pair (a, b) = (c, c + C//2) with a·sin(θ/2) < b·cos(θ/2) into the other half plane.

    The reflection is I − 2vvᵀ with v = (sin θ/2, −cos θ/2) (Singla, Singla and Feizi 2021). With θ = π/2 it is
    `maxmin`. The last channel of an odd number passes through unchanged.

    **Guarantee**: 1-Lipschitz for every θ, and an isometry wherever it is differentiable: both branches are orthogonal
    and agree on the line between them.
    """
    check_float(x, "householder")
    half = x.shape[-1] // 2
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    theta = theta.astype(x.dtype)
    cos, sin = jnp.cos(theta), jnp.sin(theta)
    kept = a * jnp.sin(theta / 2) >= b * jnp.cos(theta / 2)
    first, second = jnp.where(kept, a, cos * a + sin * b), jnp.where(kept, b, sin * a - cos * b)
    return jnp.concatenate([first, second, rest], axis=-1)
