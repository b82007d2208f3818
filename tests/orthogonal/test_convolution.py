import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from jax.extend.core import jaxprs_in_params
from jax.test_util import check_grads
from test_matrix import precisions

from lsrs_jax import orthogonal
from lsrs_jax.orthogonal import FAMILIES, ConvShape, conv_singular_values, convolve, spectrum
from lsrs_jax.orthogonal.families import exponential
from lsrs_jax.runtime.errors import UserError
from support import ROOT, threefry

pytestmark = pytest.mark.usefixtures("fast_compilation")

# A sample of the full grid. It contains every kernel size, stride, channel count and image size, and also rectangles,
# kernels larger than the image, a single input channel, and more or fewer output than input channels.
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
    ((3, 3), (2, 2), 4, 17, (4, 8)),
    ((5, 5), (4, 4), 2, 8, (4, 4)),
    ((3, 3), (1, 1), 2, 2, (1, 2)),
]
# Nine of them; the soak tries all, and the full grid.
FEW = [
    shape if index in (0, 1, 2, 4, 5, 8, 12, 14, 15) else pytest.param(shape, marks=pytest.mark.soak)
    for index, shape in enumerate(SAMPLE)
]
SIZES = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (7, 7), (8, 8), (16, 16), (4, 8), (16, 4), (1, 8), (5, 7))
CHANNELS = (1, 2, 3, 4, 8, 16, 17)


def legal(family, shape):
    try:
        family.check(shape)
    except UserError:
        return False
    return True


# The shapes of the sample that each built-in family refuses. A new family may refuse any shape.
REFUSED = {
    "adaptive": [((4, 4), (2, 2), 1, 3)],
    "paraunitary": [((3, 3), (2, 2), 4, 17), ((5, 5), (4, 4), 2, 8)],
    "exponential": [],
    "cayley": [],
}


def skip_if_refused(method, shape):
    if not legal(FAMILIES[method], shape):
        assert shape[:4] in REFUSED.get(method, [shape[:4]])
        pytest.skip("the family refuses this shape")


def initial(family, key, shape, mode):
    """``family.init``, compiled as one program, which is faster than operation by operation."""
    return jax.jit(family.init, static_argnums=(1, 2))(key, shape, mode)


def built(family, raw, shape):
    """``family.build``, compiled as one program."""
    return jax.jit(family.build, static_argnums=1)(raw, shape)


def run(family, plain, x, shape):
    """``family.apply``, compiled as one program."""
    return jax.jit(family.apply, static_argnums=2)(plain, x, shape)


# With eight Taylor terms, singular values can be 2.2e-6 below 1, in float64 too. They are never above 1.
EXACT = {"exponential": 3e-6}


