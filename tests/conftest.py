"""Fixtures of all tests: eight simulated CPU devices, short trainings, and real data where they are present."""

import ctypes
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import pytest

from lsrs_jax.runtime.processes import cache_compilations
from support import ROOT, prepared, threefry
from support.commands import QUICK, run

jax.config.update("jax_num_cpu_devices", 8)
# The compilation cache is shared by all tests and runs of the suite. It lies outside the user's cache.
os.environ["XDG_CACHE_HOME"] = str(Path(tempfile.gettempdir()) / f"lsrs_jax_tests_{os.getuid()}")
cache_compilations()
os.environ["HF_HUB_OFFLINE"] = "1"  # the library reads it when it is imported

LARGE = 3 << 29  # bytes
SHARED = Path(os.environ.get("LSRS_SHARED", ROOT.parent / "shared"))


def drop_compiled_programs():
    """Drops all compiled programs from memory; they stay on disk."""
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # otherwise glibc keeps a gigabyte of what XLA has freed


# The files that take longest, so that no worker begins one of them when the others have finished.
LONGEST = (
    "test_processes.py",
    "test_faults.py",
    "test_forgeries.py",
    "test_odd_folders.py",
    "test_audit.py",
    "test_convolution.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """Drops the compiled programs of a test file when the file is finished."""
    yield
    drop_compiled_programs()


@pytest.fixture(autouse=True)
def bounded_memory():
    """Drops the compiled programs after a test if the process has become large."""
    yield
    if (
        sys.platform == "linux"
        and int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") > LARGE
    ):
        drop_compiled_programs()


@pytest.fixture(scope="session")
def reference():
    """The folder of published certification logs."""
    folder = SHARED / "reference"
    if not folder.is_dir():
        pytest.skip("the published logs are not here")
    return folder


@pytest.fixture(scope="session")
def real_data():
    """A folder of prepared tensorflow-datasets sets."""
    folder = SHARED / "data" / "tfds"
    if not folder.is_dir():
        pytest.skip("the real data sets are not here")
    return folder


@pytest.fixture(scope="session")
def random_cifar10(tmp_path_factory):
    """A folder with a small set of random images in the format of CIFAR-10."""
    folder = tmp_path_factory.mktemp("data")
    splits = {"train": prepared.random_split(32, (32, 32, 3), 10), "test": prepared.random_split(12, (32, 32, 3), 10)}
    prepared.write(folder, "cifar10", splits, num_classes=10)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that all tests of one file share."""
    return tmp_path_factory.mktemp("folder")


@pytest.fixture(scope="module")
def certification(folder):
    """`samples.certified` in the shared folder."""
    from support import samples

    return samples.certified(folder / "certify" / "default")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The workdir of a short training on 8 simulated devices."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    out = run("train", *QUICK, f"--workdir={workdir}", devices=8)
    assert "8 x cpu" in out
    assert "left" in out
    return workdir


@pytest.fixture(scope="session")
def certified(trained):
    """The table of certificates of `trained`, computed on 1 device."""
    out = run("certify", f"--workdir={trained}", "--config.certify.name=base")
    assert "Lipschitz constant 1.0000000" in out
    assert "samples/s" in out
    assert "distances kept by the encoder, medians over pairs of 40 images: " in out
    return trained / "certify" / "base" / "certificates.tsv"


@pytest.fixture
def copy(trained, certified, tmp_path):
    """A copy of the training and its certificates, which the test may change."""
    target = tmp_path / "copy"
    shutil.copytree(trained, target)
    return target


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """Two trainings with certificates; the first also has certificates in bfloat16, and deterministic ones."""
    home = tmp_path_factory.mktemp("forgeries")
    train = [*QUICK, "--config.model.head=normalized"]
    for name, flags in (("honest", []), ("other", ["--config.seed=5"])):
        run("train", *train, *flags, f"--workdir={home / name}")
        run("certify", f"--workdir={home / name}")
    folder = f"--workdir={home / 'honest'}"
    run("certify", folder, "--config.certify.name=half", "--config.certify.head_dtype=bfloat16")
    flags = ["--config.certify.certificate=deterministic", "--config.certify.name=margin"]
    run("certify", folder, *flags)
    return home


@pytest.fixture
def home(originals, tmp_path):
    shutil.copytree(originals / "honest", tmp_path / "honest")
    return tmp_path / "honest"


@pytest.fixture
def fast_compilation():
    """Switches most XLA optimizations off, for tests that spend their time on compiling small programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def key():
    return threefry(0)
