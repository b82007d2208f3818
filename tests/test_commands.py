"""The way of the data, end to end: real processes, real digits, kills, and wrong input."""

import hashlib
import json
import random
import shutil
import signal
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import prepared
import pytest
from commands import QUICK, fingerprint, finish, refused, run, start, without_time
from scipy import stats

from lsrs_jax import certify, checkpoint, command, data, models, smoothing
from lsrs_jax import config as configuration
from lsrs_jax.errors import UserError
from lsrs_jax.files import locked
from lsrs_jax.keys import domain_key, pinned, root_key
from lsrs_jax.materialize import Float64Encoder
from lsrs_jax.smoothing import schedule
from lsrs_jax.smoothing.table import read_table


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short training on 8 simulated devices."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    out = run("train", *QUICK, f"--workdir={workdir}", devices=8)
    assert "8 x cpu" in out
    assert "left" in out
    return workdir


@pytest.fixture(scope="module")
def certified(trained):
    """Certified on 1 device; the checkpoint came from 8."""
    out = run("certify", f"--workdir={trained}", "--config.certify.name=base")
    assert "Lipschitz constant 1.0000000" in out
    assert "votes/s" in out
    return trained / "certify" / "base" / "certificates.tsv"


def test_training_leaves_what_certification_needs(trained):
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in metrics if "loss" in row}
    assert list(losses) == [20, 40, 60]
    assert all(row["images_per_second"] > 0 for row in metrics if "loss" in row)
    assert losses[60] < losses[20] < 2.4
    assert next(row for row in metrics if "test_noisy_accuracy" in row)["test_clean_accuracy"] > 0.3
    assert list((trained / "tensorboard").glob("events.*"))
    assert json.loads((trained / "config.json").read_text())["train"]["steps"] == 60


def test_certificates_are_complete_and_consistent(certified):
    header = certified.read_text().splitlines()[0].split("\t")
    assert header[:6] == ["idx", "label", "predict", "radius", "correct", "time"]
    assert header[6:] == ["n", "p_a_lower", "p_b_upper", "lipschitz", "slack", "abstain"]
    table = read_table(certified)
    np.testing.assert_array_equal(table.idx, np.arange(40))
    np.testing.assert_array_equal(table.votes, 1000)
    assert 0.2 < table.certified_accuracy(0) <= 1
    assert table.radius.max() <= 0.5 * 2.4633
    assert (table.radius[table.predict == -1] == 0).all()
    provenance = json.loads((certified.parent / "certificates.json").read_text())
    assert provenance["identity"]["data"]["name"] == "digits"
    assert provenance["lipschitz"]["constant"] >= 1
    assert provenance["record"][0]["seconds"] > 0


@pytest.mark.parametrize(("devices", "spmd"), [(8, "shard_map"), (3, "pmap")])
def test_certificates_do_not_depend_on_devices(trained, certified, devices, spmd):
    name = f"{spmd}{devices}"
    run(
        "certify",
        f"--workdir={trained}",
        f"--config.certify.name={name}",
        f"--config.certify.spmd={spmd}",
        devices=devices,
        JAX_ENABLE_X64="1",
        JAX_DEFAULT_PRNG_IMPL="rbg",
    )
    assert without_time(trained / "certify" / name / "certificates.tsv") == without_time(certified)


def kill_and_resume_certification(workdir, name, arguments, kills, rng):
    """SIGKILL at random moments of the sampling, another device count each time, torn lines; then to the end."""
    ledger = workdir / "certify" / name / "votes.0.tsv"
    common = [f"--workdir={workdir}", f"--config.certify.name={name}", *arguments]
    killed = 0
    for _ in range(20 * kills):
        if killed == kills:
            break
        before = ledger.stat().st_size if ledger.exists() else 0
        process = start("certify", *common, devices=rng.choice([1, 2, 5, 8]))
        while process.poll() is None and not (ledger.exists() and ledger.stat().st_size > max(before, 60)):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        code, _, err = finish(process)
        assert code in (-signal.SIGKILL, 0), err
        killed += code == -signal.SIGKILL
        if code == 0:
            break
        size = ledger.stat().st_size
        with ledger.open("r+b") as file:  # a write that never reached the disk as a whole
            file.truncate(max(size - rng.randrange(30), before, 1))
    run("certify", *common, devices=2)
    return killed


