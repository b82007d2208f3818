"""Reads tables of certificates, from this program and from others that follow the field's convention."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import fields_of
from lsrs_jax.runtime.format import FIELD_COLUMNS

_LARGEST_RADIUS = 1e300  # the mean over the images must still be a number


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of certificates; arrays over images, in the order of the file."""

    idx: np.ndarray
    label: np.ndarray
    predict: np.ndarray
    radius: np.ndarray
    correct: np.ndarray
    seconds: np.ndarray
    samples: np.ndarray | None  # column ``n``, if the file has it
    truncated: bool  # whether the last line was cut off

    def __len__(self) -> int:
        return len(self.idx)

    def certified_accuracy(self, radius: float) -> float:
        """Share of images classified correctly with at least this radius; abstentions count as wrong."""
        return float(np.mean(self.correct & (self.radius >= radius)))

    @property
    def average_certified_radius(self) -> float:
        """ACR (Zhai et al. 2020): mean radius; wrong and abstaining images count as 0."""
        return float(np.mean(np.where(self.correct, self.radius, 0.0)))

    @property
    def abstention(self) -> float:
        """Share of images without a certificate."""
        return float(np.mean(self.predict == -1))


def read_table(path: Path | str) -> Table:
    """Reads certificates in the field's TSV format; raises UserError naming the line that cannot be read.

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
            rows.append(_parse(fields_of(line, header)))
        except ValueError as error:
            truncated = number == len(lines) and not text.endswith("\n")
            if not truncated:
                raise UserError(f"{path} line {number} cannot be read ({error})") from error
    if not rows:
        raise UserError(f"{path} holds no certificates")
    *columns, samples = (np.asarray(column) for column in zip(*rows, strict=True))
    values, counts = np.unique(columns[0], return_counts=True)
    if len(values) < len(rows):
        raise UserError(f"{path} names image {values[counts > 1][0]} twice")
    return Table(*columns, samples=samples if "n" in header else None, truncated=truncated)


def _parse(row: Mapping[str, str]) -> tuple[int, int, int, float, bool, float, int]:
    idx, label, predict, samples = map(_integer, (row["idx"], row["label"], row["predict"], row.get("n", "0")))
    radius, correct = parse_number(row["radius"]), {"0": False, "1": True}.get(row["correct"])
    whole = 0 <= idx < 2**53 and 0 <= label < 2**31 and -1 <= predict < 2**31 and 0 <= samples < 2**53
    if correct is None or not whole or not 0 <= radius <= _LARGEST_RADIUS:
        raise ValueError("a field is out of range")
    if correct != (predict == label):
        raise ValueError("the column correct contradicts predict and label")
    return idx, label, predict, radius, correct, _seconds(row["time"]), samples


# Python's own readers also accept underscores, spaces and the digits of every script.
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_TIME = re.compile(r"(?:([0-9]{1,9}) days?, )?([0-9]{1,9}):([0-9]{1,2}):([0-9]{1,2}(?:\.[0-9]+)?)")


def _integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"{text!r} is not a whole number")
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
        raise ValueError("time is out of range")
    return seconds
