import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsrs_jax import models
from lsrs_jax.config import default
from lsrs_jax.layers.lipschitz import Float64Encoder
from lsrs_jax.models.encoders import ENCODERS
from lsrs_jax.models.flops import flops
from lsrs_jax.models.heads import HEADS
from lsrs_jax.runtime.errors import UserError
from support import threefry

pytestmark = pytest.mark.usefixtures("fast_compilation")


def model_of(shape=(8, 8, 1), **fields):
    config = default().model
    config.update(fields)
    return models.build(config, shape, 10)


@pytest.mark.parametrize("encoder", ["identity", "space_to_depth", "shallow", "deep"])
@pytest.mark.parametrize("noise", ["latent", "input"])
def test_certified_functions_are_the_trained_ones(encoder, noise):
    model = model_of(encoder=encoder, noise=noise, mean=(0.3,), std=(0.5,), head="mlp")
    params = model.init(threefry(0))
    x = np.random.default_rng(0).random((6, 8, 8, 1)).astype(np.float32)
    plain, head = model.for_certification(params)
    latents = Float64Encoder(plain, 6)(x).astype(np.float32)
    trained = jax.jit(lambda params, x: model.classify(params, model.encode(params, x)))(params, x)
    np.testing.assert_allclose(jax.jit(head)(latents), trained, atol=2e-4)
    smooths_input = encoder == "identity" or noise == "input"
    assert model.smooths_input == smooths_input
    assert plain.report.constant == pytest.approx(1.0 if smooths_input else 2.0, rel=1e-9)
    assert np.array_equal(latents, x) == smooths_input


@pytest.mark.parametrize("head", [*sorted(set(HEADS) - {"resnet50"}), pytest.param("resnet50", marks=pytest.mark.soak)])
def test_heads_treat_rows_independently(head):
    model = model_of(encoder="identity", head=head)
    params = model.init(threefry(0))
    z = jax.random.normal(threefry(1), (4, 8, 8, 1))
    logits = model.classify(params, z)
    if hasattr(model.head, "matrix"):
        weights, bias = model.head.matrix(params["head"])
        np.testing.assert_allclose(np.asarray(z, np.float64).reshape(4, -1) @ weights + bias, logits, atol=1e-5)
    assert logits.shape == (4, 10)
    np.testing.assert_allclose(model.classify(params, z.at[1:].set(7.0))[0], logits[0], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"encoder": "deeper"}, "unknown model.encoder 'deeper'"),
        ({"head": "vit"}, "unknown model.head 'vit'"),
        ({"noise": "both"}, "unknown model.noise"),
        ({"method": "qr"}, "unknown convolution method"),
        ({"padding": "same"}, "unknown padding"),
        ({"initializer": "zeros"}, "unknown initializer"),
        ({"activation": "relu"}, "unknown model.activation"),
        ({"widths": (4, 4)}, "must be as many"),
        ({"strides": (2, 0, 1, 1)}, "must be as many"),
        ({"encoder": "blocks", "head": "blocks", "widths": (10**9,) * 4}, "must be as many"),
        ({"encoder": "blocks", "head": "blocks", "widths": (), "strides": ()}, "between 0 and the 0 blocks"),
        ({"widths": (4, -4), "strides": (1, 1)}, "must be as many"),
        ({"split": 5}, "between 0 and the 4 blocks"),
        ({"split": -1}, "between 0 and the 4 blocks"),
        (
            {"encoder": "blocks"},
            "leaves 2 of 4 blocks unused: give --config.model.head=blocks as well, or --config.model.split=4",
        ),
        (
            {"head": "blocks"},
            "leaves 2 of 4 blocks unused: give --config.model.encoder=blocks as well, or --config.model.split=0",
        ),
        ({"encoder": "blocks", "split": 0}, "leaves 4 of 4 blocks unused"),
        ({"encoder": "identity", "head": "blocks", "split": 4}, "leaves 4 of 4 blocks unused"),
        ({"encoder": "blocks_haar", "head": "blocks", "strides": (4, 1, 1, 1)}, "strides of 1 and 2, got 4"),
        ({"encoder": "blocks", "head": "vit"}, "unknown model.head 'vit'"),
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


