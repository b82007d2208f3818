"""certificates.tsv: written here, read here, and read from any peer that follows the field's convention."""

import dataclasses
import re
from pathlib import Path

import numpy as np

from lsrs_jax.errors import UserError

FIELD_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
_LARGEST_RADIUS = 1e300  # whose mean over the images is still a number


def format_table(tallies, certificates, lipschitz):
    """The text of certificates.tsv for parallel lists of tallies and certificates.

    The six columns of Cohen et al. 2019 come first. Radii are printed with full precision, never rounded up.
    """
    columns = {
        "idx": [tally.idx for tally in tallies],
        "label": [tally.label for tally in tallies],
        "predict": certificates.predict,
        "radius": certificates.radius,
        "time": [tally.seconds for tally in tallies],
        "n": certificates.n,
        "p_a_lower": certificates.p_a_lower,
        "p_b_upper": certificates.p_b_upper,
        "lipschitz": np.full(len(tallies), lipschitz),
        "slack": [tally.slack for tally in tallies],
        "abstain": certificates.abstain,
    }
    return format_columns(columns)


def format_columns(columns):
    """The text of a table in the field's format from arrays over images, sorted as given.

    Args:
      columns: name → array; at least `FIELD_COLUMNS` without ``correct``, which follows from label and predict.
    """
    columns = {name: np.asarray(values) for name, values in columns.items()}
    columns["correct"] = columns["predict"] == columns["label"]
    names = [*FIELD_COLUMNS, *(name for name in columns if name not in FIELD_COLUMNS)]
    lines = ["\t".join(names)]
    for row in range(len(columns["idx"])):
        lines.append("\t".join(_print(name, columns[name][row]) for name in names))
    return "\n".join(lines) + "\n"


def _print(name, value):
    if name == "time":
        return f"{value:.6f}"
    return repr(float(value)) if isinstance(value, np.floating) else str(int(value))


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of certificates, ours or a peer's; arrays over images, sorted as in the file.

    `votes` is None where the file has no column ``n``; `truncated` says that the last line was cut off.
    """

    idx: np.ndarray
    label: np.ndarray
    predict: np.ndarray
    radius: np.ndarray
    correct: np.ndarray
    seconds: np.ndarray
    votes: np.ndarray | None
    truncated: bool

    def __len__(self):
        return len(self.idx)

    def certified_accuracy(self, radius):
        """Share of images classified correctly with at least this radius; abstentions count as wrong."""
        return float(np.mean(self.correct & (self.radius >= radius)))

    @property
    def average_certified_radius(self):
        """ACR (Zhai et al. 2020): mean radius, wrong or abstaining counted as 0."""
        return float(np.mean(np.where(self.correct, self.radius, 0.0)))

    @property
    def abstention(self):
        return float(np.mean(self.predict == -1))


def read_table(path):
    """Reads certificates in the field's TSV format, this project's columns included.

    Both time formats (``h:mm:ss.ffffff`` and seconds) are read. A cut-off last line is left out and reported.

    Raises:
      UserError: naming the line that cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file") from error
    lines = text.split("\n")
    ended = lines[-1] == ""
    lines = [line.rstrip("\r") for line in (lines[:-1] if ended else lines)]
    while len(lines) > 1 and not lines[-1]:
        lines.pop()
    header = lines[0].split("\t") if lines else []
    if len(set(header)) < len(header):
        raise UserError(f"{path}: its first line names a column twice")
    missing = [name for name in FIELD_COLUMNS if name not in header]
    if missing:
        raise UserError(f"{path} is not a table of certificates: its first line has no column {missing[0]!r}")
    rows, truncated = [], False
    for number, line in enumerate(lines[1:], start=2):
        try:
            rows.append(_parse(fields_of(line, header)))
        except ValueError as error:
            if number == len(lines) and not ended:
                truncated = True
                break
            raise UserError(f"{path} line {number} cannot be read ({error})") from error
    if not rows:
        raise UserError(f"{path} holds no certificates")
    columns = [np.asarray(column) for column in zip(*rows, strict=True)]
    idx = columns[0]
    if len(np.unique(idx)) != len(idx):
        values, counts = np.unique(idx, return_counts=True)
        raise UserError(f"{path} names image {values[counts > 1][0]} twice")
    votes = columns[6] if "n" in header else None
    return Table(*columns[:6], votes=votes, truncated=truncated)


def fields_of(line, columns):
    """``{column: text}`` of a line; raises ValueError where it has more or fewer."""
    fields = line.split("\t")
    if len(fields) != len(columns):
        raise ValueError(f"{len(fields)} columns instead of {len(columns)}")
    return dict(zip(columns, fields, strict=True))


def _parse(row):
    radius, predict, label = _number(row["radius"]), _integer(row["predict"]), _integer(row["label"])
    correct = {"0": False, "1": True}.get(row["correct"])
    if correct is None or not (0 <= radius <= _LARGEST_RADIUS) or predict < -1:
        raise ValueError("a field is out of range")
    idx, votes = _integer(row["idx"]), _integer(row.get("n", "0"))
    if not (0 <= idx < 2**53 and 0 <= label < 2**31 and predict < 2**31 and 0 <= votes < 2**53):
        raise ValueError("a field is out of range")
    if correct != (predict == label):
        raise ValueError("the column correct contradicts predict and label")
    return idx, label, predict, radius, correct, _seconds(row["time"]), votes


# Python's own readers take more: underlines, spaces, the digits of every script.
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_TIME = re.compile(r"(?:([0-9]{1,9}) days?, )?([0-9]{1,9}):([0-9]{1,2}):([0-9]{1,2}(?:\.[0-9]+)?)")


def _integer(text):
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def _number(text):
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text!r} is not a number")
    return float(text)


def _seconds(text):
    match = _TIME.fullmatch(text)
    if match:
        days, hours, minutes, seconds = match.groups()
        return ((int(days or 0) * 24 + int(hours)) * 60 + int(minutes)) * 60 + float(seconds)
    seconds = _number(text)
    if not 0 <= seconds < 2.0**53:
        raise ValueError("time is out of range")
    return seconds
