"""Wrong input to the commands gives one line that says what is wrong and what to do, and changes no file."""

import functools
import json
import shutil

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from lsrs_jax import certify, models, train
from lsrs_jax.config import save_config
from lsrs_jax.flags import config_from_flags
from lsrs_jax.models.heads import HEADS
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.rng import domain_key, pinned
from lsrs_jax.training import checkpoint
from support import prepared
from support.commands import QUICK, ROOT, fingerprint, refused, run, truncate_checkpoint

COMMANDS = {"train": train, "certify": certify}


def edit_json(path, field, value):
    """Sets a field to the value of a JSON text, or removes it."""
    content = json.loads(path.read_text())
    *sections, last = field.split(".")
    section = functools.reduce(lambda inner, name: inner[name], sections, content)
    del section[last]
    section |= {} if value is None else {last: json.loads(value)}
    path.write_text(json.dumps(content))


def damage_ledger(workdir):
    path = workdir / "certify" / "base" / "votes.0.tsv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:5], lines[5].replace("selection", "estimation"), *lines[6:]]) + "\n")


BAD_CERTIFY = {
    "misspelt field": ([], "--config.certify.alhpa=0.1", "did you mean certify.alpha?"),
    "wrong type": ([], "--config.certify.n=many", "--config.certify.n=many: it must be a whole number"),
    "negative sigma": ([], "--config.sigma=-1.0", "sigma must be a positive number"),
    "no votes": ([], "--config.certify.n=0", "certify.n must be between 1"),
    "no selection": ([], "--config.certify.n0=0", "certify.n0 must be between 1"),
    "alpha": ([], "--config.certify.alpha=1.0", "certify.alpha must be strictly between 0 and 1"),
    "name": ([], "--config.certify.name=../x", "certify.name must be a plain folder name"),
    "config file": (
        [],
        "--config=configs/digits.py",
        "this command takes no --config=FILE: its configuration is",
    ),
    "stray argument": ([], "--n=5", "unknown argument"),
    "stray word": ([], "fast", "unknown argument"),
    "no images": ([], "--config.certify.start=5000", "0 or above certify.start=5000"),
    "missing data": ([], "--config.data.name=svhn", "tfds build svhn"),
    "no name": ([], "--config.data.name=", "data.name must be the name"),
    "other sigma": ([], "--config.sigma=0.25", "run: sigma was 0.5 and is now 0.25"),
    "other n": ([], "--config.certify.n=2000", "certify.n was 1000 and is now 2000"),
    "noise on the image": ([], "--config.model.noise=input", "model.noise was 'latent' and is now 'input'"),
    "other split": ([], "--config.data.split=train", "data.split was 'test' and is now 'train'"),
    "other step": (
        [lambda w: shutil.rmtree(max((w / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name)))],
        "",
        "of the checkpoint of step 60, not 40",
    ),
    "other seed": ([], "--config.certify.seed=1", "certify.seed was"),
    "seed of the training": ([], "--config.seed=1", "seed is that of the training; to draw other noise"),
    "truncated checkpoint": ([truncate_checkpoint], "", "cannot read checkpoint"),
    "damaged ledger": ([damage_ledger], "", "is damaged"),
    "no provenance": ([lambda w: (w / "certify/base/certificates.json").unlink()], "", "holds samples but no"),
    "damaged provenance": ([lambda w: (w / "certify/base/certificates.json").write_text("{")], "", "is damaged"),
    "damaged config": ([lambda w: (w / "config.json").write_text("{")], "", "not a stored configuration"),
    "foreign config": ([lambda w: (w / "config.json").write_text('{"sgima": 1}')], "", "did you mean sigma?"),
    "tile of halves": ([], "--config.certify.tile=(8,8.5)", "tile=(8,8.5): it must be whole numbers"),
    "tile of words": ([], "--config.certify.tile=('a',3)", "tile=('a',3): it must be whole numbers"),
    "huge tile": ([], "--config.certify.tile=(4096,65536)", "tile was"),
    "other schedule": ([], "--config.certify.schedule=staged", "certify.schedule was 'fixed' and is now 'staged'"),
    "other arithmetic": (
        [],
        "--config.certify.arithmetic=float32",
        "certify.arithmetic was 'sound' and is now 'float32'",
    ),
    "other noise": ([], "--config.certify.noise=independent", "noise was 'shared' and is now 'independent'"),
    "other head_dtype": ([], "--config.certify.head_dtype=bfloat16", "head_dtype was 'float32' and is now 'bfloat16'"),
    "unknown bound": ([], "--config.certify.bound=ternary", "certify.bound must be 'binary' or 'multiclass'"),
    "unknown schedule": (
        [],
        "--config.certify.schedule=quick",
        "certify.schedule must be 'fixed' or 'staged' or 'anytime'",
    ),
    "negative radii": ([], "--config.certify.radii=(-1.0,)", "certify.radii must be numbers >= 0"),
    "words as radii": ([], "--config.certify.radii=('a',)", "radii=('a',): it must be numbers"),
    "n from counts": ([], ["--from-counts", "--config.certify.n=2000"], "were drawn with n 1000, not 2000"),
    "staged from fixed counts": (
        [],
        ["--from-counts", "--config.certify.schedule=staged"],
        "were drawn with schedule 'fixed', not 'staged'",
    ),
    "arithmetic from counts": (
        [],
        ["--from-counts", "--config.certify.arithmetic=float32"],
        "were drawn with arithmetic 'sound', not 'float32'",
    ),
    "data from counts": (
        [],
        ["--from-counts", "--config.data.split=train"],
        "were drawn with data.split 'test', not 'train': leave that flag out",
    ),
    "size from counts": (
        [],
        ["--from-counts", "--config.data.size=16"],
        "were drawn with data.size 0, not 16: leave that flag out",
    ),
    "model from counts": (
        [],
        ["--from-counts", "--config.model.noise=input"],
        "were drawn with model.noise 'latent', not 'input': leave that flag out",
    ),
    "counts without a digest": (
        [lambda w: edit_json(w / "certify/base/certificates.json", "digest", None)],
        "--from-counts",
        "is damaged",
    ),
    "counts of an old version": (
        [
            lambda w, f=field: edit_json(w / "certify/base/certificates.json", f, None)
            for field in ("digest", "format", "identity.format")
        ],
        "--from-counts",
        "is unsealed: an old version wrote it",
    ),
    "margins from counts": (
        [],
        ["--from-counts", "--config.certify.certificate=deterministic"],
        "--from-counts is for smoothed certificates: leave --config.certify.certificate out",
    ),
    "selection without votes": (
        [],
        ["--from-counts", "--config.certify.start=100", "--config.certify.stop=200"],
        "has enough samples for a certificate",
    ),
    "no such certification": ([], ["--from-counts", "--config.certify.name=none"], "holds no certification to derive"),
    "counts without a ledger": (
        [lambda w: (w / "certify/base/votes.0.tsv").unlink()],
        "--from-counts",
        "holds no samples; restore votes.*.tsv",
    ),
    "no ledger": ([lambda w: (w / "certify/base/votes.0.tsv").unlink()], "", "holds certificates but no samples"),
    "config without sigma": (
        [lambda w: edit_json(w / "config.json", "sigma", None)],
        "",
        "config field sigma is missing",
    ),
    "null": ([lambda w: edit_json(w / "config.json", "seed", "null")], "", "config field seed has the wrong type"),
    "no identity": ([lambda w: edit_json(w / "certify/base/certificates.json", "identity", None)], "", "is damaged"),
    "empty workdir": ([], "--workdir=", "is not a folder"),
    "other normalisation": ([], "--config.model.mean=(0.5,)", "trained with model.mean="),
    "other encoder": ([], "--config.model.encoder=identity", "trained with model.encoder='shallow'"),
    "no checkpoint": ([lambda w: shutil.rmtree(w / "checkpoints")], "", "no checkpoint"),
    "other training": ([], "--config.train.loss=macer", "trained with train.loss='gaussian', not 'macer'"),
    "no config": ([lambda w: (w / "config.json").unlink()], "", "holds checkpoints but no config.json"),
    "other network": ([], "--config.model.head=linear", "trained with model.head='mlp'"),
}


