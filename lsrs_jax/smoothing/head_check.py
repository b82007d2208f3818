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

_SCALES = (0.01, 1.0, 100.0, 0.0, 1.0, 1.0)  # of the random rows that surround the row under test


class Head(Protocol):
    """Any function latents → logits whose rows are independent and deterministic."""

    def __call__(self, latents: Float[Array, "batch *latent"], /) -> Float[Array, "batch classes"]: ...


# A batch takes up to 8 GiB, so each is drawn on the device that uses it, one at a time.
@functools.partial(jax.jit, static_argnums=1)
def _normals(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32)


@functools.partial(jax.jit, static_argnums=4)
def _around(row: jax.Array, position: int, key: jax.Array, scale: float, shape: tuple[int, ...]) -> jax.Array:
    """A batch with `row` at `position`, among normals of this scale."""
    return (scale * jax.random.normal(key, shape, jnp.float32)).at[position].set(row)


def check_head(head: Head, shape: tuple[int, ...]) -> tuple[int, str]:
    """Runs a head on random latents ``(rows, *latent)``; returns the number of classes and a digest of the logits.

    Raises UserError for a head that returns anything but ``(rows, K ≥ 2)`` logits, NaN logits, or logits of a row that
    depend on the other rows. The other rows are random: this reveals statistics over the whole batch or over groups,
    but not every possible dependence.
    """
    try:
        out = jax.eval_shape(head, jax.ShapeDtypeStruct(shape, jnp.float32))
    except Exception as error:  # whatever the caller's function raises
        expected = "a function latents -> logits (for a Flax module: lambda z: net.apply(variables, z))"
        why = f"it does not accept latents {shape}: {first_line(error)}"
        raise UserError(f"the head must be {expected}; {why}") from error
    real = hasattr(out, "dtype") and not jnp.issubdtype(out.dtype, jnp.complexfloating)
    if not real or len(out.shape) != 2 or out.shape[0] != shape[0] or out.shape[1] < 2:
        raise UserError(f"the head must return logits (B, K >= 2) for latents {shape}, got {out}")
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
    for number, position in enumerate(positions):
        # Moves one row to a random position in a batch of new rows.
        batch = _around(moving[number], position, jax.random.fold_in(key, number + 1), _SCALES[number], shape)
        before, after = found[chosen[number]], logits(batch)[position]
        masked = np.isinf(before) & (before == after)  # a head may mask a class with an infinite logit
        before, after = np.where(masked, 0, before), np.where(masked, 0, after)
        if not (np.abs(after - before) <= tolerance * (1 + np.abs(before))).all():
            remedy = "a row may depend on its own latent alone; evaluate normalisation with stored statistics"
            raise UserError(f"the head's rows depend on each other (batch statistics?): {remedy}")
    return out.shape[1], hashlib.sha256(found.tobytes()).hexdigest()


def check_logits(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises UserError for logits of a new shape: a head is traced several times, and may differ each time."""
    if shape != expected:
        raise UserError(f"a head must always have the same classes: {expected[1]} before, now logits of shape {shape}")
