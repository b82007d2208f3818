"""Keeps the decoded images of small prepared splits in the user's cache, so that a command starts without decoding."""

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import PIL
from PIL import features

from lsrs_jax.data.images import Arrays, Dataset
from lsrs_jax.runtime import cache
from lsrs_jax.runtime.types import Config

_STORED = 256 * 2**20  # bytes of a set in its folder; of larger ones nothing is kept
_DECODED = 64 * 2**20  # bytes of the images of a split; larger ones are not kept
_CODE = [Path(__file__).with_name(f"{module}.py") for module in ("decode", "decoded", "images", "photos", "prepared")]
_DECODERS = ("jpg", "libjpeg_turbo", "zlib", "webp", "jpg_2000", "libtiff")


def decoded_once(folder: Path, name: str, split: str, data: Config, read: Callable[[], Dataset]) -> Dataset:
    """A split of the set prepared in `folder`, from the user's cache or from `read`.

    The cached images are those that `read` gives: their file is named after a digest of all on which they depend (all
    files in the folder, the fields of `data`, the libraries and the code that decode). Splits that are cut to one size
    are always read.
    """
    if cache.folder is None or data.size or not (key := _key(folder, name, split, data)):
        return read()
    found = cache.find(key)
    if found is not None:
        return _loaded(found)
    dataset = read()
    if not isinstance(dataset, Arrays) or dataset.images.nbytes > _DECODED:
        return dataset
    if _key(folder, name, split, data) == key:  # nobody has changed the files in the meantime
        cache.keep(key, _stored(dataset))
    return dataset


def _key(folder: Path, name: str, split: str, data: Config) -> str | None:
    """The name of a split in the cache; None for what is not kept, or where a file cannot be read."""
    try:
        stored = sorted(path for path in folder.iterdir() if path.is_file())
        if sum(path.stat().st_size for path in stored) > _STORED:
            return None
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = list(pool.map(_digest, [*stored, *_CODE]))
        libraries = version("tensorflow-datasets"), PIL.__version__, *map(features.version, _DECODERS)
    except (OSError, PackageNotFoundError):  # a nightly build of tensorflow-datasets has another name
        return None
    fields = name, split, data.image_column, data.label_column, [path.name for path in stored], digests, libraries
    return f"images-{hashlib.sha256(repr(fields).encode()).hexdigest()}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stored(split: Arrays) -> bytes:
    facts = {field.name: getattr(split, field.name) for field in dataclasses.fields(split)}
    images, labels = facts.pop("images"), facts.pop("labels")
    file = io.BytesIO()
    np.savez(file, images=images, labels=labels, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8))
    return file.getvalue()


def _loaded(content: bytes) -> Arrays:
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        facts = json.loads(stored["facts"].tobytes())
        facts["class_names"] = tuple(facts["class_names"])
        return Arrays(images=stored["images"], labels=stored["labels"], **facts)
