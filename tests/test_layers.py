import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from lsrs_jax import layers, orthogonal
from lsrs_jax.layers.lipschitz import Float64Encoder, materialize
from lsrs_jax.orthogonal import depth_to_space, space_to_depth
from lsrs_jax.runtime.errors import UserError
from support import threefry

# layer, input shape, whether the layer keeps norms
LAYERS = {
    "adaptive": (layers.OrthogonalConv(6, (3, 3)), (6, 6, 3), True),
    "adaptive strided": (layers.OrthogonalConv(14, (3, 3), (2, 2), initializer="random"), (6, 8, 3), True),
    "adaptive zero": (layers.OrthogonalConv(4, (3, 3), initializer="random", padding="zero"), (5, 4, 3), False),
    "paraunitary strided": (
        layers.OrthogonalConv(5, (4, 4), (2, 2), method="paraunitary", initializer="random"),
        (6, 8, 2),
        False,
    ),
    "exponential": (layers.OrthogonalConv(6, (3, 3), method="exponential", initializer="random"), (5, 4, 3), True),
    "exponential zero": (
        layers.OrthogonalConv(9, (2, 2), (2, 1), method="exponential", initializer="random", padding="zero"),
        (4, 4, 3),
        True,
    ),
    "cayley": (layers.OrthogonalConv(6, (3, 3), method="cayley", initializer="random"), (5, 4, 3), True),
    "exponential dense": (layers.OrthogonalDense(7), (5,), True),
    "cayley dense": (layers.OrthogonalDense(3, method="cayley"), (8,), False),
    "identity dense": (layers.OrthogonalDense(4, initializer="identity"), (4,), True),
    "maxmin": (layers.MaxMin(), (3, 3, 5), True),
    "group sort": (layers.GroupSort(3), (3, 3, 7), True),
    "householder": (layers.Householder(), (3, 3, 5), True),
    "space to depth": (layers.SpaceToDepth((2, 1)), (4, 3, 2), True),
    "haar": (layers.Haar(), (4, 6, 2), True),
    "depth to space": (layers.DepthToSpace((2, 1)), (4, 3, 4), True),
    "average pool": (layers.AveragePool((2, 3)), (4, 3, 2), False),
    "l2 pool": (layers.L2Pool((2, 1)), (4, 3, 2), False),
    "pad": (layers.Channels(6), (2, 2, 4), True),
    "crop": (layers.Channels(2), (2, 2, 4), False),
    "flatten": (layers.Flatten(), (2, 3, 4), True),
}


class LayerTest(chex.TestCase, parameterized.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(*((name, *case) for name, case in LAYERS.items()))
    def test_layer_keeps_its_promises(self, layer, shape, isometry):
        x = jax.random.normal(threefry(1), (4, *shape))
        variables = jax.jit(layer.init)(threefry(0), x)
        assert set(variables) <= {"params"}
        y = self.variant(layer.apply)(variables, x)

        plain = layer.materialize(variables.get("params", {}), shape)
        assert y.shape[1:] == layer.output_shape(shape)
        values = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), plain.params)
        np.testing.assert_allclose(plain.apply(values, x), y, atol=1e-5)

        assert plain.sigma_max <= 1 + 2e-11
        norms = (
            np.linalg.norm(np.asarray(x).reshape(4, -1), axis=1),
            np.linalg.norm(np.asarray(y).reshape(4, -1), axis=1),
        )
        if isometry:
            assert plain.sigma_min >= 1 - (3e-6 if "exponential" in getattr(layer, "method", "") else 1e-10)
            np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)
        else:
            assert (norms[1] <= norms[0] * (1 + 1e-05)).all()

    @parameterized.named_parameters(*((name, *case) for name, case in LAYERS.items()))
    def test_no_pair_of_inputs_is_stretched(self, layer, shape, isometry):
        """Checks the definition of 1-Lipschitz on pairs of near and distant points, also around zero."""
        rng = np.random.default_rng(0)
        x = rng.standard_normal((64, *shape)) * 10.0 ** rng.uniform(-3, 1, (64, *[1] * len(shape)))
        step = rng.standard_normal(x.shape) * 10.0 ** rng.uniform(-6, 1, (64, *[1] * len(shape)))
        x[:8] = 0
        variables = layer.init(threefry(0), jnp.asarray(x[:1], jnp.float32))
        plain = layer.materialize(variables.get("params", {}), shape)
        with jax.enable_x64(True):
            near, far = (np.asarray(plain.apply(plain.params, jnp.asarray(point))) for point in (x, x + step))
        ratio = np.linalg.norm((far - near).reshape(64, -1), axis=1) / np.linalg.norm(step.reshape(64, -1), axis=1)
        assert ratio.max() <= plain.sigma_max + 1e-9


