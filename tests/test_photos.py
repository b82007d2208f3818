"""Photos of any size: which part of a photo is used, and that it does not depend on the process that decodes it."""

import io
import json
import multiprocessing

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from lsrs_jax import certify, data, train
from lsrs_jax.config import default
from lsrs_jax.data import photos
from lsrs_jax.runtime.errors import UserError
from support import prepared
from support.commands import ROOT, finish, refused, run, run_together, start, without_time

SMALL = [
    "--config=configs/imagenet.py:smoke",
    "--config.data.name=snaps",
    "--config.data.size=32",
    "--config.data.split=test",
    "--config.model.widths=(0,12,12,24)",
    "--config.model.strides=(2,1,1,2)",
    "--config.model.split=4",
    "--config.model.head=convnet_small",
]


@pytest.fixture(scope="module")
def snaps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    prepared.write(folder, "snaps", {"train": prepared.photos(40), "test": prepared.photos(12, seed=1)})
    return folder


def settings(**fields):
    config = default()
    config.data.name, config.data.size, config.data.batch_size, config.data.flip = "snaps", 16, 8, True
    config.data.update(fields)
    return config.data


def batches(folder, first=0, stop=6, own=slice(None), **fields):
    chosen = settings(**fields)
    return list(data.training_batches(data.load("snaps", "train", folder, 16), chosen, 5, first, stop, own))


def test_labels_and_shape_are_those_of_the_set(snaps):
    split = data.load("snaps", "test", snaps, 16)
    assert isinstance(split, data.Photos)
    assert (len(split), split.shape, len(split.class_names)) == (12, (16, 16, 3), 3)
    np.testing.assert_array_equal(split.labels, prepared.photos(12, seed=1)[1])
    assert len(data.load("snaps", "test[:25%]", snaps, 16)) == 3
    with pytest.raises(UserError, match=r"differ in size.*--config\.data\.size="):
        data.load("snaps", "test", snaps)
    with pytest.raises(UserError, match="digits are 8x8"):
        data.load("digits", "test", size=16)


def test_the_evaluated_part_is_the_middle_of_the_resized_photo(snaps):
    """Compares with the usual two steps: resize the shorter side to 8/7 of the size, crop the central square."""
    split = data.load("snaps", "test", snaps, 28)
    found = split.read(np.arange(12), np.float64)[0]
    assert (found.min() >= 0, found.max() <= 1, found.dtype) == (True, True, np.float64)
    for image, file in zip(found, prepared.photos(12, seed=1)[0], strict=True):
        photo = Image.open(io.BytesIO(file))
        short = min(photo.size)
        resized = photo.resize([round(side * 32 / short) for side in photo.size], Image.Resampling.BILINEAR)
        left, top = (resized.width - 28) // 2, (resized.height - 28) // 2
        wanted = np.asarray(resized.crop((left, top, left + 28, top + 28))) / 255
        whole = np.asarray(photo.resize((28, 28), Image.Resampling.BILINEAR)) / 255
        # The two steps round sides and corners to whole pixels, so the results differ a little.
        assert np.abs(image - wanted).mean() < 0.02
        assert np.abs(image - wanted).mean() < 0.5 * np.abs(image - whole).mean()


