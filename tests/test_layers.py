import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from conftest import threefry

from lsrs_jax import layers, models
from lsrs_jax.config import default
from lsrs_jax.errors import UserError
from lsrs_jax.materialize import Float64Encoder, materialize

LAYERS = {
    "paraunitary": (layers.OrthogonalConv(6, (3, 3)), (6, 6, 3), True),
    "paraunitary strided": (layers.OrthogonalConv(5, (4, 4), (2, 2), initializer="random"), (6, 8, 2), False),
    "cayley": (layers.OrthogonalConv(6, (3, 3), method="cayley", initializer="random"), (5, 4, 3), True),
    "exponential dense": (layers.OrthogonalDense(7), (5,), True),
    "cayley dense": (layers.OrthogonalDense(3, method="cayley"), (8,), False),
    "identity dense": (layers.OrthogonalDense(4, initializer="identity"), (4,), True),
    "maxmin": (layers.MaxMin(), (3, 3, 5), True),
    "space to depth": (layers.SpaceToDepth((2, 1)), (4, 3, 2), True),
    "pad": (layers.Channels(6), (2, 2, 4), True),
    "crop": (layers.Channels(2), (2, 2, 4), False),
    "flatten": (layers.Flatten(), (2, 3, 4), True),
}


class LayerTest(chex.TestCase, parameterized.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(*((name, *case) for name, case in LAYERS.items()))
    def test_layer_keeps_its_promises(self, layer, shape, isometry):
        x = jax.random.normal(threefry(1), (4, *shape))
        variables = layer.init(threefry(0), x)
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
            assert plain.sigma_min >= 1 - 1e-10
            np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)
        else:
            assert (norms[1] <= norms[0] * (1 + 1e-05)).all()


def test_maxmin_sorts_pairs_and_passes_the_odd_channel():
    x = jnp.array([[1.0, 5.0, 3.0, 2.0, -7.0]])
    np.testing.assert_array_equal(layers.MaxMin().apply({}, x), [[3.0, 5.0, 1.0, 2.0, -7.0]])


def test_space_to_depth_has_an_inverse():
    from lsrs_jax.orthogonal import depth_to_space, space_to_depth

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
        (layers.OrthogonalConv(3, (3,)), (1, 4, 4, 1), "two numbers each"),
        (layers.OrthogonalConv(3, (3, 3)), (1, 4, 4), "takes images"),
        (layers.OrthogonalDense(3, method="bjorck"), (1, 4), "unknown dense method"),
        (layers.Normalize((0.0,), (0.0,)), (1, 4, 4, 3), "must be positive"),
        (layers.Normalize((0.0, 0.0), (1.0,)), (1, 4, 4, 3), "2 entries for images of 3 channels"),
    ],
)
def test_bad_layers_are_refused(layer, shape, why):
    with pytest.raises(UserError, match=why):
        layer.init(threefry(0), jnp.zeros(shape))


def encoder_and_params(shape, chain, seed=0):
    encoder = layers.Encoder(chain)
    return encoder, encoder.init(threefry(seed), jnp.zeros((1, *shape)))["params"]


CHAIN = (
    layers.Normalize((0.5, 0.4, 0.3), (0.5, 0.25, 1.0)),
    layers.SpaceToDepth((2, 2)),
    layers.OrthogonalConv(12, (3, 3), initializer="random"),
    layers.MaxMin(),
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
    np.testing.assert_allclose(latents, encoder.apply({"params": params}, x.astype(np.float32)), atol=2e-5)
    np.testing.assert_allclose(latents, Float64Encoder(plain, batch=7)(x), atol=1e-13)


def test_the_encoder_never_stretches_beyond_its_constant():
    encoder, params = encoder_and_params((8, 8, 3), CHAIN)
    plain = materialize(encoder, params, (8, 8, 3))
    run = Float64Encoder(plain, batch=64)
    rng = np.random.default_rng(0)
    x = rng.random((64, 8, 8, 3))
    step = rng.standard_normal(x.shape) * 10.0 ** rng.uniform(-4, 0, (64, 1, 1, 1))
    step[:32, :, :, [0, 2]] = 0  # the channel of the smallest std, where the bound is attained
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
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    with pytest.raises(UserError, match="non-finite"):
        materialize(encoder, broken, (4, 4, 2))


def test_report_names_every_layer():
    encoder, params = encoder_and_params((8, 8, 3), CHAIN)
    text = str(materialize(encoder, params, (8, 8, 3)).report)
    assert all(type(layer).__name__ in text for layer in CHAIN)
    assert "(8, 8, 3) -> (4, 4, 8)" in text


def model_of(shape=(8, 8, 1), **fields):
    config = default().model
    config.update(fields)
    return models.build(config, shape, 10)


@pytest.mark.parametrize("encoder", models.ENCODERS)
@pytest.mark.parametrize("noise", ["latent", "input"])
def test_certified_functions_are_the_trained_ones(encoder, noise):
    model = model_of(encoder=encoder, noise=noise, mean=(0.3,), std=(0.5,), head="mlp")
    params = model.init(threefry(0))
    x = np.random.default_rng(0).random((6, 8, 8, 1)).astype(np.float32)
    plain, head = model.for_certification(params)
    latents = Float64Encoder(plain, 6)(x).astype(np.float32)
    np.testing.assert_allclose(head(latents), model.classify(params, model.encode(params, x)), atol=2e-4)
    smooths_input = encoder == "identity" or noise == "input"
    assert model.smooths_input == smooths_input
    assert plain.report.constant == pytest.approx(1.0 if smooths_input else 2.0, rel=1e-9)
    assert np.array_equal(latents, x) == smooths_input


@pytest.mark.parametrize("head", models.HEADS)
def test_heads_treat_rows_independently(head):
    model = model_of(encoder="identity", head=head)
    params = model.init(threefry(0))
    z = jax.random.normal(threefry(1), (4, 8, 8, 1))
    logits = model.classify(params, z)
    assert logits.shape == (4, 10)
    np.testing.assert_allclose(model.classify(params, z.at[1:].set(7.0))[0], logits[0], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"encoder": "deeper"}, "unknown model.encoder 'deeper'"),
        ({"head": "resnet"}, "unknown model.head 'resnet'"),
        ({"noise": "both"}, "unknown model.noise"),
        ({"method": "qr"}, "unknown convolution method"),
        ({"std": (-1.0,)}, "must be positive"),
        ({"mean": (0.0, 0.0)}, "2 entries"),
    ],
)
def test_bad_models_are_refused(fields, why):
    with pytest.raises(UserError, match=why):
        model_of(**fields)


def test_an_image_the_encoder_cannot_split_is_refused():
    with pytest.raises(UserError, match="do not divide"):
        model_of(shape=(7, 8, 1))
