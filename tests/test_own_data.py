"""A user's own images, from files, arrays and objects to certificates; and what is refused on the way."""

import dataclasses

import jax
import numpy as np
import pytest

from lsrs_jax import models
from lsrs_jax.config import default, load_config
from lsrs_jax.flags import config_from_flags
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.training import fit
from lsrs_jax.training.checkpoint import restore
from support import prepared
from support.commands import refused, run
from support.own_images import NAMES, shades, write_folder

FEW = [
    *("--config=digits", "--config.train.steps=30", "--config.train.evaluate_every=30", "--config.data.batch_size=8"),
    *("--config.certify.n=300", "--config.certify.n0=50", "--config.certify.tile=(8,8)"),
]


def certified(workdir, *flags):
    run("certify", f"--workdir={workdir}", *flags)
    rows = (workdir / "certify" / "default" / "certificates.tsv").read_text().splitlines()[1:]
    assert sum(int(row.split("\t")[4]) for row in rows) > len(rows) / 2  # it has learned the shades
    return rows


@pytest.mark.parametrize("kind", ["folder", "npz", "tfds"])
def test_from_files_to_certificates_and_a_report(tmp_path, monkeypatch, kind):
    train, test = shades(60), shades(15, seed=1)
    if kind == "folder":
        write_folder(tmp_path / "set", {"train": train, "test": test})
    elif kind == "npz":
        arrays = dict(zip(("x_train", "y_train", "x_test", "y_test"), (*train, *test), strict=True))
        np.savez_compressed(tmp_path / "set", **arrays)
    else:
        prepared.write(tmp_path, "shades", {"train": train, "test": test})
    names = {"folder": f"folder:{tmp_path}/set", "npz": f"npz:{tmp_path}/set.npz", "tfds": "shades"}
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    workdir = tmp_path / "w"
    run("train", *FEW, f"--config.data.name={names[kind]}", f"--workdir={workdir}")
    assert len(certified(workdir)) == 15
    assert "| w | 15 |" in run("report", workdir, f"--out={tmp_path / 'r'}")
    if kind == "folder":  # the identity holds digest and class names, not the path
        (tmp_path / "set").rename(tmp_path / "moved")
        moved = f"--config.data.dir={tmp_path / 'moved'}"
        run("certify", f"--workdir={workdir}", moved, "--recast=3")
        (tmp_path / "moved" / "train" / "cat").rename(tmp_path / "moved" / "train" / "ape")
        (tmp_path / "moved" / "test" / "cat").rename(tmp_path / "moved" / "test" / "ape")
        line = refused("certify", f"--workdir={workdir}", moved)
        assert "class 0 was 'cat', and it is 'ape' in folder" in line


def test_a_training_is_not_resumed_on_other_images_or_classes(tmp_path):
    images, labels = shades(24)
    write_folder(tmp_path / "a", {"train": (images, labels), "test": shades(6, seed=1)})
    write_folder(tmp_path / "b", {"train": (images[::-1].copy(), labels), "test": shades(6, seed=1)})
    write_folder(tmp_path / "c", {"train": (images, labels), "test": shades(6)}, names=("cat", "dog", "fox"))
    flags = [*FEW, f"--workdir={tmp_path / 'w'}"]
    run("train", *flags, f"--config.data.name=folder:{tmp_path / 'a'}")
    line = refused("train", *flags, f"--config.data.name=folder:{tmp_path / 'b'}")
    assert "trained on other images or labels under the same name" in line
    line = refused("train", *flags, f"--config.data.name=folder:{tmp_path / 'c'}")
    assert "class_names is ['cat', 'dog', 'emu'], and not ['cat', 'dog', 'fox']" in line
    assert "already trained" in run("train", *flags, f"--config.data.name=folder:{tmp_path / 'a'}")


def restored(workdir):
    """The parameters of the newest checkpoint, as the certification reads them."""
    config = load_config(workdir / "config.json")
    return restore(workdir, models.build(config.model, (8, 8, 3), 3))[0]


