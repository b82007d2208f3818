"""Keeps the decoded images of small prepared splits in the user's cache, so that a command starts without decoding."""

import dataclasses
import hashlib
import io
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import PIL
from PIL import features

from lsrs_jax.data.images import Arrays, Dataset
from lsrs_jax.runtime import cache
from lsrs_jax.runtime.types import Config

_MOST = 64 * 2**20  # bytes of a split, encoded and decoded; larger ones are decoded each time
_CODE = [Path(__file__).with_name(f"{module}.py") for module in ("decode", "decoded", "images", "photos", "prepared")]
_ONE_SPLIT = re.compile(r"(\w+)(\[[^\]]*\])?")  # "test" or "test[:100]", and no sum of splits


def decoded_once(folder: Path, name: str, split: str, data: Config, read: Callable[[], Dataset]) -> Dataset:
    """A split of the set prepared in `folder`, from the user's cache or from `read`.

    The cached images are those that `read` gives: their file is named after a digest of all on which they depend (the
    stored records, the set's description, the fields of `data`, the libraries and the code that decode). Splits that
    are cut to one size, and those whose labels have no names, are always read.
    """
    parts = _ONE_SPLIT.fullmatch(split)
    records = sorted(folder.glob(f"*-{parts[1]}.array_record*")) if parts else []
    small = 0 < sum(path.stat().st_size for path in records) <= _MOST
    names = folder / f"{data.label_column or 'label'}.labels.txt"
    try:
        reader = version("tensorflow-datasets")
    except PackageNotFoundError:  # a nightly build, which has another name
        return read()
    if cache.folder is None or data.size or not small or not names.is_file():
        return read()
    libraries = reader, PIL.__version__, features.version("jpg"), features.version("zlib")
    total = hashlib.sha256(repr((name, split, data.image_column, data.label_column, libraries)).encode())
    for path in (*records, *sorted((*folder.glob("*.json"), names)), *_CODE):
        content = path.read_bytes()
        total.update(f"{path.name} {len(content)} ".encode() + content)
    return _loaded(cache.cached(f"images-{total.hexdigest()}", lambda: _stored(read()), most=_MOST))


def _stored(split: Dataset) -> bytes:
    assert isinstance(split, Arrays)
    fields = {field.name: getattr(split, field.name) for field in dataclasses.fields(split)}
    file = io.BytesIO()
    np.savez(file, **fields)
    return file.getvalue()


def _loaded(content: bytes) -> Arrays:
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        found = {name: stored[name] for name in stored.files}
    arrays = {name: found.pop(name) for name in ("images", "labels")}
    return Arrays(
        **arrays, class_names=tuple(found.pop("class_names").tolist()), **{k: v.item() for k, v in found.items()}
    )