def test_the_pyramid_ends_in_a_latent_of_1024_numbers():
    model = model_of((32, 32, 3), encoder="pyramid", activation="householder")
    params = jax.eval_shape(model.init, threefry(0))
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    assert jax.eval_shape(model.encode, params, image).shape == (1, 4, 4, 64)


def test_a_deterministic_certificate_needs_a_linear_head_and_counts_the_normalisation():
    with pytest.raises(UserError, match="needs a linear head"):
        model_of(head="mlp").with_linear_head({})
    for noise in ("latent", "input"):
        model = model_of(head="orthogonal", noise=noise, mean=(0.3,), std=(0.5,))
        params = model.init(threefry(0))
        encoder, weights, bias = model.with_linear_head(params)
        assert encoder.report.constant == pytest.approx(2.0, rel=1e-9)
        x = np.random.default_rng(0).random((5, 8, 8, 1)).astype(np.float32)
        logits = Float64Encoder(encoder, 5)(x).reshape(5, -1) @ weights + bias
        np.testing.assert_allclose(logits, model.classify(params, model.encode(params, x)), atol=2e-4)


PRECURSORS = {"partial": (16, 16, 128), "latent": (1, 1, 512), "preprocessor": (32, 32, 64)}


@pytest.mark.parametrize("encoder", PRECURSORS)
def test_the_splits_of_the_precursor_have_its_latents(encoder):
    model = model_of((32, 32, 3), encoder=encoder, head="linear")
    params = jax.eval_shape(model.init, threefry(0))
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    assert jax.eval_shape(model.encode, params, image).shape == (1, *PRECURSORS[encoder])


@pytest.mark.parametrize("method", ["adaptive", pytest.param("paraunitary", marks=pytest.mark.soak)])
@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_every_encoder_is_1_lipschitz(encoder, method):
    size = (16, 16, 3) if encoder in ("partial", "preprocessor") else (32, 32, 3)
    model = model_of(size, encoder=encoder, head="linear", method=method)
    plain, _ = model.for_certification(model.init(threefry(0)))
    assert 1.0 <= plain.report.constant <= 1 + 1e-9


class TestSplitsOfOneNetwork:
    """The first blocks of one network belong to the encoder, the others to the head."""

    def network(self, split, **fields):
        common = {"encoder": "blocks", "head": "blocks", "widths": (6, 0, 10, 10), "strides": (2, 2, 1, 2)}
        return model_of((16, 16, 3), **common | {"split": split} | fields)

    def test_flops_move_from_head_to_encoder_and_none_are_lost(self):
        blocks = [2 * 9 * 12 * 6 * 64, 0, 2 * 9 * 24 * 10 * 16, 2 * 9 * 40 * 10 * 4]
        for split in range(5):
            cost = models.cost(self.network(split))
            # A circular convolution computes one row more than it returns, for 8, 4 and 2 rows.
            assert sum(blocks[:split]) <= cost.encoder <= 1.5 * sum(blocks[:split])
            assert cost.head == sum(blocks[split:]) + 2 * 10 * 10  # the last term is the dense layer
            assert cost.speedup == (cost.encoder + cost.head) / cost.head

    def test_under_input_noise_the_head_has_all_flops(self):
        latent, image = models.cost(self.network(3)), models.cost(self.network(3, noise="input"))
        assert image.encoder == 0
        assert image.head == latent.encoder + latent.head
        assert image.speedup == 1

    def test_the_first_and_the_last_split(self):
        free = self.network(0)
        assert free.smooths_input
        linear = self.network(4, head="normalized")
        params = linear.init(threefry(0))
        assert len(linear.with_linear_head(params)[1]) == 2 * 2 * 10
        with pytest.raises(UserError, match="leaves 1 of 4 blocks unused"):
            self.network(3, head="linear")

    def test_haar_strides_start_by_keeping_the_coarse_image(self):
        """A narrower block drops numbers: initially every second pixel, or with Haar strides the finest bands."""
        smooth = np.add.outer(np.arange(16), 2 * np.arange(16)) / 48.0
        images = jnp.asarray(np.stack([smooth, smooth**2])[..., None].repeat(3, -1), jnp.float32)
        kept = {}
        for encoder in ("blocks", "blocks_haar"):
            model = self.network(1, encoder=encoder, widths=(4, 0, 10, 10))
            latents = np.asarray(model.encode(model.init(threefry(0)), images))
            kept[encoder] = np.linalg.norm(latents[0] - latents[1]) / np.linalg.norm(images[0] - images[1])
        assert kept["blocks"] < 0.65
        assert 0.9 < kept["blocks_haar"] <= 1 + 1e-5

    def test_a_split_keeps_the_shape_at_the_cut(self):
        for split, shape in ((1, (8, 8, 6)), (2, (4, 4, 24)), (3, (4, 4, 10)), (4, (2, 2, 10))):
            model = self.network(split)
            params = model.init(threefry(0))
            x = jnp.zeros((2, 16, 16, 3))
            assert model.encode(params, x).shape == (2, *shape)
            assert model.classify(params, model.encode(params, x)).shape == (2, 10)


