"""Reads tables of certificates strictly, as this program writes them; `foreign.read_log` reads those of others."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import fields_of
from lsrs_jax.runtime.format import FIELD_COLUMNS

# Relative: by how much the last digits of a number may differ that another version of SciPy derives. Radii are lowered
# by 1e-12 of themselves, so that none becomes too large.
LAST_DIGITS = 1e-13
_LARGEST_RADIUS = 1e300  # the mean over the images must still be a number
Row = tuple[int, int, int, float, bool, float, int]  # the fields of a `Table`, of one image


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of certificates; arrays over images, in the order of the file."""

    idx: np.ndarray
    label: np.ndarray
    predict: np.ndarray
    radius: np.ndarray
    correct: np.ndarray
    seconds: np.ndarray  # NaN if the file has no column ``time``
    samples: np.ndarray | None  # column ``n``, if the file has it
    truncated: bool  # whether the last line was cut off

    def __len__(self) -> int:
        return len(self.idx)

    def certified_accuracy(self, radius: float) -> float:
        """Share of images classified correctly with at least this radius; abstentions count as wrong."""
        return float(np.mean(self.correct & (self.radius >= radius)))

    def worst_class(self, radius: float) -> tuple[float, int]:
        """`worst_class` of the images certified at this radius."""
        return worst_class(self.label, self.correct & (self.radius >= radius))

    @property
    def average_certified_radius(self) -> float:
        """ACR (Zhai et al. 2020): mean radius; wrong and abstaining images count as 0."""
        return self.capped_radius(np.inf)

    def capped_radius(self, cap: float) -> float:
        """The ACR if no radius were larger than `cap`."""
        return float(np.mean(np.where(self.correct, np.minimum(self.radius, cap), 0.0)))

    @property
    def abstention(self) -> float:
        """Share of images without a certificate."""
        return float(np.mean(self.predict == -1))


def worst_class(labels: np.ndarray, certified: np.ndarray) -> tuple[float, int]:
    """The lowest share of certified images in a class, and that class (the lowest of equals)."""
    return min((float(certified[labels == label].mean()), int(label)) for label in np.unique(labels))


def read_table(path: Path | str) -> Table:
    """Reads certificates in the field's TSV format; raises UserError naming line, field and value.

    Both time formats (``h:mm:ss.ffffff`` and seconds) are read. A cut-off last line is left out; `Table.truncated`.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file") from error
    lines = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
    while len(lines) > 1 and not lines[-1]:
        lines.pop()
    header, rows, truncated = lines[0].split("\t"), [], False
    if len(set(header)) < len(header):
        raise UserError(f"{path}: its first line names a column twice")
    if missing := [name for name in FIELD_COLUMNS if name not in header]:
        raise UserError(f"{path} is not a table of certificates: its first line has no column {missing[0]!r}")
    for number, line in enumerate(lines[1:], start=2):
        try:
            rows.append(parse_row(fields_of(line, header)))
        except ValueError as error:
            truncated = number == len(lines) and not text.endswith("\n")
            if not truncated:
                raise UserError(f"{path} line {number} cannot be read ({error})") from error
    return table_of(path, rows, has_samples="n" in header, truncated=truncated)


def table_of(path: Path, rows: Sequence[Row], has_samples: bool, truncated: bool) -> Table:
    """The table of these rows; raises UserError for an image that is there twice."""
    if not rows:
        raise UserError(f"{path} holds no certificates")
    *columns, samples = (np.asarray(column) for column in zip(*rows, strict=True))
    values, counts = np.unique(columns[0], return_counts=True)
    if len(values) < len(rows):
        raise UserError(f"{path} names image {values[counts > 1][0]} twice")
    return Table(*columns, samples=samples if has_samples else None, truncated=truncated)


def parse_row(row: Mapping[str, str]) -> Row:
    """The row of these fields, of which ``n`` and ``time`` may be missing; raises ValueError naming field and value."""
    limits = {"idx": (0, 2**53), "label": (0, 2**31), "predict": (-1, 2**31), "n": (0, 2**53)}
    whole = {name: _integer(name, row.get(name, "0"), *ends) for name, ends in limits.items()}
    radius = _in_field("radius", row["radius"], parse_number)
    if not 0 <= radius <= _LARGEST_RADIUS:
        raise ValueError(f"radius: {row['radius']!r} is not between 0 and {_LARGEST_RADIUS:g}")
    if row["correct"] not in ("0", "1"):
        raise ValueError(f"correct: {row['correct']!r} is neither 0 nor 1")
    correct, idx, label, predict = row["correct"] == "1", whole["idx"], whole["label"], whole["predict"]
    if correct != (predict == label):
        raise ValueError(f"correct: {row['correct']!r} contradicts predict {predict} and label {label}")
    seconds = _in_field("time", row["time"], _seconds) if "time" in row else math.nan
    return idx, label, predict, radius, correct, seconds, whole["n"]


def _in_field(name: str, text: str, read: Callable[[str], float]) -> float:
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


# Python's own readers also accept underscores, spaces and the digits of every script.
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_TIME = re.compile(r"(?:([0-9]{1,9}) days?, )?([0-9]{1,9}):([0-9]{1,2}):([0-9]{1,2}(?:\.[0-9]+)?)")


def _integer(name: str, text: str, least: int, most: int) -> int:
    if not _INTEGER.fullmatch(text) or not least <= int(text) < most:
        raise ValueError(f"{name}: {text!r} is not a whole number from {least} to {most - 1}")
    return int(text)


def parse_number(text: str) -> float:
    """The number that a field names; raises ValueError for anything else."""
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text!r} is not a number")
    return float(text)


def _seconds(text: str) -> float:
    if match := _TIME.fullmatch(text):
        days, hours, minutes, seconds = match.groups()
        return ((int(days or 0) * 24 + int(hours)) * 60 + int(minutes)) * 60 + float(seconds)
    seconds = parse_number(text)
    if not 0 <= seconds < 2.0**53:
        raise ValueError(f"{text!r} is not a number of seconds")
    return seconds