# These cases run as users run them, in a process of their own: one case for every way in which a command can end. The
# other cases run in this process, because starting JAX takes time. A configuration file without get_config always needs
# its own process: ml_collections loads all files under one name and would find the get_config of an earlier test.
IN_A_PROCESS = (
    "misspelt field",
    "file that is no config",
    "stray word",
    "missing data",
    "truncated checkpoint",
    "damaged ledger",
    "no config",
)


def refusal(case, name, arguments):
    """The line with which a command refuses its arguments; cases in `IN_A_PROCESS` start a process of their own."""
    if case in IN_A_PROCESS:
        return refused(name, *arguments)
    with pytest.raises(UserError) as error:
        COMMANDS[name].run([*map(str, arguments)])
    assert error.value.code == 2
    return str(error.value)


@pytest.mark.parametrize("case", BAD_CERTIFY)
def test_bad_input_to_certify(copy, case, tmp_path, monkeypatch):
    damages, flag, why = BAD_CERTIFY[case]
    for damage in damages:
        damage(copy)
    before = fingerprint(copy)
    flags = flag if isinstance(flag, list) else [flag] if flag else []
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    assert why in refusal(case, "certify", [f"--workdir={copy}", "--config.certify.name=base", *flags])
    assert fingerprint(copy) == before