def test_group_sort_sorts_groups():
    x = jnp.array([[1.0, 5.0, 3.0, 2.0, 4.0, 6.0, -7.0]])
    # The groups are (c, c + 2, c + 4), largest first; the seventh channel does not change.
    np.testing.assert_array_equal(layers.GroupSort(3).apply({}, x), [[4.0, 6.0, 3.0, 5.0, 1.0, 2.0, -7.0]])
    np.testing.assert_array_equal(layers.GroupSort(2).apply({}, x), layers.MaxMin().apply({}, x))
    np.testing.assert_array_equal(layers.GroupSort(7).apply({}, x), -np.sort(-np.asarray(x)))


@pytest.mark.parametrize("theta", [0.0, 0.3, np.pi / 2, 2.0, np.pi, 5.0, -1.0])
def test_householder_reflects_one_half_plane_into_the_other(theta):
    x = np.random.default_rng(0).standard_normal((50, 2))
    y = np.asarray(orthogonal.householder(jnp.asarray(x, jnp.float32), jnp.array([theta], jnp.float32)))
    normal = np.array([np.sin(theta / 2), -np.cos(theta / 2)])
    reflection = np.eye(2) - 2 * np.outer(normal, normal)
    np.testing.assert_allclose(y, np.where(x @ normal[:, None] >= 0, x, x @ reflection), atol=1e-5)
    assert (y @ normal >= -1e-5).all()


def test_householder_starts_as_maxmin_and_learns_its_angle():
    x = jax.random.normal(threefry(0), (4, 5))
    variables = layers.Householder().init(threefry(1), x)
    np.testing.assert_allclose(layers.Householder().apply(variables, x), layers.MaxMin().apply({}, x), atol=1e-6)
    gradient = jax.grad(lambda v: jnp.sum(layers.Householder().apply(v, x) ** 3))(variables)
    assert jnp.abs(gradient["params"]["theta"]).min() > 0


def test_pools():
    x = jnp.arange(8.0).reshape(1, 2, 4, 1)
    np.testing.assert_allclose(layers.AveragePool().apply({}, x)[0, 0, :, 0], [10 / 2, 18 / 2])
    expected = np.sqrt([0 + 1 + 16 + 25, 4 + 9 + 36 + 49])
    np.testing.assert_allclose(layers.L2Pool(epsilon=0.0).apply({}, x)[0, 0, :, 0], expected)
    gradient = jax.grad(lambda x: layers.L2Pool().apply({}, x).sum())(jnp.zeros((1, 2, 2, 1)))
    assert np.isfinite(gradient).all()


def test_maxmin_sorts_pairs_and_passes_the_odd_channel():
    x = jnp.array([[1.0, 5.0, 3.0, 2.0, -7.0]])
    np.testing.assert_array_equal(layers.MaxMin().apply({}, x), [[3.0, 5.0, 1.0, 2.0, -7.0]])


