"""Sets of the Hugging Face library `datasets`, from the local disk or its cache."""

import os
from pathlib import Path
from typing import Any

from lsrs_jax.data.decode import is_grey
from lsrs_jax.data.images import Dataset, numbered
from lsrs_jax.data.photos import read_source
from lsrs_jax.runtime.errors import UserError, first_line
from lsrs_jax.runtime.logs import quiet
from lsrs_jax.runtime.types import Config


class _Rows:
    """The examples of a split with still encoded images."""

    def __init__(self, table: Any, image: str, label: str, names: tuple[str, ...] | None) -> None:
        self._table, self._image, self._label = table, image, label
        self._numbers = None if names is None else {name: number for number, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self._table)

    def __getitems__(self, index: list[int]) -> list[dict[str, Any]]:
        found = self._table[index]
        rows = []
        for row, cell, label in zip(index, found[self._image], found[self._label], strict=True):
            if cell is None or label is None:
                raise UserError(
                    f"row {row} of the set has no {'image' if cell is None else 'label'}: filter such rows out"
                )
            image = cell["bytes"] or Path(cell["path"]).read_bytes()
            rows.append({"image": image, "label": label if self._numbers is None else self._numbers[label]})
        return rows


def load_huggingface(data: Config, split: str) -> Dataset:
    """A split of the set ``data.dir``: a folder that `save_to_disk` wrote, or a name (``NAME:CONFIG``) in the cache.

    Nothing is downloaded, and no code that comes with a set is run. The image and the label are the only columns of
    their kind, or those that ``data.image_column`` and ``data.label_column`` name. Raises UserError for anything else.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the library reads it when it is imported
    try:
        import datasets
    except ImportError as error:
        raise UserError("data.name=hf needs the extra hf of lsrs_jax: pip install datasets") from error
    if not data.dir:
        raise UserError("no set is named: give --config.data.name=hf:NAME, or hf:FOLDER, which save_to_disk wrote")
    where, parts = Path(data.dir).expanduser(), data.dir.partition(":")
    if where.is_dir() and not any((where / file).is_file() for file in ("dataset_dict.json", "dataset_info.json")):
        raise UserError(f"{where} was not written by save_to_disk of datasets; for image files, give folder:PATH")
    if not where.is_dir() and (where.is_absolute() or data.dir.startswith((".", "~")) or data.dir.count("/") > 1):
        raise UserError(f"there is no folder {where}, and no set of Hugging Face has this name")
    try:
        with quiet():
            if where.is_dir():
                found: Any = datasets.load_from_disk(str(where))
            else:
                found = datasets.load_dataset(parts[0], parts[2] or None)
    except Exception as error:  # of any reader of the library
        remedy = f"download it once: python -c 'import datasets; datasets.load_dataset(\"{parts[0]}\")'"
        raise UserError(f"cannot load the set {data.dir} ({first_line(error)[:200]}); {remedy}") from error
    if not isinstance(found, dict):
        raise UserError(f"{data.dir} holds a single split: save a DatasetDict with the splits train and test")
    if split not in found:
        raise UserError(f"{data.dir} has no split {split!r}, only {', '.join(found)}")
    table = found[split]
    if not len(table):
        raise UserError(f"the split {split!r} of {data.dir} is empty")
    image = data.image_column or _only(table, lambda kind: isinstance(kind, datasets.Image), "image", data.dir)
    label = data.label_column or _only(table, lambda kind: isinstance(kind, datasets.ClassLabel), "label", data.dir)
    for column in (image, label):
        if column not in table.features:
            raise UserError(f"{data.dir} has no column {column!r}, only {', '.join(table.features)}")
    if not isinstance(table.features[image], datasets.Image):
        raise UserError(f"the column {image!r} of {data.dir} holds no images: --config.data.image_column names another")
    kind, names, texts = table.features[label], (), None
    if isinstance(kind, datasets.ClassLabel):
        names = tuple(kind.names)
    else:
        values = _values(found, label)
        if all(isinstance(value, str) for value in values):
            names = texts = tuple(sorted(values))
        elif all(type(value) is int for value in values):
            names = numbered(max(*values, 0) + 1)
        else:
            remedy = "--config.data.label_column names another"
            raise UserError(f"the column {label!r} of {data.dir} holds no classes: {remedy}")
    rows = _Rows(table.cast_column(image, datasets.Image(decode=False)), image, label, texts)
    grey = all(is_grey(example["image"]) for i in range(len(rows)) for example in rows.__getitems__([i]))
    name = "hf" if where.is_dir() else data.dir  # the path is not part of the identity
    return read_source(rows, data.size, 1 if grey else 3, name=name, version="", split=split, class_names=names)


def _values(found: Any, label: str) -> set[Any]:
    """The labels of all splits that have one; {None}, which is no label, if they are lists or other objects."""
    try:
        parts = [part.unique(label) for part in found.values() if label in part.features]
        return {value for part in parts for value in part if value is not None}
    except Exception:  # of Arrow, for columns that have no distinct values
        return {None}


def _only(table: Any, fits: Any, what: str, name: str) -> str:
    """The only column of a kind."""
    found = [column for column, kind in table.features.items() if fits(kind)]
    if not found and what in table.features:
        return what
    if len(found) != 1:
        columns = ", ".join(found or table.features)
        raise UserError(
            f"{name} has {len(found)} columns that could be the {what} ({columns}): data.{what}_column names it"
        )
    return found[0]
