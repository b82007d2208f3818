"""Encoders of a caller: any JAX function, with a Lipschitz constant that nobody here proves."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, jaxprs_in_params
from jaxtyping import Array

from lsrs_jax.layers.base import Shape
from lsrs_jax.layers.lipschitz import CLAIMED, LayerBound, LipschitzReport, Materialized
from lsrs_jax.runtime.errors import UserError, reason

_ROUNDING = 1e-10  # relative; a float64 program of a million roundings stays below it


def claimed(
    encoder: Callable[[Array], Array] | None, lipschitz: float, input_shape: Shape, low_precision: bool
) -> Materialized:
    """A caller's encoder of inputs of this shape (None: the identity) as a `Materialized`.

    Args:
      encoder: a JAX function of batches.
      lipschitz: the constant that the caller claims.
      low_precision: whether the encoder may compute below float64, because the caller gives the error as slack.

    Raises UserError for a function that JAX cannot trace, that computes below float64 where that is not allowed, whose
    rows depend on each other, or that stretches the distance of some random inputs by more than the constant. The last
    two are seen on a few inputs only.

    **Guarantee**: none of its own: the report passes on the caller's constant. The float64 rounding of the encoder is
    taken to be at most 1e-10 of ``lipschitz · ‖x‖ + ‖encoder(0)‖``.
    """
    if encoder is None:
        layers = () if lipschitz == 1 else (LayerBound("0 encoder of the caller", float(lipschitz), 0.0, CLAIMED),)
        return Materialized(lambda _, x: x, (), LipschitzReport(layers, input_shape, input_shape))
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        zeros = jnp.zeros((2, *input_shape), jnp.float64)
        try:
            program = jax.make_jaxpr(lambda x: encoder(x))(zeros)
            at_zero = np.asarray(encoder(zeros))
        except UserError:
            raise
        except Exception as error:  # whatever the caller's function raises
            remedy = "give a JAX function of a batch, or encode yourself and give the latents"
            raise UserError(
                f"the encoder failed on a batch of shape {zeros.shape}: {reason(error)}; {remedy}"
            ) from error
    if at_zero.ndim < 2 or len(at_zero) != 2:
        raise UserError(f"the encoder must return a batch of latents, got the shape {at_zero.shape} for a batch of 2")
    if not np.isfinite(at_zero).all():
        raise UserError("the encoder returns NaN or infinite latents for an input of zeros")
    low = [str(dtype) for dtype in _floating_dtypes(program.jaxpr) if jnp.dtype(dtype).itemsize < 8]
    if low and not low_precision:
        remedy = "let it compute in float64 (leave dtype=... out), or give the ℓ2 error of its latents as slack"
        raise UserError(f"the encoder computes in {low[0]}, and its rounding is not covered: {remedy}")
    _check_rows(encoder, input_shape)
    _check_claim(encoder, lipschitz, input_shape)
    offset = float(np.linalg.norm(at_zero[0])) * (1 + 1e-9)
    bound = LayerBound("0 encoder of the caller", float(lipschitz), 0.0, CLAIMED, 0.0 if low else _ROUNDING, offset)
    return Materialized(
        lambda _, x: encoder(x), (), LipschitzReport((bound,), input_shape, tuple(map(int, at_zero.shape[1:])))
    )


def _check_rows(encoder: Callable[[Array], Array], input_shape: Shape) -> None:
    """Raises UserError if a latent depends on the other inputs of its batch, or on its place there."""
    rng = np.random.default_rng(1)
    x, others = rng.random((2, 4, *input_shape))
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        before = np.asarray(encoder(jnp.asarray(x)), np.float64)
        after = np.asarray(encoder(jnp.asarray(np.concatenate([others[:1], x[:1], others[1:3]]))), np.float64)
    if not np.allclose(before[0], after[1], rtol=1e-3, atol=1e-3 * max(1.0, float(np.abs(before).max()))):
        raise UserError("the encoder's rows depend on each other: the latent of an input may depend on it alone")


def _check_claim(encoder: Callable[[Array], Array], lipschitz: float, input_shape: Shape) -> None:
    """Raises UserError if a few random pairs of inputs, far and near, show that the constant is too small."""
    rng = np.random.default_rng(0)
    x = rng.random((16, *input_shape))
    y = x + np.repeat([1.0, 1e-3], 8).reshape(-1, *[1] * len(input_shape)) * rng.standard_normal(x.shape)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        moved = np.asarray(encoder(jnp.asarray(y)), np.float64) - np.asarray(encoder(jnp.asarray(x)), np.float64)
    stretch = np.linalg.norm(moved.reshape(16, -1), axis=1) / np.linalg.norm((y - x).reshape(16, -1), axis=1)
    if (largest := float(stretch.max())) > lipschitz * (1 + 1e-3) + 1e-3:
        raise UserError(f"the encoder stretches a distance by {largest:g}: lipschitz={lipschitz:g} is not its constant")


def _floating_dtypes(program: Jaxpr) -> Iterator[Any]:
    """The dtypes of all floating-point results in a program."""
    for equation in program.eqns:
        dtypes = (getattr(variable.aval, "dtype", None) for variable in equation.outvars)
        yield from (dtype for dtype in dtypes if dtype is not None and jnp.issubdtype(dtype, jnp.floating))
        for inner in jaxprs_in_params(equation.params):
            yield from _floating_dtypes(inner)