@pytest.mark.parametrize("kind", ["fixed", "staged"])
def test_a_killed_certification_resumes_to_the_same_bytes(trained, kind):
    # A small tile keeps the run long enough to be killed in the middle.
    arguments = ["--config.certify.n=60001", "--config.certify.stop=64", "--config.certify.tile=(2, 8)"]
    arguments.append(f"--config.certify.schedule={kind}")
    run("certify", f"--workdir={trained}", f"--config.certify.name=whole_{kind}", *arguments)
    killed = kill_and_resume_certification(trained, f"killed_{kind}", arguments, 2, random.Random(0))
    assert killed >= 1
    whole, resumed = (trained / "certify" / f"{name}_{kind}" for name in ("whole", "killed"))
    assert without_time(resumed / "certificates.tsv") == without_time(whole / "certificates.tsv")
    assert len(json.loads((resumed / "certificates.json").read_text())["record"]) == killed + 1


def final_parameters(workdir):
    metas = sorted((workdir / "checkpoints").glob("*/meta/metadata"), key=lambda path: int(path.parts[-3]))
    return json.loads(metas[-1].read_text())


def kill_and_resume_training(workdir, arguments, kills, rng):
    common = [*arguments, f"--workdir={workdir}"]
    killed = 0
    for _ in range(kills):
        known = set((workdir / "checkpoints").glob("[0-9]*"))
        process = start("train", *common)
        while process.poll() is None and not set((workdir / "checkpoints").glob("[0-9]*")) - known:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        code, _, err = finish(process)
        assert code in (-signal.SIGKILL, 0), err
        killed += code == -signal.SIGKILL
        if code == 0:
            break
    run("train", *common)
    return killed


