"""Networks that are code of the user: heads and encoders of Linen and NNX, and nothing imported that a file names."""

import json
import shutil

import jax
import numpy as np
import pytest

import lsrs_jax
from lsrs_jax import models
from lsrs_jax.config import default
from lsrs_jax.models import custom
from lsrs_jax.runtime.errors import UserError
from support import threefry
from support.commands import QUICK, ended, run

CODE = '''
import math
import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from lsrs_jax import layers


class Small(nn.Module):
    num_classes: int
    width: int = 8

    @nn.compact
    def __call__(self, z):
        return nn.Dense(self.num_classes)(nn.relu(nn.Dense(self.width)(z.reshape(len(z), -1))))


class Other(nnx.Module):
    def __init__(self, num_classes, latent_shape, width=8, *, rngs):
        self.first = nnx.Linear(math.prod(latent_shape), width, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, z):
        return self.last(self.drop(nnx.relu(self.first(z.reshape(len(z), -1)))))


class Coupling(nn.Module):
    """Convolutions on half of the channels."""

    @nn.compact
    def __call__(self, x):
        x = layers.SpaceToDepth((2, 2))(x)
        left, right = jnp.split(x, 2, axis=-1)
        left = layers.MaxMin()(layers.OrthogonalConv(2, (3, 3))(left))
        return jnp.concatenate([left, right], axis=-1)


class WithStatistics(nnx.Module):
    def __init__(self, num_classes, latent_shape, *, rngs):
        self.norm = nnx.BatchNorm(math.prod(latent_shape), rngs=rngs)
        self.last = nnx.Linear(math.prod(latent_shape), num_classes, rngs=rngs)

    def __call__(self, z):
        return self.last(self.norm(z.reshape(len(z), -1)))


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x)


class Pair(nn.Module):
    def __call__(self, x):
        return x, x


class Summed(nn.Module):
    def __call__(self, x):
        return x.sum()


class Broken(nn.Module):
    def __call__(self, x):
        raise ZeroDivisionError("broken today")


def failing(num_classes):
    raise RuntimeError("no weights today")
'''


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "mine.py"
    path.write_text(CODE)
    return path


def section(code, head="Small", encoder="shallow", **args):
    config = default()
    config.model.head, config.model.head_args = f"{code}:{head}" if head else "linear", json.dumps(args)
    config.model.encoder = encoder if encoder == "shallow" else f"{code}:{encoder}"
    return config


@pytest.mark.parametrize("head", ["Small", "Other"])
def test_heads_of_linen_and_nnx_are_built_with_their_arguments(code, head):
    config = section(code, head, width=5)
    with custom.typed_code(config):
        model = models.build(config.model, (8, 8, 1), 10)
    assert model.shapes()[1].shape == (1, 4, 4, 4)
    leaves = [leaf.shape for leaf in jax.tree.leaves(model.shapes()[0]["head"])]
    assert sorted(leaves) == [(5,), (5, 10), (10,), (64, 5)]


@pytest.mark.parametrize(
    ("head", "encoder", "message"),
    [
        ("WithStatistics", "shallow", "state besides its parameters"),
        ("Missing", "shallow", "has no 'Missing'"),
        ("failing", "shallow", "no weights today"),
        ("", "Dense", "Dense"),
        ("", "Pair", r"mine.py:Pair returns a tuple for one image: it must return one array"),
        ("", "Summed", r"mine.py:Summed returns \(\) for one image"),
        ("", "Broken", "mine.py:Broken failed: .*broken today"),
    ],
)
def test_code_that_cannot_be_used_gives_one_line(code, head, encoder, message):
    config = section(code, head, encoder)

    def use():
        model = models.build(config.model, (8, 8, 1), 10)
        model.for_certification(model.init(threefry(0)))

    with custom.typed_code(config), pytest.raises(UserError, match=message):
        use()


@pytest.mark.parametrize("args", ["[1]", "{", "7"])
def test_arguments_that_are_no_object_are_refused(code, args):
    config = section(code)
    config.model.head_args = args
    with custom.typed_code(config), pytest.raises(UserError, match="JSON object"):
        models.build(config.model, (8, 8, 1), 10)


@pytest.fixture(scope="module")
def own(code, tmp_path_factory):
    """A workdir whose encoder and head are code, trained and certified by the commands."""
    workdir = tmp_path_factory.mktemp("own") / "run"
    flags = [f"--config.model.head={code}:Other", f"--config.model.encoder={code}:Coupling"]
    run("train", *QUICK, *flags, f"--workdir={workdir}")
    allowed = [f"--allow-code={code}:Other", f"--allow-code={code}:Coupling"]
    out = run("certify", f"--workdir={workdir}", *allowed)
    assert "0 SpaceToDepth" in out
    assert "1 OrthogonalConv" in out
    return workdir, allowed


