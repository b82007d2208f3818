"""Reads certification logs of other programs where their meaning is clear, and says what it read leniently."""

import codecs
import collections
import contextlib
import csv
import re
from pathlib import Path

from lsrs_jax.certification.table import Row, Table, parse_number, parse_row, read_table, table_of
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.format import FIELD_COLUMNS

_OPTIONAL = ("correct", "time")
_WHOLE = re.compile(r"(-?[0-9]{1,18})\.0*")  # pandas writes whole numbers like this if some are missing
_TRUE, _FALSE = ("true", "1.0"), ("false", "0.0")
_DAYS = re.compile(r"([0-9]+) days? \+?(?=[0-9])")  # pandas writes times like this
_SUMMARY = re.compile(r"[#A-Za-z][^:=]*[:=]")  # as in "ACR: 0.5"
_KNOWN = (*FIELD_COLUMNS, "n")  # the columns that are read
_SPACES = "spaces around fields are left out"


def read_log(path: Path | str) -> tuple[Table, list[str]]:
    """A table of certificates, and notes about what was not as `table.read_table` expects it.

    A table that `read_table` reads comes back as the same table, without notes. Raises UserError naming line, field and
    value of what has no clear meaning. A cut-off last line is left out; `Table.truncated`.
    """
    with contextlib.suppress(UserError):
        if not (table := read_table(path)).truncated:  # a last line that is no row may have a meaning
            return table, []
    path, found = Path(path), collections.Counter[str]()
    text = _text(path, found)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty")
    found["blank lines are left out"] = lines[-1][0] - len(lines)
    delimiter = next((mark for mark in "\t,;" if mark in lines[0][1]), "\t")
    if delimiter != "\t":
        found[f"the fields are separated by {delimiter!r}"] = 1
    try:
        names, header = _cells(lines[0][1], delimiter)
    except csv.Error as error:
        raise UserError(f"{path} is not a table of certificates: its first line cannot be read ({error})") from error
    found[_SPACES] += bool(set(_KNOWN) & set(header) - set(names))
    if len(set(header)) < len(header):
        raise UserError(f"{path}: its first line names a column twice")
    for name in FIELD_COLUMNS:
        if name not in header and name not in _OPTIONAL:
            raise UserError(f"{path} is not a table of certificates: its first line has no column {name!r}")
        found[f"there is no column {name!r}"] = name not in header
    while len(lines) > 1 and _SUMMARY.match(lines[-1][1]) and lines[-1][1].count(delimiter) < len(header) - 1:
        found[f"its last line {lines.pop()[1].strip()[:60]!r} is no row and is left out"] = 1
    rows, truncated = list[Row](), False
    for number, line in lines[1:]:
        try:
            spaced, cells = _cells(line, delimiter)
            if cells == header:
                found["a repeated header is left out"] += 1
                continue
            if len(cells) > len(header) and not any(cells[len(header) :]):
                found["empty fields after the last column are left out"] += 1
                del cells[len(header) :]
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} columns instead of {len(header)}")
            read = (name in _KNOWN for name in header)
            found[_SPACES] += any(a != b for known, a, b in zip(read, spaced, cells, strict=False) if known)
            rows.append(parse_row(_plain(dict(zip(header, cells, strict=True)), found)))
        except (ValueError, csv.Error) as error:
            truncated = (number, line) == lines[-1] and not text.endswith("\n")
            if not truncated:
                raise UserError(f"{path} line {number} cannot be read ({error})") from error
    table = table_of(path, rows, has_samples="n" in header, truncated=truncated)
    said = [f"{what} ({times:,} times)" if times > 1 else what for what, times in found.items() if times]
    return table, [f"read leniently: {'; '.join(said)}."] if said else []


def _text(path: Path, found: collections.Counter[str]) -> str:
    content, encoding = path.read_bytes(), "utf-8"
    if content.startswith(codecs.BOM_UTF8):
        encoding = "utf-8-sig"
    elif content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    found["a byte-order mark is left out"] = encoding != "utf-8"
    try:
        return content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file") from error


def _cells(line: str, delimiter: str) -> tuple[list[str], list[str]]:
    """The fields of a line, with and without spaces around them."""
    cells = next(csv.reader([line], delimiter=delimiter))
    return cells, [cell.strip(" ") for cell in cells]


def _plain(row: dict[str, str], found: collections.Counter[str]) -> dict[str, str]:
    """The fields as `table.parse_row` expects them. What has no clear meaning stays, and is refused there."""
    for name in ("idx", "label", "predict", "n"):
        if match := _WHOLE.fullmatch(row.get(name, "")):
            row[name] = match[1]
            found["numbers such as 3.0 are read as whole numbers"] += 1
    right = row["predict"] == row["label"]
    correct = row.setdefault("correct", "1" if right else "0").lower()
    if correct in (*_TRUE, *_FALSE):
        row["correct"] = "1" if correct in _TRUE else "0"
        found["True and 1.0 (False and 0.0) in the column correct are read as 1 (0)"] += 1
    if row["predict"] == "-1" and row["radius"].lower() in ("nan", ""):
        row["radius"] = "0"
        found["the radius of an abstention is no number and counts as 0"] += 1
    if row["radius"].startswith("-") and parse_number(row["radius"]) < 0:
        row["radius"] = "0"
        if right:  # a negative radius is no certificate, not even of the radius 0
            row["predict"], row["correct"] = "-1", "0"
            found["the right class with a negative radius counts as an abstention"] += 1
        else:
            found["a negative radius of another class than the label, or of an abstention, counts as 0"] += 1
    if "time" in row and _DAYS.match(row["time"]):
        row["time"] = _DAYS.sub(r"\1 days, ", row["time"])
        found["times such as '0 days 00:00:01' are read as pandas writes them"] += 1
    return row
