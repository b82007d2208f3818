"""Training and test images that belong together, and those that a caller of `training.fit` gives."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lsrs_jax.data.images import Dataset, check_labels, from_arrays, numbered, other_class
from lsrs_jax.data.photos import Photos
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.types import Config

Given = Dataset | tuple[ArrayLike, ArrayLike]  # a data set, or images and labels


def pair_of(data: Given, test: Given, class_names: Sequence[str] | None, config: Config) -> tuple[Dataset, Dataset]:
    """Training and test images that a caller gives; `config` is the section ``data``.

    Arrays have the classes `class_names`, or as many as their labels count. Raises UserError for anything that is no
    data set, for wrong labels, wrong pixels in some images, and images that do not belong together.
    """
    given = {"data": (config.train_split, data), "test": (config.split, test)}
    arrays = {name: pair for name, (_, pair) in given.items() if isinstance(pair, tuple | list)}
    for name, pair in arrays.items():
        if len(pair) != 2:
            raise UserError(f"{name} must be (images, labels), got {len(pair)} arrays")
    names = tuple(class_names or ()) or numbered(_classes(arrays))
    train_set, test_set = (
        from_arrays(pair[0], pair[1], names, split=split, layout=config.layout)
        if isinstance(pair, tuple | list)
        else _checked(name, pair)
        for name, (split, pair) in given.items()
    )
    check_pair(train_set, test_set)
    return train_set, test_set


def check_pair(train_set: Dataset, test_set: Dataset) -> None:
    """Raises UserError unless images of training and of test have one shape and the same classes."""
    if tuple(train_set.shape) != tuple(test_set.shape):
        shapes = f"{tuple(train_set.shape)}, test images {tuple(test_set.shape)}"
        remedy = "--config.data.size=N cuts all of them to N x N"
        raise UserError(f"training images have the shape {shapes}: both must have the same; {remedy}")
    if difference := other_class(list(train_set.class_names), list(test_set.class_names)):
        raise UserError(f"training and test images have other classes: {difference} in the test images")
    if not isinstance(train_set, Photos):  # their labels would have to be read
        counts = np.bincount(train_set.labels, minlength=len(train_set.class_names))
        if missing := [train_set.class_names[label] for label in np.flatnonzero(counts == 0)]:
            print(f"note: there is no training image of {', '.join(missing[:10])}{', ...' * (len(missing) > 10)}")


def _classes(arrays: dict[str, Any]) -> int:
    """The number of classes in pairs of images and labels."""
    largest = 0
    for name, pair in arrays.items():
        labels = np.asarray(pair[1])
        if labels.dtype.kind not in "iuf" or not np.isfinite(labels).all():
            raise UserError(f"the labels of {name} must be whole numbers from 0 on, got {labels.dtype}")
        largest = max(largest, int(labels.max(initial=0)))
    return largest + 1


def _checked(name: str, dataset: Any) -> Dataset:
    """A caller's `Dataset`; raises UserError for a missing member, a wrong label, or wrong pixels in some images."""
    members = ("name", "version", "split", "class_names", "shape", "labels", "__len__", "digest", "read")
    if missing := [member for member in members if not hasattr(dataset, member)]:
        kind = type(dataset).__name__
        raise UserError(f"{name} must be (images, labels) or a Dataset, and {kind} has no {', '.join(missing)}")
    where = f"the split {dataset.split!r} of {dataset.name}"
    if not len(dataset):
        raise UserError(f"{where} is empty")
    labels = check_labels(dataset.labels, len(dataset.class_names), where)
    some = np.unique(np.linspace(0, len(dataset) - 1, 100).astype(int))
    pixels, found = dataset.read(some, np.float32)
    if np.shape(pixels) != (len(some), *dataset.shape) or not np.array_equal(found, labels[some]):
        expected = f"images of shape {(len(some), *dataset.shape)} and their labels"
        raise UserError(f"{where}: read must return {expected}, got {np.shape(pixels)} and {np.shape(found)}")
    if not np.issubdtype(np.asarray(pixels).dtype, np.floating) or not (np.min(pixels) >= 0 and np.max(pixels) <= 1):
        raise UserError(f"{where}: read must return pixels in [0, 1], got {np.min(pixels):g} to {np.max(pixels):g}")
    return dataset