def test_an_older_checkpoint_can_be_certified_and_a_training_continued(tmp_path):
    np.savez_compressed(tmp_path / "set.npz", images=shades(60)[0], labels=shades(60)[1])
    flags = [*FEW, f"--config.data.name=npz:{tmp_path / 'set.npz'}"]
    run("train", *flags, "--config.train.checkpoint_every=10", f"--workdir={tmp_path / 'w'}")
    older = [f"--workdir={tmp_path / 'w'}", "--config.certify.checkpoint=20", "--config.certify.name=older"]
    run("certify", *older)
    assert '"step": 20' in (tmp_path / "w" / "certify" / "older" / "certificates.json").read_text()
    assert "no checkpoint of step 7" in refused("certify", *older, "--config.certify.checkpoint=7")
    more = [*flags, f"--config.train.start_from={tmp_path / 'w'}", f"--workdir={tmp_path / 'more'}"]
    out = run("train", *more, "--config.train.learning_rate=1e-12")
    assert f"starting with the parameters of {tmp_path / 'w'}" in out
    old, new = (restored(tmp_path / name) for name in ("w", "more"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), old, new)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(old)) > 0.1
    line = refused("train", *more[:-2], f"--config.train.start_from={tmp_path / 'none'}", f"--workdir={tmp_path / 'x'}")
    assert "no checkpoint in" in line


@pytest.mark.parametrize("kind", ["digest", "share", "more"])
def test_images_of_the_training_are_not_certified_by_accident(tmp_path, kind):
    root, workdir = write_folder(tmp_path / "set", {"": shades(48)}), tmp_path / "w"
    size = ("--config.data.size=8",) if kind == "digest" else ()
    flags = [*FEW, f"--config.data.name=folder:{root}", *size, f"--workdir={workdir}"]
    run("train", *flags, "--config.train.steps=4", "--config.train.evaluate_every=4")
    if kind == "share":
        for flag in ("--config.data.share_seed=5", "--config.data.test_share=0.9"):
            assert "would certify images on which it was trained" in refused("certify", f"--workdir={workdir}", flag)
        return
    write_folder(root, {"": shades(48, seed=5)}, kind="png" if kind == "digest" else "bmp")
    line = refused("train", *flags, "--config.train.steps=4", "--config.train.evaluate_every=4")
    assert "trained on other images or labels under the same name" in line


def test_parameters_to_start_from_are_not_forgotten_after_a_kill(tmp_path):
    np.savez_compressed(tmp_path / "set.npz", images=shades(60)[0], labels=shades(60)[1])
    flags = [*FEW, f"--config.data.name=npz:{tmp_path / 'set.npz'}"]
    run("train", *flags, f"--workdir={tmp_path / 'w'}")
    killed = tmp_path / "killed"
    (killed / "checkpoints").mkdir(parents=True)
    out = run("train", *flags, f"--config.train.start_from={tmp_path / 'w'}", f"--workdir={killed}")
    assert "starting with the parameters of" in out


def test_splits_that_do_not_belong_together_are_refused_before_any_work(tmp_path):
    images, labels = shades(12)
    arrays = {"x_train": images, "y_train": labels, "x_test": images[:, :6, :6], "y_test": labels}
    np.savez_compressed(tmp_path / "set.npz", **arrays)
    flags = [*FEW, f"--config.data.name=npz:{tmp_path / 'set.npz'}", f"--workdir={tmp_path / 'w'}"]
    assert "training images have the shape (8, 8, 3), test images (6, 6, 3)" in refused("train", *flags)
    assert not (tmp_path / "w").exists()


