"""`lsrs_jax.load`, files of networks, exported predictions, and the pretrained networks of the package."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsrs_jax
from lsrs_jax import data
from lsrs_jax.api import loading
from lsrs_jax.api.export import _needed
from lsrs_jax.certification import ledger, store, verify
from lsrs_jax.certification.table import read_table
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing.confidence import leaders
from studies import pretrained
from support import threefry
from support.commands import ended, refused, run

IMAGES = data.load("digits", "test").read(np.arange(8), np.float64)[0]


def test_a_workdir_gives_the_classifier_that_the_command_certified(trained, certified):
    classifier = lsrs_jax.load(trained)
    stored = store.read(certified.with_name("certificates.json"))
    assert classifier.lipschitz == stored.lipschitz.constant
    assert classifier.sigma == stored.identity.sigma
    assert list(classifier.class_names) == stored.identity.data["class_names"]
    found = classifier.certify(IMAGES, n=stored.identity.n, key=threefry(stored.identity.seed))
    table = read_table(certified)
    np.testing.assert_array_equal(found.predict, table.predict[:8])
    np.testing.assert_allclose(found.radius, table.radius[:8], rtol=1e-9)


def test_steps_and_sources_that_are_not_there(trained, tmp_path):
    steps = sorted(int(path.name) for path in (trained / "checkpoints").glob("[0-9]*"))
    older, newest = lsrs_jax.load(trained, step=steps[0]), lsrs_jax.load(trained)
    x = jnp.asarray(IMAGES, jnp.float32)
    assert (older.soft_logits(x, threefry(0), 4) != newest.soft_logits(x, threefry(0), 4)).any()
    for source, message in ((tmp_path / "none", "no network at"), ("nets", "-small, digits"), (tmp_path, "holds no")):
        with pytest.raises(UserError, match=message):
            lsrs_jax.load(source)
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        lsrs_jax.load(trained, step=7)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "digits"
    run("export", f"--workdir={trained}", f"--out={out}", "--batch=4", "--n=300", "--alpha=0.01")
    return out


def test_a_file_holds_the_same_network(trained, exported):
    one, other = lsrs_jax.load(trained), lsrs_jax.load(exported)
    x = jnp.asarray(IMAGES, jnp.float32)
    np.testing.assert_array_equal(one.soft_logits(x, threefry(0), 8), other.soft_logits(x, threefry(0), 8))
    assert (one.lipschitz, one.sigma, one.class_names) == (other.lipschitz, other.sigma, other.class_names)
    assert lsrs_jax.load(exported / "model.safetensors").lipschitz == one.lipschitz


@pytest.mark.parametrize("position", [0, 9, 300, -5, None])
def test_a_damaged_file_is_one_line(exported, tmp_path, position):
    path = tmp_path / "model.safetensors"
    content = bytearray((exported / "model.safetensors").read_bytes())
    if position is None:
        del content[len(content) // 2 :]
    else:
        content[position] ^= 0x41
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged|no file of a network|configuration"):
        lsrs_jax.load(path)


RUN = """
import pathlib, sys
sys.modules["lsrs_jax"] = None
import jax, numpy as np
program = jax.export.deserialize(pathlib.Path(sys.argv[1]).read_bytes())
x = np.load(sys.argv[2])
print(program.call(x, jax.random.key_data(jax.random.key(3, impl="threefry2x32"))).tolist())
print(program.call(x, jax.random.key_data(jax.random.key(4, impl="threefry2x32"))).tolist())
x[0, 0, 0], x[1] = np.nan, 1e9
print(program.call(x, jax.random.key_data(jax.random.key(3, impl="threefry2x32"))).tolist())
"""


def test_an_exported_prediction_runs_without_this_package(exported, tmp_path):
    x = IMAGES[:4].astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", RUN, exported / "predict.stablehlo", tmp_path / "x.npy"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second, spoilt = map(json.loads, found.stdout.splitlines())
    classifier = lsrs_jax.load(exported)
    for key, classes in ((3, first), (4, second)):
        own = classifier.predict(x.astype(np.float64), key=threefry(key), n=300, alpha=0.01)
        assert classes == own.tolist()
    assert spoilt == [-1, -1, *first[2:]]


def test_the_card_says_how_to_run_the_program(exported, tmp_path, monkeypatch):
    text = (exported / "README.md").read_text()
    assert "sigma 0.5" in text
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(exported)
    names = {}
    exec(code, names)
    assert names["classes"].shape == (4,)


@pytest.mark.parametrize("noise", ["shared", "independent"])
@pytest.mark.parametrize("arithmetic", ["sound", "float32"])
def test_exported_classes_are_those_of_predict(tmp_path, noise, arithmetic):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(12, 4)).astype(np.float32)
    classifier = lsrs_jax.SmoothedClassifier(
        lambda z: jnp.tanh(z.reshape(len(z), -1) @ weights),
        **{"sigma": 0.5, "encoder": lambda x: 2 * x, "lipschitz": 2.0, "tile": (4, 16)},
        noise=noise,
        arithmetic=arithmetic,
    )
    x = rng.normal(size=(8, 3, 4)).astype(np.float32)
    path = classifier.export(tmp_path / "p", (3, 4), batch=8, n=100, alpha=0.05)
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    for seed in range(3):
        found = program.call(x, jax.random.key_data(threefry(seed)))
        own = classifier.predict(x.astype(np.float64), key=threefry(seed), n=100, alpha=0.05)
        np.testing.assert_array_equal(found, own)


@pytest.mark.parametrize(("classes", "tau"), [(2, 0.0), (5, 0.0), (3, 1e-7), (10, 1e-3)])
def test_the_table_of_the_exported_test_is_that_of_leaders(classes, tau):
    n, alpha = 60, 0.01
    needed, rng = _needed(n, classes, alpha, tau), np.random.default_rng(1)
    counts = rng.multinomial(n, rng.dirichlet(np.ones(classes) * 0.4, 4000))[:, :]
    ordered = np.sort(counts, axis=1)[:, ::-1]
    ahead = ordered[:, 0] >= needed[ordered[:, 0] + ordered[:, 1]]
    np.testing.assert_array_equal(ahead, leaders(counts, alpha, tau) >= 0)
    assert ahead.any()
    assert not ahead.all()


def test_what_cannot_be_exported_is_one_line(trained, tmp_path):
    def callback(z):
        return jax.pure_callback(
            lambda z: np.zeros((len(z), 2), np.float32), jax.ShapeDtypeStruct((len(z), 2), "f4"), z
        )

    for options in ({"batch": 0}, {"n": 0}, {"alpha": 2.0}):
        with pytest.raises(UserError):
            lsrs_jax.load(trained).export(tmp_path / "x", (8, 8, 1), **options)
    with pytest.raises(UserError, match="cannot be exported"):
        lsrs_jax.SmoothedClassifier(callback, sigma=0.5).export(tmp_path / "x", (3,))
    assert not (tmp_path / "x").exists()
    assert "no training" in refused("export", f"--workdir={tmp_path}", f"--out={tmp_path / 'o'}")
    assert "--out" in refused("export", f"--workdir={trained}")
    assert "--n" in refused("export", f"--workdir={trained}", f"--out={tmp_path / 'o'}", "--n=0")


@pytest.mark.parametrize("name", loading.pretrained())
def test_a_pretrained_network_is_the_one_of_its_certificates_and_card(name, request):
    home = loading._PRETRAINED / name
    classifier = lsrs_jax.load(name)
    stored, verdict = verify.run(home / "certify" / "default")
    assert verdict.missing == verdict.others == 0
    assert classifier.lipschitz == pytest.approx(stored.lipschitz.constant, rel=1e-9)
    counts = ledger.read(home / "certify" / "default", *schedule_of(stored), stored.identity.run)
    settings = stored.settings.copy_and_resolve_references()
    if settings.data.name != "digits":
        settings.data.dir = str(request.getfixturevalue("real_data"))
    images = data.load_split(settings.data, settings.data.split)
    assert images.digest() == stored.identity.data["digest"]
    some = np.array(sorted(counts.images)[:6])
    looks = [counts.images[i].looks[-1] for i in some]
    found = classifier.certify(
        images.read(some, np.float64)[0], n=int(looks[0].sum()), key=threefry(stored.identity.seed)
    )
    for own, look in zip(found.counts, looks, strict=True):  # near-ties of another machine
        assert np.abs(own - look).sum() <= 2 * 5 or look.sum() != looks[0].sum()
    card = (home / "README.md").read_text()
    assert pretrained.card(name, home, "X").partition(" with X.")[0] in card


def schedule_of(stored):
    from lsrs_jax.certification.identity import schedule_of

    return schedule_of(stored.settings), stored.identity.classes


def test_pretrained_networks_are_small_and_report_reads_them(tmp_path):
    home = loading._PRETRAINED
    assert sum(path.stat().st_size for path in home.rglob("*") if path.is_file()) < 2 << 20
    shutil.copytree(home / "digits", tmp_path / "digits")
    assert "| digits | 360 |" in run("report", str(tmp_path / "digits"), f"--out={tmp_path / 'report'}")
    code, out, _ = ended("certify", f"--workdir={tmp_path / 'digits'}", "--verify")
    assert code == 3
    assert "every radius from its samples" in out
