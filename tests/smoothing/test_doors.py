"""One network through every library that can write it: equal counts, one program, and messages that name the call."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from lsrs_jax import from_torch
from lsrs_jax.certification import store, verify
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing import Sampler, SmoothedClassifier, certify, predict
from lsrs_jax.smoothing.head_trace import TracedHead
from support import threefry
from support.commands import run

SHAPE, TILE, CLASSES = (8, 8, 3), (2, 16), 4
IMAGES = np.random.default_rng(0).random((3, *SHAPE))
RNG = np.random.default_rng(1)
KERNEL = (RNG.standard_normal((3, 3, 3, 16)) / 3).astype(np.float32)
BIAS = RNG.standard_normal(16).astype(np.float32)
DENSE = RNG.standard_normal((256, CLASSES)).astype(np.float32)


def sample(head, images=IMAGES, **changes):
    settings = {"sigma": 0.5, "key": threefry(0), "n0": 20, "n": 1000, "tile": TILE}
    return certify(head, images, **settings | changes)


def pure(z):
    """A convolution, a pooling and a dense layer, on images NHWC."""
    x = lax.conv_general_dilated(z, KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = lax.reduce_window(jax.nn.relu(x + BIAS), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.reshape(len(z), -1) @ DENSE


def linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.max_pool(nn.relu(nn.Conv(16, (3, 3))(x)), (2, 2), (2, 2))
            return nn.Dense(CLASSES, use_bias=False)(x.reshape(len(x), -1))

    params = {"Conv_0": {"kernel": KERNEL, "bias": BIAS}, "Dense_0": {"kernel": DENSE}}
    return lambda z: Net().apply({"params": params}, z)


class Stateful(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.dense = nnx.Linear(256, CLASSES, use_bias=False, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.conv.kernel[...], self.conv.bias[...] = jnp.asarray(KERNEL), jnp.asarray(BIAS)
        self.dense.kernel[...] = jnp.asarray(DENSE)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv(x)), (2, 2), (2, 2))
        return self.drop(self.dense(x.reshape(len(x), -1)))


def stateful():
    module = Stateful(nnx.Rngs(0))
    module.eval()
    return module


def equinox(batched=True):
    """An Equinox module of one image HWC, which convolves CHW; its dense layer reads the pixels in the order CHW."""
    eqx = pytest.importorskip("equinox")
    key = jax.random.key(0)
    conv, dense = eqx.nn.Conv2d(3, 16, 3, padding=1, key=key), eqx.nn.Linear(256, CLASSES, use_bias=False, key=key)
    kernel, bias = jnp.asarray(KERNEL.transpose(3, 2, 0, 1)), jnp.asarray(BIAS.reshape(-1, 1, 1))
    conv = eqx.tree_at(lambda layer: (layer.weight, layer.bias), conv, (kernel, bias))
    weight = jnp.asarray(DENSE.reshape(4, 4, 16, CLASSES).transpose(3, 2, 0, 1).reshape(CLASSES, -1))
    dense = eqx.tree_at(lambda layer: layer.weight, dense, weight)
    ways = [eqx.nn.Lambda(lambda x: jnp.moveaxis(x, -1, 0)), conv, eqx.nn.Lambda(jax.nn.relu), eqx.nn.MaxPool2d(2, 2)]
    module = eqx.nn.Sequential([*ways, eqx.nn.Lambda(jnp.ravel), dense])
    return jax.vmap(module) if batched else module


def pytorch():
    """A PyTorch module of images NCHW; its dense layer reads the pixels in the order CHW."""
    torch = pytest.importorskip("torch")
    conv, dense = torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Linear(256, CLASSES, bias=False)
    weight = DENSE.reshape(4, 4, 16, CLASSES).transpose(3, 2, 0, 1).reshape(CLASSES, -1)
    with torch.no_grad():
        for parameter, value in (
            (conv.weight, KERNEL.transpose(3, 2, 0, 1)),
            (conv.bias, BIAS),
            (dense.weight, weight),
        ):
            parameter.copy_(torch.tensor(np.ascontiguousarray(value)))
    layers = (conv, torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten(), dense)
    return from_torch(torch.nn.Sequential(*layers).eval(), torch.zeros(1, 3, 8, 8), layout="NHWC")


DOORS = {"pure": lambda: pure, "linen": linen, "nnx": stateful, "equinox": equinox, "pytorch": pytorch}


@pytest.fixture(scope="module")
def expected():
    return sample(pure)


@pytest.fixture(scope="module")
def network():
    return equinox()


@pytest.mark.parametrize("door", [linen, stateful])
def test_libraries_with_the_same_arithmetic_give_the_same_counts(door, expected):
    found = sample(door())
    np.testing.assert_array_equal(found.counts, expected.counts)
    np.testing.assert_array_equal(found.radius, expected.radius)


@pytest.mark.parametrize("channels_last", [True, False])
def test_equinox_gives_the_same_counts_but_where_logits_nearly_tie(channels_last, network, expected):
    """Its sums run in another order, so a sample whose leading logits agree to 1e-6 may get another class."""
    assert np.allclose(network(np.float32(IMAGES)), pure(np.float32(IMAGES)), rtol=1e-5, atol=1e-5)
    found = sample(network, channels_last=channels_last)
    assert np.abs(found.counts - expected.counts).sum() <= 2  # one of 3,000 samples
    np.testing.assert_array_equal(found.predict, expected.predict)
    settings = {"sigma": 0.5, "key": threefry(0), "n": 200, "tile": TILE}
    one = predict(network, IMAGES, channels_last=channels_last, **settings)
    assert one.tolist() == predict(pure, IMAGES, **settings).tolist()


@pytest.mark.parametrize("name", DOORS)
def test_every_door_leads_to_a_folder_that_readers_read(name, expected, tmp_path):
    classifier, labels = SmoothedClassifier(DOORS[name](), sigma=0.5, tile=TILE), expected.predict % CLASSES
    settings = {"key": threefry(0), "n0": 20, "n": 1000}
    found = classifier.certify(IMAGES, labels, out=tmp_path, **settings)
    np.testing.assert_array_equal(found.counts, classifier.certify(IMAGES, **settings).counts)
    assert np.abs(found.counts - expected.counts).sum() <= 2
    stored, verdict = verify.run(found.folder)
    assert verdict.complete
    reordered = name in ("equinox", "pytorch")
    assert stored.identity.program == ("channels_last" if reordered else None)
    run("certify", f"--workdir={tmp_path}", "--from-counts", "--config.certify.alpha=0.05")
    assert "| 3 |" in run("report", f"x={tmp_path}", f"--out={tmp_path / 'report'}")
    # What was begun with one program goes on with it, also in attacks.
    other = SmoothedClassifier(DOORS[name](), sigma=0.5, tile=TILE, channels_last=not reordered)
    np.testing.assert_array_equal(other.certify(IMAGES, labels, out=tmp_path, **settings).counts, found.counts)
    assert store.read(found.folder / "certificates.json").identity == stored.identity


def test_counts_depend_on_neither_spmd_nor_the_number_of_devices(network):
    counts = sample(network).counts
    np.testing.assert_array_equal(sample(network, spmd="pmap").counts, counts)
    classifier = SmoothedClassifier(network, sigma=0.5, tile=TILE, devices=jax.devices()[:3])
    found = classifier.certify(IMAGES, key=threefry(0), n0=20, n=1000)
    np.testing.assert_array_equal(found.counts, counts)
    assert classifier.sampler(SHAPE).program == "channels_last"


def test_counts_of_one_program_are_not_continued_with_the_other(network):
    classifiers = [SmoothedClassifier(network, sigma=0.5, tile=TILE, channels_last=flag) for flag in (True, False)]
    settings = {"key": threefry(0), "n0": 20, "n": 200}
    first = [classifier.certify(IMAGES, **settings) for classifier in classifiers]
    again = classifiers[0].certify(IMAGES, **settings, counts=first[0].samples, alpha=0.01)
    np.testing.assert_array_equal(again.counts, first[0].counts)
    for one, other in ((0, 1), (1, 0)):
        with pytest.raises(UserError, match="counts are of another head"):
            classifiers[one].certify(IMAGES, **settings, counts=first[other].samples)


def test_bfloat16_convolutions_are_replayed_too(network):
    def half(z):
        kernel = jnp.asarray(KERNEL.transpose(3, 2, 0, 1), jnp.bfloat16)
        x = jnp.moveaxis(z, -1, 1).astype(jnp.bfloat16)
        x = lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
        return jax.nn.relu(x).mean(axis=(2, 3)).astype(jnp.float32) @ DENSE[:16]

    samplers = [Sampler(half, SHAPE, sigma=0.5, tile=TILE, channels_last=flag) for flag in (True, False)]
    assert [sampler.program for sampler in samplers] == ["channels_last", "plain"]
    one, other = (sampler.one_batch(IMAGES[:2], threefry(0), "estimation", 960) for sampler in samplers)
    assert one.sum() == other.sum() == 1920
    assert np.abs(one - other).sum() <= 200  # two roundings of bfloat16 are two classifiers


# ------------------------------------------------------------------------------------------------ which program runs


@pytest.mark.parametrize("spmd", ["shard_map", "pmap"])
def test_a_head_without_such_convolutions_keeps_its_program(spmd):
    on, off = (Sampler(linen(), SHAPE, sigma=0.5, tile=TILE, spmd=spmd, channels_last=flag) for flag in (True, False))
    assert on.program == off.program == "plain"
    assert on.head_digest == off.head_digest
    texts = [re.sub("metadata={.*?}", "", sampler._call.func.as_text()) for sampler in (on, off)]
    found = [[line for line in text.splitlines() if " = " in line] for text in texts]  # without the names of files
    assert found[0] == found[1] != []


def test_the_sampling_loop_has_no_slow_convolution(network):
    def labels(flag):
        sampler = Sampler(network, SHAPE, sigma=0.5, tile=TILE, channels_last=flag)
        return set(re.findall("dim_labels=([a-z0-9>_-]+)", sampler._call.func.as_text()))

    assert "b01f_01io->b01f" in labels(True)
    assert not any(label.startswith("bf01") for label in labels(True))
    assert any(label.startswith("bf01") for label in labels(False))


def test_other_platforms_and_the_flag_keep_the_program_of_the_head(network):
    shape = (TILE[0] * TILE[1], *SHAPE)
    plain, replayed = TracedHead(network), TracedHead(network, channels_last=True)
    plain.trace(shape), replayed.trace(shape)
    assert (plain.program, replayed.program) == ("plain", "channels_last")
    assert plain.for_loop(shape) is network
    with pytest.raises(UserError, match="channels_last must be True or False"):
        sample(pure, channels_last="yes")


def test_transformations_of_equinox_are_replayed_too(expected):
    eqx = pytest.importorskip("equinox")
    head = eqx.filter_jit(eqx.filter_vmap(equinox(batched=False)))
    sampler = Sampler(head, SHAPE, sigma=0.5, tile=TILE)
    assert sampler.program == "channels_last"
    np.testing.assert_array_equal(sample(head).predict, expected.predict)


def test_calls_in_a_row_compile_once_for_each_program(network, monkeypatch):
    made, own = [], Sampler.__init__
    monkeypatch.setattr(Sampler, "__init__", lambda self, *args, **kw: made.append(self) or own(self, *args, **kw))
    for flag in (True, True, False, False):
        sample(network, channels_last=flag, n=100)
    assert [sampler.program for sampler in made] == ["channels_last", "plain"]


def test_a_head_that_depends_on_a_mesh_is_replayed_without_it(network):
    def constrained(z):
        return network(lax.with_sharding_constraint(z, P("data")))

    counts = sample(network).counts
    for kind in (jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto):
        with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(kind,))):
            np.testing.assert_array_equal(sample(network).counts, counts)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        np.testing.assert_array_equal(sample(constrained).counts, counts)
        sampler = Sampler(constrained, SHAPE, sigma=0.5, tile=TILE)
    assert sampler.program == "channels_last"


def test_rows_that_depend_on_each_other_are_refused_in_the_program_that_runs(network):
    for head in (lambda z: network(z - z.mean(axis=0)), lambda z: network(z) * (1 + jnp.arange(len(z))[:, None])):
        with pytest.raises(UserError, match="depend on each other"):
            sample(head)


# ---------------------------------------------------------------------------------------- heads that are not ready yet


def with_dropout():
    eqx = pytest.importorskip("equinox")
    return eqx.nn.Sequential([equinox(batched=False), eqx.nn.Dropout(0.5)])


def with_state(axis=None, closed=True):
    """An Equinox head with batch statistics, in train mode."""
    eqx = pytest.importorskip("equinox")
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(CLASSES, "batch", mode="ema")
    network = equinox(batched=False)

    def one(x):
        return norm(network(x), state)[0] if closed else norm(network(x))

    return jax.vmap(one, axis_name=axis)


def torch_module():
    torch = pytest.importorskip("torch")
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, CLASSES))


def linen_statistics():
    norm = nn.BatchNorm(use_running_average=False)
    variables = norm.init(threefry(0), np.zeros((1, CLASSES), np.float32))
    return lambda z: norm.apply(variables, pure(z), mutable=["batch_stats"])


def called(head, *index):
    """A function that calls the head, and takes a part of what it returns."""
    return lambda z: head(z)[index[0]] if index else head(z)


def wrapped_layer():
    module = nnx.bridge.ToNNX(nn.Dense(CLASSES), rngs=nnx.Rngs(0)).lazy_init(np.zeros((1, 192), np.float32))
    module.eval()
    return lambda z: module(z.reshape(len(z), -1))


UNREADY = {
    "one example": (lambda: equinox(batched=False), r"takes one example, channels first: give jax\.vmap\(model\)"),
    "one example, by a function": (lambda: called(equinox(batched=False)), r"give jax\.vmap\(model\)"),
    "dropout": (lambda: jax.vmap(with_dropout()), r"draws random numbers: call eqx\.nn\.inference_mode\(model\) first"),
    "statistics": (with_state, r"statistics over the batch: call eqx\.nn\.inference_mode\(model\) first"),
    "statistics, named axis": (
        lambda: with_state("batch"),
        r"rows depend .* Equinox: eqx\.nn\.inference_mode\(model\)",
    ),
    "no state": (
        lambda: with_state(closed=False),
        r"give lambda z: jax\.vmap\(lambda x: model\(x, state\)\[0\]\)\(z\)",
    ),
    "PyTorch": (torch_module, r"convert it with lsrs_jax\.from_torch\(module, example_input\)"),
    "PyTorch, by a function": (lambda: called(torch_module()), r"lsrs_jax\.from_torch\(module"),
    "NNX": (lambda: Stateful(nnx.Rngs(0)), r"NNX in train mode .*: call its method eval\(\)"),
    "Linen in NNX": (wrapped_layer, r"give each wrapped layer \.to_nnx__rngs = None"),
    "Linen, unbound": (lambda: nn.Dense(3), r"for a Flax module: lambda z: net\.apply\(variables, z\)"),
    "Linen, logits and state": (linen_statistics, "give the logits alone, without the new state"),
    "Linen, statistics": (lambda: called(linen_statistics(), 0), "Linen: use_running_average=True"),
}


@pytest.mark.parametrize("name", UNREADY)
def test_a_head_that_is_not_ready_is_told_the_call_that_is_missing(name):
    make, why = UNREADY[name]
    head = make()
    with pytest.raises(UserError, match=why) as caught:
        sample(head)
    assert str(caught.value).isprintable()


def test_inference_mode_is_all_that_they_miss(expected):
    eqx = pytest.importorskip("equinox")
    found = sample(jax.vmap(eqx.nn.inference_mode(with_dropout())))
    np.testing.assert_array_equal(found.predict, expected.predict)