@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.parametrize("arguments", FEW, ids=str)
def test_singular_values_are_one(method, arguments):
    family, shape = FAMILIES[method], ConvShape(*arguments)
    skip_if_refused(method, shape)
    padded = shape._replace(padding="zero")
    assert legal(family, padded) == (method != "cayley")
    modes = ("identity", "random")
    raws = jax.jit(lambda key: {mode: family.init(key, shape, mode) for mode in modes})(threefry(0))
    for mode, dtype in (("identity", np.float32), ("random", np.float32), ("random", np.float64)):
        with jax.enable_x64(dtype == np.float64):
            raw = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), raws[mode])  # noqa: B023
            plain = jax.tree.map(np.asarray, built(family, raw, shape))
        single = dtype == np.float32
        above = 1e-10 if not single else 1e-6 if method == "exponential" else 5e-6
        below = 1e-5 if single else max(1e-10, EXACT.get(method, 0))
        found = family.spectrum(plain, shape)
        assert found.sigma_max <= 1 + above
        assert found.sigma_max >= 1 - below
        assert found.sigma_min >= 1 - below
        if method != "cayley":  # the same kernel under zero padding
            found = family.spectrum(plain, padded)
            assert found.sigma_max <= 1 + above
            assert method != "exponential" or found.sigma_min >= 1 - below


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("method", FAMILIES)
def test_singular_values_are_one_on_the_full_grid(method):
    family, worst, cases = FAMILIES[method], [0.0, 0.0], 0
    for k, s, c_in, c_out in itertools.product((1, 2, 3, 4, 5, 7), (1, 2, 4), CHANNELS, CHANNELS):
        raw = plain = None
        if c_out == CHANNELS[0]:  # a process cannot map the memory of thousands of compiled programs
            jax.clear_caches()
        for hw, padding in itertools.product(SIZES, ("circular", "zero")):
            shape = ConvShape((k, k), (s, s), c_in, c_out, hw, padding)
            if not legal(family, shape):
                continue
            if raw is None:
                raw = initial(family, threefry(cases), shape, "random")
            if plain is None or method == "cayley":  # the kernels of the other families do not depend on the size
                plain = jax.tree.map(np.asarray, built(family, raw, shape))
            found = family.spectrum(plain, shape)
            worst[0], cases = max(worst[0], found.sigma_max - 1), cases + 1
            assert found.sigma_max <= 1 + (1e-6 if method == "exponential" else 5e-6), shape
            if padding == "circular" or method == "exponential":
                worst[1] = max(worst[1], 1 - found.sigma_min)
                assert found.sigma_min >= 1 - 1e-5, shape
    print(f"\n{method}: {cases} layers, max sigma - 1 = {worst[0]:.2e}, max 1 - sigma = {worst[1]:.2e}")
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
        ((3, 3), (2, 2), 2, 9, (4, 2)),
        ((7, 5), (1, 1), 2, 2, (3, 4)),
    ],
    ids=str,
)
def test_the_layer_as_run_has_the_reported_spectrum(method, arguments):
    """Compares with the singular values of the dense Jacobian, under both paddings."""
    family = FAMILIES[method]
    shapes = [shape for kind in ("circular", "zero") if legal(family, shape := ConvShape(*arguments, kind))]
    if not shapes:
        pytest.skip("the family refuses this shape")
    assert len(shapes) == (1 if method == "cayley" else 2)  # Cayley layers need circular padding
    size = (*arguments[4], arguments[2])

    def layer(key, shape):
        plain = family.build(family.init(key, shape, "random"), shape)
        return plain, jax.jacobian(lambda x: family.apply(plain, x[None], shape)[0].reshape(-1))(jnp.zeros(size))

    layers = jax.jit(lambda key: [layer(key, shape) for shape in shapes])(threefry(1))
    for shape, (plain, jacobian) in zip(shapes, layers, strict=True):
        exact = np.linalg.svd(np.asarray(jacobian, np.float64).reshape(-1, np.prod(size)), compute_uv=False)
        found = family.spectrum(jax.tree.map(np.asarray, plain), shape)
        assert jacobian.shape[0] == np.prod(shape.output_shape)
        assert exact.max() <= found.sigma_max + 2e-6
        assert exact.min() >= found.sigma_min - 2e-6
        if shape.padding == "circular" or method == "exponential":
            assert np.abs(exact - 1).max() <= 1e-5


def test_the_torus_of_the_images_size_does_not_bound_a_zero_padded_convolution():
    """The reason for the larger torus: on the small one this kernel is 0, but under zero padding its norm is 1."""
    kernel = np.zeros((3, 1, 1, 1))
    kernel[:, 0, 0, 0] = [1, 0, -1]  # on a torus of two rows the taps cancel
    assert conv_singular_values(kernel, (2, 1)).max() <= 1e-12
    jacobian = jax.jacobian(lambda x: convolve(x[None], kernel, padding="zero")[0].reshape(-1))(jnp.zeros((2, 1, 1)))
    exact = np.linalg.svd(np.asarray(jacobian).reshape(2, 2), compute_uv=False).max()
    bound = orthogonal.kernel_spectrum(kernel, (2, 1), padding="zero").sigma_max
    assert exact == pytest.approx(1.0)
    assert exact <= bound <= 2


def test_an_exponential_kernel_that_is_not_antisymmetric_is_refused_under_zero_padding():
    shape = ConvShape((3, 3), (1, 1), 2, 2, (4, 4), "zero")
    with pytest.raises(UserError, match="not antisymmetric"):
        FAMILIES["exponential"].spectrum(np.ones((3, 3, 2, 2)), shape)


def test_the_exponential_layer_is_the_matrix_exponential():
    shape = ConvShape((3, 3), (1, 1), 2, 2, (3, 4), "zero")
    family = FAMILIES["exponential"]
    kernel = built(family, initial(family, threefry(3), shape, "random"), shape)
    x = jax.random.normal(threefry(4), (1, 3, 4, 2))
    generator = jax.jacobian(lambda x: convolve(x, kernel, padding="zero").reshape(-1))(x).reshape(24, 24)
    assert np.abs(generator + generator.T).max() <= 1e-6
    assert np.linalg.norm(generator, 2) > 0.2
    expected = scipy.linalg.expm(np.asarray(generator, np.float64)) @ np.asarray(x).reshape(-1)
    np.testing.assert_allclose(family.apply(kernel, x, shape).reshape(-1), expected, atol=1e-5)