def test_a_killed_training_resumes_to_the_same_parameters(tmp_path):
    arguments = [*QUICK, "--config.train.steps=400", "--config.train.checkpoint_every=100", "--config.data.crop=1"]
    arguments += ["--config.train.loss=consistency", "--config.train.noises=2", "--config.train.ema=0.99"]
    run("train", *arguments, f"--workdir={tmp_path / 'whole'}")
    assert kill_and_resume_training(tmp_path / "killed", arguments, 1, random.Random(1)) == 1
    whole, killed = final_parameters(tmp_path / "whole"), final_parameters(tmp_path / "killed")
    assert whole["step"] == 400
    assert whole == killed
    metrics = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    losses = [[(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row] for lines in metrics]
    assert losses[0] == losses[1]
    assert "already trained" in run("train", *arguments, f"--workdir={tmp_path / 'killed'}")


def test_a_finished_training_is_left_as_it_is_but_looked_at(copy):
    before = fingerprint(copy)
    out = run("train", *QUICK, "--config.certify.n=77", f"--workdir={copy}")
    assert "already trained to step 60" in out
    assert "config.json there keeps certify.n 1000, not 77" in out
    assert fingerprint(copy) == before
    run("certify", f"--workdir={copy}", "--config.certify.name=base", "--verify")
    truncate_checkpoint(copy)
    assert "restore it from a copy" in refused("train", *QUICK, f"--workdir={copy}")


@pytest.fixture
def copy(trained, certified, tmp_path):
    target = tmp_path / "copy"
    shutil.copytree(trained, target)
    return target


def test_certification_needs_no_optimizer_state(copy, certified):
    for item in (copy / "checkpoints").glob("*/train"):
        shutil.rmtree(item)
    run("certify", f"--workdir={copy}", "--config.certify.name=again")
    assert without_time(copy / "certify" / "again" / "certificates.tsv") == without_time(certified)


def test_another_alpha_needs_no_votes(copy, certified):
    out = run("certify", f"--workdir={copy}", "--config.certify.name=base", "--config.certify.alpha=0.05")
    assert "40 of them done" in out
    assert "votes/s" not in out
    table = read_table(copy / "certify" / "base" / "certificates.tsv")
    before = read_table(certified)
    assert (table.radius >= before.radius).all()
    assert (table.radius > before.radius).any()


def test_what_was_derived_stays_until_another_flag_is_given(copy):
    path = copy / "certify" / "base" / "certificates.tsv"
    flags = [f"--workdir={copy}", "--config.certify.name=base"]
    run("certify", *flags, "--from-counts", "--config.certify.alpha=0.05", "--config.certify.bound=multiclass")
    derived = path.read_bytes()
    out = run("certify", *flags)
    assert "was derived with alpha 0.05, which holds unless --config.certify.alpha is given" in out
    assert path.read_bytes() == derived
    out = run("certify", *flags, "--config.certify.alpha=0.001")
    assert "alpha 0.001, multiclass bound" in out
    assert path.read_bytes() != derived


def test_compiled_programs_are_kept_and_a_broken_cache_does_no_harm(copy, certified, tmp_path):
    def certify_again(name, home):
        run("certify", f"--workdir={copy}", f"--config.certify.name={name}", XDG_CACHE_HOME=str(home))
        assert without_time(copy / "certify" / name / "certificates.tsv") == without_time(certified)
        return fingerprint(home) if home.is_dir() else {}

    first = certify_again("first", tmp_path / "cache")
    loops = [name for name in first if "device_votes" in name and name.endswith("cache")]
    assert len(loops) == 1
    second = certify_again("second", tmp_path / "cache")
    assert {name for name in second if name.endswith("cache")} == {name for name in first if name.endswith("cache")}
    path = tmp_path / "cache" / loops[0]
    path.write_bytes(path.read_bytes()[:1000])  # as a kill would leave it
    certify_again("third", tmp_path / "cache")
    certify_again("fourth", tmp_path / "config.json" / "nowhere")


def recomputed(folder, alpha, looks):
    """p_A of each image from the rows of a ledger, with SciPy alone: the best of its looks at their share of alpha."""
    selection, counts, found = {}, {}, {}
    for line in (folder / "votes.0.tsv").read_text().splitlines()[1:]:
        idx, _, _, purpose, _, _, pairs, *_ = line.split("\t")
        table = (selection if purpose == "selection" else counts).setdefault(int(idx), np.zeros(10, int))
        for pair in pairs.split(","):
            name, number = map(int, pair.split(":"))
            table[name] += number
        if purpose == "estimation" and table.sum() in looks:
            k = table[selection[int(idx)].argmax()]
            p = stats.beta.ppf(alpha / len(looks), k, table.sum() - k + 1) if k else 0.0
            found.setdefault(int(idx), []).append(p)
    return {idx: max(values) for idx, values in found.items()}


def columns(path, *names):
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    return [[float(row[rows[0].index(name)]) for row in rows[1:]] for name in names]


STAGED = ["--config.certify.schedule=staged", "--config.certify.n=6000", "--config.certify.stop=60"]


def test_a_staged_certification_and_what_can_be_derived_from_it(copy, tmp_path):
    flags = [f"--workdir={copy}", "--config.certify.name=staged", *STAGED, "--config.certify.radii=(0.1,0.3)"]
    out = run("certify", *flags)
    assert "looks from" in out
    assert "the largest radius is" in out
    looks = schedule.plan("staged", 100, 6000, 32).looks
    folder = copy / "certify" / "staged"
    idx, votes, p_a = columns(folder / "certificates.tsv", "idx", "n", "p_a_lower")
    assert len(idx) == 60
    assert set(votes) <= set(looks)
    assert len(set(votes)) > 1
    exact = recomputed(folder, 0.001, looks)
    np.testing.assert_allclose(p_a, [exact[i] for i in idx], rtol=1e-8)

    assert "staged to decide the radii 0.1, 0.3" in run("report", folder, f"--out={tmp_path / 'report'}")

    # Without checkpoint, without data: other bounds from the same votes.
    shutil.rmtree(copy / "checkpoints")
    ledger = (folder / "votes.0.tsv").read_bytes()
    again = [*flags, "--from-counts", "--config.data.name=nowhere"]
    out = run("certify", *again, "--config.certify.alpha=0.05", TFDS_DATA_DIR=str(tmp_path))
    assert "votes/s" not in out
    exact = recomputed(folder, 0.05, looks)
    np.testing.assert_allclose(columns(folder / "certificates.tsv", "p_a_lower")[0], [exact[i] for i in idx], rtol=1e-8)
    binary = read_table(folder / "certificates.tsv")
    out = run("certify", *again, "--config.certify.alpha=0.05", "--config.certify.bound=multiclass")
    several = read_table(folder / "certificates.tsv")
    assert several.average_certified_radius > binary.average_certified_radius
    derivation = json.loads((folder / "certificates.json").read_text())["derivation"]
    assert (derivation["alpha"], derivation["bound"]) == (0.05, "multiclass")
    assert (folder / "votes.0.tsv").read_bytes() == ledger


def test_interrupted_images_are_left_out_of_what_is_derived(copy, certified):
    ledger = copy / "certify" / "base" / "votes.0.tsv"
    lines = ledger.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not (line.startswith("7\t") and "estimation" in line)]
    assert len(kept) < len(lines)
    ledger.write_text("".join(kept))
    out = run("certify", f"--workdir={copy}", "--config.certify.name=base", "--from-counts")
    assert "1 images whose sampling was interrupted" in out
    assert 7 not in read_table(copy / "certify" / "base" / "certificates.tsv").idx
    run("certify", f"--workdir={copy}", "--config.certify.name=base")
    assert without_time(copy / "certify" / "base" / "certificates.tsv") == without_time(certified)


