"""The free first layer: integer weights, exact sums, and where it is off."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsrs_jax import SmoothedClassifier, models
from lsrs_jax.certification import store
from lsrs_jax.config import default
from lsrs_jax.models.first_layer import split_head
from lsrs_jax.models.heads import HEADS, BlocksHead
from lsrs_jax.runtime import mesh
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing import FirstLayer, Sampler
from lsrs_jax.smoothing.discrete_gaussian import MAX_LATENT
from lsrs_jax.smoothing.first_layer import REACH, IntegerLayer, SplitHead
from support import threefry
from support.commands import ended, run

RNG = np.random.default_rng(5)
SPACING, SIGMA, MAX_NOISE = 2.0**-16, 0.25, 2**18 - 1
DENSE = FirstLayer(RNG.normal(size=(32, 24)), RNG.normal(size=24))
CONV = FirstLayer(RNG.normal(size=(3, 3, 2, 5)).astype(np.float32), RNG.normal(size=5), (2, 1), ((0, 2), (1, 1)))
LAYERS = {
    "dense": (DENSE, (4, 4, 2)),
    "wide": (FirstLayer(RNG.normal(size=(3072, 6)) * 10.0 ** RNG.uniform(-9, 9, (3072, 6))), (3072,)),
    "even": (FirstLayer(np.full((3072, 2), 1 / 3), np.array([1e6, -1e-6])), (3072,)),
    "zero": (FirstLayer(np.zeros((3, 2)), np.array([0.0, 2.5])), (3,)),
    "conv": (CONV, (5, 6, 2)),
    "same": (FirstLayer(CONV.kernel, RNG.normal(size=(3, 3, 5)), (2, 2), "SAME"), (5, 6, 2)),
    "valid": (FirstLayer(CONV.kernel, None, (1, 2), "VALID"), (5, 6, 2)),
}


def rest(outputs):
    outputs = jax.nn.relu(outputs.reshape(len(outputs), -1))
    weights = np.random.default_rng(6).normal(size=(outputs.shape[1], 3)).astype(np.float32)
    return (outputs - 0.5) @ weights


def evaluated(layer, latents, noise):
    """The outputs for every pair of latents and noise, ``(images, samples, *outputs)``."""
    tables = layer.tables

    @jax.jit
    def rows(latents, noise):
        return layer.rows(layer.of_images(latents, tables), layer.product(noise, tables), tables)

    return np.asarray(rows(latents, noise)).reshape(len(latents), len(noise), *layer.shape)


def python_outputs(given, layer, steps):
    """The outputs of an integer layer in integers of Python, by the definition of a convolution."""
    tables = layer.tables
    weights, bias = (np.vectorize(int, otypes=[object])(part) for part in (tables.kernel, tables.bias))
    steps = np.vectorize(int, otypes=[object])(steps)
    if given.kernel.ndim == 2:
        sums = np.dot(steps.reshape(-1), weights) + bias
    else:
        (height, width, channels, _), (down, right) = given.kernel.shape, given.strides
        weights = weights.reshape(height, width, channels, -1)
        edges = given.padding
        if isinstance(edges, str):
            edges = jax.lax.padtype_to_pads(steps.shape[:2], (height, width), given.strides, edges)
        steps = np.pad(steps, (*edges, (0, 0)), constant_values=0)
        sums = np.zeros(layer.shape, object) + bias
        for i, j in itertools.product(*map(range, layer.shape[:2])):
            window = steps[i * down : i * down + height, j * right : j * right + width]
            sums[i, j] += np.tensordot(window, weights, 3)
    return np.vectorize(float, otypes=[np.float32])(sums) * tables.scale


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_are_those_of_integers_of_python(name):
    given, shape = LAYERS[name]
    layer = IntegerLayer(given, SPACING, shape)
    latents = RNG.integers(-MAX_LATENT, MAX_LATENT, (3, *shape), np.int32, endpoint=True)
    noise = RNG.integers(-MAX_NOISE, MAX_NOISE, (3, *shape), np.int32, endpoint=True)
    if given.kernel.ndim == 2:  # the largest sums of an output
        signs = np.sign(layer.tables.kernel[:, 0]).astype(np.int32).reshape(shape)
        latents[0], noise[0] = MAX_LATENT * signs, MAX_NOISE * signs
    found = evaluated(layer, latents, noise)
    for image, sample in itertools.product(range(3), range(3)):
        expected = python_outputs(given, layer, latents[image].astype(np.int64) + noise[sample])
        np.testing.assert_array_equal(found[image, sample], expected)
    assert layer.agrees((3, 2), mesh.local_mesh())


@pytest.mark.parametrize("name", LAYERS)
def test_weights_have_as_many_bits_as_the_sums_allow(name):
    given, shape = LAYERS[name]
    tables = IntegerLayer(given, SPACING, shape).tables
    kernel, bias = (part.reshape(-1, len(tables.scale)) for part in (given.kernel, given.bias))

    def largest(output, bits):
        weights = [round(float(np.ldexp(weight, bits))) for weight in kernel[:, output]]
        offsets = [round(float(np.ldexp(offset / SPACING, bits))) for offset in bias[:, output]]
        return REACH * sum(map(abs, weights)) + max(map(abs, offsets)), weights, offsets

    for output, scale in enumerate(tables.scale):
        bits = int(np.log2(SPACING / np.float64(scale)))
        total, weights, offsets = largest(output, bits)
        assert total < 2**53
        assert not kernel[:, output].any() or largest(output, bits + 1)[0] >= 2**53
        np.testing.assert_array_equal(tables.kernel[:, output], weights)
        np.testing.assert_array_equal(tables.bias.reshape(-1, len(tables.scale))[:, output], offsets)


@pytest.mark.parametrize("name", ["dense", "conv", "same"])
def test_outputs_depend_on_the_sum_of_latent_and_noise_alone(name):
    given, shape = LAYERS[name]
    layer = IntegerLayer(given, SPACING, shape)
    total = RNG.integers(-(2**22), 2**22, shape, np.int32)
    noise = RNG.integers(-MAX_NOISE, MAX_NOISE, (8, *shape), np.int32)
    found = evaluated(layer, total - noise, noise)
    expected = evaluated(layer, total[None], np.zeros((1, *shape), np.int32))[0, 0]
    for number in range(len(noise)):
        np.testing.assert_array_equal(found[number, number], expected)
    near = np.asarray(given((total[None] * SPACING).astype(np.float32))[0])
    np.testing.assert_allclose(expected, near, rtol=0, atol=1e-4 * np.abs(near).max())


def float32_product(self, steps, tables):
    """W·steps with the sums rounded to float32: the variant that is not sound."""
    windows = self._windows(steps, jnp).astype(jnp.float32)
    return jnp.dot(windows, jnp.asarray(tables.kernel, jnp.float32), precision="highest")


def test_a_product_in_float32_is_another_function_and_turns_the_layer_off(monkeypatch):
    given, shape = LAYERS["dense"]
    latents, noise = (RNG.integers(-(2**17), 2**17, (4, *shape), np.int32) for _ in range(2))
    exact = evaluated(IntegerLayer(given, SPACING, shape), latents, noise)
    monkeypatch.setattr(IntegerLayer, "product", float32_product)
    layer = IntegerLayer(given, SPACING, shape)
    assert (evaluated(layer, latents, noise) != exact).any()
    assert not layer.agrees((4, 4), mesh.local_mesh())
    assert sampler((given, rest), shape).first_layer is None


def sampler(head, shape, **changes):
    return Sampler(head, shape, **{"sigma": SIGMA, "tile": (4, 8), "devices": jax.local_devices()[:1]} | changes)


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_counts_are_those_of_rows_one_by_one_on_any_devices(name):
    given, shape = LAYERS[name]
    latents, n = 0.2 * RNG.normal(size=(4, *shape)), 205
    many = {"devices": None, "spmd": "pmap" if name == "dense" else "shard_map"}
    settings = [{}, many, {"integer_first_layer": False}]
    made = [sampler((given, rest), shape, **each) for each in settings]
    counts = [each.one_batch(latents, threefry(1), "estimation", n) for each in made]
    assert [each.first_layer for each in made] == ["integer", "integer", None]
    loop, layer = made[0], IntegerLayer(given, SPACING, shape)
    key, quantized, zero = loop.keys(threefry(1))["estimation"], loop.quantize(latents), np.zeros((1, *shape), np.int32)
    expected = np.zeros((4, 3), int)
    for block in range(-(-n // 8)):
        noise = np.asarray(loop.blocks.noise(key, None, block, loop._tables))[: n - 8 * block].reshape(-1, *shape)
        steps = (quantized[:, None] + noise[None]).reshape(-1, *shape)
        outputs = evaluated(layer, steps, zero)[:, 0]
        classes = np.asarray(rest(outputs)).argmax(axis=1).reshape(4, -1)
        expected += (classes[:, :, None] == np.arange(3)).sum(axis=1)
    assert (np.count_nonzero(expected, axis=1) > 1).any()
    for found in counts[:2]:
        np.testing.assert_array_equal(found, expected)
    assert np.abs(counts[2] - expected).sum() <= 4  # the head in float32 is another function, but a near one
    clean = np.asarray(rest(evaluated(layer, quantized, zero)[:, 0])).argmax(axis=1)
    np.testing.assert_array_equal(loop.without_noise(quantized), clean)


@pytest.mark.parametrize("changes", [{"noise": "independent"}, {"arithmetic": "float32"}])
def test_it_is_off_where_it_would_not_be_exact(changes):
    given, shape = LAYERS["dense"]
    pair, whole = (given, rest), lambda z: rest(given(z))
    counts = [
        sampler(head, shape, **changes).one_batch(np.ones((2, *shape)), threefry(0), "selection", 50, range(2))
        for head in (pair, whole)
    ]
    np.testing.assert_array_equal(*counts)
    assert sampler(pair, shape, **changes).first_layer is None
    assert sampler(whole, shape).first_layer is None


def test_a_sampler_knows_its_layer():
    given, shape = LAYERS["dense"]
    loop, other = sampler((given, rest), shape), (FirstLayer(given.kernel + 1e-3, given.bias), rest)
    assert loop.is_current((FirstLayer(given.kernel, given.bias), rest))
    assert not loop.is_current(other)
    assert loop.head_digest != sampler(other, shape).head_digest


def test_what_does_not_fit_is_refused():
    for wrong in (
        lambda: FirstLayer(np.zeros((2, 3, 4))),
        lambda: FirstLayer(np.zeros((2, 3)), np.zeros(2)),
        lambda: FirstLayer(np.full((2, 3), np.nan)),
        lambda: FirstLayer(CONV.kernel, padding="CIRCULAR"),
        lambda: SmoothedClassifier((DENSE, rest, rest), sigma=SIGMA),  # pyright: ignore[reportArgumentType]
        lambda: sampler((DENSE, rest), (3, 3)),
        lambda: sampler((CONV, rest), (5, 6, 3)),
        lambda: sampler((FirstLayer(1e36 * DENSE.kernel), rest), (32,)),
        lambda: sampler((FirstLayer(CONV.kernel, np.zeros((9, 9, 5))), rest), (5, 6, 2)),
        lambda: SmoothedClassifier((DENSE, rest), sigma=SIGMA, integer_first_layer=1),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(UserError):
            wrong()


# ------------------------------------------------------------------------------------------------- heads of the package

CONVOLUTIONS = {
    "convnet",
    "convnet_light",
    "convnet_small",
    "resnet",
    "resnet_latent",
    "resnet_fine",
    "resnet10",
    "resnet18",
}
SPLIT = CONVOLUTIONS | {"mlp", "resnet50"}


@pytest.mark.parametrize("name", ["mlp", "convnet_light", "resnet", "resnet50", "resnet18_tail"])
@pytest.mark.parametrize("encoder", ["shallow", "identity"])
def test_heads_of_this_package_are_split_at_their_first_layer(name, encoder):
    """Under ISRS the normalisation, with its zeros at the border, becomes part of the layer."""
    config = default().model
    config.encoder, config.head, config.mean, config.std = encoder, name, (0.3, 0.4, 0.5), (0.2, 0.5, 0.4)
    model = models.build(config, (16, 16, 3), 4)
    params = jax.tree.map(lambda leaf: leaf + 0.02, model.init(threefry(2)))
    encoded, head = model.for_certification(params)
    assert isinstance(head, SplitHead) == (name in SPLIT)
    if not isinstance(head, SplitHead):
        return
    z = RNG.random((2, *encoded.report.output_shape)).astype(np.float32)
    whole = np.asarray(head(z))
    np.testing.assert_allclose(head.rest(head.first(z)), whole, rtol=0, atol=2e-5 * np.abs(whole).max())
    assert IntegerLayer(head.first, SPACING, z.shape[1:]).shape == np.asarray(head.first(z)).shape[1:]


def test_the_heads_that_are_split():
    def begins(head):
        shape, whole = (8, 8, 2), lambda z: z
        params = jax.eval_shape(head.init, threefry(0), jnp.zeros((1, *shape)))["params"]
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
        return split_head(head, zeros, shape, whole, "float32", None) is not whole

    assert {name for name in HEADS if begins(HEADS[name](3))} == SPLIT
    assert begins(BlocksHead(3, (4, 4), (1, 2)))
    assert not begins(BlocksHead(3, (4, 4), (2, 1)))
    assert not begins(BlocksHead(3, (0, 4), (1, 1)))


# ----------------------------------------------------------------------------------------------------------- end to end

X = RNG.random((6, 32))
LABELS = np.asarray(rest(DENSE(X.astype(np.float32)))).argmax(axis=1)


def made(**changes):
    return SmoothedClassifier((DENSE, rest), **{"sigma": SIGMA, "tile": (4, 16)} | changes)


def first_layer(workdir):
    return json.loads((workdir / "certify/default/certificates.json").read_text())["identity"].get("first_layer")


def test_certify_verify_audit_predict_and_export_serve_one_function(tmp_path):
    found = made().certify(X, LABELS, out=tmp_path, n=500)
    assert first_layer(tmp_path) == "integer"
    assert (found.predict >= 0).any()
    assert ended("certify", f"--workdir={tmp_path}", "--verify")[0] == 0
    audit = made().audit(X, LABELS, out=tmp_path, steps=3, samples=4, votes=300, restarts=1)
    assert audit.pairs.sum() > 0
    assert audit.flips.sum() == 0
    in_memory = made().certify(X, LABELS, n=500)
    np.testing.assert_array_equal(in_memory.counts, found.counts)
    program = jax.export.deserialize(made().export(tmp_path / "program", (32,), batch=6, n=300).read_bytes())
    key = threefry(3)
    classes = program.call(X.astype(np.float32), jax.random.key_data(key))
    np.testing.assert_array_equal(classes, made().predict(X.astype(np.float32), key=key, n=300))


def test_a_folder_continues_with_the_layer_that_it_began_with(tmp_path, monkeypatch):
    """A folder of an older version has no field, and means the head in its own dtype."""
    made(integer_first_layer=False).certify(X[:3], LABELS[:3], out=tmp_path / "old", n=200)
    assert first_layer(tmp_path / "old") is None
    made().certify(X[:3], LABELS[:3], out=tmp_path / "old", n=200, alpha=0.01)
    assert first_layer(tmp_path / "old") is None
    made().certify(X[:3], LABELS[:3], out=tmp_path / "new", n=200)
    made(integer_first_layer=False).certify(X[:3], LABELS[:3], out=tmp_path / "new", n=200, alpha=0.01)
    assert first_layer(tmp_path / "new") == "integer"
    monkeypatch.setattr(IntegerLayer, "agrees", lambda *_: False)
    with pytest.raises(UserError, match=r"sampled with the first_layer 'integer' of the head, and this is 'plain'"):
        made().certify(X[:3], LABELS[:3], out=tmp_path / "new", n=200)
    with pytest.raises(UserError, match="integer first layer, which this platform does not compute exactly"):
        made().audit(X[:3], LABELS[:3], out=tmp_path / "new", steps=2, samples=4, votes=300, restarts=1)


def test_trained_networks_are_certified_and_drawn_again(tmp_path, copy):
    run("certify", f"--workdir={copy}", "--config.certify.name=own", "--config.certify.stop=10")
    identity = store.read_folder(copy / "certify" / "own", "to read").identity
    assert identity.first_layer == "integer"
    out = run("certify", f"--workdir={copy}", "--config.certify.name=own", "--recast=4")
    assert "0 differ" in out


@pytest.mark.parametrize(
    "wrong",
    [
        {"strides": (0, 1)},
        {"strides": 2},
        {"strides": (1.5, 1)},
        {"padding": ((1, 1),)},
        {"padding": 1},
        {"padding": ((-1, 0), (0, 0))},
    ],
    ids=str,
)
def test_strides_and_padding_that_fit_no_layer_are_refused(wrong):
    with pytest.raises(UserError, match="of a first layer, strides are two whole numbers >= 1, and padding two pairs"):
        FirstLayer(np.ones((3, 3, 2, 4)), **wrong)


def test_kernels_that_no_float32_layer_can_have_are_refused():
    with pytest.raises(UserError, match="kernel"):
        FirstLayer(np.ones((3, 2)) * 1j)
    with pytest.raises(UserError, match="has a kernel"):
        FirstLayer(np.ones((3, 0)))
    with pytest.raises(UserError, match="too large for float32"):
        IntegerLayer(FirstLayer(np.full((3, 2), 1e305)), 2.0**-16, (3,))
    with pytest.raises(UserError, match="is larger than latents"):
        IntegerLayer(FirstLayer(np.ones((5, 5, 2, 4)), padding="VALID"), 2.0**-16, (3, 3, 2))