@pytest.mark.parametrize("norm", [0.3, 1.0, 3.0, 4.0])
def test_the_range_of_the_taylor_polynomial(norm):
    low, high = exponential._taylor_range(norm)
    angles = np.linspace(0, norm, 10_001)
    values = np.abs(sum((1j * angles) ** j / math.factorial(j) for j in range(exponential.TERMS + 1)))
    assert low <= values.min() + 1e-12
    assert high >= values.max() - 1e-12
    assert (low, high) == (pytest.approx(values.min(), abs=1e-6), pytest.approx(values.max(), abs=1e-6))
    assert (high > 1 + 1e-9) == (norm > 3.39)  # a layer of a larger norm would stretch, so the norm is capped


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_norm_of_a_skew_kernel_is_capped(scale):
    shape = ConvShape((3, 3), (1, 1), 4, 4, (8, 8))
    family = FAMILIES["exponential"]
    raw = jax.tree.map(lambda leaf: scale * leaf, initial(family, threefry(0), shape, "random"))
    norm = conv_singular_values(built(family, raw, shape), (8, 8)).max()
    assert norm <= 1 + 1e-6
    assert (norm > 0.3) == (scale >= 1)


@pytest.mark.parametrize(
    ("size", "channels"),
    [
        pytest.param(size, channels, marks=() if size == 3 or index % 3 == size // 2 else pytest.mark.soak)
        for index, channels in enumerate([(1, 1), (3, 3), (4, 6), (6, 4)])
        for size in (1, 3, 5)
    ],
)
def test_identity_initialisation_is_the_identity(size, channels, key):
    c_in, c_out = channels
    shape = ConvShape((size, size), (1, 1), c_in, c_out, (5, 4))
    x = jax.random.normal(key, (2, 5, 4, c_in))
    kept = np.zeros((2, 5, 4, c_out), np.float32)
    kept[..., : min(channels)] = x[..., : min(channels)]
    for method, tolerance in (("adaptive", 1e-5), ("paraunitary", 1e-5), ("exponential", 0), ("cayley", 0.4)):
        family = FAMILIES[method]
        if not legal(family, shape):
            assert (method, channels) == ("adaptive", (1, 1))
            continue
        layer = jax.jit(lambda x: family.apply(family.build(family.init(key, shape, "identity"), shape), x, shape))  # noqa: B023
        assert np.linalg.norm(layer(x) - kept) <= tolerance * np.linalg.norm(x)


@pytest.mark.parametrize("method", FAMILIES)
def test_initialisations_differ(method, key):
    shape = ConvShape((3, 3), (1, 1), 4, 4, (4, 4))
    family = FAMILIES[method]
    x = jax.random.normal(key, (2, 4, 4, 4))
    y = run(family, built(family, initial(family, key, shape, "random"), shape), x, shape)
    assert np.abs(y - x).max() > 0.5


@pytest.mark.parametrize("method", FAMILIES)
def test_leaves_of_an_initialisation_can_be_donated(method, key):
    """Two leaves that share a buffer could not be donated."""
    shape = ConvShape((3, 3), (1, 1), 4, 4, (4, 4))
    raw = FAMILIES[method].init(key, shape, "identity")
    assert jax.tree.leaves(jax.jit(lambda raw: jax.tree.map(lambda leaf: leaf + 1, raw), donate_argnums=0)(raw))


@pytest.mark.parametrize("method", FAMILIES)
def test_the_pure_functions_refuse_bad_input_as_the_module_does(method, key):
    shape = ConvShape((3, 3), (1, 1), 4, 4, (4, 4))
    family = FAMILIES[method]
    with pytest.raises(UserError, match="unknown initializer"):
        family.init(key, shape, "identty")
    plain = built(family, initial(family, key, shape, "identity"), shape)
    with pytest.raises(UserError, match="floating-point"):
        family.apply(plain, jnp.ones((1, 4, 4, 4), jnp.uint8), shape)


def test_the_example_family_of_the_documentation_works(monkeypatch, key):
    section = (ROOT / "docs" / "layers.md").read_text().partition("## Adding a family\n")[2]
    module = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], module)
    monkeypatch.setitem(FAMILIES, "pointwise", module["FAMILY"])
    test_singular_values_are_one("pointwise", SAMPLE[1])
    test_initialisations_differ("pointwise", key)
    test_leaves_of_an_initialisation_can_be_donated("pointwise", key)
    test_the_pure_functions_refuse_bad_input_as_the_module_does("pointwise", key)
    test_construction_ignores_the_users_matmul_precision("pointwise", key)