def test_random_parts_have_the_share_and_the_ratio_they_should():
    rng = np.random.default_rng(0)
    boxes = np.array([photos.random_box(500, 375, rng, (0.08, 1.0)) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= 500).all()
    assert (boxes[:, 3] <= 375).all()
    share, ratio = width * height / (500 * 375), width / height
    assert 0.078 < share.min() < 0.085
    assert share.max() > 0.95
    assert 0.74 < ratio.min() < 0.77
    assert 1.31 < ratio.max() < 1.35
    # If every box fits into the photo, shares are uniform and ratios log-uniform: checks means and quartiles.
    small = np.array([photos.random_box(500, 500, rng, (0.1, 0.3)) for _ in range(4000)])
    width, height = small[:, 2] - small[:, 0], small[:, 3] - small[:, 1]
    assert abs(np.mean(width * height / 250_000) - 0.2) < 0.004
    assert abs(np.mean(np.log(width / height))) < 0.01
    assert abs(np.mean(np.abs(np.log(width / height)) < np.log(4 / 3) / 2) - 0.5) < 0.04
    assert abs(np.mean(small[:, 0] / (500 - width)) - 0.5) < 0.02
    # If no box has an allowed share and ratio, the largest central box with an allowed ratio is used.
    assert photos.random_box(1000, 10, rng, (1.0, 1.0)) == pytest.approx((493.33, 0, 506.67, 10), abs=0.01)


def test_batches_do_not_depend_on_workers_start_or_process(snaps):
    whole = batches(snaps)
    assert len(whole) == 6
    assert whole[0][0].shape == (8, 16, 16, 3)
    assert whole[0][0].dtype == np.float32
    assert 0.5 < whole[0][0].max() <= 1
    for other in (batches(snaps, workers=2), batches(snaps, workers=1)):
        for (images, labels), (images_, labels_) in zip(whole, other, strict=True):
            np.testing.assert_array_equal(images, images_)
            np.testing.assert_array_equal(labels, labels_)
    late = batches(snaps, first=4, own=slice(2, 5))
    assert len(late) == 2
    np.testing.assert_array_equal(late[1][0], whole[5][0][2:5])
    np.testing.assert_array_equal(late[1][1], whole[5][1][2:5])


def test_an_epoch_sees_every_photo_once_and_the_next_one_cuts_it_otherwise(snaps):
    split = data.load("snaps", "train", snaps, 16)
    order = np.concatenate([data.batch_indices(40, 8, 5, step) for step in range(5)])
    whole = batches(snaps, stop=10, area=(1.0, 1.0), flip=False)
    labels = np.concatenate([labels for _, labels in whole[:5]])
    np.testing.assert_array_equal(labels, split.labels[order])
    first = np.concatenate([images for images, _ in batches(snaps, stop=5)])[np.argsort(order)]
    again = np.concatenate([data.batch_indices(40, 8, 5, step) for step in range(5, 10)])
    second = np.concatenate([images for images, _ in batches(snaps, first=5, stop=10)])[np.argsort(again)]
    assert (np.abs(first - second).mean(axis=(1, 2, 3)) > 1e-3).all()


def test_half_of_the_photos_are_mirrored(snaps):
    split = data.load("snaps", "train", snaps, 16)
    plain, _ = split.random_view(3, np.random.default_rng(0), (1.0, 1.0), flip=False)
    views = [split.random_view(3, np.random.default_rng(seed), (1.0, 1.0), flip=True)[0] for seed in range(200)]
    mirrored = sum(
        (view == split.random_view(3, np.random.default_rng(s), (1.0, 1.0), False)[0][:, ::-1]).all()
        for s, view in enumerate(views)
    )
    assert 70 < mirrored < 130
    assert plain.dtype == np.uint8


def test_the_digest_sees_photos_labels_and_size(snaps, tmp_path):
    files, labels = prepared.photos(12, seed=1)
    digests = {data.load("snaps", "test", snaps, size).digest() for size in (16, 20)}
    assert data.load("snaps", "test", snaps, 16).digest() in digests
    for name, changed in (
        ("label", (files, np.r_[labels[:-1], (labels[-1] + 1) % 3])),
        ("order", (files[::-1], labels)),
        ("photo", ([*files[:-1], prepared.photos(1, seed=9)[0][0]], labels)),
    ):
        prepared.write(tmp_path / name, "snaps", {"test": changed})
        digests.add(data.load("snaps", "test", tmp_path / name, 16).digest())
    assert len(digests) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photo_that_cannot_be_decoded_is_named(tmp_path, workers):
    files, labels = prepared.photos(8)
    prepared.write(tmp_path, "snaps", {"train": ([*files[:7], files[7][:200]], labels)})
    with pytest.raises(UserError, match="image 7 of the split 'train' of snaps cannot be decoded"):
        batches(tmp_path, stop=1, workers=workers)
    with pytest.raises(UserError, match="image 7 of the split 'train' of snaps cannot be decoded"):
        data.load("snaps", "train", tmp_path, 16).read([7], np.float32)[0]


def test_a_broken_png_is_named_without_addresses(tmp_path):
    files = [prepared.encoded(np.zeros((30, 30, 3), np.uint8))[:8] + b"\0\0\0\5\1\2\3\4" + bytes(20), b"nothing"]
    prepared.write(tmp_path, "snaps", {"train": (files, [0, 1])})
    split = data.load("snaps", "train", tmp_path, 16)
    for index in range(2):
        with pytest.raises(UserError, match=f"image {index} of the split 'train' of snaps cannot be decoded") as error:
            split.read([index], np.float32)[0]
        assert "0x" not in str(error.value)


def test_a_worker_that_is_killed_is_one_line(snaps):
    stream = data.training_batches(data.load("snaps", "train", snaps, 16), settings(workers=1), 5, 0, 500)
    next(stream)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(UserError, match=r"was killed .*smaller --config\.data\.workers"):
        list(stream)


@pytest.mark.usefixtures("fast_compilation")
def test_the_training_is_kept_where_a_test_photo_is_broken(tmp_path):
    files, labels = prepared.photos(12)
    prepared.write(tmp_path, "snaps", {"train": (files, labels), "test": ([*files[:11], files[11][:200]], labels)})
    flags = [*SMALL, f"--config.data.dir={tmp_path}", f"--workdir={tmp_path / 'w'}", "--config.data.workers=0"]
    assert "image 11 of the split 'test' of snaps cannot be decoded" in refused("train", *flags)
    assert (tmp_path / "w" / "checkpoints" / "4").is_dir()


def test_data_in_cloud_buckets_are_refused(tmp_path):
    with pytest.raises(UserError, match="a folder that this machine sees"):
        data.load("snaps", "train", "gs://bucket/tfds", 16)


@pytest.mark.soak
def test_trained_certified_killed_and_resumed(snaps, tmp_path):
    """SIGTERM ends the first half of a training with workers; the second half starts with exactly the next batch."""
    flags = [*SMALL, f"--config.data.dir={snaps}", "--config.train.steps=12", "--config.train.checkpoint_every=100"]
    run("train", *flags, f"--workdir={tmp_path / 'whole'}", "--config.data.workers=0")
    halved = start("train", *flags, f"--workdir={tmp_path / 'halved'}", "--config.data.workers=2")
    for line in halved.stdout:
        if line.startswith("step      3"):
            halved.terminate()
            break
    code, _, err = finish(halved)
    assert code == 143, err
    run("train", *flags, f"--workdir={tmp_path / 'halved'}", "--config.data.workers=1")
    for name in ("whole", "halved"):
        run("certify", f"--workdir={tmp_path / name}")
    tables = [
        without_time(tmp_path / name / "certify" / "default" / "certificates.tsv") for name in ("whole", "halved")
    ]
    assert tables[0] == tables[1]
    assert len(tables[0]) == 7
    run("certify", f"--workdir={tmp_path / 'whole'}", "--verify")
    assert "data.size" in refused("train", *flags, f"--workdir={tmp_path / 'whole'}", "--config.data.size=28")


@pytest.mark.soak
def test_two_processes_see_the_batches_of_one(snaps, tmp_path):
    flags = [*SMALL, f"--config.data.dir={snaps}", "--config.data.workers=1"]
    run("train", *flags, f"--workdir={tmp_path / 'one'}", devices=2)
    run_together(2, "train", *flags, f"--workdir={tmp_path / 'two'}")
    losses = []
    for name in ("one", "two"):
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5, rtol=0)


