import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from jax.extend.core import jaxprs_in_params
from jax.test_util import check_grads

from lsrs_jax import orthogonal
from lsrs_jax.orthogonal import matrix
from lsrs_jax.orthogonal.families import cayley

pytestmark = pytest.mark.usefixtures("fast_compilation")


def gaussian(shape, scale, dtype=np.float32, seed=0):
    return (scale * np.random.default_rng(seed).standard_normal(shape) / np.sqrt(max(shape))).astype(dtype)


@pytest.mark.parametrize("method", orthogonal.METHODS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 2), (3, 8), (8, 3), (17, 17), (64, 48)])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 30.0, 1000.0])
def test_singular_values_are_one(method, shape, scale):
    build = orthogonal.METHODS[method]
    for dtype, tolerance in ((np.float32, 5e-6), (np.float64, 1e-10)):
        with jax.enable_x64(dtype == np.float64):
            q = np.asarray(jax.jit(build)(gaussian(shape, scale, dtype)))
        assert q.shape == shape
        assert q.dtype == dtype
        assert np.abs(orthogonal.dense_singular_values(q) - 1).max() <= tolerance


@pytest.mark.parametrize("method", orthogonal.METHODS)
@pytest.mark.parametrize("scale", [1e4, 1e8, 1e15])
def test_enormous_weights_still_give_an_orthogonal_matrix(method, scale):
    q = jax.jit(orthogonal.METHODS[method])(gaussian((17, 9), scale))
    assert np.abs(orthogonal.dense_singular_values(q) - 1).max() <= 5e-6


@pytest.mark.parametrize("norm", [1e-3, 0.5, 3.0, 50.0])
def test_expm_is_the_matrix_exponential(norm):
    a = gaussian((12, 12), 1.0, np.float64)
    a = (a - a.T) * norm
    with jax.enable_x64(True):
        ours = np.asarray(jax.jit(matrix.expm_skew)(a))
    np.testing.assert_allclose(ours, scipy.linalg.expm(a), atol=1e-11)


def test_square_cayley_is_the_cayley_transform():
    w = gaussian((6, 6), 2.0, np.float64)
    a = w - w.T
    with jax.enable_x64(True):
        ours = np.asarray(jax.jit(matrix.cayley)(w))
    np.testing.assert_allclose(ours, np.linalg.solve(np.eye(6) + a, np.eye(6) - a), atol=1e-12)


def test_tall_cayley_matches_its_formula():
    w = gaussian((7, 4), 2.0, np.float64)
    u, v = w[:4], w[4:]
    a = u - u.T + v.T @ v
    inverse = np.linalg.inv(np.eye(4) + a)
    with jax.enable_x64(True):
        ours = np.asarray(jax.jit(matrix.cayley)(w))
    np.testing.assert_allclose(ours, np.concatenate([inverse @ (np.eye(4) - a), -2 * v @ inverse]), atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7)])
def test_complex_cayley_is_unitary(shape):
    w = (gaussian(shape, 3.0) + 1j * gaussian(shape, 3.0, seed=1)).astype(np.complex64)
    q = np.asarray(jax.jit(matrix.cayley)(w))
    assert np.abs(np.linalg.svd(q, compute_uv=False) - 1).max() <= 5e-6


@pytest.mark.parametrize("method", orthogonal.METHODS)
@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (2, 4)])
def test_gradients_are_right(method, shape):
    with jax.enable_x64(True):
        w = jnp.asarray(gaussian(shape, 2.0, np.float64))
        check_grads(jax.jit(orthogonal.METHODS[method]), (w,), order=1, modes=["rev"])


@pytest.mark.parametrize("method", orthogonal.METHODS)
@pytest.mark.parametrize("shape", [(6, 6), (7, 3), (3, 7)])
def test_25_optimizer_steps_do_not_leave_the_manifold(method, shape):
    build, optimizer = orthogonal.METHODS[method], optax.adam(0.05)
    start = w = jnp.asarray(gaussian(shape, 1.0))
    state = optimizer.init(w)

    @jax.jit
    def step(w, state):
        gradient = jax.grad(lambda w: jnp.sum((build(w) - gaussian(shape, 1.0, seed=3)) ** 2))(w)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(w, updates), state

    for _ in range(25):
        w, state = step(w, state)
    assert jnp.abs(w - start).max() > 0.1
    assert np.abs(orthogonal.dense_singular_values(jax.jit(build)(w)) - 1).max() <= 5e-6


@pytest.mark.parametrize("method", orthogonal.METHODS)
@pytest.mark.parametrize("kind", ["zero", "rank one"])
def test_gradients_are_finite_at_degenerate_weights(method, kind):
    w = np.zeros((6, 4), np.float32)
    if kind == "rank one":
        w[:] = np.outer(np.arange(6), np.ones(4))
    target = gaussian((6, 4), 1.0)
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(orthogonal.METHODS[method](w) * target)))(w)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


