"""Tries a head before it is sampled: the shape of its logits, NaN, and rows that depend on each other."""

import functools
import hashlib
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lsrs_jax.runtime.errors import UserError, first_line
from lsrs_jax.runtime.rng import domain_key

_SCALES = (0.01, 1.0, 100.0, 0.0, 1.0, 1.0)  # of the companions among which a row is tried


class Head(Protocol):
    """Any function latents → logits whose rows are independent and deterministic."""

    def __call__(self, latents: Float[Array, "batch *latent"], /) -> Float[Array, "batch classes"]: ...


# A batch takes up to 8 GiB: each is drawn on the device where it is used, one at a time.
@functools.partial(jax.jit, static_argnums=1)
def _normals(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32)


@functools.partial(jax.jit, static_argnums=4)
def _around(row: jax.Array, position: int, key: jax.Array, scale: float, shape: tuple[int, ...]) -> jax.Array:
    """A batch with `row` at `position`, among normals of this scale."""
    return (scale * jax.random.normal(key, shape, jnp.float32)).at[position].set(row)


def check_head(head: Head, shape: tuple[int, ...]) -> tuple[int, str]:
    """Runs a head on random latents ``(rows, *latent)``; returns the number of classes, and a digest of the logits.

    Raises:
      UserError: for a head that returns anything but ``(rows, K ≥ 2)`` logits, NaN logits, or logits of a row that
        depend on the other rows. Random companions are tried: they reveal batch statistics over the whole batch or over
        groups, not every imaginable coupling.
    """
    out = _output(head, shape)
    compiled = jax.jit(lambda latents: head(latents))  # traced anew: JAX may remember the head from another context
    key, rng = domain_key(0, "probe"), np.random.default_rng(0)
    tolerance = 0.05 if out.dtype in (jnp.bfloat16, jnp.float16) else 1e-4

    def logits(latents: jax.Array) -> np.ndarray:
        found = compiled(latents)
        check_logits(found.shape, out.shape)
        return np.asarray(found, np.float32)

    latents, (chosen, positions) = _normals(key, shape), rng.integers(shape[0], size=(2, len(_SCALES)))
    found, moving = logits(latents), latents[chosen]
    del latents
    if np.isnan(found).any():
        raise UserError("the head returns NaN logits; a NaN never certifies")
    turns = zip(found[chosen], moving, positions, _SCALES, strict=True)
    for number, (alone, row, position, scale) in enumerate(turns, start=1):
        # One row moves to a random position, among companions that it has not met before.
        second = logits(_around(row, position, jax.random.fold_in(key, number), scale, shape))[position]
        infinite = np.isinf(alone) & (second == alone)  # a masked class
        before, after = np.where(infinite, 0, alone), np.where(infinite, 0, second)
        if not (np.abs(after - before) <= tolerance * (1 + np.abs(before))).all():
            raise UserError(
                "the head's rows depend on each other (batch statistics?): each row must be a function of its own "
                "latent alone; evaluate normalisation with stored statistics"
            )
    return out.shape[1], hashlib.sha256(found.tobytes()).hexdigest()


def _output(head: Head, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the logits."""
    try:
        out = jax.eval_shape(head, jax.ShapeDtypeStruct(shape, jnp.float32))
    except Exception as error:  # whatever the caller's function raises
        raise UserError(
            "the head must be a function latents -> logits (for a Flax module: lambda z: net.apply(variables, z)) "
            f"and does not accept latents {shape}: {first_line(error)}"
        ) from error
    real = hasattr(out, "dtype") and not jnp.issubdtype(out.dtype, jnp.complexfloating)
    if not real or len(out.shape) != 2 or out.shape[0] != shape[0] or out.shape[1] < 2:
        raise UserError(f"the head must return logits (B, K >= 2) for latents {shape}, got {out}")
    return out


def check_logits(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """A head is traced several times; raises UserError unless it returns logits of the same shape each time."""
    if shape != expected:
        raise UserError(
            f"the head returned logits of shape {shape} after {expected[1]} classes before: it must always have the "
            "same classes"
        )