def test_the_cost_counts_convolutions_and_not_the_building_of_kernels():
    model = model_of((8, 8, 4), encoder="blocks", head="blocks", widths=(16, 16), strides=(1, 1), split=1)
    product = 2 * 9 * 4 * 16 * 8 * 8
    assert models.cost(model).encoder == product * 9 / 8  # it computes one row more than it returns
    text = models.describe(model)
    assert "noise on 8x8x16 (1,024 numbers)" in text
    assert f"{product * 9 / 8 / 1e6:.2f} MFLOP once per image" in text
    permuted = model_of((8, 8, 4), encoder="space_to_depth", head="linear")
    assert models.cost(permuted) == (0.0, 2 * 256 * 10)
    assert "0.00 MFLOP once" in models.describe(permuted)


def test_flops_of_products_loops_and_complex_numbers():
    def loop(a, b):
        return jax.lax.scan(lambda carry, _: (jax.jit(jnp.matmul)(carry, b), None), a, length=5)[0]

    square = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert flops(loop, square, square) == 5 * 2 * 4**3
    assert flops(lambda a, b: jax.vmap(jnp.dot)(a, b).sum(), square, square) == 2 * 4 * 4
    twisted = jax.ShapeDtypeStruct((4, 4), jnp.complex64)
    assert flops(jnp.matmul, twisted, twisted) == 8 * 4**3
    image, kernel = jax.ShapeDtypeStruct((2, 6, 6, 8), jnp.float32), jax.ShapeDtypeStruct((3, 3, 2, 8), jnp.float32)

    def grouped(x, w):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=layout, feature_group_count=4)

    assert flops(grouped, image, kernel) == 2 * (2 * 3 * 3 * 8) * (3 * 3 * 2)


@pytest.mark.parametrize("noise", ["latent", "input"])
def test_a_head_in_bfloat16_rounds_and_returns_float32(noise):
    model = model_of(head="mlp", noise=noise)
    params = model.init(threefry(0))
    x = np.random.default_rng(0).random((6, 8, 8, 1)).astype(np.float32)
    exact = np.asarray(model.classify(params, x if noise == "input" else model.encode(params, x)))
    model = dataclasses.replace(model, head_dtype="bfloat16")
    rounded = model.classify(params, x if noise == "input" else model.encode(params, x))
    assert rounded.dtype == np.float32
    error = np.abs(np.asarray(rounded) - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.03


def test_data_of_one_class_is_one_line():
    with pytest.raises(UserError, match="the data has 1 class: a classifier needs at least two"):
        models.build(default().model, (8, 8, 1), 1)
