"""Image classification sets in memory: the embedded digits, and any prepared tensorflow-datasets set."""

import dataclasses
import difflib
import hashlib
import os
from pathlib import Path

import numpy as np

from lsrs_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split, in the order of its source.

    Attributes:
      name, version, split: what it is; part of a certificate's identity.
      images: uint8 ``(N, H, W, C)``.
      labels: int32 ``(N,)``, in ``[0, num_classes)``.
      num_classes: K.
      max_value: pixel value that stands for 1.0 (255; the digits use 16).
    """

    name: str
    version: str
    split: str
    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    max_value: int = 255

    def __len__(self):
        return len(self.labels)

    @property
    def shape(self):
        """``(H, W, C)``."""
        return self.images.shape[1:]

    def digest(self):
        """SHA-256 over images and labels: what a certificate was made from, whatever its name and version say."""
        total = hashlib.sha256(str((self.images.shape, self.max_value, self.num_classes)).encode())
        total.update(np.ascontiguousarray(self.images).tobytes())
        total.update(np.ascontiguousarray(self.labels, np.int32).tobytes())
        return total.hexdigest()

    def pixels(self, index, dtype):
        """Images of `index` scaled to [0, 1], the unit of every radius."""
        return np.asarray(self.images[index], dtype) / np.asarray(self.max_value, dtype)


def load(name, split, data_dir=""):
    """Loads one split into memory.

    Args:
      name: ``"digits"`` (scikit-learn's 1,797 handwritten digits, 8x8x1; ``train`` is the first 1,437 of them and
        ``test`` the last 360, by other writers) or the name of a tensorflow-datasets set prepared as array_record.
      split: a split name; tensorflow-datasets slices such as ``"test[:100]"`` work for its sets.
      data_dir: where the sets lie; ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``, where empty.

    Raises:
      UserError: with the command that prepares a missing set.
    """
    if name.startswith("digits:"):
        raise UserError("the embedded digits have one version: data.name='digits'")
    return _load_digits(split) if name == "digits" else _load_tfds(name, split, data_dir)


def _load_digits(split):
    from sklearn import datasets as sklearn_datasets

    slices = {"train": slice(0, 1437), "test": slice(1437, 1797)}
    if split not in slices:
        raise UserError(f"digits has the splits train and test, not {split!r}")
    digits = sklearn_datasets.load_digits()
    chosen = slices[split]
    images = digits.images[chosen, :, :, None].astype(np.uint8)
    return Dataset("digits", "1.0.0", split, images, digits.target[chosen].astype(np.int32), 10, 16)


def _load_tfds(name, split, data_dir):
    folder = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
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
                    "sets of one image size are supported"
                )
            images[start + offset], labels[start + offset] = image, example["label"]
    return images, labels


def batch_indices(size, batch_size, seed, step):
    """Indices of training batch `step`, a function of (seed, step) alone: each epoch is a fresh permutation.

    The last ``size % batch_size`` examples of an epoch's permutation are left out.
    """
    if not 1 <= batch_size <= size:
        raise UserError(f"data.batch_size must lie between 1 and the {size} training images, got {batch_size}")
    epoch, position = divmod(step, size // batch_size)
    permutation = np.random.default_rng([seed, 0, epoch]).permutation(size)
    return permutation[position * batch_size : (position + 1) * batch_size]


def augment(images, *, crop, flip, seed, step, rows=slice(None), batch_size=None):
    """Random shifts by up to `crop` pixels (zero padding) and horizontal flips, deterministic in (seed, step).

    Args:
      images: ``(B, H, W, C)``, any dtype; returned with the same shape and dtype.
      rows: which of a batch of `batch_size` they are, all of it by default: an image is shifted and flipped alike,
        whether the others are here or not.
    """
    rng = np.random.default_rng([seed, 1, step])
    batch, height, width = images.shape[:3]
    whole = batch if batch_size is None else batch_size
    if crop:
        padded = np.pad(images, ((0, 0), (crop, crop), (crop, crop), (0, 0)))
        down, right = rng.integers(0, 2 * crop + 1, (2, whole))[:, rows, None, None]
        images = padded[np.arange(batch)[:, None, None], down + np.arange(height)[:, None], right + np.arange(width)]
    if flip:
        flipped = rng.random(whole)[rows] < 0.5
        images = np.where(flipped[:, None, None, None], images[:, :, ::-1], images)
    return images