def test_crop_belongs_to_images_of_one_size(snaps, tmp_path):
    line = refused("train", *SMALL, f"--config.data.dir={snaps}", f"--workdir={tmp_path}", "--config.data.crop=2")
    assert "data.crop must be at least 0, and 0 if data.size is given" in line


class _Drawn(list):
    """A stand-in for a data source of tensorflow-datasets."""

    def __getitems__(self, keys):
        return [self[key] for key in keys]


@pytest.mark.usefixtures("fast_compilation")
def test_end_to_end_on_mocked_data(snaps, tmp_path, monkeypatch, capsys):
    """`tfds.testing.mock_data` replaces the record files."""
    files, labels = prepared.photos(16, seed=3)

    def source(self, split, decoders=None, **_):
        assert "image" in decoders
        return _Drawn({"image": file, "label": int(label)} for file, label in zip(files, labels, strict=True))

    monkeypatch.chdir(ROOT)
    home = snaps / "snaps" / "1.0.0"
    with tfds.testing.mock_data(num_examples=16, data_dir=str(home), as_data_source_fn=source):
        train.run([*SMALL, f"--config.data.dir={snaps}", f"--workdir={tmp_path}", "--config.data.workers=0"])
        assert "16 training and 16 test images (32, 32, 3)" in capsys.readouterr().out
        certify.run([f"--workdir={tmp_path}"])
    assert "8 images: certified accuracy" in capsys.readouterr().out


@pytest.mark.soak
@pytest.mark.parametrize("variant", ["smoke", "smoke_isrs"])
def test_imagenet_end_to_end(real_data, tmp_path, variant):
    """Trains and certifies the full-size networks of configs/imagenet.py on real photos."""
    out = run(
        "train",
        f"--config=configs/imagenet.py:{variant}",
        f"--config.data.dir={real_data}",
        f"--workdir={tmp_path}",
        "--config.data.workers=2",
    )
    assert "100 training and 8 test images (224, 224, 3)" in out
    assert "4 images: certified accuracy" in run("certify", f"--workdir={tmp_path}")
    run("certify", f"--workdir={tmp_path}", "--verify")