def test_haar_is_an_orthonormal_matrix_with_the_coarse_image_first():
    x = jax.random.normal(threefry(0), (2, 4, 6, 3))
    y = orthogonal.haar(x)
    np.testing.assert_allclose(y[..., :3], orthogonal.average_pool(x, (2, 2)), atol=1e-6)
    basis = jnp.eye(16).reshape(16, 4, 4, 1)
    matrix = np.asarray(orthogonal.haar(basis)).reshape(16, 16)
    np.testing.assert_array_equal(matrix @ matrix.T, np.eye(16))
    assert set(np.unique(matrix)) == {-0.5, 0.0, 0.5}
    flat = np.asarray(orthogonal.haar(jnp.ones((1, 2, 2, 1))))
    np.testing.assert_array_equal(flat.ravel(), [2, 0, 0, 0])
    columns = np.asarray(orthogonal.haar(jnp.asarray([[[[1.0], [-1.0]], [[1.0], [-1.0]]]])))
    np.testing.assert_array_equal(columns.ravel(), [0, 2, 0, 0])


def test_space_to_depth_has_an_inverse():
    x = jax.random.normal(threefry(0), (2, 4, 6, 3))
    np.testing.assert_array_equal(depth_to_space(space_to_depth(x, (2, 3)), (2, 3)), x)
    # Each output pixel holds exactly the pixels of its block.
    block = space_to_depth(x, (2, 3))[0, 1, 0].reshape(2, 3, 3)
    np.testing.assert_array_equal(block, x[0, 2:4, 0:3])


@pytest.mark.parametrize(
    ("layer", "shape", "why"),
    [
        (layers.SpaceToDepth((2, 2)), (1, 5, 4, 1), "do not divide"),
        (layers.OrthogonalConv(3, (3, 3), method="bcop"), (1, 4, 4, 1), "unknown convolution method 'bcop'"),
        (layers.OrthogonalConv(3, (3, 3), initializer="zeros"), (1, 4, 4, 1), "unknown initializer"),
        (layers.OrthogonalConv(3, (3,)), (1, 4, 4, 1), "kernel_size must be two positive integers"),
        (layers.OrthogonalConv(3, (3, 3)), (1, 4, 4), "takes images"),
        (layers.OrthogonalDense(3, method="bjorck"), (1, 4), "unknown dense method"),
        (layers.OrthogonalConv(3, (3, 3), padding="reflect"), (1, 4, 4, 1), "would not be 1-Lipschitz"),
        (layers.DepthToSpace((2, 2)), (1, 4, 4, 3), "not divisible"),
        (layers.AveragePool((2, 2)), (1, 4, 5, 3), "do not divide"),
        (layers.L2Pool((2, 2)), (1, 4), "takes images"),
        (layers.GroupSort(1), (1, 4), "at least 2"),
        (layers.L2Pool((2, 2), -0.5), (1, 4, 4, 1), "would stretch"),
        (layers.OrthogonalConv(3, "33"), (1, 4, 4, 1), "kernel_size must be two"),
        (layers.OrthogonalConv(4.0, (3, 3)), (1, 4, 4, 1), "features must be a positive integer"),
        (layers.OrthogonalDense(0), (1, 4), "features must be"),
        (layers.Channels(-1), (1, 4), "features must be"),
        (layers.AveragePool(0), (1, 4, 4, 1), "window must be two"),
        (layers.SpaceToDepth((0, 2)), (1, 4, 4, 1), "strides must be two"),
        (layers.Haar(), (1, 5, 4, 1), "do not divide"),
        (layers.Normalize((0.0,), (1e-300,)), (1, 4, 4, 1), "must be positive"),
        (layers.Normalize((0.0,), (0.0,)), (1, 4, 4, 3), "must be positive"),
        (layers.Normalize((0.0, 0.0), (1.0,)), (1, 4, 4, 3), "2 entries for images of 3 channels"),
    ],
)
def test_bad_layers_are_refused(layer, shape, why):
    with pytest.raises(UserError, match=why):
        layer.init(threefry(0), jnp.zeros(shape))


@pytest.mark.parametrize(
    "layer",
    [
        *(layers.OrthogonalConv(2, (3, 3), method=method) for method in orthogonal.FAMILIES),
        layers.OrthogonalDense(2),
        layers.Normalize((0.5,), (0.5,)),
        layers.Householder(),
        layers.L2Pool(),
    ],
)
def test_integers_are_refused_instead_of_silenced(layer):
    with pytest.raises(UserError, match="floating-point"):
        layer.init(threefry(0), jnp.zeros((1, 4, 4, 2), jnp.uint8))


