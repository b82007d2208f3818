import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import threefry
from test_matrix import precisions

from lsrs_jax.errors import UserError
from lsrs_jax.orthogonal import FAMILIES, ConvShape, circular_conv, conv_singular_values, spectrum

# A covering sample: every kernel size, stride, channel count and image size of the full grid occurs, with rectangles,
# kernels larger than the image, one input channel, and both directions of a channel change.
SAMPLE = [
    ((1, 1), (1, 1), 1, 1, (4, 4)),
    ((1, 1), (1, 1), 4, 2, (1, 1)),
    ((2, 2), (1, 1), 3, 8, (5, 3)),
    ((2, 2), (2, 2), 1, 3, (4, 8)),
    ((3, 3), (1, 1), 1, 16, (8, 8)),
    ((3, 3), (1, 1), 17, 17, (4, 4)),
    ((3, 3), (1, 1), 16, 3, (7, 2)),
    ((3, 1), (1, 1), 8, 8, (1, 7)),
    ((4, 4), (2, 2), 3, 17, (16, 16)),
    ((4, 4), (4, 4), 1, 8, (8, 4)),
    ((4, 4), (1, 1), 2, 4, (3, 3)),
    ((5, 5), (1, 1), 4, 4, (4, 4)),
    ((7, 7), (1, 1), 2, 3, (5, 5)),
    ((4, 2), (2, 1), 3, 4, (2, 3)),
    ((6, 6), (2, 2), 8, 1, (4, 4)),
]
SIZES = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (7, 7), (8, 8), (16, 16), (4, 8), (16, 4), (1, 8), (5, 7))
CHANNELS = (1, 2, 3, 4, 8, 16, 17)


def legal(family, shape):
    try:
        family.check(shape)
    except UserError:
        return False
    return True


def skip_if_refused(method, arguments):
    """A new family may refuse shapes; the two of the start take every shape here."""
    if not legal(FAMILIES[method], ConvShape(*arguments)):
        assert method not in ("paraunitary", "cayley")
        pytest.skip("the family refuses this shape")


def deviations(method, arguments, mode, dtype, seed=0):
    """max(σ − 1) and max|σ − 1| of a freshly built layer."""
    family, shape = FAMILIES[method], ConvShape(*arguments)
    with jax.enable_x64(dtype == np.float64):
        raw = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), family.init(threefry(seed), shape, mode))
        plain = jax.tree.map(np.asarray, jax.jit(family.build, static_argnums=1)(raw, shape))
    sigma = family.singular_values(plain, shape)
    return (sigma - 1).max(), np.abs(sigma - 1).max()


@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.parametrize("arguments", SAMPLE, ids=str)
def test_singular_values_are_one(method, arguments):
    skip_if_refused(method, arguments)
    for mode in ("identity", "random"):
        over, off = deviations(method, arguments, mode, np.float32)
        assert over <= 5e-6
        assert off <= 1e-5
    assert deviations(method, arguments, "random", np.float64)[1] <= 1e-10


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("method", FAMILIES)
def test_singular_values_are_one_on_the_full_grid(method):
    family, worst, cases = FAMILIES[method], (0.0, 0.0), 0
    build = jax.jit(family.build, static_argnums=1)
    for k, s, c_in, c_out in itertools.product((1, 2, 3, 4, 5, 7), (1, 2, 4), CHANNELS, CHANNELS):
        raw = plain = None
        if c_out == CHANNELS[0]:  # thousands of compiled programs exceed what a process may map
            jax.clear_caches()
        for hw in SIZES:
            shape = ConvShape((k, k), (s, s), c_in, c_out, hw)
            if not legal(family, shape):
                continue
            if raw is None:
                raw = family.init(threefry(cases), shape, "random")
            if plain is None or method == "cayley":  # the kernels of the other family do not depend on the size
                plain = jax.tree.map(np.asarray, build(raw, shape))
            sigma = family.singular_values(plain, shape)
            found = (sigma.max() - 1, np.abs(sigma - 1).max())
            worst, cases = tuple(map(max, worst, found)), cases + 1
            assert found[0] <= 5e-6, shape
            assert found[1] <= 1e-5, shape
    print(f"\n{method}: {cases} layers, max sigma - 1 = {worst[0]:.2e}, max |sigma - 1| = {worst[1]:.2e}")
    assert cases > 1000