@pytest.mark.parametrize(
    "flag",
    ["arithmetic=float32", "noise=independent", "head_dtype=bfloat16", "bound=multiclass"],
)
def test_every_option_certifies_about_the_same(copy, certified, flag):
    run("certify", f"--workdir={copy}", "--config.certify.name=other", f"--config.certify.{flag}")
    tables = [read_table(path) for path in (certified, copy / "certify" / "other" / "certificates.tsv")]
    radii = [table.average_certified_radius for table in tables]
    assert radii[0] > 0
    assert 0.8 * radii[0] < radii[1] < (2.0 if "bound" in flag else 1.2) * radii[0]
    # What was chosen when the votes were cast need not be said again.
    run("certify", f"--workdir={copy}", "--config.certify.name=other", "--from-counts", "--config.certify.alpha=0.05")
    again = read_table(copy / "certify" / "other" / "certificates.tsv")
    assert again.average_certified_radius > tables[1].average_certified_radius


def test_more_images_extend_the_same_ledger(copy, certified):
    run("certify", f"--workdir={copy}", "--config.certify.name=base", "--config.certify.stop=50", devices=2)
    rows = without_time(copy / "certify" / "base" / "certificates.tsv")
    assert rows[:41] == without_time(certified)
    assert len(rows) == 51


def test_a_half_written_ledger_line_is_sampled_again(copy, certified):
    ledger = copy / "certify" / "base" / "votes.0.tsv"
    ledger.write_bytes(ledger.read_bytes()[:-9])
    run("certify", f"--workdir={copy}", "--config.certify.name=base")
    assert without_time(copy / "certify" / "base" / "certificates.tsv") == without_time(certified)


def truncate_checkpoint(workdir):
    newest = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    for path in (newest / "model").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_json(path, field, value):
    """Sets a field to a JSON text, or removes it."""
    content = json.loads(path.read_text())
    del content[field]
    path.write_text(json.dumps(content | ({} if value is None else {field: json.loads(value)})))


def damage_ledger(workdir):
    path = workdir / "certify" / "base" / "votes.0.tsv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:5], lines[5].replace("selection", "estimation"), *lines[6:]]) + "\n")