def convolution(method, features, shape):
    """A 3x3 layer of a family for images of a shape, if the family accepts it."""
    layer = layers.OrthogonalConv(features, (3, 3), method=method, initializer="random")
    try:
        layer.output_shape(shape)
    except UserError:
        pytest.skip("the family refuses this shape")
    return layer


@pytest.mark.parametrize("method", orthogonal.FAMILIES)
def test_bfloat16_images_stay_bfloat16(method):
    layer = convolution(method, 4, (4, 4, 4))
    x = jax.random.normal(threefry(0), (2, 4, 4, 4))
    variables = jax.jit(layer.init)(threefry(1), x)
    exact, rough = (jax.jit(layer.apply)(variables, x.astype(dtype)) for dtype in (jnp.float32, jnp.bfloat16))
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(rough.astype(jnp.float32), exact, atol=0.1)


def encoder_and_params(shape, chain, seed=0):
    encoder = layers.Encoder(chain)
    return encoder, jax.jit(encoder.init)(threefry(seed), jnp.zeros((1, *shape))).get("params", {})


CHAIN = (
    layers.Normalize((0.5, 0.4, 0.3), (0.5, 0.25, 1.0)),
    layers.SpaceToDepth((2, 2)),
    layers.OrthogonalConv(12, (3, 3), initializer="random"),
    layers.Householder(),
    layers.OrthogonalConv(8, (3, 3), method="cayley", initializer="random"),
    layers.MaxMin(),
)


def test_materialize_counts_every_factor_and_runs_in_float64():
    encoder, params = encoder_and_params((8, 8, 3), CHAIN)
    plain = materialize(encoder, params, (8, 8, 3))
    assert plain.report.output_shape == (4, 4, 8)
    assert len(plain.report.layers) == len(CHAIN)
    assert 4 < plain.report.constant < 4 + 1e-8
    assert plain.report.constant == plain.report.to_dict()["constant"]
    x = np.random.default_rng(0).random((5, 8, 8, 3))
    latents = Float64Encoder(plain, batch=2)(x)
    assert latents.dtype == np.float64
    np.testing.assert_allclose(latents, jax.jit(encoder.apply)({"params": params}, x.astype(np.float32)), atol=2e-5)
    np.testing.assert_allclose(latents, Float64Encoder(plain, batch=7)(x), atol=1e-13)


def test_an_encoder_builds_its_kernels_together_and_computes_the_same():
    first, second, third, fourth = (layers.OrthogonalConv(12, (3, 3), initializer="random") for _ in range(4))
    # The kernels after a layer of unknown shape are built one by one.
    chain = (layers.SpaceToDepth((2, 2)), first, layers.MaxMin(), second, layers.MaxMin(), third, nn.Dense(12), fourth)
    encoder, params = encoder_and_params((8, 8, 3), chain)
    x = jax.random.normal(threefry(2), (3, 8, 8, 3))
    one_by_one = x
    for index, layer in enumerate(chain):
        one_by_one = jax.jit(layer.apply)({"params": params.get(f"layers_{index}", {})}, one_by_one)
    np.testing.assert_allclose(jax.jit(encoder.apply)({"params": params}, x), one_by_one, atol=1e-5)
    assert len({np.asarray(params[f"layers_{i}"]["raw"]["rotation"]).tobytes() for i in (1, 3, 5, 7)}) == 4

    gradient = jax.jit(jax.grad(lambda p: jnp.sum(encoder.apply({"params": p}, x) ** 3)))(params)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("method", orthogonal.FAMILIES)
def test_training_kernel_and_materialised_kernel_agree(method):
    layer = convolution(method, 12, (8, 8, 8))
    x = jnp.zeros((1, 8, 8, 8))
    params = layer.init(threefry(3), x)["params"]
    shape = layer.conv_shape((8, 8, 8))
    trained = jax.jit(lambda raw: orthogonal.family(method).build(raw, shape))(params["raw"])
    certified = layer.materialize(params, (8, 8, 8)).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), trained, certified)