@pytest.mark.parametrize(("shape", "classes"), [((28, 28, 1), 10), ((8, 8, 3), 10), ((8, 8, 1), 3)])
def test_data_that_the_network_was_not_trained_for_are_refused_before_any_work(copy, shape, classes, tmp_path):
    prepared.write(tmp_path / "sets", "other", {"test": prepared.random_split(4, shape, classes)}, classes)
    before = fingerprint(copy)
    flags = ["--config.data.name=other", f"--config.data.dir={tmp_path / 'sets'}", "--config.certify.name=other"]
    with pytest.raises(UserError) as error:
        certify.run([f"--workdir={copy}", *flags])
    trained, found = "[8, 8, 1] in 10 classes", f"{list(shape)} and {classes} classes:"
    assert f"trained on images of shape {trained}, but other has the shape {found}" in str(error.value)
    assert fingerprint(copy) == before


@pytest.mark.parametrize("command", ["train", "certify", "audit"])
def test_a_platform_that_cannot_start_is_not_blamed_on_the_files(trained, tmp_path, command):
    flags = QUICK if command == "train" else []
    copy = tmp_path / "w"
    shutil.copytree(trained, copy)
    line = refused(command, *flags, f"--workdir={copy}", JAX_PLATFORMS="abacus")
    assert "error: JAX cannot start (Unable to initialize backend 'abacus'" in line


BAD_TRAIN = {
    "no config": ([], "no configuration"),
    "file that is no config": (["--config=lsrs_jax/runtime/types.py"], "has no attribute 'get_config'"),
    "missing config": (["--config=configs/nothing.py"], "no configuration file 'configs/nothing.py'"),
    "unknown variant": (
        ["--config=configs/digits.py:lsr"],
        "bad configuration: unknown variant 'lsr': choose one of lsrs, cayley",
    ),
    "misspelt field": (["--config=configs/digits.py", "--config.sgima=1.0"], "did you mean sigma?"),
    "no field": (
        ["--config=configs/digits.py", "--config.=1"],
        "--config.=1 names no field: write --config.FIELD=VALUE",
    ),
    "missing file": (
        ["--config=configs/digits.py", "--config.data.name=none.npz"],
        "there is no file none.npz: check the",
    ),
    "wrong type": (["--config=configs/digits.py", "--config.train.steps=ten"], "steps=ten: it must be a whole number"),
    "long warm-up": (
        ["--config=configs/digits.py", "--config.train.steps=60", "--config.train.warmup_steps=60"],
        "warmup_steps must be at least 0 and below train.steps=60, got 60",
    ),
    "letters as mean": (
        ["--config=configs/digits.py", "--config.model.mean=('a',)"],
        "model.mean=('a',): it must be numbers",
    ),
    "nan as std": (["--config=configs/digits.py", "--config.model.std=(nan,)"], "model.std=(nan,): it must be numbers"),
    "crop": (["--config=configs/digits.py", "--config.data.crop=9"], "data.crop 9"),
    "config that fails": (
        ["--config=tests/support/failing_config.py"],
        "failing_config.py line 5: division by zero",
    ),
    "zero sigma": (["--config=configs/digits.py", "--config.sigma=0.0"], "sigma must be a positive number"),
    "batch too large": (["--config=configs/digits.py", "--config.data.batch_size=5000"], "1437 training images"),
    "missing data": (["--config=configs/mnist.py"], "tfds build mnist --file_format=array_record"),
    "unknown encoder": (["--config=configs/digits.py", "--config.model.encoder=shalow"], "choose one of"),
    "other config in the workdir": ([*QUICK, "--config.sigma=0.25"], "trained with sigma=0.5, not 0.25"),
}


