"""Image sets in memory, and how sets are loaded: the embedded digits, and any prepared tensorflow-datasets set."""

import dataclasses
import difflib
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int32, UInt8
from numpy.typing import DTypeLike

from lsrs_jax.data.photos import Index, Photos
from lsrs_jax.runtime.errors import UserError, first_line
from lsrs_jax.runtime.logs import quiet
from lsrs_jax.runtime.types import Config


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split, in the order of its source. Name, version and split are part of a certificate's identity."""

    name: str
    version: str
    split: str
    images: UInt8[np.ndarray, "N H W C"]
    labels: Int32[np.ndarray, " N"]  # in [0, num_classes)
    num_classes: int
    max_value: int = 255  # the pixel value that stands for 1.0; it is 16 for the digits

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(H, W, C)``."""
        return self.images.shape[1:]

    def digest(self) -> str:
        """SHA-256 of images and labels. It identifies the data, whatever name and version say."""
        total = hashlib.sha256(str((self.images.shape, self.max_value, self.num_classes)).encode())
        total.update(np.ascontiguousarray(self.images).tobytes())
        total.update(np.ascontiguousarray(self.labels, np.int32).tobytes())
        return total.hexdigest()

    def read(self, index: Index, dtype: DTypeLike) -> tuple[Float[np.ndarray, "B H W C"], Int32[np.ndarray, " B"]]:
        """``(pixels, labels)`` of the images `index`."""
        return self.pixels(index, dtype), self.labels[index]

    def pixels(self, index: Index, dtype: DTypeLike) -> Float[np.ndarray, "B H W C"]:
        """The images `index` scaled to [0, 1], the unit of every radius."""
        return self.scaled(self.images[index], dtype)

    def scaled(self, images: UInt8[np.ndarray, "B H W C"], dtype: DTypeLike) -> Float[np.ndarray, "B H W C"]:
        """Stored images, scaled to [0, 1]."""
        return np.asarray(images, dtype) / np.asarray(self.max_value, dtype)


ImageSet = Dataset | Photos


def load_split(data_config: Config, split: str) -> ImageSet:
    """Calls `load` for the ``data`` section of a configuration."""
    return load(data_config.name, split, data_config.dir, data_config.size)


def load(name: str, split: str, data_dir: str | Path = "", size: int = 0) -> ImageSet:
    """Loads one split: a `Dataset` in memory, or `Photos`, which are decoded when they are read.

    Args:
      name: ``"digits"`` (scikit-learn's 1,797 handwritten digits, 8x8x1; ``train`` is the first 1,437 of them and
        ``test`` the last 360, by other writers) or the name of a tensorflow-datasets set prepared as array_record.
      split: a split name; for tensorflow-datasets also a slice such as ``"test[:100]"``.
      data_dir: folder of the prepared sets; if empty, ``$TFDS_DATA_DIR`` or else ``~/tensorflow_datasets``.
      size: 0 for images that already have one size; otherwise photos are cropped to `size` x `size` pixels.

    Raises UserError for data that cannot be read; for a missing set it names the command that prepares it.
    """
    if name.startswith("digits:"):
        raise UserError("the embedded digits have one version: data.name='digits'")
    if name != "digits":
        return _load_tfds(name, split, data_dir, size)
    if size:
        raise UserError("the embedded digits are 8x8 pixels: data.size=0")
    slices = {"train": slice(0, 1437), "test": slice(1437, 1797)}
    if split not in slices:
        raise UserError(f"digits has the splits train and test, not {split!r}")
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = digits.images[slices[split], :, :, None].astype(np.uint8)
    return Dataset("digits", "1.0.0", split, images, digits.target[slices[split]].astype(np.int32), 10, 16)


def _load_tfds(name: str, split: str, data_dir: str | Path, size: int) -> ImageSet:
    folder = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    if "://" in str(data_dir):
        remedy = "copy the set there, or mount it"
        raise UserError(f"data.dir must be a folder that this machine sees, not {data_dir}: {remedy}")
    base_name, _, version = name.partition(":")
    home = folder / base_name
    prepare = f"pip install tensorflow-cpu && tfds build {base_name} --file_format=array_record --data_dir={folder}"
    if not home.is_dir():
        raise UserError(f"data set {base_name!r} is not in {folder}; prepare it with: {prepare}")

    def order(path: Path) -> list[int]:
        return [int(part) if part.isdigit() else -1 for part in path.name.split(".")]

    versions = sorted((path.parent for path in home.glob("*/dataset_info.json")), key=order)
    chosen = [path for path in versions if path.name == version] if version else versions[-1:]
    if not chosen:
        found = ", ".join(path.name for path in versions)
        wanted, only = version and f" {version}", found and f", only {found}"
        raise UserError(f"{home} holds no prepared version{wanted}{only}; prepare it with: {prepare}")
    try:
        with quiet():
            return _read(chosen[0], base_name, split, size, prepare)
    except UserError:
        raise
    except Exception as error:  # tfds raises whatever its readers raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"cannot read {chosen[0]} ({reason}); prepare it with: {prepare}") from error


def _read(folder: Path, name: str, split: str, size: int, prepare: str) -> ImageSet:
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(folder)
    info, features = builder.info, builder.info.features
    if info.file_format.value != "array_record":
        stored = f"{folder} is prepared as {info.file_format.value}, which needs TensorFlow to read"
        raise UserError(f"{stored}; prepare it again with: {prepare}")
    base_split = split.split("[")[0].split("+")[0]
    if base_split not in info.splits:
        near = difflib.get_close_matches(base_split, list(info.splits), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{name} has no split {base_split!r}, only {', '.join(sorted(info.splits))}{hint}")
    if "image" not in features or "label" not in features:
        raise UserError(f"{name} is no image classification set: it has the features {sorted(features)}")
    if not info.splits[split].num_examples:
        raise UserError(f"the split {split!r} of {name} is empty")
    classes = features["label"].num_classes
    if not size:
        return Dataset(name, folder.name, split, *_decode(builder.as_data_source(split), name), classes)
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    channels, dtype = features["image"].shape[-1] or 3, np.dtype(features["image"].np_dtype)
    if channels not in (1, 3) or dtype != np.uint8:
        raise UserError(f"images of {name} have {channels} channels of {dtype}; photos have 1 or 3 of uint8")
    return Photos(builder.name, str(builder.version), split, source, size, channels, classes)


def _decode(source: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a whole data source, which is not empty; raises UserError unless all images have one size."""
    images, labels = np.empty(0), np.empty(len(source), np.int32)
    for start in range(0, len(source), 1024):
        batch = source.__getitems__(list(range(start, min(start + 1024, len(source)))))
        for position, example in enumerate(batch, start):
            image = np.asarray(example["image"])
            if image.dtype != np.uint8 or image.ndim != 3:
                raise UserError(f"images of {name} are {image.dtype} of shape {image.shape}, not uint8 (H, W, C)")
            if not position:
                images = np.empty((len(source), *image.shape), np.uint8)
            if image.shape != images.shape[1:]:
                sizes = f"{images.shape[1:]} and {image.shape}"
                raise UserError(f"images of {name} differ in size ({sizes}); data.size=224 cuts them to 224x224")
            images[position], labels[position] = image, example["label"]
    return images, labels