def test_a_layer_works_in_another_network():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.remat(layers.OrthogonalConv)(8, (3, 3), strides=(2, 2))(x)
            return layers.OrthogonalDense(3)(nn.relu(nn.Conv(4, (3, 3))(x)).reshape(x.shape[0], -1))

    x = jax.random.normal(threefry(0), (2, 6, 6, 2), jnp.bfloat16)
    variables = jax.jit(Net().init)(threefry(1), x)
    assert jax.jit(Net().apply)(variables, x).shape == (2, 3)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(Net().apply(v, x).astype(jnp.float32) ** 2)))(variables)
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_the_encoder_never_stretches_beyond_its_constant():
    encoder, params = encoder_and_params((8, 8, 3), CHAIN)
    plain = materialize(encoder, params, (8, 8, 3))
    run = Float64Encoder(plain, batch=64)
    rng = np.random.default_rng(0)
    x = rng.random((64, 8, 8, 3))
    step = rng.standard_normal(x.shape) * 10.0 ** rng.uniform(-4, 0, (64, 1, 1, 1))
    step[:32, :, :, [0, 2]] = 0  # only the channel of the smallest std moves, where the bound is attained
    ratio = np.linalg.norm((run(x + step) - run(x)).reshape(64, -1), axis=1) / np.linalg.norm(
        step.reshape(64, -1), axis=1
    )
    assert ratio.max() <= plain.report.constant
    wide, params = encoder_and_params((8, 8, 3), CHAIN[:3])
    isometric = materialize(wide, params, (8, 8, 3))
    run = Float64Encoder(isometric, batch=64)
    ratio = np.linalg.norm((run(x + step) - run(x)).reshape(64, -1), axis=1) / np.linalg.norm(
        step.reshape(64, -1), axis=1
    )
    assert ratio[:32].max() > isometric.report.constant * (1 - 1e-6)


def test_materialize_refuses_what_it_cannot_prove():
    with pytest.raises(UserError, match=r"takes an lsrs_jax\.layers\.Encoder"):
        materialize(nn.Dense(3), {}, (4, 4, 1))
    with pytest.raises(UserError, match="no proven Lipschitz constant"):
        materialize(layers.Encoder((nn.Dense(3),)), {}, (4, 4, 1))
    encoder, params = encoder_and_params((4, 4, 2), (layers.OrthogonalConv(2, (3, 3)),))
    plain = materialize(encoder, params, (4, 4, 2))
    with pytest.raises(UserError, match="materialized for inputs"):
        plain.apply(plain.params, jnp.zeros((1, 6, 6, 2)))
    for wrong in ({}, {"layers_0": {}}, {"layers_0": {"raw": {"rotation": np.zeros((3, 3))}}}):
        with pytest.raises(UserError, match="finds no parameters that fit"):
            materialize(encoder, wrong, (4, 4, 2))
    shared = layers.OrthogonalConv(2, (3, 3))
    twice, params = encoder_and_params((4, 4, 2), (shared, layers.MaxMin(), shared))
    with pytest.raises(UserError, match="an instance of its own"):
        materialize(twice, params, (4, 4, 2))
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    with pytest.raises(UserError, match="non-finite"):
        materialize(encoder, broken, (4, 4, 2))