@pytest.mark.parametrize("case", BAD_TRAIN)
def test_bad_input_to_train(copy, case, tmp_path, monkeypatch):
    arguments, why = BAD_TRAIN[case]
    other = "other config" in case
    workdir = copy if other else tmp_path / "new"
    before = fingerprint(copy)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    assert why in refusal(case, "train", [*arguments, f"--workdir={workdir}"])
    assert fingerprint(copy) == before
    assert not (tmp_path / "new").exists()


def test_a_diverging_training_names_the_step_and_its_advice_works(tmp_path):
    arguments = [*QUICK, "--config.train.optimizer=sgd", f"--workdir={tmp_path / 'new'}"]
    line = refused("train", *arguments, "--config.train.learning_rate=1e30")
    assert "at step" in line
    assert "lower train.learning_rate" in line
    run("train", *arguments, "--config.train.learning_rate=0.01")


def test_a_batch_that_does_not_divide_over_devices_is_refused(tmp_path):
    line = refused("train", *QUICK, "--config.data.batch_size=100", f"--workdir={tmp_path / 'new'}", devices=8)
    assert "--config.data.batch_size=100 must be a multiple of 8, the number of devices" in line
    assert not (tmp_path / "new").exists()


class SmallHead(nn.Module):
    """A dense layer with an optional mistake that a certification must refuse."""

    num_classes: int
    mistake: str = ""

    @nn.compact
    def __call__(self, z):
        logits = nn.Dense(self.num_classes)(z.reshape(z.shape[0], -1))
        if self.mistake == "coupled":
            return logits - logits.mean(axis=0)
        far = jnp.abs(z).max(axis=(1, 2, 3))[:, None] > 2.5
        return jnp.where(far, jnp.nan, logits) if self.mistake == "nan" else logits


@pytest.mark.parametrize(("mistake", "why"), [("coupled", "rows depend on each other"), ("nan", "NaN logits")])
def test_a_head_that_cannot_be_certified_leaves_nothing_behind(tmp_path, monkeypatch, mistake, why):
    monkeypatch.setitem(HEADS, "small", lambda classes: SmallHead(classes, mistake))
    config = config_from_flags([*QUICK, "--config.model.head=small", "--config.train.steps=2"])
    model = models.build(config.model, (8, 8, 1), 10)
    save_config(config, tmp_path / "config.json")
    with pinned(), checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, model.init(domain_key(0, "init")), {"m": np.zeros(1)})
    before = fingerprint(tmp_path)
    with pytest.raises(UserError, match=why):
        certify.run([f"--workdir={tmp_path}"])
    left = fingerprint(tmp_path)
    assert {name: left[name] for name in before} == before
    assert set(left) == set(before)
    # A corrected head and another tile can start again in the same folder.
    monkeypatch.setitem(HEADS, "small", SmallHead)
    certify.run([f"--workdir={tmp_path}", "--config.certify.stop=3", "--config.certify.tile=(2,8)"])


def test_a_run_that_differs_names_each_field_that_the_user_has_changed(copy):
    flags = [f"--workdir={copy}", "--config.certify.name=base", "--config.certify.n=2000", "--config.sigma=0.25"]
    line = refused("certify", *flags, "--config.certify.noise=independent")
    for words in ("certify.n was 1000 and is now 2000", "sigma was 0.5 and is now 0.25", "certify.noise was 'shared'"):
        assert words in line