@pytest.mark.parametrize("strides", [(2, 2), (4, 2)])
def test_identity_initialisation_with_strides_is_space_to_depth(strides, key):
    kernel_size = tuple(s + 2 for s in strides)
    shape = ConvShape(kernel_size, strides, 3, 3 * strides[0] * strides[1], (8, 8))
    family = FAMILIES["adaptive"]
    x = jax.random.normal(key, (2, 8, 8, 3))
    y = run(family, built(family, initial(family, key, shape, "identity"), shape), x, shape)
    np.testing.assert_allclose(y, orthogonal.space_to_depth(x, strides), atol=1e-5)


@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.parametrize(
    "arguments",
    [
        *(SAMPLE[index] for index in (2, 4, 8, 14)),
        *(pytest.param(SAMPLE[index], marks=pytest.mark.soak) for index in (0, 12)),
    ],
    ids=str,
)
def test_25_optimizer_steps_do_not_leave_the_manifold(method, arguments, key):
    family, shape = FAMILIES[method], ConvShape(*arguments)
    skip_if_refused(method, shape)
    x = jax.random.normal(key, (8, *shape.input_hw, shape.c_in))
    target = jax.random.normal(threefry(9), (8, *shape.output_shape))
    optimizer = optax.adam(0.05)

    @jax.jit
    def step(raw, state):
        gradient = jax.grad(lambda raw: jnp.mean((family.apply(family.build(raw, shape), x, shape) - target) ** 2))(raw)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(raw, updates), state

    start = raw = initial(family, key, shape, "identity")
    state = optimizer.init(raw)
    for _ in range(25):
        raw, state = step(raw, state)
    pairs = zip(jax.tree.leaves(raw), jax.tree.leaves(start), strict=True)
    moved = max(float(jnp.abs(a - b).max()) for a, b in pairs if a.size)
    found = family.spectrum(jax.tree.map(np.asarray, built(family, raw, shape)), shape)
    assert moved > 0.05 or shape.c_in == shape.c_out == 1  # the only orthogonal 1x1 matrix near 1 is 1 itself
    assert found.sigma_min >= 1 - 1e-5
    assert found.sigma_max <= 1 + 5e-6


def rank_one(shape):
    if len(shape) < 2:
        return np.ones(shape)
    return np.broadcast_to(np.outer(np.arange(shape[-2]), 1 + np.arange(shape[-1])), shape)


@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.parametrize("weights", ["zero", "ones", "rank one"])
def test_gradients_are_finite_at_degenerate_weights(method, weights, key):
    shape = ConvShape((3, 3), (1, 1), 2, 4, (4, 4))
    family = FAMILIES[method]
    x, target = jax.random.normal(key, (2, 4, 4, 2)), jax.random.normal(threefry(5), (2, 4, 4, 4))
    fill = {"zero": lambda shape: np.zeros(shape), "ones": lambda shape: np.ones(shape), "rank one": rank_one}[weights]
    raw = jax.tree.map(lambda leaf: jnp.asarray(fill(leaf.shape), jnp.float32), initial(family, key, shape, "random"))
    gradient = jax.jit(jax.grad(lambda raw: jnp.sum(family.apply(family.build(raw, shape), x, shape) * target)))(raw)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    found = family.spectrum(jax.tree.map(np.asarray, built(family, raw, shape)), shape)
    assert found.sigma_max <= 1 + 5e-6  # a factor of deficient rank may shrink norms, but must not enlarge them


@pytest.mark.parametrize("method", FAMILIES)
def test_gradients_through_the_construction_are_right(method, key):
    shape = ConvShape((3, 3), (1, 1), 2, 3, (3, 4))
    family = FAMILIES[method]
    with jax.enable_x64(True):
        raw = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), initial(family, key, shape, "random"))
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 2)))
        layer = jax.jit(lambda raw, x: family.apply(family.build(raw, shape), x, shape))
        check_grads(layer, (raw, x), order=1, modes=["rev"])