def extended_convolution(x, kernel, strides):
    """Circular `convolve.convolve` of one image in extended precision."""
    kernel, (sh, sw) = kernel.astype(np.longdouble), strides
    (height, width, _), (kh, kw) = x.shape, kernel.shape[:2]
    y = np.zeros((height // sh, width // sw, kernel.shape[3]), np.longdouble)
    for i, j in np.ndindex(*y.shape[:2]):
        for a, b in np.ndindex(kh, kw):
            row, column = (i * sh + a - (kh - sh) // 2) % height, (j * sw + b - (kw - sw) // 2) % width
            y[i, j] += x[row, column] @ kernel[a, b]
    return y


def extended_taylor(x, kernel, terms=8):
    z = x
    for term in range(terms, 0, -1):
        z = x + extended_convolution(z, kernel, (1, 1)) / term
    return z


def extended_maxmin(x):
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([np.maximum(a, b), np.minimum(a, b)], axis=-1)


def extended_windows(x):
    height, width, channels = x.shape
    return x.reshape(height // 2, 2, width // 2, 2, channels).transpose(0, 2, 1, 3, 4).reshape(-1, 4, channels)


def extended_haar(x):
    signs = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], np.longdouble)
    return np.einsum("bw,nwc->nbc", signs, extended_windows(x)) / 2


ROUNDED = {
    "adaptive": (layers.OrthogonalConv(8, (3, 3), (2, 2)), lambda x, p: extended_convolution(x, p, (2, 2))),
    "paraunitary": (
        layers.OrthogonalConv(6, (4, 4), (2, 2), method="paraunitary"),
        lambda x, p: extended_convolution(x, p, (2, 2)),
    ),
    "exponential": (layers.OrthogonalConv(4, (3, 3), method="exponential"), extended_taylor),
    "maxmin": (layers.MaxMin(), lambda x, p: extended_maxmin(x)),
    "haar": (layers.Haar(), lambda x, p: extended_haar(x)),
    "average": (layers.AveragePool(), lambda x, p: extended_windows(x).sum(axis=1) / 2),
    "l2": (
        layers.L2Pool(),
        lambda x, p: np.sqrt((extended_windows(x) ** 2).sum(axis=1) + np.longdouble(1e-6)),
    ),
    "normalize": (
        layers.Normalize((0.3,), (0.7,)),
        lambda x, p: (x - np.longdouble(0.3)) / np.longdouble(0.7),
    ),
    "dense": (layers.OrthogonalDense(5), lambda x, p: x @ p.astype(np.longdouble)),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_float64_rounding_stays_within_its_bound_and_float32_does_not(name):
    layer, exact = ROUNDED[name]
    layer = layer.clone(initializer="random") if hasattr(layer, "initializer") else layer
    encoder, params = encoder_and_params((8, 8, 4), (layer,))
    plain = materialize(encoder, params, (8, 8, 4))
    x = np.random.default_rng(0).random((8, 8, 4))
    truth = exact(x.astype(np.longdouble), plain.params[0])
    bound = plain.report.rounding(np.linalg.norm(x))
    error = Float64Encoder(plain, 1)(x[None])[0].astype(np.longdouble) - truth.reshape(plain.report.output_shape)
    assert float(np.linalg.norm(error)) <= bound
    assert bound < 1e-11
    if name != "maxmin":
        single = plain.apply(
            jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), plain.params), jnp.float32(x[None])
        )
        error = np.asarray(single[0], np.longdouble) - truth.reshape(plain.report.output_shape)
        assert float(np.linalg.norm(error)) > bound


def test_cayleys_rounding_stays_within_its_bound():
    """An exact reference would need an FFT in extended precision, so the test compares two orders of summation."""
    encoder, params = encoder_and_params((8, 8, 4), (layers.OrthogonalConv(4, (3, 3), method="cayley"),))
    plain = materialize(encoder, params, (8, 8, 4))
    x = np.random.default_rng(0).random((8, 8, 4))
    y = Float64Encoder(plain, 1)(x[None])[0]
    rolled = Float64Encoder(plain, 1)(np.roll(x, (3, 5), (0, 1))[None])[0]
    error = np.linalg.norm(np.roll(rolled, (-3, -5), (0, 1)) - y)
    assert 0 < error <= 2 * plain.report.rounding(np.linalg.norm(x)) < 1e-11


def test_rounding_adds_up_along_the_chain_and_is_stretched_with_it():
    encoder, params = encoder_and_params((8, 8, 4), (layers.OrthogonalConv(4, (3, 3)), layers.MaxMin()))
    plain = materialize(encoder, params, (8, 8, 4)).report
    chain = (layers.OrthogonalConv(4, (3, 3)), layers.MaxMin(), layers.Normalize((0.0,), (0.5,)))
    stretched = materialize(*encoder_and_params((8, 8, 4), chain), (8, 8, 4)).report
    assert plain.rounding(2.0) == pytest.approx(2 * plain.rounding(1.0), rel=1e-9)
    assert 2 * plain.rounding(1.0) < stretched.rounding(1.0) < 2 * plain.rounding(1.0) + 1e-14


def test_report_names_every_layer():
    encoder, params = encoder_and_params((8, 8, 3), CHAIN)
    text = str(materialize(encoder, params, (8, 8, 3)).report)
    assert all(type(layer).__name__ in text for layer in CHAIN)
    assert "(8, 8, 3) -> (4, 4, 8)" in text


def test_one_number_stands_for_rows_and_columns():
    x = jax.random.normal(threefry(1), (2, 6, 6, 4))
    for one, both in (
        (layers.OrthogonalConv(8, 3), layers.OrthogonalConv(8, (3, 3))),
        (layers.OrthogonalConv(8, kernel_size=4, strides=2), layers.OrthogonalConv(8, (4, 4), (2, 2))),
        (layers.SpaceToDepth(2), layers.SpaceToDepth((2, 2))),
        (layers.DepthToSpace(np.int64(2)), layers.DepthToSpace((2, 2))),
        (layers.AveragePool(2), layers.AveragePool((2, 2))),
        (layers.L2Pool(3), layers.L2Pool((3, 3))),
    ):
        variables = jax.jit(both.init)(threefry(0), x)
        np.testing.assert_array_equal(jax.jit(one.apply)(variables, x), jax.jit(both.apply)(variables, x))
        plains = [layer.materialize(variables.get("params", {}), (6, 6, 4)) for layer in (one, both)]
        assert plains[0][2:] == plains[1][2:]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: layers.GroupSort(2.5), r"group_sort needs groups of at least 2 channels, a whole number, got 2\.5"),
        (lambda: layers.GroupSort("2"), "a whole number, got '2'"),
        (
            lambda: layers.OrthogonalConv(8, 2.5),
            r"kernel_size must be two .*, got 2\.5",
        ),
        (lambda: layers.OrthogonalConv(8, 3, True), "strides must be two positive integers, .* got True"),
        (lambda: layers.OrthogonalConv(8, 3, groups=2), "OrthogonalConv has no 'groups', only features, kernel_size"),
        (lambda: layers.OrthogonalConv(8, 3, dilation=2), "has no 'dilation', .*; no layer has groups or dilation"),
        (lambda: layers.MaxMin(axis=1), "MaxMin has no 'axis', only nothing"),
    ],
)
def test_options_that_a_layer_does_not_have_are_one_line(make, why):
    with pytest.raises(UserError, match=why):
        make().init(threefry(0), jnp.zeros((1, 6, 6, 4)))


