"""Orthogonal matrices from unconstrained ones: matrix exponential, Cayley transform, Björck iteration.

Every function works on stacks of real or complex matrices in float32 or float64, and is differentiable. All products
run at the highest matmul precision, also against the user's flags: TF32 or bfloat16 products have errors of 6e-3 to
5e-2, and the results would not be orthogonal.
"""

import functools
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

_P = ParamSpec("_P")
_R = TypeVar("_R")
Matrix = Inexact[Array, "*batch m n"]
Square = Inexact[Array, "*batch n n"]

_BJORCK_STEPS = 12
_GRAM_SQUARINGS = 5
_MAX_SQUARINGS = 12  # in the matrix exponential
_BLOCK = 16  # Matrices up to this size are inverted without splitting them into halves.
_LARGEST = 1024.0  # The Cayley transform scales W of a larger Frobenius norm to this norm.


def highest_precision(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Runs `function` with all products at the highest precision and JAX's own rules for dtypes and shapes."""

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        rules = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
        with jax.default_matmul_precision("highest"), rules[0], rules[1]:
            return function(*args, **kwargs)

    return wrapped


def adjoint(a: Inexact[Array, "*batch m n"]) -> Inexact[Array, "*batch n m"]:
    """Conjugate transpose of the last two axes."""
    return jnp.conj(jnp.swapaxes(a, -1, -2))


@highest_precision
def bjorck_step(q: Matrix) -> Matrix:
    """One Björck iteration Q ← 1.5 Q − 0.5 Q QᴴQ (Björck and Bowie 1971), for m ≥ n.

    **Guarantee**: a singular value s in [0, √3) becomes 1.5 s − 0.5 s³ ≤ 1 (up to the rounding of the two products). A
    deviation e from 1 becomes about 1.5 e².
    """
    return 1.5 * q - 0.5 * q @ (adjoint(q) @ q)


@highest_precision
def bjorck(w: Matrix) -> Matrix:
    """Makes W with m ≥ n semi-orthogonal by a fixed number of Björck's iterations.

    First, each column is scaled by (Σ_j abs(WᵀW)_ij + ε)^−½, which gives ‖W‖ ≤ 1 (Prach and Lampert 2022, Theorem 1).
    Use `exponential` or `cayley` if W is not clearly tall (m < 2n): small singular values need more iterations.

    **Guarantee**: no singular value exceeds 1, converged or not (up to the rounding of the dtype). All are 1 up to
    rounding if the smallest singular value of the scaled W is above about .05; a rank-deficient W keeps small ones.
    """
    gram = jnp.abs(adjoint(w) @ w).sum(axis=-1)
    w = w * jax.lax.rsqrt(gram + 1e-12)[..., None, :]
    return jax.lax.scan(lambda q, _: (bjorck_step(q), None), w, None, length=_BJORCK_STEPS)[0]


@highest_precision
def gram_bound(w: Float[Array, "*batch m n"]) -> Float[Array, "*batch"]:
    """An upper bound on the largest singular value: ‖(WWᵀ)^32‖_F^(1/64) (Delattre et al. 2023).

    **Guarantee**: never below the spectral norm (up to rounding), and at most min(m, n)^(1/128) times it.
    """
    # W is scaled to entries of at most 1, so that no power overflows. `tiny` keeps the gradient finite at W = 0.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(w), axis=(-2, -1), keepdims=True))
    largest = jnp.where(largest > 0, largest, 1.0)
    w = w / largest
    gram = w @ adjoint(w) if w.shape[-2] <= w.shape[-1] else adjoint(w) @ w
    logarithm, tiny = 0.0, 1e-30
    for _ in range(_GRAM_SQUARINGS):
        norm = jnp.sqrt(jnp.sum(gram**2, axis=(-2, -1)) + tiny)
        logarithm = 2 * (logarithm + jnp.log(norm))
        gram = gram / norm[..., None, None]
        gram = gram @ gram
    final = 0.5 * jnp.log(jnp.sum(gram**2, axis=(-2, -1)) + tiny)
    return largest[..., 0, 0] * jnp.exp((logarithm + final) / 2 ** (_GRAM_SQUARINGS + 1))


@highest_precision
def expm_skew(a: Square) -> Square:
    """exp(A) for skew-Hermitian A, by scaling, a Taylor polynomial and squaring.

    The number of squarings depends on the norm √‖A²‖_F of each matrix. Each squaring doubles the deviation from
    orthogonality; a Björck step removes it at the end (1e-6 remain in float32). Matrices of a Frobenius norm above
    4,096, whose angles float32 does not resolve, are scaled to this norm.
    """
    if a.size == 0:
        return a
    norms = jnp.linalg.norm(jax.lax.stop_gradient(a), axis=(-2, -1), keepdims=True)
    a = a * jnp.minimum(1.0, 2.0**_MAX_SQUARINGS / jnp.maximum(norms, 1.0))
    square = a @ a
    norm = jnp.sqrt(jnp.linalg.norm(jax.lax.stop_gradient(square), axis=(-2, -1), keepdims=True))
    squarings = jnp.clip(jnp.ceil(jnp.log2(jnp.maximum(norm, 1e-30))), 0, _MAX_SQUARINGS).astype(jnp.int32)
    scale = jnp.exp2(-squarings.astype(norm.dtype))
    a, square = scale * a, scale**2 * square
    # Paterson-Stockmeyer with blocks of four terms. For ‖A‖ ≤ 1 the remainder is 2e-9 after three and 4e-19 after five.
    blocks = 5 if norm.dtype == jnp.float64 else 3
    powers = [jnp.eye(a.shape[-1], dtype=a.dtype), a, square, square @ a]
    fourth = square @ square

    def block(index: int) -> Square:
        return sum(power / math.factorial(4 * index + i) for i, power in enumerate(powers))  # pyright: ignore[reportReturnType]

    q = block(blocks - 1)
    for index in reversed(range(blocks - 1)):
        q = block(index) + fourth @ q

    # Unneeded squarings are computed and discarded, because a `cond` would make a GPU wait for its host.
    steps = jnp.arange(_MAX_SQUARINGS)
    return bjorck_step(jax.lax.scan(lambda q, step: (jnp.where(step < squarings, q @ q, q), None), q, steps)[0])


def exponential(w: Matrix) -> Matrix:
    """Makes a semi-orthogonal matrix from unconstrained W by the matrix exponential; W = 0 gives the identity.

    Square W gives exp(W − Wᴴ) (Lezcano-Casado and Martínez-Rubio 2019); rectangular W is padded to a square first.

    **Guarantee**: all min(m, n) singular values are 1 up to the rounding of the dtype.
    """
    rows, columns = w.shape[-2:]
    if rows < columns:
        return adjoint(exponential(adjoint(w)))
    w = jnp.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, rows - columns)])
    return expm_skew(w - adjoint(w))[..., :columns]


