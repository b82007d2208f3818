"""Purely linear heads: noise in as many dimensions as there are classes."""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from lsrs_jax.errors import UserError
from lsrs_jax.orthogonal.spectrum import dense_singular_values, upper_bound


@dataclasses.dataclass(frozen=True)
class Span:
    """A linear head logits = Wᵀz + b, seen in the span of its weights.

    Attributes:
      basis: float64 ``(d, K)``, orthonormal columns that span the weights: the new latents are ``z @ basis``.
      head: the function new latents ``(B, K)`` → logits ``(B, K)``.
      lipschitz: of the step z → z @ basis, proven; 1 up to rounding. The certificate must be divided by it.
    """

    basis: np.ndarray
    head: Callable
    lipschitz: float


def _affine(triangle, offset, z):
    return z @ triangle + offset


def span_of(weights, bias):
    """The `Span` of a linear head with weights ``(d, K)``, d ≥ K, and bias ``(K,)``.

    With W = QR the logits are Rᵀ(Qᵀz) + b, and Qᵀδ of δ ~ N(0, σ²I_d) is N(0, σ²I_K): smoothing the small head on Qᵀz
    is the same in law as smoothing the linear head on z, with K instead of d random numbers per vote, and a smaller
    charge for the grid.

    **Guarantee**: Qᵀ is one more Lipschitz layer, in front of the noise, and the certificate of the small head at Qᵀz
    holds for the classifier that is its smoothing after that layer. No property of floating-point sums is assumed.
    """
    weights, bias = np.asarray(weights, np.float64), np.asarray(bias, np.float64)
    if weights.ndim != 2 or bias.shape != weights.shape[1:] or weights.shape[0] < weights.shape[1]:
        raise UserError(
            f"a linear head has weights (d, K) with d >= K and a bias (K,), got {weights.shape} and {bias.shape}"
        )
    if not (np.isfinite(weights).all() and np.isfinite(bias).all()):
        raise UserError("the weights of a linear head must be finite")
    basis, triangle = np.linalg.qr(weights)
    triangle, offset = jnp.asarray(triangle, jnp.float32), jnp.asarray(bias, jnp.float32)
    return Span(basis, functools.partial(_affine, triangle, offset), upper_bound(dense_singular_values(basis).max()))
