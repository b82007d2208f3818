"""The second round on an accelerator: its data arrive as they were sent; its calls resume, end in time and report."""

import argparse
import json
import tarfile

import numpy as np
import pytest

from benchmarks import accelerator, cifar10_file, second_round
from lsrs_jax.data import load
from lsrs_jax.runtime.errors import UserError
from studies.runs import RECIPE
from support import prepared

LINEAR = "deterministic, Haar, linear"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed file of random images, and the folder of tensorflow-datasets from which it was made."""
    folder = tmp_path_factory.mktemp("packed")
    sizes = {"train": 32, "test": 12, "test_exact": 12}
    splits = {name: prepared.random_split(size, (32, 32, 3), 10) for name, size in sizes.items()}
    prepared.write(folder, "cifar10", splits, num_classes=10)
    cifar10_file.pack(folder, folder / "cifar10.packed")
    return folder / "cifar10.packed", folder


def test_labels_and_exact_images_arrive_as_they_were(packed, tmp_path):
    path, folder = packed
    digest = cifar10_file.unpack(path, tmp_path / "cifar10.npz")
    for split in ("train", "test", "test_exact"):
        sent, arrived = load("cifar10", split, folder), load(f"npz:{tmp_path / 'cifar10.npz'}", split)
        np.testing.assert_array_equal(sent.labels, arrived.labels)
        assert (sent.shape, sent.class_names) == (arrived.shape, arrived.class_names)
    assert digest == sent.digest() == arrived.digest()


def test_jpeg_changes_smooth_images_little_and_keeps_neighbours_apart():
    x, y = np.meshgrid(np.linspace(0, 200, 32), np.linspace(0, 50, 32))
    smooth = np.stack([x, y, x + y], axis=-1).astype(np.uint8)
    images = np.stack([smooth, 255 - smooth, np.zeros_like(smooth)] * 40)
    back = cifar10_file.images_of(cifar10_file.jpeg(images), len(images))
    assert back.shape == images.shape
    assert np.abs(back.astype(int) - images).max() <= 8
    np.testing.assert_array_equal(back[2::3], 0)


def test_a_damaged_or_another_file_is_refused(packed, tmp_path):
    content = bytearray(packed[0].read_bytes())
    (tmp_path / "short").write_bytes(content[: len(content) // 2])
    with np.load(packed[0]) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["y_train"] = arrays["y_train"][::-1]
    np.savez(tmp_path / "other.npz", **arrays)
    for name, words in (("short", "is no packed CIFAR-10"), ("other.npz", "was damaged: send it again")):
        with pytest.raises(UserError, match=words):
            cifar10_file.unpack(tmp_path / name, tmp_path / "cifar10.npz")
    assert not (tmp_path / "cifar10.npz").exists()


def test_the_plan_has_every_run_and_the_calls_end_before_their_time(capsys):
    second_round.main(["plan"])
    text = capsys.readouterr().out
    for label, run in second_round.ROWS.items():
        assert (f"workdir=runs/{run.name}" in text) == (label != RECIPE)
    assert set(second_round.BUDGETS) == set(second_round.PIECES)
    assert all(seconds < 300 for seconds in second_round.SECONDS.values())


@pytest.mark.soak
def test_a_call_makes_keeps_packs_and_resumes(packed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(second_round, "SIDE_BY_SIDE", [LINEAR])
    arguments = ["call1", "--tiny", f"--packed={packed[0]}", f"--out={tmp_path / 'out'}", f"--to={tmp_path / 'to'}"]
    with pytest.raises(accelerator.Deadline, match="the same command resumes"):
        second_round.main([*arguments, "--seconds=0.01"])
    assert not list((tmp_path / "out").glob("kept/*"))
    second_round.main(arguments)
    assert f"| {LINEAR} | no noise |" in capsys.readouterr().out
    with tarfile.open(tmp_path / "to" / "out.tar.gz.0") as archive:
        archive.extractall(tmp_path / "back", filter="data")
    back = tmp_path / "back" / "out"
    assert second_round.markdown(back) == second_round.markdown(tmp_path / "out")
    assert not (back / "cifar10.npz").exists()
    kept = json.loads((back / "kept" / "second-haar-linear" / "certificates.json").read_text())
    assert kept["identity"]["data"]["digest"] == load("cifar10", "test_exact", packed[1]).digest()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    second_round.main(arguments)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_call2_goes_on_after_a_piece_that_fails(tmp_path, monkeypatch):
    this = second_round.Round(argparse.Namespace(tiny=True, out=tmp_path, seconds=60))
    with pytest.raises(UserError, match="needs the checkpoint of second-haar-blocks: run call1 first"):
        second_round.whole_set(this, this.whole, "fixed")
    pieces = {"fixed": second_round.PIECES["fixed"], "rates": lambda this, work: {"seconds": work.end}}
    monkeypatch.setattr(second_round, "PIECES", pieces)
    assert second_round.call2(this) == ["fixed"]
    assert [path.name for path in tmp_path.iterdir()] == ["second.rates.json"]
    this.whole.end = 0.0
    with pytest.raises(accelerator.Deadline, match="no time is left for fixed"):
        second_round.call2(this)


def test_warm_ups_keep_their_shares():
    flags = dict(flag.split("=") for flag in second_round.lengths(12_000))
    assert flags == {
        "train.steps": "12000",
        "train.warmup_steps": "1800",
        "train.smoothadv.warmup_steps": "1200",
        "train.sigma_steps": "600",
    }