BAD_CERTIFY = {
    "misspelt field": ([], "--config.certify.alhpa=0.1", "did you mean certify.alpha?"),
    "wrong type": ([], "--config.certify.n=many", "n"),
    "negative sigma": ([], "--config.sigma=-1.0", "sigma must be a positive number"),
    "no votes": ([], "--config.certify.n=0", "certify.n must be between 1"),
    "no selection": ([], "--config.certify.n0=0", "certify.n0 must be between 1"),
    "alpha": ([], "--config.certify.alpha=1.0", "certify.alpha"),
    "name": ([], "--config.certify.name=../x", "certify.name"),
    "config file": (
        [],
        "--config=configs/digits.py",
        "certify takes no --config=FILE: its configuration is",
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
        "of the checkpoint of step 60, and the newest is that of step 40",
    ),
    "other seed": ([], "--config.seed=1", "seed was 0 and is now 1"),
    "truncated checkpoint": ([truncate_checkpoint], "", "cannot read checkpoint"),
    "damaged ledger": ([damage_ledger], "", "is damaged"),
    "no provenance": ([lambda w: (w / "certify/base/certificates.json").unlink()], "", "holds votes but no"),
    "damaged provenance": ([lambda w: (w / "certify/base/certificates.json").write_text("{")], "", "is damaged"),
    "damaged config": ([lambda w: (w / "config.json").write_text("{")], "", "not a stored configuration"),
    "foreign config": ([lambda w: (w / "config.json").write_text('{"sgima": 1}')], "", "is missing"),
    "tile of halves": ([], "--config.certify.tile=(8,8.5)", "certify.tile has the wrong type"),
    "tile of words": ([], "--config.certify.tile=('a',3)", "tile"),
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
    "unknown schedule": ([], "--config.certify.schedule=quick", "certify.schedule must be 'fixed' or 'staged'"),
    "negative radii": ([], "--config.certify.radii=(-1.0,)", "certify.radii must be numbers >= 0"),
    "words as radii": ([], "--config.certify.radii=('a',)", "certify.radii has the wrong type"),
    "n from counts": ([], ["--from-counts", "--config.certify.n=2000"], "were cast with n 1000, not 2000"),
    "staged from fixed counts": (
        [],
        ["--from-counts", "--config.certify.schedule=staged"],
        "were cast with schedule 'fixed', not 'staged'",
    ),
    "arithmetic from counts": (
        [],
        ["--from-counts", "--config.certify.arithmetic=float32"],
        "were cast with arithmetic 'sound', not 'float32'",
    ),
    "counts of another version": (
        [lambda w: edit_json(w / "certify/base/certificates.json", "digest", None)],
        "--from-counts",
        "was written by another version",
    ),
    "margins from counts": (
        [],
        ["--from-counts", "--config.certify.certificate=deterministic"],
        "--from-counts is for smoothed certificates",
    ),
    "selection without votes": (
        [],
        ["--from-counts", "--config.certify.start=100", "--config.certify.stop=200"],
        "no image of this selection",
    ),
    "no such certification": ([], ["--from-counts", "--config.certify.name=none"], "holds no certification to derive"),
    "counts without a ledger": (
        [lambda w: (w / "certify/base/votes.0.tsv").unlink()],
        "--from-counts",
        "holds no votes; restore votes.*.tsv",
    ),
    "no ledger": ([lambda w: (w / "certify/base/votes.0.tsv").unlink()], "", "holds certificates but no votes"),
    "config without sigma": ([lambda w: edit_json(w / "config.json", "sigma", None)], "", "sigma"),
    "null": ([lambda w: edit_json(w / "config.json", "seed", "null")], "", "seed"),
    "no identity": ([lambda w: edit_json(w / "certify/base/certificates.json", "identity", None)], "", "is damaged"),
    "empty workdir": ([], "--workdir=", "is not a folder"),
    "other normalisation": ([], "--config.model.mean=(0.5,)", "trained with model.mean="),
    "other encoder": ([], "--config.model.encoder=identity", "trained with model.encoder='shallow'"),
    "no checkpoint": ([lambda w: shutil.rmtree(w / "checkpoints")], "", "no checkpoint"),
    "other training": ([], "--config.train.loss=macer", "trained with train.loss='gaussian', not 'macer'"),
    "no config": ([lambda w: (w / "config.json").unlink()], "", "holds checkpoints but no config.json"),
    "other network": ([], "--config.model.head=linear", "trained with model.head='mlp'"),
}


@pytest.mark.parametrize("case", BAD_CERTIFY)
def test_bad_input_to_certify(copy, case, tmp_path):
    damages, flag, why = BAD_CERTIFY[case]
    for damage in damages:
        damage(copy)
    before = fingerprint(copy)
    flags = flag if isinstance(flag, list) else [flag] if flag else []
    arguments = [f"--workdir={copy}", "--config.certify.name=base", *flags]
    assert why in refused("certify", *arguments, TFDS_DATA_DIR=str(tmp_path / "none"))
    assert fingerprint(copy) == before


