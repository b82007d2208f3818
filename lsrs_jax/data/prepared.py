"""Sets that tensorflow-datasets has prepared, read without TensorFlow."""

import difflib
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from lsrs_jax.data.decoded import decoded_once
from lsrs_jax.data.images import Dataset, numbered
from lsrs_jax.data.photos import read_source
from lsrs_jax.runtime.errors import UserError, first_line
from lsrs_jax.runtime.logs import quiet
from lsrs_jax.runtime.types import Config

_OF_TFDS = re.compile(r"tensorflow_datasets\.core\.features\.[\w.]+")  # names of code that may be imported
_CHANNELS = {None: 3, 1: 1, 3: 3, 4: 3}  # of a feature: of its images; None stands for files of any kind


class _Source:
    """The examples of a split with still encoded images, under the names that `read_source` expects."""

    def __init__(self, source: Any, image: str, label: str) -> None:
        self._source, self._image, self._label = source, image, label

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, index: list[int]) -> list[dict[str, Any]]:
        examples = self._source.__getitems__(index)
        return [{"image": example[self._image], "label": int(example[self._label])} for example in examples]


def load_prepared(data: Config, split: str) -> Dataset:
    """A split of the set ``NAME``, ``NAME:VERSION`` or ``NAME/CONFIG`` in ``data.dir``; see `sources.load`."""
    folder = Path(data.dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    if "://" in data.dir:
        remedy = "copy the set there, or mount it"
        raise UserError(f"--config.data.dir must be a folder that this machine sees, not {data.dir}: {remedy}")
    name, _, version = data.name.partition(":")
    base, _, config = name.partition("/")
    home = folder / name
    build = f"tfds build {base}{config and f' --config={config}'} --file_format=array_record --data_dir={folder}"
    prepare = f"pip install tensorflow-cpu && {build}"
    if not home.is_dir():
        if (here := Path(data.name)).is_dir() or here.suffix == ".npz":
            if not here.exists():
                raise UserError(f"there is no file {data.name}: check the path, and give --config.data.name=npz:PATH")
            own = f"--config.data.name={'npz' if here.suffix == '.npz' else 'folder'}:{data.name}"
            raise UserError(f"{data.name} is no set of tensorflow-datasets; for your own images, give {own}")
        raise UserError(f"data set {name!r} is not in {folder}; prepare it with: {prepare}")

    def order(path: Path) -> list[int]:
        return [int(part) if part.isdigit() else -1 for part in path.name.split(".")]

    versions = sorted((path.parent for path in home.glob("*/dataset_info.json")), key=order)
    chosen = [path for path in versions if path.name == version] if version else versions[-1:]
    if not chosen:
        if not config and (configs := sorted({path.parents[1].name for path in home.glob("*/*/dataset_info.json")})):
            names = " or ".join(f"--config.data.name={name}/{config}" for config in configs)
            raise UserError(f"{name} has several configurations in {folder}; choose one: {names}")
        found = ", ".join(path.name for path in versions)
        wanted, only = version and f" {version}", found and f", only {found}"
        raise UserError(f"{home} holds no prepared version{wanted}{only}; prepare it with: {prepare}")
    try:
        with quiet():
            return decoded_once(
                chosen[0], name, split, data, lambda: _read(chosen[0], name, split, data, f"{prepare} --overwrite")
            )
    except UserError:
        raise
    except Exception as error:  # tfds raises whatever its readers raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"cannot read {chosen[0]} ({reason}); prepare it again with: {prepare} --overwrite") from error


def _check_features(folder: Path) -> None:
    """Raises UserError for features that are not those of tensorflow-datasets, which would import their code."""
    path = folder / "features.json"
    try:
        found: list[Any] = [json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []
    except ValueError:  # `builder_from_directory` refuses it
        return
    while found:
        part = found.pop()
        if isinstance(part, list):
            found += part
        elif isinstance(part, dict):
            found += part.values()
            for name in (part.get(key) for key in ("pythonClassName", "python_class_name", "type")):
                if isinstance(name, str) and "." in name and not _OF_TFDS.fullmatch(name):
                    what = f"{path} names the code {name[:80]!r}"
                    raise UserError(f"{what}, which is not imported because a file names it")


def _read(folder: Path, name: str, split: str, data: Config, prepare: str) -> Dataset:
    import tensorflow_datasets as tfds

    _check_features(folder)
    builder: Any = tfds.builder_from_directory(folder)
    info, features = builder.info, builder.info.features
    formats = {found.value for found in info.available_file_formats()}
    if "array_record" not in formats:
        convert = f"tfds convert_format --dataset_dir={folder} --out_file_format=array_record"
        stored = f"{folder} is prepared as {' and '.join(sorted(formats))}, which needs TensorFlow to read"
        raise UserError(f"{stored}; convert it with: {convert} (or prepare it again with: {prepare})")
    base_split = split.split("[")[0].split("+")[0]
    if base_split not in info.splits:
        near = difflib.get_close_matches(base_split, list(info.splits), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{name} has no split {base_split!r}, only {', '.join(sorted(info.splits))}{hint}")
    try:
        size = info.splits[split].num_examples
    except Exception as error:  # the parser of slices raises several types
        examples = f"{base_split}[:100], {base_split}[100:200] or {base_split}[:10%]"
        raise UserError(f"the slice in {split!r} cannot be read ({first_line(error)}): write {examples}") from error
    if not size:
        raise UserError(f"the split {split!r} of {name} is empty")
    image, label = data.image_column or "image", data.label_column or "label"
    if missing := [column for column in (image, label) if column not in features]:
        remedy = "--config.data.image_column and --config.data.label_column name those of an image and its class"
        raise UserError(f"{name} has no feature {missing[0]!r}, only {', '.join(sorted(features))}: {remedy}")
    return read_source(
        _source(builder, split, image, label),
        data.size,
        _channels(features[image], image, name),
        name=builder.name if data.size and "/" not in name else name,
        version=str(builder.version),
        split=split,
        class_names=_class_names(folder, features[label], image, label, name),
    )


def _source(builder: Any, split: str, image: str, label: str) -> _Source:
    import tensorflow_datasets as tfds

    raw = {image: tfds.decode.SkipDecoding()}
    return _Source(builder.as_data_source(split, decoders=raw, file_format="array_record"), image, label)


def _channels(feature: Any, image: str, name: str) -> int:
    """How many channels the images of a feature have, after decoding."""
    stored = feature.shape[-1] if feature.shape else 0
    if type(feature).__name__ != "Image" or stored not in _CHANNELS or np.dtype(feature.np_dtype).kind != "u":
        raise UserError(
            f"the feature {image!r} of {name} is {feature!r}; it must be an image file with 1, 3 or 4 channels of 8 or "
            "16 bits"
        )
    return _CHANNELS[stored]


def _class_names(folder: Path, feature: Any, image: str, label: str, name: str) -> tuple[str, ...]:
    """The names of a label's classes; for whole numbers that no class is declared for, those that the set contains."""
    if names := getattr(feature, "names", None):
        return tuple(names)
    if feature.shape != () or not np.issubdtype(np.dtype(feature.np_dtype), np.integer):
        remedy = "--config.data.label_column names another feature, which holds one whole number per image"
        raise UserError(f"the feature {label!r} of {name} is {feature!r}, not a class: {remedy}")
    return numbered(_largest_label(folder, image, label) + 1)


@functools.lru_cache
def _largest_label(folder: Path, image: str, label: str) -> int:
    """The largest label in any split of a set, so that all its splits have the same classes."""
    import tensorflow_datasets as tfds

    _check_features(folder)
    builder, largest = tfds.builder_from_directory(folder), 0
    for split in builder.info.splits:
        source = _source(builder, split, image, label)
        for start in range(0, len(source), 256):
            found = source.__getitems__(list(range(start, min(start + 256, len(source)))))
            largest = max(largest, *(example["label"] for example in found))
    return largest
