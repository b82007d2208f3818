"""A user's own images: class folders, npz files, Hugging Face sets, arrays and any object with the members of a set."""

import dataclasses
import os

import jax
import numpy as np
import pytest
from PIL import Image

from lsrs_jax import data, models
from lsrs_jax.config import default, load_config
from lsrs_jax.data import npz
from lsrs_jax.flags import config_from_flags
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.training import fit
from lsrs_jax.training.checkpoint import restore
from support import prepared
from support.commands import refused, run

NAMES = ("cat", "dog", "emu")
FEW = [
    *("--config=digits", "--config.train.steps=30", "--config.train.evaluate_every=30", "--config.data.batch_size=8"),
    *("--config.certify.n=300", "--config.certify.n0=50", "--config.certify.tile=(8,8)"),
]


def shades(count, seed=0, shape=(8, 8, 3)):
    """Noisy images whose brightness shows the class, and labels; every class occurs."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = rng.normal(60 + 60 * labels[:, None, None, None], 20, (count, *shape))
    return np.clip(images, 0, 255).astype(np.uint8), labels


def write_folder(root, splits, names=NAMES, kind="png"):
    """Writes images as ``split/class/number.png``; the split "" stands for no folder of splits."""
    for split, (images, labels) in splits.items():
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            home = root / split / names[label]
            home.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.squeeze()).save(home / f"{number:03}.{kind}")
    return root


def by_class(images, labels):
    return [images[i] for i in np.argsort(labels, kind="stable")], np.sort(labels)


class TestFolders:
    def test_splits_classes_and_pixels(self, tmp_path):
        train, test = shades(9), shades(6, seed=1)
        root = write_folder(tmp_path, {"train": train, "val": test})
        found = data.load(f"folder:{root}", "train")
        images, labels = by_class(*train)
        np.testing.assert_array_equal(found.images, images)
        np.testing.assert_array_equal(found.labels, labels)
        assert found.class_names == NAMES
        assert (found.name, found.split) == ("folder", "train")
        other = data.load("folder", "test", root)
        assert other.split == "val"
        np.testing.assert_array_equal(other.images, by_class(*test)[0])
        with pytest.raises(UserError, match="has no split 'extra', only train, test, val"):
            data.load("folder", "extra", root)

    def test_one_folder_of_classes_is_divided_by_seed_and_share(self, tmp_path):
        root = write_folder(tmp_path, {"": shades(60)})

        def halves(**fields):
            parts = [data.load("folder", split, root, **fields) for split in ("train", "test")]
            return [{image.tobytes() for image in part.images} for part in parts]

        train, test = halves()
        assert len(train) + len(test) == 60
        assert not train & test
        assert 4 <= len(test) <= 22
        assert halves() == [train, test]
        assert halves(share_seed=1)[1] != test
        assert len(halves(test_share=0.5)[1]) > len(test)
        write_folder(root, {"": shades(30, seed=9)}, kind="bmp")  # new files move no old one
        more = halves()
        assert train <= more[0]
        assert test <= more[1]
        with pytest.raises(UserError, match=r"none of 90 images .* is in the split 'test': change data.test_share"):
            halves(test_share=1e-6)

    @pytest.mark.parametrize("names", [("Train", "Test"), ("TRAINING", "Validation")])
    def test_names_of_splits_are_read_in_any_case(self, tmp_path, names):
        root = write_folder(tmp_path, dict.fromkeys(names, shades(6)))
        for split, name in zip(("train", "test"), names, strict=True):
            found = data.load("folder", split, root)
            assert (found.split, found.class_names, len(found)) == (name, NAMES, 6)

    @pytest.mark.parametrize(
        ("there", "missing"), [(("test", "val"), "train"), (("val",), "train"), (("train",), "test")]
    )
    def test_a_missing_split_is_no_class(self, tmp_path, there, missing):
        root = write_folder(tmp_path, dict.fromkeys(there, shades(6)))
        with pytest.raises(UserError, match=f"has no split '{missing}', only .*: make a folder {missing}, or put"):
            data.load("folder", missing, root)

    def test_what_is_left_out_is_said(self, tmp_path, capsys):
        root = write_folder(tmp_path, {"train": shades(6), "test": shades(3)})
        hidden = root / "train" / "cat" / ".ipynb_checkpoints"
        hidden.mkdir()
        Image.new("RGB", (8, 8)).save(hidden / "copy.png")
        (root / "train" / "cat" / "loop").symlink_to(root / "train" / "cat")
        (root / "train" / "cat" / "notes.txt").write_text("a note")
        assert len(data.load("folder", "train", root)) == 6
        assert "note: 2 files in " in capsys.readouterr().out
        (root / "train" / "cat" / "round.png").symlink_to(root / "train" / "cat" / "round.png")
        assert len(data.load("folder", "train", root)) == 6
        assert "note: 3 files in " in capsys.readouterr().out

    def test_a_name_that_cannot_be_shown_is_refused(self, tmp_path):
        root = write_folder(tmp_path, {"train": shades(3), "test": shades(3)})
        os.mkdir(os.fsencode(root / "train") + b"/caf\xe9")
        with pytest.raises(UserError, match="cannot be shown: rename it"):
            data.load("folder", "train", root)

    def test_grey_files_give_one_channel_and_one_coloured_file_three(self, tmp_path):
        root = write_folder(tmp_path, {"train": shades(6, shape=(8, 8, 1)), "test": shades(3, shape=(8, 8, 1))})
        assert data.load("folder", "train", root).shape == (8, 8, 1)
        write_folder(root, {"test": ([shades(1)[0][0]], [2])})
        assert data.load("folder", "train", root).shape == (8, 8, 3)

    def test_a_class_that_only_one_split_has_is_a_class_of_both(self, tmp_path):
        images, labels = shades(6)
        root = write_folder(tmp_path, {"train": (images, labels), "test": (images[labels != 1], labels[labels != 1])})
        assert data.load("folder", "test", root).class_names == NAMES
        assert set(data.load("folder", "test", root).labels) == {0, 2}

    def test_sizes_that_differ_are_refused_with_both_or_cut(self, tmp_path):
        root = write_folder(tmp_path, {"train": shades(3), "test": shades(3)})
        write_folder(root, {"train": ([np.zeros((9, 12, 3), np.uint8)], [2])})
        with pytest.raises(UserError, match=r"differ in size \(8x8 and 9x12\); data.size=224"):
            data.load("folder", "train", root)
        assert data.load("folder", "train", root, 6).read([0, 3], np.float32)[0].shape == (2, 6, 6, 3)

    def test_a_link_that_leaves_the_folder_is_refused(self, tmp_path):
        root = write_folder(tmp_path / "set", {"train": shades(3), "test": shades(3)})
        Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
        inside = root / "train" / "cat"
        (inside / "own.png").symlink_to(next(inside.glob("*.png")))
        assert len(data.load("folder", "train", root)) == 4
        (inside / "other.png").symlink_to(tmp_path / "secret.png")
        with pytest.raises(UserError, match=r"other\.png is a link to .*secret\.png, outside of"):
            data.load("folder", "train", root)

    def test_what_is_wrong_is_named(self, tmp_path):
        for path, why in ((tmp_path / "none", "needs a folder of images"), (tmp_path, "has no images: put files into")):
            with pytest.raises(UserError, match=why):
                data.load("folder", "train", path)
        root = write_folder(tmp_path / "set", {"train": shades(3), "test": shades(3)})
        (root / "train" / "dog" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
        with pytest.raises(UserError, match=r"dog/torn\.png cannot be decoded .*: replace or remove it"):
            data.load("folder", "train", root)


class TestArrays:
    def test_layouts_types_and_names_of_arrays(self, tmp_path):
        images, labels = shades(6)
        file = tmp_path / "set.npz"
        expected = data.from_arrays(images, labels, NAMES).read([1, 4], np.float64)[0]

        def load(split="train", layout="NHWC", **arrays):
            np.savez_compressed(file, **arrays)
            return data.load(f"npz:{file}", split, layout=layout)

        both = {"y_train": labels, "x_test": images[:3], "y_test": labels[:3]}
        found = load(x_train=images, **both)
        np.testing.assert_array_equal(found.images, images)
        assert (found.name, found.class_names, len(load("test", x_train=images, **both))) == ("npz", ("0", "1", "2"), 3)
        first = load(layout="NCHW", x_train=images.transpose(0, 3, 1, 2), y_train=labels[:, None])
        np.testing.assert_array_equal(first.images, images)
        floats = load(x_train=images / 255, y_train=labels)
        np.testing.assert_allclose(floats.read([1, 4], np.float64)[0], expected, atol=1e-7)
        assert load(x_train=images[..., 0], y_train=labels).shape == (8, 8, 1)
        texts = load(train_images=images, train_labels=np.array(["b", "c", "a"] * 2))
        assert texts.class_names == ("a", "b", "c")
        assert texts.labels.tolist() == [1, 2, 0, 1, 2, 0]
        texts = load(x_train=images, y_train=np.array([b"b", b"c", b"a"] * 2), class_names=np.array(["c", "b", "a"]))
        assert (texts.class_names, texts.labels.tolist()) == (("c", "b", "a"), [1, 0, 2, 1, 0, 2])
        assert load(x_train=images, y_train=labels, class_names=np.array(NAMES)).class_names == NAMES

    def test_one_pair_of_arrays_is_divided_by_seed(self, tmp_path):
        images, labels = shades(300)
        np.savez_compressed(tmp_path / "set.npz", images=images, labels=labels)
        train, test = (data.load("npz", split, tmp_path / "set.npz") for split in ("train", "test"))
        assert len(train) + len(test) == 300
        assert 30 < len(test) < 90
        assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}

    @pytest.mark.parametrize(
        ("arrays", "why"),
        [
            ({"x_train": np.zeros((2, 8, 8, 3), np.int64), "y_train": [0, 1]}, "are int64: give uint8, or floating"),
            ({"x_train": np.full((2, 8, 8, 3), 255.0), "y_train": [0, 1]}, "between 255 and 255: scale them"),
            ({"x_train": np.full((2, 8, 8, 3), np.nan), "y_train": [0, 1]}, "between nan and nan: scale them"),
            ({"x_train": np.zeros((2, 3, 8, 8), np.uint8), "y_train": [0, 1]}, "data.layout='NCHW'"),
            ({"x_train": np.zeros((2, 8), np.uint8), "y_train": [0, 1]}, r"shape \(N, H, W, C\) or \(N, H, W\)"),
            ({"x_train": np.zeros((2, 8, 8, 3), np.uint8), "y_train": [0]}, "give one label per image"),
            ({"x_train": np.zeros((2, 8, 8, 3), np.uint8), "y_train": [0, -1]}, "image 1 .* label -1.*not published"),
            ({"x_train": np.zeros((2, 8, 8, 3), np.uint8), "y_train": [0, 0.5]}, "whole numbers"),
            ({"x_train": np.zeros((2, 8, 8, 3), np.uint8), "y_train": [0, np.nan]}, "whole numbers"),
            ({"x_train": np.zeros((2, 8, 8, 3), np.uint8), "y_train": [[0, 1], [1, 0]]}, "give one label per image"),
            ({"x_train": np.zeros((2, 8, 8, 3), np.uint8), "y_train": ["a", "b"], "class_names": ["a"]}, "label 'b'"),
            (
                {"x_train": np.zeros((2, 8, 8, 3), np.uint8), "y_train": [0, 1], "class_names": ["a", "a"]},
                "that differ",
            ),
            ({"x_train": np.zeros((2, 8, 8, 3), np.uint8), "y_train": [0, 1], "class_names": "ab"}, "one-dimensional"),
            (
                {
                    **dict.fromkeys(("x_train", "train_images"), np.zeros((1, 8, 8))),
                    "y_train": [0],
                    "train_labels": [0],
                },
                "the split 'train' twice",
            ),
            ({"a": np.zeros(3)}, "it needs x_train, y_train, x_test and y_test, or images and labels"),
            ({"x_test": np.zeros((2, 8, 8, 3), np.uint8), "y_test": [0, 1]}, "has no split 'train', only test"),
        ],
    )
    def test_other_arrays_are_refused(self, tmp_path, arrays, why):
        np.savez(tmp_path / "set.npz", **arrays)
        with pytest.raises(UserError, match=why):
            data.load("npz", "train", tmp_path / "set.npz")

    def test_files_that_could_do_harm_are_not_read(self, tmp_path, monkeypatch):
        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "marker"),)

        np.savez(tmp_path / "p.npz", x_train=np.array([Payload()], object), y_train=np.array([0]))
        with pytest.raises(UserError, match=r"cannot read .*numpy.savez_compressed"):
            data.load("npz", "train", tmp_path / "p.npz")
        assert not (tmp_path / "marker").exists()
        monkeypatch.setattr(npz, "_LARGE", 2**20)
        images = np.zeros((2**12, 24, 24, 1), np.uint8)
        np.savez_compressed(tmp_path / "b.npz", x_train=images, y_train=np.zeros(len(images)))
        with pytest.raises(UserError, match=r"b\.npz expands to 0\.0 GiB from [\d,]+ bytes"):
            data.load("npz", "train", tmp_path / "b.npz")
        np.savez(tmp_path / "b.npz", x_train=images, y_train=np.arange(len(images)) % 3)
        assert len(data.load("npz", "train", tmp_path / "b.npz")) == len(images)
        np.save(tmp_path / "one.npy", np.zeros(3))
        with pytest.raises(UserError, match="holds one array: save images and labels"):
            data.load("npz", "train", tmp_path / "one.npy")
        (tmp_path / "t.npz").write_bytes(b"no archive")
        for path in (tmp_path / "t.npz", tmp_path / "none.npz"):
            with pytest.raises(UserError, match="npz"):
                data.load("npz", "train", path)

    def test_masked_arrays_are_refused(self):
        images, labels = shades(3)
        for pair in ((np.ma.masked_equal(images, 0), labels), (images, np.ma.masked_equal(labels, 1))):
            with pytest.raises(UserError, match="are a masked array"):
                data.from_arrays(*pair, NAMES)


class TestHuggingFace:
    @pytest.fixture(scope="class")
    def saved(self, tmp_path_factory):
        datasets = pytest.importorskip("datasets")
        home = tmp_path_factory.mktemp("hf") / "shades"
        features = {"picture": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))}
        features |= {
            "text": datasets.Value("string"),
            "number": datasets.Value("int64"),
            "share": datasets.Value("float"),
        }

        def split(count, seed):
            images, labels = shades(count, seed)
            columns = {"picture": [Image.fromarray(image) for image in images], "label": labels}
            columns |= {"text": [NAMES[label] for label in labels], "number": labels, "share": labels / 2}
            return datasets.Dataset.from_dict(columns, datasets.Features(features))

        datasets.DatasetDict({"train": split(9, 0), "test": split(6, 1)}).save_to_disk(home)
        return home

    def test_images_labels_and_names(self, saved):
        found = data.load(f"hf:{saved}", "train")
        np.testing.assert_array_equal(found.images, shades(9)[0])
        np.testing.assert_array_equal(found.labels, shades(9)[1])
        assert (found.name, found.class_names) == ("hf", NAMES)
        assert data.load("hf", "test", saved, label_column="text").class_names == NAMES
        assert data.load("hf", "test", saved, label_column="number").class_names == ("0", "1", "2")

    @pytest.mark.parametrize(
        ("fields", "why"),
        [
            ({"split": "val"}, "has no split 'val', only train, test"),
            ({"image_column": "photo"}, "has no column 'photo', only picture"),
            ({"image_column": "text"}, "'text' of .* holds no images"),
            ({"label_column": "share"}, "'share' of .* holds no classes"),
        ],
    )
    def test_what_is_wrong_is_named(self, saved, fields, why):
        split = fields.pop("split", "train")
        with pytest.raises(UserError, match=why):
            data.load("hf", split, saved, **fields)

    @pytest.mark.parametrize("size", [0, 8])
    @pytest.mark.parametrize(
        ("column", "values", "why"),
        [
            ("label", [0, None, 1], "row 1 of the set has no label"),
            ("label", [0, -1, 1], "label -1"),
            ("picture", "none", "row 1 of the set has no image"),
            ("lists", [[0], [1], [2]], "'lists' of .* holds no classes"),
        ],
    )
    def test_broken_rows_are_named(self, tmp_path, column, values, why, size):
        datasets = pytest.importorskip("datasets")
        images = [Image.fromarray(image) for image in shades(3)[0]]
        kind = datasets.Sequence(datasets.Value("int64")) if column == "lists" else datasets.Value("int64")
        name = column if column == "lists" else "label"
        columns = {"picture": images, name: values}
        if column == "picture":
            columns = {"picture": [images[0], None, images[2]], "label": [0, 1, 2]}
        table = datasets.Dataset.from_dict(columns, datasets.Features({"picture": datasets.Image(), name: kind}))
        datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "set")
        with pytest.raises(UserError, match=why):
            data.load("hf", "train", tmp_path / "set", size, label_column=name)

    def test_other_folders_are_named(self, tmp_path):
        pytest.importorskip("datasets")
        with pytest.raises(UserError, match=r"was not written by save_to_disk.*give folder:PATH"):
            data.load("hf", "train", tmp_path)
        with pytest.raises(UserError, match="there is no folder"):
            data.load("hf", "train", tmp_path / "none")

    def test_a_set_that_is_not_there_names_the_download(self):
        with pytest.raises(UserError, match=r"download it once: .*load_dataset"):
            data.load("hf:nobody/nothing", "train")


class TestPrepared:
    def test_a_builder_configuration_and_its_choice(self, tmp_path):
        images, labels = prepared.random_split(6, (5, 5, 1))
        for config in ("letters", "digits"):
            prepared.write(tmp_path / "emnist", config, {"train": (images, labels)})
        assert data.load("emnist/letters", "train", tmp_path).name == "emnist/letters"
        with pytest.raises(UserError, match=r"choose one: data.name=emnist/digits or data.name=emnist/letters"):
            data.load("emnist", "train", tmp_path)
        with pytest.raises(UserError, match=r"tfds build emnist --config=balanced --file_format=array_record"):
            data.load("emnist/balanced", "train", tmp_path)

    def test_another_stored_format_names_a_command_that_can_work(self, tmp_path):
        prepared.write(tmp_path, "records", {"train": prepared.random_split(3, (4, 4, 1))}, file_format="tfrecord")
        with pytest.raises(
            UserError, match=r"tfds convert_format --dataset_dir=.*--out_file_format=array_record.*--overwrite"
        ):
            data.load("records", "train", tmp_path)

    def test_array_record_as_an_alternative_format_is_read(self, tmp_path):
        images, labels = prepared.random_split(3, (4, 4, 1))
        home = prepared.write(tmp_path, "both", {"train": (images, labels)})
        info = (home / "dataset_info.json").read_text()
        other = info.replace(
            '"fileFormat": "array_record"', '"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]'
        )
        (home / "dataset_info.json").write_text(other)
        np.testing.assert_array_equal(data.load("both", "train", tmp_path).images, images)

    @pytest.mark.parametrize("slice_", ["[:5abs]", "[5", "[:200%]"])
    def test_a_mistyped_slice_shows_right_ones(self, tmp_path, slice_):
        prepared.write(tmp_path, "tiny", {"train": prepared.random_split(3, (4, 4, 1))})
        with pytest.raises(UserError, match=r"the slice in 'train.*write train\[:100\]"):
            data.load("tiny", f"train{slice_}", tmp_path)

    def test_whole_numbers_are_labels_and_other_features_are_not(self, tmp_path):
        images, labels = prepared.random_split(6, (5, 5, 1))
        home = prepared.write(tmp_path, "tiny", {"train": (images, [0, 1, 4, 1, 0, 2]), "test": (images, labels)})
        features, prefix = home / "features.json", "tensorflow_datasets.core.features"
        whole = features.read_text()

        def label(kind, content):
            start = whole.index('"label": ')
            features.write_text(
                f'{whole[:start]}"label": {{{content}, "pythonClassName": "{prefix}.{kind}"}}}}}}, '
                f'"pythonClassName": "{prefix}.features_dict.FeaturesDict"}}'
            )

        label("scalar.Scalar", '"tensor": {"shape": {}, "dtype": "int64", "encoding": "none"}')
        for split in ("train", "test"):
            assert data.load("tiny", split, tmp_path).class_names == ("0", "1", "2", "3", "4")
        label("text_feature.Text", '"text": {}')
        with pytest.raises(UserError, match=r"feature 'label' of tiny is Text.*data.label_column"):
            data.load("tiny", "train", tmp_path)
        features.write_text(whole)
        with pytest.raises(UserError, match="has no feature 'coarse', only image, label"):
            data.load("tiny", "train", tmp_path, label_column="coarse")


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
