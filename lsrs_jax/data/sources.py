"""Loads data sets by name: the embedded digits, a folder, an npz file, Hugging Face and tensorflow-datasets."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num

from lsrs_jax.config import SOURCES, default, split_source
from lsrs_jax.data.images import Arrays, Dataset, numbered
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.types import Config

# Each source has its libraries, which are imported when it is used. All other names are those of tensorflow-datasets.
_LOADERS = dict(
    zip(SOURCES, (("folder", "load_folder"), ("npz", "load_npz"), ("huggingface", "load_huggingface")), strict=True)
)


def load(name: str, split: str, data_dir: str | Path = "", size: int = 0, **fields: Any) -> Dataset:
    """Loads one split of a set.

    Args:
      name: ``"digits"`` (scikit-learn's 1,797 handwritten digits, 8x8x1; ``train`` is the first 1,437 of them and
        ``test`` the last 360, by other writers); ``"folder:PATH"`` (``train/<class>/*.png``, see `folder`),
        ``"npz:PATH"`` (arrays, see `npz`), ``"hf:NAME"`` (see `huggingface`); or the name of a tensorflow-datasets set
        prepared as array_record, with a version (``"mnist:3.0.1"``) or a builder configuration (``"emnist/letters"``).
      split: a split name; for tensorflow-datasets also a slice such as ``"test[:100]"``.
      data_dir: the PATH; or the folder of the prepared sets, ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
      size: 0 for images that already have one size; otherwise images are cut to `size` x `size` pixels.
      fields: other fields of the ``data`` section of a configuration, such as ``layout="NCHW"``.

    Raises UserError for data that cannot be read; for a missing set it names the command that prepares it.
    """
    data = default().data
    data.update({"name": name, "dir": str(data_dir), "size": size} | fields)
    return load_split(split_source(data), split)


def load_split(data: Config, split: str) -> Dataset:
    """Loads a split of the set that the ``data`` section of a configuration names; see `load`."""
    if data.name == "arrays":  # of `training.fit`
        remedy = "save them with numpy.savez_compressed(FILE, x_test=…, y_test=…) and give --config.data.name=npz:FILE"
        raise UserError(f"the images of this training were arrays in a program: {remedy}")
    if data.name.partition(":")[0] == "digits":
        return _digits(data, split)
    module, function = _LOADERS.get(data.name, ("prepared", "load_prepared"))
    return getattr(importlib.import_module(f"lsrs_jax.data.{module}"), function)(data, split)


def _digits(data: Config, split: str) -> Arrays:
    if data.name != "digits":
        raise UserError("the embedded digits have one version: --config.data.name=digits")
    if data.size:
        raise UserError("the embedded digits are 8x8 pixels: leave --config.data.size out, or 0")
    slices = {"train": slice(0, 1437), "test": slice(1437, 1797)}
    if split not in slices:
        raise UserError(f"digits has the splits train and test, not {split!r}")
    table = _digits_table()[slices[split]]
    images, labels = table[:, :-1].reshape(-1, 8, 8, 1).astype(np.uint8), table[:, -1].astype(np.int32)
    return Arrays("digits", "1.0.0", split, images, labels, numbered(10), 16)


def _digits_table() -> Num[np.ndarray, "1797 65"]:
    """The 64 pixels and the label of every digit: the file in scikit-learn, whose import would take a second."""
    package = importlib.util.find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or []:
        if (path := Path(folder) / "datasets" / "data" / "digits.csv.gz").exists():
            return np.loadtxt(path, np.int32, delimiter=",")
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    return np.column_stack([digits.data, digits.target])
