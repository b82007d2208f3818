"""Where the sets come from: the embedded digits, and any prepared tensorflow-datasets set."""

import difflib
import os
from pathlib import Path

import numpy as np

from lsrs_jax.data.memory import Dataset
from lsrs_jax.data.photos import Photos
from lsrs_jax.errors import UserError


def of_config(data, split):
    """`load` for the ``data`` section of a configuration."""
    return load(data.name, split, data.dir, data.size)


def load(name, split, data_dir="", size=0):
    """Loads one split: a `Dataset` in memory, or `Photos` that are decoded when they are read.

    Args:
      name: ``"digits"`` (scikit-learn's 1,797 handwritten digits, 8x8x1; ``train`` is the first 1,437 of them and
        ``test`` the last 360, by other writers) or the name of a tensorflow-datasets set prepared as array_record.
      split: a split name; tensorflow-datasets slices such as ``"test[:100]"`` work for its sets.
      data_dir: where the sets lie; ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``, where empty.
      size: 0 for images of one size, which stay as they are; else every photo is cut to so many pixels across and down.

    Raises:
      UserError: with the command that prepares a missing set.
    """
    if name.startswith("digits:"):
        raise UserError("the embedded digits have one version: data.name='digits'")
    if name != "digits":
        return _load_tfds(name, split, data_dir, size)
    if size:
        raise UserError("the embedded digits are 8x8 pixels: data.size=0")
    return _load_digits(split)


def _load_digits(split):
    from sklearn import datasets as sklearn_datasets

    slices = {"train": slice(0, 1437), "test": slice(1437, 1797)}
    if split not in slices:
        raise UserError(f"digits has the splits train and test, not {split!r}")
    digits = sklearn_datasets.load_digits()
    chosen = slices[split]
    images = digits.images[chosen, :, :, None].astype(np.uint8)
    return Dataset("digits", "1.0.0", split, images, digits.target[chosen].astype(np.int32), 10, 16)


def _load_tfds(name, split, data_dir, size):
    folder = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    if "://" in str(data_dir):
        raise UserError(
            f"data.dir must be a folder that this machine sees, not {data_dir}: copy the set there, or mount it"
        )
    base_name, _, version = name.partition(":")
    home = folder / base_name
    prepare = f"pip install tensorflow-cpu && tfds build {base_name} --file_format=array_record --data_dir={folder}"
    if not home.is_dir():
        raise UserError(f"data set {base_name!r} is not in {folder}; prepare it with: {prepare}")
    versions = sorted(
        (path.parent for path in home.glob("*/dataset_info.json")), key=lambda path: _version_key(path.name)
    )
    chosen = [path for path in versions if path.name == version] if version else versions[-1:]
    if not chosen:
        wanted, found = f" {version}" if version else "", ", ".join(path.name for path in versions)
        only = f", only {found}" if found else ""
        raise UserError(f"{home} holds no prepared version{wanted}{only}; prepare it with: {prepare}")
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(chosen[0])
        if builder.info.file_format.value != "array_record":
            raise UserError(
                f"{chosen[0]} is prepared as {builder.info.file_format.value}, which needs TensorFlow to read; "
                f"prepare it again with: {prepare}"
            )
        _check_split(builder.info.splits, split, base_name)
        features = builder.info.features
        if "image" not in features or "label" not in features:
            raise UserError(f"{base_name} is no image classification set: it has the features {sorted(features)}")
        if not builder.info.splits[split].num_examples:
            raise UserError(f"the split {split!r} of {base_name} is empty")
        if size:
            return _photos(builder, split, size)
        images, labels = _decode(builder.as_data_source(split), base_name)
    except UserError:
        raise
    except Exception as error:  # tfds raises whatever its readers raise
        line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UserError(
            f"cannot read {chosen[0]} ({type(error).__name__}: {line}); prepare it with: {prepare}"
        ) from error
    return Dataset(base_name, chosen[0].name, split, images, labels, features["label"].num_classes)


def _version_key(name):
    return [int(part) if part.isdigit() else -1 for part in name.split(".")]


def _check_split(splits, split, name):
    wanted = split.split("[")[0].split("+")[0]
    if wanted not in splits:
        near = difflib.get_close_matches(wanted, list(splits), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{name} has no split {wanted!r}, only {', '.join(sorted(splits))}{hint}")


def _decode(source, name):
    """Decodes a whole data source; images must share one size."""
    images, labels = None, np.empty(len(source), np.int32)
    for start in range(0, len(source), 1024):
        batch = source.__getitems__(list(range(start, min(start + 1024, len(source)))))
        for offset, example in enumerate(batch):
            image = np.asarray(example["image"])
            if image.dtype != np.uint8 or image.ndim != 3:
                raise UserError(f"images of {name} are {image.dtype} of shape {image.shape}, not uint8 (H, W, C)")
            if images is None:
                images = np.empty((len(source), *image.shape), np.uint8)
            if image.shape != images.shape[1:]:
                raise UserError(
                    f"images of {name} differ in size ({images.shape[1:]} and {image.shape}); "
                    "data.size=224 cuts them to 224x224"
                )
            images[start + offset], labels[start + offset] = image, example["label"]
    return images, labels


def _photos(builder, split, size):
    from tensorflow_datasets import decode

    features = builder.info.features
    source = builder.as_data_source(split, decoders={"image": decode.SkipDecoding()})
    channels = features["image"].shape[-1] or 3
    if channels not in (1, 3) or np.dtype(features["image"].np_dtype) != np.uint8:
        kind = f"{channels} channels of {np.dtype(features['image'].np_dtype)}"
        raise UserError(f"images of {builder.name} have {kind}; photos have 1 or 3 of uint8")
    return Photos(builder.name, str(builder.version), split, source, size, channels, features["label"].num_classes)