@pytest.mark.parametrize(("shape", "classes"), [((28, 28, 1), 10), ((8, 8, 3), 10), ((8, 8, 1), 3)])
def test_data_that_the_network_was_not_trained_for_are_refused_before_any_work(copy, shape, classes, tmp_path):
    prepared.write(tmp_path / "sets", "other", {"test": prepared.random_split(4, shape, classes)}, classes)
    before = fingerprint(copy)
    flags = ["--config.data.name=other", f"--config.data.dir={tmp_path / 'sets'}", "--config.certify.name=other"]
    with pytest.raises(UserError) as error:
        certify.run([f"--workdir={copy}", *flags])
    trained, found = "[8, 8, 1] in 10 classes", f"{list(shape)} in {classes}:"
    assert f"trained on images of shape {trained}, but those of other are of shape {found}" in str(error.value)
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
    "file that is no config": (["--config=tests/commands.py"], "has no attribute 'get_config'"),
    "missing config": (["--config=configs/nothing.py"], "no configuration file 'configs/nothing.py'"),
    "unknown variant": (
        ["--config=configs/digits.py:lsr"],
        "bad configuration: unknown variant 'lsr': choose one of lsrs, cayley",
    ),
    "misspelt field": (["--config=configs/digits.py", "--config.sgima=1.0"], "did you mean sigma?"),
    "wrong type": (["--config=configs/digits.py", "--config.train.steps=ten"], "steps"),
    "long warm-up": (
        ["--config=configs/digits.py", "--config.train.steps=60", "--config.train.warmup_steps=60"],
        "warmup_steps must be at least 0 and below train.steps=60, got 60",
    ),
    "letters as mean": (["--config=configs/digits.py", "--config.model.mean=('a',)"], "mean"),
    "nan as std": (["--config=configs/digits.py", "--config.model.std=(nan,)"], "std"),
    "crop": (["--config=configs/digits.py", "--config.data.crop=9"], "data.crop 9"),
    "config that fails": (["--config=tests/failing_config.py"], "tests/failing_config.py line 5: division by zero"),
    "zero sigma": (["--config=configs/digits.py", "--config.sigma=0.0"], "sigma must be a positive number"),
    "batch too large": (["--config=configs/digits.py", "--config.data.batch_size=5000"], "1437 training images"),
    "missing data": (["--config=configs/mnist.py"], "tfds build mnist --file_format=array_record"),
    "unknown encoder": (["--config=configs/digits.py", "--config.model.encoder=shalow"], "choose one of"),
    "other config in the workdir": ([*QUICK, "--config.sigma=0.25"], "trained with sigma=0.5, not 0.25"),
}


@pytest.mark.parametrize("case", BAD_TRAIN)
def test_bad_input_to_train(copy, case, tmp_path):
    arguments, why = BAD_TRAIN[case]
    other = "other config" in case
    workdir = copy if other else tmp_path / "new"
    before = fingerprint(copy)
    assert why in refused("train", *arguments, f"--workdir={workdir}", TFDS_DATA_DIR=str(tmp_path / "none"))
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
    assert "not divisible by the 8 devices; choose a multiple of 8" in line
    assert not (tmp_path / "new").exists()


class SmallHead(nn.Module):
    """A dense layer, and what a certification must refuse in a head."""

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
    monkeypatch.setitem(models.HEADS, "small", lambda classes: SmallHead(classes, mistake))
    config = command.config_from_flags([*QUICK, "--config.model.head=small", "--config.train.steps=2"])
    model = models.build(config.model, (8, 8, 1), 10)
    configuration.save(config, tmp_path / "config.json")
    with pinned(), checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, model.init(domain_key(0, "init")), {"m": np.zeros(1)})
    before = fingerprint(tmp_path)
    with pytest.raises(UserError, match=why):
        certify.run([f"--workdir={tmp_path}"])
    left = fingerprint(tmp_path)
    assert {name: left[name] for name in before} == before
    assert set(left) == set(before)
    # A mended head, and another tile, start afresh in the same place.
    monkeypatch.setitem(models.HEADS, "small", SmallHead)
    certify.run([f"--workdir={tmp_path}", "--config.certify.stop=3", "--config.certify.tile=(2,8)"])