@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.parametrize(
    "arguments",
    [
        ((3, 3), (1, 1), 2, 3, (4, 5)),
        ((4, 4), (2, 2), 2, 3, (4, 6)),
        ((5, 5), (1, 1), 1, 2, (3, 3)),
        ((2, 2), (1, 1), 3, 1, (3, 2)),
        ((2, 2), (2, 2), 1, 4, (4, 4)),
    ],
    ids=str,
)
def test_the_layer_as_run_has_the_reported_spectrum(method, arguments):
    skip_if_refused(method, arguments)
    family, shape = FAMILIES[method], ConvShape(*arguments)
    plain = family.build(family.init(threefry(1), shape, "random"), shape)
    size = (*shape.input_hw, shape.c_in)
    jacobian = jax.jacobian(lambda x: family.apply(plain, x[None], shape)[0].reshape(-1))(jnp.zeros(size))
    exact = np.linalg.svd(np.asarray(jacobian, np.float64).reshape(-1, np.prod(size)), compute_uv=False)
    assert jacobian.shape[0] == np.prod(shape.output_shape)
    assert np.abs(exact - 1).max() <= 1e-5
    assert exact.max() <= family.singular_values(jax.tree.map(np.asarray, plain), shape).max() + 2e-6


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("channels", [(1, 1), (3, 3), (4, 6), (6, 4)])
def test_identity_initialisation_is_the_identity(size, channels, key):
    c_in, c_out = channels
    shape = ConvShape((size, size), (1, 1), c_in, c_out, (5, 4))
    x = jax.random.normal(key, (2, 5, 4, c_in))
    kept = np.zeros((2, 5, 4, c_out), np.float32)
    kept[..., : min(channels)] = x[..., : min(channels)]
    for method, tolerance in (("paraunitary", 1e-5), ("cayley", 0.4)):
        family = FAMILIES[method]
        y = family.apply(family.build(family.init(key, shape, "identity"), shape), x, shape)
        assert np.linalg.norm(y - kept) <= tolerance * np.linalg.norm(x)


@pytest.mark.parametrize("method", FAMILIES)
def test_initialisations_differ(method, key):
    shape = ConvShape((3, 3), (1, 1), 4, 4, (4, 4))
    family = FAMILIES[method]
    x = jax.random.normal(key, (2, 4, 4, 4))
    y = family.apply(family.build(family.init(key, shape, "random"), shape), x, shape)
    assert np.abs(y - x).max() > 0.5


@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.parametrize("arguments", [SAMPLE[0], SAMPLE[2], SAMPLE[4], SAMPLE[8], SAMPLE[12], SAMPLE[14]], ids=str)
def test_25_optimizer_steps_do_not_leave_the_manifold(method, arguments, key):
    skip_if_refused(method, arguments)
    family, shape = FAMILIES[method], ConvShape(*arguments)
    x = jax.random.normal(key, (8, *shape.input_hw, shape.c_in))
    target = jax.random.normal(threefry(9), (8, *shape.output_shape))
    optimizer = optax.adam(0.05)

    @jax.jit
    def step(raw, state):
        gradient = jax.grad(lambda raw: jnp.mean((family.apply(family.build(raw, shape), x, shape) - target) ** 2))(raw)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(raw, updates), state

    start = raw = family.init(key, shape, "identity")
    state = optimizer.init(raw)
    for _ in range(25):
        raw, state = step(raw, state)
    pairs = zip(jax.tree.leaves(raw), jax.tree.leaves(start), strict=True)
    moved = max(float(jnp.abs(a - b).max()) for a, b in pairs if a.size)
    sigma = family.singular_values(jax.tree.map(np.asarray, family.build(raw, shape)), shape)
    assert moved > 0.05 or shape.c_in == shape.c_out == 1  # the only orthogonal 1x1 matrix near 1 is 1
    assert np.abs(sigma - 1).max() <= 1e-5
    assert sigma.max() <= 1 + 5e-6