def _sweep(m: Square) -> Square:
    """Inverse by Gauss-Jordan elimination, in place, with the diagonal as pivots."""

    def eliminate(k: Int[Array, ""], m: Square) -> Square:
        column, row = m[..., :, k], m[..., k, :]
        pivot = 1 / row[..., k]
        row = row * pivot[..., None]
        m = m - column[..., :, None] * row[..., None, :]
        m = m.at[..., k, :].set(row).at[..., :, k].set(-column * pivot[..., None])
        return m.at[..., k, k].set(pivot)

    return jax.lax.fori_loop(0, m.shape[-1], eliminate, m)


def _eliminate(m: Square) -> Square:
    """Block-wise inverse: the first diagonal block and its Schur complement both have a Hermitian part ≥ I again."""
    n = m.shape[-1]
    if n <= _BLOCK:
        return _sweep(m)
    half = n // 2
    a, b, c, d = m[..., :half, :half], m[..., :half, half:], m[..., half:, :half], m[..., half:, half:]
    a = _eliminate(a)
    left, right = c @ a, a @ b
    d = _eliminate(d - left @ b)
    b = -right @ d
    return jnp.concatenate([jnp.concatenate([a - b @ left, b], -1), jnp.concatenate([-d @ left, d], -1)], -2)


@jax.custom_jvp
@highest_precision
def accretive_inverse(m: Square) -> Square:
    """Inverse of matrices whose Hermitian part (M + Mᴴ)/2 is at least the identity.

    Elimination without pivoting; each of two Newton steps squares its error, which grows with ‖M‖². LAPACK's concurrent
    triangular solves can deadlock on a CPU of few cores (seen with jax 0.10, not reported upstream; use LAPACK when a
    stack of solves on two cores does not hang any more).
    """
    inverse, identity = _eliminate(m), jnp.eye(m.shape[-1], dtype=m.dtype)
    for _ in range(2):
        inverse = inverse + inverse @ (identity - m @ inverse)
    return inverse


@accretive_inverse.defjvp
@highest_precision
def _accretive_inverse_jvp(primals: tuple[Square], tangents: tuple[Square]) -> tuple[Square, Square]:
    inverse = accretive_inverse(*primals)
    return inverse, -inverse @ tangents[0] @ inverse


@highest_precision
def cayley(w: Matrix) -> Matrix:
    """Makes a semi-orthogonal matrix from unconstrained W by the Cayley transform; W = 0 gives the identity.

    Tall W = [U; V] with A = U − Uᴴ + VᴴV gives [(I+A)⁻¹(I−A); −2V(I+A)⁻¹] (Trockman and Kolter 2021, appendix); wide W
    gives the adjoint of the result for Wᴴ. I + A is invertible because A + Aᴴ = 2VᴴV ≥ 0. W of a Frobenius norm above
    1,024, whose angles float32 does not resolve, is scaled to it. A Björck step removes the error of the inverse.

    **Guarantee**: all min(m, n) singular values are 1 up to the rounding of the dtype.
    """
    rows, columns = w.shape[-2:]
    if rows < columns:
        return adjoint(cayley(adjoint(w)))
    if w.size == 0:
        return w
    norms = jnp.sqrt(jnp.sum(jnp.abs(w / _LARGEST) ** 2, axis=(-2, -1), keepdims=True) + 1e-30)
    w = w / jnp.maximum(norms, 1.0)
    top, bottom = w[..., :columns, :], w[..., columns:, :]
    identity = jnp.eye(columns, dtype=w.dtype)
    inverse = accretive_inverse(identity + (top - adjoint(top)) + adjoint(bottom) @ bottom)
    return bjorck_step(jnp.concatenate([2 * inverse - identity, -2 * bottom @ inverse], axis=-2))


METHODS: dict[str, Callable[[Matrix], Matrix]] = {"exponential": exponential, "cayley": cayley}