def test_every_charge_reaches_the_certificates(tmp_path):
    """Recomputes radii from the ledger with SciPy alone, for an encoder that stretches by 2."""
    workdir = tmp_path / "run"
    run("train", *QUICK, "--config.model.std=(0.5,)", "--config.model.mean=(0.2,)", f"--workdir={workdir}")
    run("certify", f"--workdir={workdir}")
    folder = workdir / "certify" / "default"
    votes, slack = {}, {}
    for line in (folder / "votes.0.tsv").read_text().splitlines()[1:]:
        idx, _, charge, purpose, _, _, pairs, *_ = line.split("\t")
        counts = votes.setdefault((int(idx), purpose), np.zeros(10, int))
        for pair in pairs.split(","):
            name, number = pair.split(":")
            counts[int(name)] += int(number)
        slack[int(idx)] = float(charge)
    table = read_table(folder / "certificates.tsv")
    certified = 0
    for idx, predict, radius in zip(table.idx, table.predict, table.radius, strict=True):
        candidate = votes[idx, "selection"].argmax()
        k, n = votes[idx, "estimation"][candidate], votes[idx, "estimation"].sum()
        p = stats.beta.ppf(0.001, k, n - k + 1) if k else 0.0
        expected = (0.5 * stats.norm.ppf(p) - slack[idx]) / 2
        assert predict == (candidate if expected > 0 else -1)
        if expected > 0:
            assert radius < expected
            assert radius == pytest.approx(expected, rel=1e-6, abs=1e-8)
            certified += 1
    assert certified > 10
    lower = columns(folder / "certificates.tsv", "p_a_lower")[0]
    for idx, found in zip(table.idx, lower, strict=True):
        k = votes[idx, "estimation"][votes[idx, "selection"].argmax()]
        p = stats.beta.ppf(0.001, k, 1001 - k) if k else 0.0
        assert found == pytest.approx(max(p * (1 - 1e-10) - 64 * 2.0**-44, 0), abs=1e-14)
    # The charge covers the rounding of the very latents, on a grid of 2⁻¹⁵, and the votes come from the seed's
    # certification domain.
    config = configuration.load(workdir / "config.json")
    model = models.build(config.model, (8, 8, 1), 10)
    with pinned():
        params, _ = checkpoint.restore_model(workdir, jax.eval_shape(model.init, root_key(0)))
    encoder, head = model.for_certification(params)
    latents = Float64Encoder(encoder, 5)(data.load("digits", "test").pixels(np.arange(40), np.float64))
    moved = np.linalg.norm((np.rint(latents * 2**15) / 2**15 - latents).reshape(40, -1), axis=1)
    images = data.load("digits", "test").pixels(np.arange(40), np.float64).reshape(40, -1)
    rounding = 2 * encoder.report.rounding(np.linalg.norm(images, axis=1) + 10 * 0.5 / encoder.report.constant)
    charged = np.array([slack[idx] for idx in range(40)]) - 8 * 2.0**-15 * (1 + 2.0**-50)
    np.testing.assert_allclose(charged, rounding, rtol=1e-3)
    assert 0 < moved.max() < 4 * 2.0**-15
    again = smoothing.certify(head, latents, sigma=0.5, key=root_key(0), n=1000, tile=config.certify.tile)
    np.testing.assert_array_equal(again.counts, [votes[idx, "estimation"] for idx in range(40)])


@pytest.fixture(scope="module")
def margins(tmp_path_factory):
    """A 1-Lipschitz classifier with both kinds of certificates."""
    workdir = tmp_path_factory.mktemp("margins") / "run"
    run("train", *QUICK, "--config.train.loss=margin", "--config.model.head=normalized", f"--workdir={workdir}")
    run("certify", f"--workdir={workdir}", "--config.certify.name=smoothed")
    flags = ["--config.certify.certificate=deterministic", "--config.certify.name=margin"]
    assert "no noise" in run("certify", f"--workdir={workdir}", *flags, devices=2)
    return workdir


