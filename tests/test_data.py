import numpy as np
import pytest

from lsrs_jax import data
from lsrs_jax.runtime.errors import UserError
from support import prepared


def test_digits_are_real_and_split_once():
    train, test = data.load("digits", "train"), data.load("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.shape == (8, 8, 1)
    assert set(train.labels) == set(range(10)) == set(test.labels)
    pixels = train.read(np.arange(len(train)), np.float64)[0]
    assert (pixels.min(), pixels.max()) == (0.0, 1.0)
    assert 1e-3 < pixels.std() < 0.5


def test_a_prepared_set_is_read_in_order(tmp_path):
    images, labels = prepared.random_split(40, (5, 4, 3))
    prepared.write(tmp_path, "tiny", {"train": (images, labels), "test": (images[:7], labels[:7])})
    train = data.load("tiny", "train", str(tmp_path))
    np.testing.assert_array_equal(train.images, images)
    np.testing.assert_array_equal(train.labels, labels)
    assert (train.name, train.version, len(train.class_names)) == ("tiny", "1.0.0", 3)
    assert len(data.load("tiny", "train[:25%]", str(tmp_path))) == 10
    assert len(data.load("tiny:1.0.0", "test", str(tmp_path))) == 7


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
    prepared.write(tmp_path, "tiny", {"train": prepared.random_split(3, (4, 4, 1))})
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert data.load("tiny", "train").shape == (4, 4, 1)


def test_what_is_missing_says_how_to_get_it(tmp_path):
    home = prepared.write(tmp_path, "tiny", {"train": prepared.random_split(3, (4, 4, 1))})
    prepared.write(tmp_path, "records", {"train": prepared.random_split(3, (4, 4, 1))}, file_format="tfrecord")
    for name, split, why in (
        ("cifar10", "train", f"tfds build cifar10 --file_format=array_record --data_dir={tmp_path}"),
        ("tiny:2.0.0", "train", "only 1.0.0"),
        ("tiny", "tran", "did you mean 'train'"),
        ("tiny", "test", "has no split 'test'"),
        ("records", "train", "needs TensorFlow"),
        ("tiny", "train[:0]", "empty"),
    ):
        with pytest.raises(UserError, match=why.replace("[", "\\[")) as caught:
            data.load(name, split, str(tmp_path))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="has the splits train and test"):
        data.load("digits", "validation")
    record = next(home.glob("*.array_record*"))
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot read"):
        data.load("tiny", "train", str(tmp_path))


def test_batches_depend_on_seed_and_step_alone():
    epoch = [data.batch_indices(100, 32, 7, step) for step in range(3)]
    seen = np.concatenate(epoch)
    assert len(set(seen.tolist())) == 96
    np.testing.assert_array_equal(data.batch_indices(100, 32, 7, 1), epoch[1])
    assert (data.batch_indices(100, 32, 7, 3) != epoch[0]).any()
    assert (data.batch_indices(100, 32, 8, 0) != epoch[0]).any()
    for size in (0, 101):
        with pytest.raises(UserError, match=r"data.batch_size"):
            data.batch_indices(100, size, 0, 0)


def test_augmentation_shifts_and_flips_each_image_its_own_way():
    images = np.arange(1, 37, dtype=np.float32).reshape(1, 6, 6, 1).repeat(400, axis=0)
    out = data.augment(images, crop=1, flip=True, seed=0, step=3)
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    padded = np.pad(images[0], ((1, 1), (1, 1), (0, 0)))
    legal = [padded[i : i + 6, j : j + 6] for i in range(3) for j in range(3)]
    legal += [image[:, ::-1] for image in legal]
    counts = np.array([(out == image).all(axis=(1, 2, 3)).sum() for image in legal])
    assert counts.sum() == 400
    assert counts.min() > 5  # all 18 outcomes, each about 22 times
    np.testing.assert_array_equal(out, data.augment(images, crop=1, flip=True, seed=0, step=3))
    assert (out != data.augment(images, crop=1, flip=True, seed=0, step=4)).any()
    np.testing.assert_array_equal(data.augment(images, crop=0, flip=False, seed=0, step=0), images)
    part = data.augment(images[7:90], crop=1, flip=True, seed=0, step=3, rows=slice(7, 90), batch_size=400)
    np.testing.assert_array_equal(part, out[7:90])


def test_a_set_without_the_version_asked_for_names_those_it_has(tmp_path):
    (tmp_path / "mnist").mkdir()
    for name, words in (
        ("mnist", "no prepared version; prepare"),
        ("mnist:9.0.0", "no prepared version 9.0.0; prepare"),
    ):
        with pytest.raises(UserError, match=words):
            data.load(name, "test", str(tmp_path))
    (tmp_path / "mnist" / "3.0.1").mkdir()
    (tmp_path / "mnist" / "3.0.1" / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=r"no prepared version 9.0.0, only 3.0.1; prepare"):
        data.load("mnist:9.0.0", "test", str(tmp_path))


def test_real_sets(real_data):
    mnist = data.load("mnist", "test", str(real_data))
    assert mnist.images.shape == (10_000, 28, 28, 1)
    assert np.bincount(mnist.labels)[1] == 1135
    cifar = data.load("cifar10", "test_exact", str(real_data))
    assert cifar.images.shape == (1000, 32, 32, 3)
    assert np.bincount(cifar.labels).tolist() == [103, 89, 100, 103, 90, 86, 112, 102, 106, 109]
    with pytest.raises(UserError, match="differ in size"):
        data.load("imagenet2012", "validation", str(real_data))