def test_bjorck_step_never_exceeds_one_and_contracts():
    sigma = np.linspace(0.0, 1.7, 64)
    after = np.diag(np.asarray(matrix.bjorck_step(jnp.asarray(np.diag(sigma).astype(np.float32)))))
    assert after.max() <= 1 + 1e-6
    near = np.abs(sigma - 1) < 0.05
    assert np.abs(after - 1)[near].max() <= 2 * 0.05**2


def precisions(function, *arguments):
    """The precision of every matrix product and convolution in a traced function."""
    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                found.append(equation.params["precision"])
            for inner in jaxprs_in_params(equation.params):
                walk(inner)

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


@pytest.mark.parametrize("method", orthogonal.METHODS)
def test_construction_ignores_the_users_matmul_precision(method):
    with jax.default_matmul_precision("bfloat16"):
        found = precisions(orthogonal.METHODS[method], jnp.ones((4, 4)))
    assert found
    assert all(precision == (jax.lax.Precision.HIGHEST,) * 2 for precision in found)


@pytest.mark.parametrize("shape", [(2, 1), (3, 1), (8, 4), (17, 8), (64, 32), (256, 128)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_bjorck_makes_tall_matrices_orthonormal(shape, scale):
    for seed in range(3):
        q = jax.jit(matrix.bjorck)(gaussian(shape, scale, seed=seed))
        assert np.abs(orthogonal.dense_singular_values(q) - 1).max() <= 5e-6


@pytest.mark.parametrize("kind", ["zero", "rank one", "square", "ill-conditioned"])
def test_bjorck_never_exceeds_one(kind):
    w = gaussian((12, 6), 1.0)
    if kind == "zero":
        w[:] = 0
    elif kind == "rank one":
        w[:] = np.outer(np.arange(12), np.ones(6))
    elif kind == "square":
        w = gaussian((12, 12), 1.0)
    else:
        w[:, 0] = w[:, 1] + 1e-5
    sigma = orthogonal.dense_singular_values(jax.jit(matrix.bjorck)(w))
    assert sigma.max() <= 1 + 1e-6
    assert sigma.min() < 0.999  # these matrices do not converge, and still no singular value exceeds 1
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(matrix.bjorck(w) * gaussian(w.shape, 1.0, seed=4))))(w)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (8, 3), (64, 64)])
@pytest.mark.parametrize("scale", [1e-17, 1e-6, 1.0, 1e6, 1e15])
def test_gram_bound_is_above_the_norm_and_close(shape, scale):
    for w in (gaussian(shape, scale), np.full(shape, scale, np.float32)):
        exact, bound = np.linalg.norm(w.astype(np.float64), 2), float(jax.jit(matrix.gram_bound)(w))
        assert exact * (1 - 1e-5) <= bound <= exact * min(shape) ** (1 / 128) * (1 + 1e-5)
    assert np.isfinite(jax.jit(jax.grad(matrix.gram_bound))(jnp.zeros(shape))).all()


@pytest.mark.parametrize("n", [1, 2, 16, 17, 40, 96])
def test_accretive_inverse_is_the_inverse(n):
    rng = np.random.default_rng(0)
    w, v = (rng.standard_normal((3, n, n)) + 1j * rng.standard_normal((3, n, n)) for _ in range(2))
    m = np.eye(n) + (w - w.conj().swapaxes(-1, -2)) + v.conj().swapaxes(-1, -2) @ v
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.jit(matrix.accretive_inverse)(m), np.linalg.inv(m), atol=1e-11)
        check_grads(jax.jit(matrix.accretive_inverse), (jnp.asarray(m[0, :4, :4].real),), order=1, modes=["fwd", "rev"])


def test_many_cayley_transforms_in_one_program_finish():
    """With LAPACK's triangular solves, this program hung on two cores."""
    weights = [jnp.asarray(gaussian((40, 48, 48), 1.0, seed=seed)) for seed in range(6)]
    many = jax.jit(lambda weights: [matrix.cayley(w) for w in weights])
    for _ in range(20):
        results = jax.block_until_ready(many(weights))
    assert all(np.isfinite(q).all() for q in results)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4), (4, 5), (1, 7), (8, 8)])
def test_fourier_transforms_are_numpys(size):
    x = np.random.default_rng(0).standard_normal((2, *size, 3))
    with jax.enable_x64(True):
        spectrum = cayley.transform(jnp.asarray(x), size)
        np.testing.assert_allclose(spectrum, np.fft.rfft2(x, axes=(1, 2)), atol=1e-12)
        np.testing.assert_allclose(cayley.inverse(spectrum, size[1]), x, atol=1e-12)
        # A kernel that is larger than the torus wraps around it; the offset moves the origin of the kernel.
        moved = cayley.transform(jnp.asarray(x), (2, 2), (1, 0))
    folded = np.zeros((2, 2, 2, 3))
    for i, j in np.ndindex(size):
        folded[:, (i - 1) % 2, j % 2] += x[:, i, j]
    np.testing.assert_allclose(moved, np.fft.rfft2(folded, axes=(1, 2)), atol=1e-12)