@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.parametrize("weights", ["zero", "ones"])
def test_gradients_are_finite_at_degenerate_weights(method, weights, key):
    shape = ConvShape((3, 3), (1, 1), 2, 4, (4, 4))
    family = FAMILIES[method]
    x, target = jax.random.normal(key, (2, 4, 4, 2)), jax.random.normal(threefry(5), (2, 4, 4, 4))
    raw = jax.tree.map(jnp.zeros_like if weights == "zero" else jnp.ones_like, family.init(key, shape, "random"))
    gradient = jax.grad(lambda raw: jnp.sum(family.apply(family.build(raw, shape), x, shape) * target))(raw)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("method", FAMILIES)
def test_construction_ignores_the_users_matmul_precision(method, key):
    shape = ConvShape((3, 3), (1, 1), 2, 4, (4, 4))
    family = FAMILIES[method]
    with jax.default_matmul_precision("bfloat16"):
        found = precisions(lambda raw: family.build(raw, shape), family.init(key, shape, "random"))
    assert found
    assert all(precision == (jax.lax.Precision.HIGHEST,) * 2 for precision in found)


@pytest.mark.parametrize(
    ("method", "arguments", "why"),
    [
        ("paraunitary", ((3, 3), (2, 2), 2, 2, (4, 4)), "multiple of the strides"),
        ("paraunitary", ((2, 2), (2, 2), 2, 2, (5, 4)), "do not divide"),
        ("cayley", ((3, 3), (2, 2), 2, 2, (4, 5)), "do not divide"),
        ("cayley", ((1, 1), (2, 2), 2, 2, (4, 4)), "smaller than the strides"),
        ("paraunitary", ((1, 3), (2, 1), 2, 2, (4, 4)), "smaller than the strides"),
        ("cayley", ((3, 3), (1, 1), 2, 0, (4, 4)), "at least 1"),
    ],
)
def test_unsound_layers_are_refused(method, arguments, why):
    with pytest.raises(UserError, match=why):
        FAMILIES[method].check(ConvShape(*arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        ((3, 3), (1, 1), 2, 3, (4, 5)),
        ((5, 4), (1, 1), 1, 2, (3, 2)),
        ((3, 3), (2, 2), 2, 2, (4, 6)),
        ((7, 7), (2, 1), 1, 1, (4, 3)),
    ],
    ids=str,
)
def test_exact_spectrum_of_any_kernel(arguments):
    """Against the dense Jacobian, for kernels that are not orthogonal at all."""
    shape = ConvShape(*arguments)
    kernel = np.random.default_rng(0).standard_normal((*shape.kernel_size, shape.c_in, shape.c_out)).astype(np.float32)
    size = (*shape.input_hw, shape.c_in)
    jacobian = jax.jacobian(lambda x: circular_conv(x[None], kernel, shape.strides, (1, 0))[0].reshape(-1))(
        jnp.zeros(size)
    )
    dense = np.linalg.svd(np.asarray(jacobian, np.float64).reshape(-1, np.prod(size)), compute_uv=False)
    ours = np.sort(conv_singular_values(kernel, shape.input_hw, shape.strides).ravel())[::-1]
    np.testing.assert_allclose(ours[: len(dense)], dense, atol=1e-4)
    assert spectrum.upper_bound(ours.max()) > ours.max()


def test_spectrum_refuses_a_stride_that_does_not_divide():
    with pytest.raises(ValueError, match="do not divide"):
        conv_singular_values(np.ones((2, 2, 1, 1)), (3, 4), (2, 2))