def test_code_is_imported_only_if_the_user_names_it(own, code, monkeypatch):
    workdir, allowed = own
    marker = code.with_name("imported")
    monkeypatch.setattr(custom, "resolve", lambda name: marker.write_text(name))
    for command in (["certify"], ["certify", "--recast=2"], ["audit"], ["export", f"--out={workdir.parent / 'out'}"]):
        code_, _, err = ended(command[0], f"--workdir={workdir}", *command[1:])
        assert code_ == 2
        assert "--allow-code=" in err
    with pytest.raises(UserError, match="--allow-code="):
        lsrs_jax.load(workdir)
    code_, out, _ = ended("certify", f"--workdir={workdir}", "--verify")
    assert code_ == 3
    assert "which only --recast=N with --allow-code imports" in out
    run("certify", f"--workdir={workdir}", "--from-counts", "--config.certify.alpha=0.01")
    run("report", str(workdir), f"--out={workdir.parent / 'report'}")
    assert ended("certify", f"--workdir={workdir}", "--verify", *allowed)[0] == 2
    assert not marker.exists()


def test_named_code_serves_every_command_and_load(own, code):
    workdir, allowed = own
    run("certify", f"--workdir={workdir}", "--recast=2", *allowed)
    names = [flag.removeprefix("--allow-code=") for flag in allowed]
    classifier = lsrs_jax.load(workdir, allow_code=names)
    assert 1 <= classifier.lipschitz < 1 + 1e-9
    run("export", f"--workdir={workdir}", f"--out={workdir.parent / 'exported'}", "--n=64", *allowed)
    with pytest.raises(UserError, match="--allow-code="):
        lsrs_jax.load(workdir.parent / "exported")
    again = lsrs_jax.load(workdir.parent / "exported", allow_code=names)
    x = np.random.default_rng(0).random((2, 8, 8, 1))
    key = threefry(0)
    assert np.array_equal(again.soft_logits(x, key, 8), classifier.soft_logits(x, key, 8))


def test_changed_moved_and_missing_code(own, code, tmp_path):
    workdir, allowed = own
    moved = tmp_path / "moved.py"
    shutil.copy(code, moved)
    names = [f"{moved}:Other", f"{moved}:Coupling"]
    lsrs_jax.load(workdir, allow_code=names)  # the same code in another place
    moved.write_text(CODE.replace("0.5", "0.6"))
    with pytest.raises(UserError, match="--allow-code="):
        lsrs_jax.load(workdir, allow_code=names)
    text = code.read_text()
    try:
        code.write_text(text + "\n# changed\n")
        flags = [flag.removeprefix("--allow-code=") for flag in allowed]
        with pytest.raises(UserError, match="has changed since the training"):
            lsrs_jax.load(workdir, allow_code=flags)
        code.unlink()
        with pytest.raises(UserError, match="there is no file with the code"):
            lsrs_jax.load(workdir, allow_code=flags)
    finally:
        code.write_text(text)


def test_a_forged_configuration_executes_nothing(trained, certified, tmp_path):
    """A folder whose files name code that leaves a marker."""
    workdir, marker = tmp_path / "run", tmp_path / "marker"
    shutil.copytree(trained, workdir)
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(marker)!r}, 'w').close()\ndef Head(**_): pass\n")
    config = json.loads((workdir / "config.json").read_text())
    for name in (f"{evil}:Head", "evil:Head"):
        config["model"]["head"] = name
        (workdir / "config.json").write_text(json.dumps(config))
        for command in (["certify"], ["certify", "--verify"], ["certify", "--recast=1"], ["certify", "--from-counts"]):
            assert ended(command[0], f"--workdir={workdir}", *command[1:])[0] == 2
        for command in (["audit"], ["export", f"--out={tmp_path / 'out'}"]):
            assert ended(command[0], f"--workdir={workdir}", *command[1:])[0] == 2
        ended("report", str(workdir), f"--out={tmp_path / 'report'}")
        with pytest.raises(UserError):
            lsrs_jax.load(workdir)
    assert not marker.exists()


def test_a_library_registers_a_head(monkeypatch):
    monkeypatch.setattr(custom, "REGISTERED", {})
    monkeypatch.setattr("lsrs_jax.models.split.REGISTERED", custom.REGISTERED)
    models.register_head("mine", models.split.HEADS["mlp"])
    models.register_head("mine", models.split.HEADS["mlp"])
    for name in ("linear", "a:b", "mine"):
        with pytest.raises(UserError, match="cannot be registered"):
            models.register_head(name, models.split.HEADS["linear"])
    config = default()
    config.model.head = "mine"
    assert models.build(config.model, (8, 8, 1), 10).head.num_classes == 10
