"""Sets that are one NumPy file (npz) of arrays."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from lsrs_jax.data.images import Dataset, from_arrays, numbered
from lsrs_jax.runtime.errors import UserError, first_line
from lsrs_jax.runtime.types import Config

_IMAGES, _LABELS = ("x_{}", "{}_images", "images_{}"), ("y_{}", "{}_labels", "labels_{}")  # of a split
_LARGE, _MOST_EXPANSION = 2**30, 200  # images rarely shrink to a tenth


def load_npz(data: Config, split: str) -> Dataset:
    """A split of the npz file ``data.dir``, with arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``.

    ``train_images`` and ``train_labels`` are read as well. A file with only ``images`` and ``labels`` has the splits
    train and test: every image belongs to test with probability ``data.test_share``, decided by ``data.share_seed``.
    Labels are whole numbers, or texts, whose sorted set are the class names; an array ``class_names`` names whole
    numbers. Pixels are as in `from_arrays`. Pickled objects are not read, because they can run code.
    """
    path = Path(data.dir).expanduser()
    if not data.dir or not path.is_file():
        raise UserError(f"--config.data.name=npz:FILE needs a file of arrays, and {data.dir!r} is none")
    try:
        _refuse_bomb(path)
        opened = np.load(path, allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise UserError(f"{path} holds one array: save images and labels with numpy.savez_compressed")
        with opened:
            return _read(opened, path, data, split)
    except UserError:
        raise
    except Exception as error:  # of zipfile, zlib and NumPy
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"cannot read {path} ({reason}): save plain arrays with numpy.savez_compressed") from error


def _refuse_bomb(path: Path) -> None:
    """Raises UserError for a small file that would fill the memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            size = sum(entry.file_size for entry in file.infolist())
        if size > max(_LARGE, _MOST_EXPANSION * path.stat().st_size):
            raise UserError(f"{path} expands to {size / 2**30:.1f} GiB from {path.stat().st_size:,} bytes: not read")


def _read(opened: Any, path: Path, data: Config, split: str) -> Dataset:
    pairs: dict[str, tuple[str, str]] = {}
    for name, pattern in ((name, pattern) for name in opened.files for pattern in zip(_IMAGES, _LABELS, strict=True)):
        found, partner = _split_of(name, *pattern)
        if partner in opened.files:
            if found in pairs:
                raise UserError(f"{path} has the split {found!r} twice, in {pairs[found][0]} and {name}")
            pairs[found] = name, partner
    divided = bool(pairs)
    if not divided and {"images", "labels"} <= set(opened.files):
        pairs["train"] = pairs["test"] = ("images", "labels")
    if not pairs:
        needed = "x_train, y_train, x_test and y_test, or images and labels"
        raise UserError(f"{path} has the arrays {', '.join(opened.files) or '(none)'}; it needs {needed}")
    if split not in pairs:
        raise UserError(f"{path} has no split {split!r}, only {', '.join(pairs)}")
    names, labels = _classes({name: opened[label] for name, (_, label) in pairs.items()}, opened, path)
    images, chosen = opened[pairs[split][0]], labels[split]
    if not divided:
        if len(images) != len(chosen):
            raise UserError(f"{path} has {len(images)} images and {len(chosen)} labels")
        tested = np.random.default_rng([data.share_seed, 0]).random(len(chosen)) < data.test_share
        rows = tested if split == "test" else ~tested
        images, chosen = images[rows], chosen[rows]
    return from_arrays(images, chosen, names, name="npz", split=split, layout=data.layout)


def _split_of(name: str, image: str, label: str) -> tuple[str, str]:
    """The split that an array called `name` holds, and the name of its labels, if it fits the pattern `image`."""
    before, _, after = image.partition("{}")
    if not (name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after)):
        return "", ""
    split = name[len(before) : len(name) - len(after)]
    return split, label.format(split)


def _classes(labels: dict[str, np.ndarray], opened: Any, path: Path) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Class names, and the labels as numbers. All splits have the same classes."""
    named = _names(opened["class_names"], path) if "class_names" in opened.files else ()
    kinds = {found.dtype.kind in "US" for found in labels.values()}
    if len(kinds) > 1:
        raise UserError(f"{path} mixes labels that are texts with labels that are numbers")
    if kinds == {True}:
        texts = {name: _texts(found, path) for name, found in labels.items()}
        names = named or tuple(sorted({text for found in texts.values() for text in found.ravel().tolist()}))
        numbers = {name: number for number, name in enumerate(names)}
        if unknown := {text for found in texts.values() for text in found.ravel().tolist()} - set(names):
            raise UserError(f"{path} has the label {min(unknown)!r}, which is not in class_names")
        return names, {name: np.vectorize(numbers.get, [int])(found) for name, found in texts.items()}
    if named:
        return named, labels
    largest = max(float(np.max(found, initial=-1)) if found.dtype.kind in "iuf" else -1 for found in labels.values())
    if not 0 <= largest < 2**20:
        raise UserError(f"the labels in {path} must be whole numbers from 0 on, or texts")
    return numbered(int(largest) + 1), labels


def _names(array: np.ndarray, path: Path) -> tuple[str, ...]:
    """The names in ``class_names``; raises UserError unless they are texts that differ."""
    names = tuple(_texts(array, path).tolist()) if array.ndim == 1 and array.dtype.kind in "US" else ()
    if not names or len(set(names)) < len(names):
        raise UserError(f"class_names in {path} must be a one-dimensional array of texts that differ")
    return names


def _texts(array: np.ndarray, path: Path) -> np.ndarray:
    try:
        return np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array
    except UnicodeDecodeError as error:
        raise UserError(f"{path} has texts that are not UTF-8: save them as str") from error
