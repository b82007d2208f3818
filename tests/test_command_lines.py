"""Command lines as people mistype them: one line that says what to do, exit code 2, and nothing written."""

import contextlib
import io
import os
import runpy
import shutil
import signal
import subprocess
import sys

import pytest
from PIL import Image

from lsrs_jax import cli
from lsrs_jax.config import FIELDS
from lsrs_jax.flags import config_from_flags, experiments
from support import ROOT
from support.commands import fingerprint, refused, run

# Arguments -> what the line says. {new} is a folder that does not exist, {trained} a workdir. `completed` adds a
# configuration and a workdir where the line is not about them.
WRONG = {
    # the command
    "trian": "unknown command 'trian': did you mean train?",
    "lsrs train": "unknown command 'lsrs'",
    "--version": "unknown command '--version': choose one of train",
    # the experiment
    "train --workdir={new}": "give --config=NAME, a file or one of cifar10, cifar10_mlp, cifar10_orthogonal",
    "train --workdir={new} --config=digit": "no configuration file 'digit'; did you mean digits?",
    "train --workdir={new} --config=configs/nothing.py": "or one of cifar10, cifar10_mlp, cifar10_orthogonal",
    "train --workdir={new} --config=digits.py:isr": "no configuration file 'digits.py'; did you mean digits?",
    "train --workdir={new} --config=digits:isr": "unknown variant 'isr': choose one of lsrs, cayley",
    "train --workdir={new} --config=": "no configuration file ''",
    "train --workdir={new} --config": "--config needs a value",
    "train --workdir={new} --config=README.md": "bad configuration",
    "train --workdir={new} digits": "options begin with --",
    # fields without their section, or misspelt
    "train {new} --config=digits": "the following arguments are required: --workdir",
    "train --steps=10": "did you mean --config.train.steps=10 or --config.train.smoothadv.steps=10?",
    "train --train.steps=10": "did you mean --config.train.steps=10?",
    "train --config.steps=10": "unknown config field 'steps'; did you mean train.steps?",
    "train --config.train.step=10": "did you mean train.steps?",
    "train --learning-rate=0.1": "did you mean --config.train.learning_rate=0.1?",
    "train --sigma=0.25": "did you mean --config.sigma=0.25?",
    "train --seed 3": "did you mean --config.seed",
    "train --batch_size=8": "did you mean --config.data.batch_size=8?",
    "train config.train.steps=10": "did you mean --config.train.steps=10?",
    "train --config.train=10": "config field train is a section: set one of train.checkpoint_every",
    "train --config.train.steps.more=10": "config field train.steps is no section",
    "train --config.format=1": "unknown config field 'format'",
    "certify --n=1000": "did you mean --config.certify.n=1000?",
    "certify --alpha=0.01": "did you mean --config.certify.alpha=0.01?",
    "certify --name=x": "did you mean --config.data.name=x or --config.certify.name=x?",
    "certify --frobnicate=1": "unknown argument '--frobnicate=1'; see --help",
    "certify --from_counts": "did you mean --from-counts?",
    "train --Config=digits": "did you mean --config=digits?",
    "train --config=digits --config=mnist": "two configurations: --config=digits and --config=mnist; give one",
    "train --config.data.name=folder:{new} --config.data.dir={new}": "leave --config.data.dir out",
    "data digits mnist": "unknown argument 'mnist'; options begin with --",
    "config digits mnist": "unknown argument 'mnist'; options begin with --",
    # values
    "train --config.train.steps=1e99": "train.steps must be between 1 and 1000000000, got 9999",
    "train --config.train.steps=1e12": "train.steps must be between 1 and 1000000000",
    "train --config.train.start_from=gs://bucket/w": "train.start_from must be a folder of this machine",
    "train --config.data.crop=2 --config.data.size=8": "data.crop must be at least 0, and 0 if data.size is given",
    "train --config.train.steps = 10": "spaces around =: write --config.train.steps=VALUE",
    "train --config.train.steps": "--config.train.steps needs a value: write --config.train.steps=VALUE",
    "train --config.train.steps=1.5": "it must be a whole number, such as 1000",
    "train --config.train.steps=1e-3": "it must be a whole number, such as 1000",
    "train --config.train.steps=ten": "it must be a whole number, such as 1000",
    "train --config.train.steps=0": "train.steps must be between 1 and 1000000000, got 0",
    "train --config.train.steps=-5": "train.steps must be between 1 and 1000000000, got -5",
    "train --config.sigma=0": "sigma must be a positive number",
    "train --config.sigma=1/4": "error: --config.sigma=1/4: it must be a number, such as 0.5",
    "train --config.sigma=abc": "error: --config.sigma=abc: it must be a number, such as 0.5",
    "certify --config.certify.n=ten": "error: --config.certify.n=ten: it must be a whole number, such as 100000",
    "train --config.data.batch_size=1.5": "--config.data.batch_size=1.5: it must be a whole number, such as 128",
    "train --config.data.flip=maybe": "error: --config.data.flip=maybe: it must be true or false",
    "train --config.model.mean=half": "--config.model.mean=half: it must be numbers with commas between them",
    "certify --config.certify.tile=abc": "--config.certify.tile=abc: it must be whole numbers with commas between them",
    "certify --config.certify.tile=(a,8)": "--config.certify.tile=(a,8): it must be whole numbers with commas between",
    "certify --config.certify.radii=0.25,x": "it must be numbers with commas between them, such as 0.25,0.5",
    "train --config.train.loss=gauss": "train.loss must be 'gaussian' or 'consistency'",
    "train --config.model.head=mpl": "choose one of",
    "train --config.data.name=folder:": "needs a folder of images, and",
    "train --config.data.name=folder:{new}": "needs a folder of images, and",
    "train --config.data.name=npz:{new}": "needs a file of arrays, and",
    "train --config.data.name=../x": "data.name must be the name of a data set",
    "train --config.data.test_share=1.5": "data.test_share must be strictly between 0 and 1",
    "train --config.data.layout=CHW": "data.layout must be 'NHWC' or 'NCHW'",
    "train --config.data.train_split=training": "digits has the splits train and test, not 'training'",
    "train --config.train.start_from={new}": "no checkpoint in",
    # paths
    "certify --workdir={new}": "holds no training: run python -m lsrs_jax.train --config=NAME --workdir=",
    "certify --workdir=README.md": "'README.md' is not a folder",
    "certify --workdir=s3://bucket/x": "neither a folder nor the URL of one",
    "certify --config.certify.checkpoint=7": "no checkpoint of step 7 in",
    "certify --config=digits": "this command takes no --config=FILE",
    "certify --json": "--json is for --verify and --recast",
    "certify --verify --from-counts": "not allowed with argument",
    "certify --recast=0": "a number of images, at least 1",
    "report {trained}": "the following arguments are required: --out",
    "report {new} --out={new}/r": "no run at",
    "report README.md --out={new}/r": "README.md",
    "report {trained} --out={new}/r --radii=a": "--radii",
    "report a|b={trained} --out={new}/r": "bad name",
    "sweep --config=digits": "the following arguments are required: --out",
    "sweep --out={new} --sigma=0.5": "give --config=NAME, a file or one of",
    "sweep --out={new} --config=digits --variants=lsrs,isr": "unknown variant 'isr': choose one of lsrs, cayley",
    "sweep --out={new} --config=digits --variants=lsrs,lsrs": "must be different names with commas between them",
    "sweep --out={new} --config=digits:isrs --variants=lsrs": "--config=digits:isrs and --variants both name a variant",
    "sweep --out={new} --config=digits --sigma=0.5,x": "argument --sigma: must be positive numbers",
    "sweep --out={new} --config=digits --sigma=0": "argument --sigma: must be positive numbers",
    "sweep --out={new} --config=digits --seeds=0": "at least one seed",
    "sweep --out={new} --config=digits --seeds=a": "must be a number of seeds or a list such as 0,7",
    "sweep --out={new} --config=digits --seeds=2 --config.seed=1": "--seeds and --config.seed are both given",
    "sweep --out={new} --config=digits --jobs=0": "argument --jobs: must be a whole number of at least 1",
    "sweep --out={new} --config=digits --steps=9": "did you mean --config.train.steps=9",
    "sweep --out={new} --config=digits --config.certify.n=0": "certify.n must be",
    "sweep --out={trained} --config=digits": "is the workdir of a training; give another folder as --out",
    "sweep --out=README.md --config=digits": "'README.md' is not a folder",
    "config nothing": "no configuration file 'nothing'; give a file, or one of",
    "config digits --config.sigma=-1": "sigma must be a positive number",
    "data folder:{new}": "needs a folder of images",
    "data digits --out={new}.pdf": "--out must be a file that ends with .png",
    "data svhn --config.data.dir={new}": "tfds build svhn",
    "data": "the following arguments are required: NAME",
}