@pytest.mark.parametrize("method", FAMILIES)
def test_kernels_built_together_are_those_built_alone(method, key):
    """This also holds for kernels of different shapes that are built as parts of a larger one."""
    family = FAMILIES[method]
    shapes = [ConvShape((3, 3), (1, 1), *pair, (3, 4)) for pair in ((4, 4), (6, 6), (4, 4), (2, 4), (4, 3))]
    raws = [initial(family, threefry(i), shape, "random") for i, shape in enumerate(shapes)]
    together = jax.jit(
        lambda raws: orthogonal.build_kernels([(method, *pair) for pair in zip(shapes, raws, strict=True)])
    )(raws)
    for shape, raw, plain in zip(shapes, raws, together, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), plain, built(family, raw, shape))


def primitives(function, *arguments):
    """Names of all primitives in a traced function, including those of inner functions."""
    names = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            names.append(equation.primitive.name)
            for inner in jaxprs_in_params(equation.params):
                walk(inner)

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    return names


def test_building_is_batched_and_large_kernels_are_rematerialized(key):
    def trace(channels, count):
        shape = ConvShape((3, 3), (1, 1), channels, channels, (4, 4))
        raws = [jax.tree.map(jnp.zeros_like, FAMILIES["adaptive"].init(key, shape, "random")) for _ in range(count)]
        return primitives(lambda raws: orthogonal.build_kernels([("adaptive", shape, raw) for raw in raws]), raws)

    products = [trace(8, count).count("dot_general") for count in (1, 5)]
    assert products[0] == products[1] > 0
    assert "cond" not in trace(8, 5)  # a GPU waits for its host before each `cond`
    assert "remat2" not in trace(8, 2) + trace(8, 1)
    assert "remat2" in trace(512, 2)


def test_a_kernel_that_is_part_of_another_is_built_with_it(key):
    """The program has as many matrix products as for the largest kernel alone."""

    def products(*channels):
        shapes = [ConvShape((3, 3), (1, 1), *pair, (4, 4)) for pair in channels]
        raws = [FAMILIES["adaptive"].init(key, shape, "random") for shape in shapes]

        def build(raws):
            return orthogonal.build_kernels([("adaptive", *pair) for pair in zip(shapes, raws, strict=True)])

        return primitives(build, raws).count("dot_general")

    assert products((8, 8), (3, 8), (8, 5), (8, 8)) == products((8, 8)) < products((8, 8), (8, 10))


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
        ("cayley", ((3, 3), (1, 1), 2, 2, (4, 4), "zero"), "needs padding='circular'"),
        ("adaptive", ((3, 3), (1, 1), 2, 2, (4, 4), "reflect"), "would not be 1-Lipschitz"),
        ("exponential", ((3, 3), (1, 1), 2, 2, (4, 4), "edge"), "would not be 1-Lipschitz"),
        ("adaptive", ((3, 3), (2, 2), 2, 2, (5, 4)), "do not divide"),
        ("adaptive", ((3, 3), (1, 1), 1, 1, (4, 4)), "could only shift the image"),
        ("adaptive", ((3, 3), (2, 2), 1, 3, (4, 4)), "could only shift the image"),
        ("exponential", ((1, 1), (2, 2), 2, 2, (4, 4)), "smaller than the strides"),
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
    """Compares with the dense Jacobian, for kernels that are not orthogonal."""
    shape = ConvShape(*arguments)
    kernel = np.random.default_rng(0).standard_normal((*shape.kernel_size, shape.c_in, shape.c_out)).astype(np.float32)
    size = (*shape.input_hw, shape.c_in)
    jacobian = jax.jit(jax.jacobian(lambda x: convolve(x[None], kernel, shape.strides)[0].reshape(-1)))(jnp.zeros(size))
    dense = np.linalg.svd(np.asarray(jacobian, np.float64).reshape(-1, np.prod(size)), compute_uv=False)
    ours = np.sort(conv_singular_values(kernel, shape.input_hw, shape.strides).ravel())[::-1]
    np.testing.assert_allclose(ours[: len(dense)], dense, atol=1e-4)
    assert spectrum.upper_bound(ours.max()) > ours.max()


def test_spectrum_refuses_a_stride_that_does_not_divide():
    with pytest.raises(ValueError, match="do not divide"):
        conv_singular_values(np.ones((2, 2, 1, 1)), (3, 4), (2, 2))