def test_an_encoder_is_the_same_in_the_mesh_of_the_caller():
    encoder, params = encoder_and_params((4, 4, 2), (layers.OrthogonalConv(4, 3), layers.Flatten()))
    images = np.random.default_rng(0).random((3, 4, 4, 2))
    expected = Float64Encoder(materialize(encoder, params, (4, 4, 2)), 2)(images)
    with jax.set_mesh(jax.make_mesh((8,), ("data",))):
        np.testing.assert_array_equal(Float64Encoder(materialize(encoder, params, (4, 4, 2)), 2)(images), expected)


def test_masked_weights_and_images_are_refused():
    encoder, params = encoder_and_params((4, 4, 2), (layers.OrthogonalConv(4, 3),))
    encode = Float64Encoder(materialize(encoder, params, (4, 4, 2)), 2)
    images = np.ma.masked_greater(np.random.default_rng(0).random((3, 4, 4, 2)), 0.9)
    masked = jax.tree.map(lambda leaf: np.ma.masked_greater(np.asarray(leaf), 0.1), params)
    for call in (
        lambda: encode(images),
        lambda: materialize(encoder, masked, (4, 4, 2)),
        lambda: orthogonal.dense_singular_values(images[0, 0]),
        lambda: orthogonal.conv_singular_values(images[:3], (4, 4)),
    ):
        with pytest.raises(UserError, match="must not have masked entries"):
            call()