def test_certificates_of_another_set_remember_where_it_is(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", images=shades(60)[0], labels=shades(60)[1])
    np.savez_compressed(tmp_path / "b.npz", x_test=shades(9, seed=3)[0], y_test=shades(9, seed=3)[1])
    workdir = f"--workdir={tmp_path / 'w'}"
    run("train", *FEW, f"--config.data.name=npz:{tmp_path / 'a.npz'}", workdir)
    run("certify", workdir, f"--config.data.name=npz:{tmp_path / 'b.npz'}")
    assert "verdict: intact" in run("certify", workdir, "--recast=2")
    np.savez_compressed(tmp_path / "b.npz", x_test=shades(9, seed=4)[0], y_test=shades(9, seed=3)[1])
    line = refused("certify", workdir, f"--config.data.name=npz:{tmp_path / 'b.npz'}")
    assert "images or labels of npz, split test, have changed (digest " in line


def small_config():
    config = config_from_flags(FEW)
    config.train.steps = config.train.evaluate_every = config.train.checkpoint_every = 40
    config.sigma = 0.25
    return config


def test_fit_takes_arrays_and_the_command_certifies_what_it_wrote(tmp_path):
    train, test = shades(60), shades(15, seed=1)
    workdir = tmp_path / "w"
    model, params = fit(small_config(), train, test, workdir, NAMES)
    logits = model.classify(params, model.encode(params, (test[0] / 255).astype(np.float32)))
    assert logits.shape == (15, 3)
    assert load_config(workdir / "config.json").data.name == "arrays"
    assert "save them with numpy.savez_compressed" in refused("certify", f"--workdir={workdir}")
    np.savez_compressed(tmp_path / "test.npz", x_test=test[0], y_test=test[1], class_names=np.array(NAMES))
    run("certify", f"--workdir={workdir}", f"--config.data.name=npz:{tmp_path / 'test.npz'}")
    for pair, why in (
        ((train[0], train[1] + 5), "label"),
        ((train[0], np.full(60, np.nan)), "whole numbers"),
        ((train[0], np.array(["a"] * 60)), "whole numbers"),
        ((train[0][:, :4], train[1]), "both must have the same"),
        ((*train, None), r"must be \(images, labels\), got 3 arrays"),
        (train[0], "ndarray has no name"),
    ):
        for names in (NAMES, None)[: 1 if why == "label" else 2]:
            with pytest.raises(UserError, match=why):
                fit(small_config(), pair, test, tmp_path / "x", names)
    assert not (tmp_path / "x").exists()


@dataclasses.dataclass(frozen=True)
class Stripes:
    """A set that makes its images when they are read."""

    split: str
    name: str = "stripes"
    version: str = "1"
    class_names: tuple = ("even", "odd")
    shape: tuple = (8, 8, 1)

    def __len__(self):
        return 24

    @property
    def labels(self):
        return np.arange(24, dtype=np.int32) % 2

    def digest(self):
        return f"{self.name} {self.split}"

    def read(self, index, dtype):
        labels = self.labels[index]
        images = np.zeros((len(labels), 8, 8, 1), dtype)
        for image, label in zip(images, labels, strict=True):
            image[label::2] = 1
        return images, labels


def test_any_object_with_the_members_of_a_set_can_be_trained_on(tmp_path):
    model, params = fit(small_config(), Stripes("train"), Stripes("test"), tmp_path / "w")
    images, labels = Stripes("test").read(np.arange(24), np.float32)
    assert (np.argmax(model.classify(params, model.encode(params, images)), axis=1) == labels).all()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"labels": np.arange(24) % 2 - 1}, "label -1"),
        ({"labels": np.arange(24)}, "label 2, but labels go from 0 to 1"),
        ({"read": lambda index, dtype: (np.full((len(index), 8, 8, 1), 9, dtype), index % 2)}, "pixels in \\[0, 1\\]"),
        ({"read": lambda index, dtype: (np.zeros((len(index), 8, 8), dtype), index % 2)}, "read must return images"),
        (
            {"read": lambda index, dtype: (np.zeros((len(index), 8, 8, 1), np.uint8), index % 2)},
            "read must return pixels",
        ),
    ],
)
def test_an_object_that_breaks_its_promise_is_refused(tmp_path, change, why):
    class Broken(Stripes):
        pass

    for name, value in change.items():
        setattr(Broken, name, property(lambda _, value=value: value))
    with pytest.raises(UserError, match=why):
        fit(small_config(), Broken("train"), Stripes("test"), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_relative_folder_is_found_from_another_one(tmp_path, monkeypatch):
    write_folder(tmp_path / "set", {"train": shades(9), "test": shades(3)})
    monkeypatch.chdir(tmp_path)
    config = config_from_flags([*FEW, "--config.data.name=folder:set"])
    assert config.data.dir == str(tmp_path / "set")
    monkeypatch.setenv("HOME", str(tmp_path))
    config = config_from_flags([*FEW, "--config.data.name=folder:~/set"])
    assert config.data.dir == str(tmp_path / "set")
    assert config_from_flags([*FEW, "--config.data.name=hf:org/name"]).data.dir == "org/name"
    assert config_from_flags(FEW).data.dir == default().data.dir == ""