def test_deterministic_and_smoothed_certificates_meet_in_one_report(margins, tmp_path):
    tables = {name: read_table(margins / "certify" / name / "certificates.tsv") for name in ("margin", "smoothed")}
    table = tables["margin"]
    np.testing.assert_array_equal(table.idx, tables["smoothed"].idx)
    assert (table.votes == 0).all()
    assert table.certified_accuracy(0) > 0.3
    provenance = json.loads((margins / "certify" / "margin" / "certificates.json").read_text())
    assert provenance["identity"]["certificate"] == "deterministic"
    assert len(provenance["lipschitz"]["layers"]) == 5
    assert provenance["derivation"]["bound"] == "margin"
    out = run("report", margins, f"--out={tmp_path / 'report'}")
    assert "| run/margin | 40 |" in out
    assert "| run/smoothed | 40 |" in out

    # Recomputed from the trained functions: the nearest rival, at the distance of the weights, none beyond the radius.
    config = configuration.load(margins / "config.json")
    model = models.build(config.model, (8, 8, 1), 10)
    with pinned():
        params, _ = checkpoint.restore_model(margins, jax.eval_shape(model.init, root_key(0)))
    images = data.load("digits", "test").pixels(np.arange(40), np.float32)
    logits = np.asarray(model.classify(params, model.encode(params, images)), np.float64)
    kernel = np.asarray(params["head"]["kernel"], np.float64)
    kernel /= np.linalg.norm(kernel, axis=0)
    for row, (predict, radius) in enumerate(zip(table.predict, table.radius, strict=True)):
        rivals = [j for j in range(10) if j != predict]
        distances = [np.linalg.norm(kernel[:, predict] - kernel[:, j]) for j in rivals]
        expected = min((logits[row, predict] - logits[row, j]) / d for j, d in zip(rivals, distances, strict=True))
        assert radius == pytest.approx(max(expected, 0), abs=2e-5)
        assert predict == logits[row].argmax()


def test_kinds_of_certificates_are_not_mixed(margins, copy, certified):
    deterministic = "--config.certify.certificate=deterministic"
    before = fingerprint(margins)
    for flags, why in (
        ([deterministic, "--config.certify.name=smoothed"], "certificate was 'smoothed' and is now 'deterministic'"),
        (["--config.certify.name=margin"], "certificate was 'deterministic' and is now 'smoothed'"),
    ):
        assert why in refused("certify", f"--workdir={margins}", *flags)
    fewer = ["--config.certify.name=margin", deterministic, "--config.certify.stop=5"]
    assert "35 images outside" in refused("certify", f"--workdir={margins}", *fewer)
    assert fingerprint(margins) == before
    assert "needs a linear head" in refused("certify", f"--workdir={copy}", deterministic, "--config.certify.name=x")
    assert not (copy / "certify" / "x").exists()
    shutil.copytree(copy / "certify" / "base", margins / "certify" / "y")
    (margins / "certify" / "y" / "certificates.json").unlink()
    assert "another certification" in refused(
        "certify", f"--workdir={margins}", deterministic, "--config.certify.name=y"
    )


def test_an_interrupted_change_of_alpha_never_mixes_tables(copy):
    """Killed at any moment, certificates.json names the alpha of the table beside it, or none."""
    folder = copy / "certify" / "base"
    for attempt in range(4):
        alpha = (0.05, 0.001)[attempt % 2]
        flags = [f"--config.certify.alpha={alpha}", f"--config.certify.stop={60 + 60 * attempt}"]
        before = (folder / "certificates.json").read_bytes()
        process = start("certify", f"--workdir={copy}", "--config.certify.name=base", *flags)
        while process.poll() is None and (folder / "certificates.json").read_bytes() == before:
            time.sleep(0.001)
        time.sleep(0.003 * attempt)
        process.kill()
        finish(process)
        derivation = json.loads((folder / "certificates.json").read_text())["derivation"]
        if derivation:
            digest = hashlib.sha256((folder / "certificates.tsv").read_bytes()).hexdigest()
            assert derivation["certificates"] == digest


def test_a_second_training_in_one_workdir_is_refused(tmp_path):
    workdir = tmp_path / "new"
    with locked(workdir / ".train.lock", "training"):
        assert "another process is training" in refused("train", *QUICK, f"--workdir={workdir}")
    assert [path.name for path in workdir.iterdir()] == [".train.lock"]


def test_help_and_missing_workdir():
    for name in ("train", "certify", "audit", "report"):
        code, out, _ = finish(start(name, "--help"))
        assert code == 0
        assert "python -m lsrs_jax" in out
    assert "--workdir" in refused("train", "--config=configs/digits.py")
    assert "--workdir" in refused("certify", "--config=configs/digits.py")
