"""Subspace projection of linear heads: the noise has only as many dimensions as there are classes."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float64

from lsrs_jax.orthogonal.spectrum import dense_singular_values, upper_bound
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.validate import refuse_masked


@dataclasses.dataclass(frozen=True)
class SubspaceProjection:
    """A linear head logits = Wᵀz + b, restricted to the subspace that its weight vectors span."""

    basis: Float64[np.ndarray, "d K"]  # orthonormal columns; the new latents are z @ basis
    head: Callable[[Float[jax.Array, "B K"]], Float[jax.Array, "B K"]]  # new latents -> logits
    lipschitz: float  # proven constant of z -> z @ basis, 1 up to rounding; divide certified radii by it


def _affine(triangle: jax.Array, offset: jax.Array, z: jax.Array) -> jax.Array:  # unlike a lambda it can be pickled
    return z @ triangle + offset


def project_linear_head(weights: Float[np.ndarray, "d K"], bias: Float[np.ndarray, " K"]) -> SubspaceProjection:
    """Projects a linear head with d ≥ K onto the subspace of its weights.

    With W = QR the logits are Rᵀ(Qᵀz) + b. For δ ~ N(0, σ²I_d), Qᵀδ is distributed as N(0, σ²I_K). Smoothing the small
    head at Qᵀz is therefore the same in distribution as smoothing the linear head at z, but a sample takes K random
    numbers instead of d, and the error budget of the grid is smaller.

    **Guarantee**: Qᵀ is one more Lipschitz layer in front of the noise. The certificate of the small head at Qᵀz holds
    for the classifier that smooths the small head after that layer. No property of floating-point sums is assumed.
    """
    refuse_masked("weights and bias", [weights, bias])
    weights, bias = np.asarray(weights, np.float64), np.asarray(bias, np.float64)
    if weights.ndim != 2 or bias.shape != weights.shape[1:] or weights.shape[0] < weights.shape[1]:
        raise UserError(
            f"a linear head has weights (d, K) with d >= K and a bias (K,), got {weights.shape} and {bias.shape}"
        )
    if not (np.isfinite(weights).all() and np.isfinite(bias).all()):
        raise UserError("the weights of a linear head must be finite")
    basis, triangle = np.linalg.qr(weights)
    head = functools.partial(_affine, jnp.asarray(triangle, jnp.float32), jnp.asarray(bias, jnp.float32))
    return SubspaceProjection(basis, head, upper_bound(dense_singular_values(basis).max()))


_RENAMED = {"Span": SubspaceProjection, "span_of": project_linear_head}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{name} is now {_RENAMED[name].__name__}", DeprecationWarning, stacklevel=2)
    return _RENAMED[name]
