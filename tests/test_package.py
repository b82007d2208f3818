"""The package as a stranger gets it: built, installed outside the repository, and used from an empty folder."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support import ROOT

pytestmark = pytest.mark.package
LITTLE = "--config.certify.n=256 --config.certify.n0=64 --config.certify.step=5"
PAGES = [ROOT / "docs" / name for name in ("start.md", "howto/data.md", "classifiers.md")]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def newest_python():
    """The newest Python above this one that is on the PATH or under pyenv, or None."""
    home = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    found = list(home.glob("3.*/bin/python3"))
    found += [Path(path) for minor in range(20, 11, -1) if (path := shutil.which(f"python3.{minor}"))]
    code, best = "import sys; print(*sys.version_info[:2])", (sys.version_info[:2], None)
    for path in found:
        done = subprocess.run([path, "-c", code], capture_output=True, text=True)
        if done.returncode == 0:
            best = max(best, (tuple(map(int, done.stdout.split())), str(path)), key=lambda pair: pair[0])
    return best[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the sdist, built from a copy of the files that git knows."""
    source, out = tmp_path_factory.mktemp("source") / "clone", tmp_path_factory.mktemp("dist")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "build", "--outdir", out, source], check=True, capture_output=True)
    return source, out


def test_wheel_and_sdist_hold_the_package_and_the_experiments(built):
    source, out = built
    modules = {path.relative_to(source).as_posix() for path in (source / "lsrs_jax").rglob("*.py")}
    experiments = {f"lsrs_jax/configs/{path.name}" for path in (source / "configs").glob("*.py")}
    networks = [path for path in (source / "lsrs_jax" / "pretrained").rglob("*") if path.is_file()]
    pretrained = {path.relative_to(source).as_posix() for path in networks}
    assert "lsrs_jax/pretrained/digits/model.safetensors" in pretrained
    reporting = source / "lsrs_jax" / "reporting"
    page = {
        path.relative_to(source).as_posix() for path in reporting.iterdir() if path.suffix in (".html", ".css", ".js")
    }
    assert len(page) == 5
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == modules | experiments | pretrained | page | {"lsrs_jax/py.typed"}
    with tarfile.open(next(out.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert modules | pretrained | page | {f"configs/{path.name}" for path in (source / "configs").glob("*.py")} <= names


class Environment:
    """A new environment with the wheel, and an empty folder to work in."""

    def __init__(self, python, wheel, folder):
        self.folder, self.bin = folder / "empty", folder / "venv" / "bin"
        self.folder.mkdir()
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
        install = [self.bin / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel]
        subprocess.run(install, check=True)

    def run(self, *words, cwd=None, code=0):
        """Stdout, or for another exit code stderr, of a program of the environment."""
        settings = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}
        settings.pop("PYTHONPATH", None)
        words, where = list(map(str, words)), cwd or self.folder
        done = subprocess.run(words, cwd=where, env=settings, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout


@pytest.fixture(scope="module", params=["this", "newest"])
def installed(built, request, tmp_path_factory):
    python = sys.executable if request.param == "this" else newest_python()
    if python is None:
        pytest.skip(f"there is no Python newer than {sys.version.split()[0]} here")
    return Environment(python, next(built[1].glob("*.whl")), tmp_path_factory.mktemp(request.param))


def test_three_commands_from_an_empty_folder(installed):
    few = ("--config.train.steps=100", "--config.certify.n=500", "--config.certify.step=9")
    installed.run("lsrs", "train", "--config=digits", "--workdir=w", *few)
    assert "Lipschitz constant 1.0" in installed.run("lsrs", "certify", "--workdir=w")
    installed.run("lsrs", "report", "w", "--out=r")
    assert {path.name for path in (installed.folder / "r").iterdir()} >= {
        "report.md",
        "report.html",
        "curve.png",
        "curve.svg",
    }
    assert "--config.train.steps" in installed.run("lsrs", "train", "--help")
    assert installed.run("lsrs") == installed.run("python", "-m", "lsrs_jax")
    line = installed.run("lsrs", "train", "--config=digit", "--workdir=x", code=2)
    assert "did you mean digits?" in line
    assert "cifar10_small" in line


def shades(folder):
    """Writes images of two classes, dark and light."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for label, name in enumerate(("dark", "light")):
            home = folder / split / name
            home.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(rng.normal(70 + 100 * label, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(home / f"{number}.png")


def test_a_folder_of_images_from_files_to_a_curve(installed):
    shades(installed.folder / "shades")
    few = ("--config.train.steps=60", "--config.data.batch_size=16", "--config.certify.n=500")
    installed.run("lsrs", "train", "--config=digits", "--config.data.name=folder:shades", "--workdir=s", *few)
    installed.run("lsrs", "certify", "--workdir=s")
    assert "| s |" in installed.run("lsrs", "report", "s", "--out=rs")


def test_every_block_of_the_readme_and_every_program_of_the_guide_runs(installed):
    readme, start, *rest = [BLOCK.findall(page.read_text(encoding="utf-8")) for page in (ROOT / "README.md", *PAGES)]
    first, guide = readme + start, sum(rest, readme + start)
    scripts = [text for language, text in first if language in ("", "bash") and "pip install" not in text]
    assert len(scripts) == 3
    # These are not installed with the package: tests/test_documentation.py runs their programs.
    absent = ("import equinox", "import torch")
    programs = [text for language, text in guide if language == "python" and not any(a in text for a in absent)]
    assert len(programs) > 10
    for text in programs:
        installed.run("python", "-c", text)
    shades(installed.folder / "PATH")
    few = "--config.train.steps=4 --config.train.warmup_steps=1 --config.data.batch_size=16"
    for text in scripts:
        text = text.replace("lsrs_jax.train ", f"lsrs_jax.train {few} ")
        text = text.replace("lsrs_jax.certify ", f"lsrs_jax.certify {LITTLE} ")
        installed.run("bash", "-e", "-c", text)


def test_a_bare_clone_uses_its_own_files(built, installed):
    source, _ = built
    code = "import lsrs_jax, lsrs_jax.flags as f; print(lsrs_jax.__file__, f.experiments()['digits'])"
    found = installed.run("python", "-c", code, cwd=source).split()
    assert found == [str(source / "lsrs_jax" / "__init__.py"), str(source / "configs" / "digits.py")]
    few = ("--config.train.steps=2", "--config.train.evaluate_every=2", "--workdir=w")
    installed.run("python", "-m", "lsrs_jax.train", "--config=configs/digits.py", *few, cwd=source)