def line_of(arguments):
    """The one line on stderr of ``lsrs ARGUMENTS``, which must exit with 2."""
    name, rest = arguments[0], arguments[1:]
    if name in cli.COMMANDS:
        return refused(cli.COMMANDS[name][0], *rest)
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["lsrs", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 2
    assert err.getvalue().count("\n") == 1
    return err.getvalue()


def completed(words):
    """The arguments of a line of `WRONG`."""
    added, about = [], WRONG[words]
    if words.startswith("train") and "--config=NAME" not in about and "--config " not in f"{words} ".replace("=", " "):
        added.append("--config=digits")
    if words.startswith(("train", "certify")) and "--workdir" not in words + about:
        added.append("--workdir={new}" if words.startswith("train") else "--workdir={trained}")
    if words.startswith("certify"):
        added.append("--config.certify.name=new")
    return [*words.split(), *added]


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_command_line_is_answered_in_one_line(words, trained, tmp_path):
    before = fingerprint(trained)
    arguments = [word.format(new=tmp_path / "new", trained=trained) for word in completed(words)]
    assert WRONG[words] in line_of(arguments)
    assert not list(tmp_path.iterdir())
    assert fingerprint(trained) == before


def test_ways_to_write_the_same_configuration():
    expected = config_from_flags(["--config=configs/digits.py:isrs", "--config.train.steps=10000"]).to_dict()
    for words in (
        "--config=digits:isrs --config.train.steps=1e4",
        "--config digits:isrs --config.train.steps 10000",
        f"--config={ROOT}/configs/digits.py:isrs --config.train.steps=10_000",
        "-config=digits:isrs -config.train.steps=1.0e+4",
        "--config=digits:isrs --config.train.steps=10000.0",
    ):
        assert config_from_flags(words.split()).to_dict() == expected, words


def test_the_last_value_of_a_field_counts():
    fields = "radii=(0.1,)", "seed=1", "radii=(0.5,0.7)", "seed=2"
    words = [f"--config.certify.{field}" for field in fields]
    config = config_from_flags(["--config=digits", *words])
    assert (config.certify.radii, config.certify.seed) == ((0.5, 0.7), 2)


def test_paths_begin_at_home_where_they_say_so(monkeypatch, tmp_path, certified):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text((ROOT / "configs" / "digits.py").read_text())
    assert config_from_flags(["--config=~/mine.py"]).train.steps == 800
    assert cli.workdir("~/w") == tmp_path / "w"
    shutil.copytree(certified.parent, tmp_path / "w")
    run("report", "~/w", "--out=~/r")
    assert (tmp_path / "r" / "report.md").is_file()
    assert not (ROOT / "~").exists()


def test_the_list_of_commands_and_the_help_of_each():
    listed = subprocess.run([sys.executable, "-m", "lsrs_jax"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(f"  {name} " in listed.stdout for name in cli.COMMANDS)
    assert len(listed.stdout.splitlines()) < 24
    for name, (module, _) in cli.COMMANDS.items():
        out = run(module, "--help")
        assert out.startswith(f"usage: python -m lsrs_jax.{module} ")
        assert out.count(f"\n  python -m lsrs_jax.{module}") >= 3, name
    assert "--config.train.steps=1000" in run("train", "--help")
    assert "--config.certify.alpha=0.001" in run("certify", "--help")


def test_every_field_is_printed_with_value_default_and_meaning():
    out = run("show_config", "digits:isrs", "--config.certify.n=5e3")
    for name, field in FIELDS.items():
        assert f"{name} = " in out
        assert field.meaning in out
    assert "model.encoder = 'identity'   (default: 'shallow')" in out
    assert "certify.n = 5000   (default: 100000)" in out
    assert all(name in run("show_config") for name in experiments())


def test_data_are_described_and_drawn(tmp_path):
    out = run("show_data", "digits", f"--out={tmp_path / 'sheet.png'}")
    assert "train: 1,437 images of shape (8, 8, 1), 10 classes" in out
    assert "test: 360 images" in out
    assert "pixels from 0.000 to 1.000" in out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height >= 10 * 64
        assert len(sheet.getcolors(2**16)) > 10


@pytest.mark.filterwarnings("ignore:'lsrs_jax.report' found in sys.modules")
def test_a_command_in_a_notebook_or_program_raises_and_leaves_the_process_alone(monkeypatch):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(os, "_exit", lambda _: pytest.fail("the process was ended"))
    for arguments, code in ((["nosuch"], 2), (["--help"], 0)):
        monkeypatch.setattr(sys, "argv", ["lsrs_jax.report", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("lsrs_jax.report", run_name="__main__")
        assert (end.value.code or 0) == code
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
