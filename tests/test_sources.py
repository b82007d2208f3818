"""Where a user's images come from: class folders, npz files, Hugging Face and tensorflow-datasets."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from lsrs_jax import data
from lsrs_jax.data import npz
from lsrs_jax.runtime.errors import UserError
from support import prepared
from support.own_images import NAMES, by_class, shades, write_folder


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
        with pytest.raises(UserError, match=r"differ in size \(8x8 and 9x12\); --config.data.size=8, for"):
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
        for path, why in (
            (tmp_path / "none", "needs a folder of images"),
            (tmp_path, "has no images: give each class"),
        ):
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
            ({"x_train": np.zeros((2, 3, 8, 8), np.uint8), "y_train": [0, 1]}, "--config.data.layout=NCHW"),
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
        for pair in ((np.ma.masked_equal(images, images[0, 0, 0, 0]), labels), (images, np.ma.masked_equal(labels, 1))):
            with pytest.raises(UserError, match="must not have masked entries"):
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
        with pytest.raises(UserError, match=r"choose one: --config.data.name=emnist/digits or .*=emnist/letters"):
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


def test_features_of_a_prepared_set_that_name_code_are_not_imported(random_cifar10, tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    (tmp_path / "evil_features.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass F: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(random_cifar10, tmp_path / "data")
    (path,) = (tmp_path / "data").glob("cifar10/*/features.json")
    honest = path.read_text()
    for key in ("pythonClassName", "pythonClassN\\u0061me"):
        path.write_text(
            honest.replace('"pythonClassName"', f'"{key}"', 1).replace(
                "tensorflow_datasets.core.features.features_dict.FeaturesDict", "evil_features.F", 1
            )
        )
        with pytest.raises(UserError, match=r"names the code 'evil_features\.F'"):
            data.load("cifar10", "test", str(tmp_path / "data"))
    assert not marker.exists()
    path.write_text(honest)
    assert len(data.load("cifar10", "test", str(tmp_path / "data"))) == 12
