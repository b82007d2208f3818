"""Reads and writes audit.tsv and audit.json, beside the certificates that were attacked.

audit.json holds the digests of the attacked table and of a finished audit.tsv, and the settings.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lsrs_jax.auditing import flips
from lsrs_jax.runtime.documents import first_difference, plain, read_sealed, refuse_unknown, write_sealed
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import append, digest_of, fields_of, write_atomic
from lsrs_jax.runtime.format import AUDIT_COLUMNS
from lsrs_jax.runtime.signals import deferred
from lsrs_jax.runtime.validate import real

_MOST = 2**27  # of every size in the settings
_WHOLE = ("idx", "label", "predict", "unperturbed", "pairs", "flips", "undecided")


class Settings(NamedTuple):
    """Sizes of the attacks. A resumed audit must have the same settings."""

    images: int
    fractions: tuple[float, ...]
    restarts: int
    steps: int
    samples: int
    votes: int  # samples of a prediction


def check_votes(settings: Settings, alpha: float) -> None:
    """Raises UserError if a prediction of so many samples can decide nothing, even if all agree."""
    least = math.ceil(1 - math.log2(0.99 * alpha))
    if settings.votes < least:
        raise UserError(f"votes={settings.votes} can decide nothing at alpha {alpha}: give at least {least}")


class Attacked(NamedTuple):
    """Rows of the attacked table."""

    idx: np.ndarray
    label: np.ndarray
    predict: np.ndarray
    radius: np.ndarray


class Found(NamedTuple):
    """Results of the attacks; arrays over images. All but `point` and `answer` are columns of an audit.tsv."""

    unperturbed: np.ndarray  # class that `predict` gives the image itself, or −1
    pairs: np.ndarray  # number of tried points inside the certified radius
    flips: np.ndarray  # how often `predict` returned another class than the certificate there
    undecided: np.ndarray  # how often `predict` abstained there
    distance: np.ndarray  # ℓ2 norm of the nearest flip away from the certified (else the unperturbed) class, or inf
    attack: np.ndarray  # the name of the attack that found the nearest flip
    point: np.ndarray  # the nearest flip as float32 image
    answer: np.ndarray  # class that `predict` gives the nearest flip


class Audit(NamedTuple):
    """The rows of an audit.tsv; arrays over images, as in `Attacked` and `Found`."""

    idx: np.ndarray
    label: np.ndarray
    predict: np.ndarray
    radius: np.ndarray
    correct: np.ndarray  # True if the certified (else the unperturbed) class is the label
    pairs: np.ndarray
    flips: np.ndarray
    undecided: np.ndarray
    distance: np.ndarray

    def robust_accuracy(self, radius: float) -> float:
        """Share of images that are correct and that no attack flipped within this radius: an upper bound.

        An image without certificate on which `predict` abstains counts as wrong, as in certified accuracy.
        """
        return float(np.mean(self.correct & (self.distance > radius)))


def read_audit(path: Path) -> Audit:
    """Reads an audit.tsv; raises UserError that names the line that cannot be read."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if lines[0].split("\t") != list(AUDIT_COLUMNS):
        raise UserError(f"{path} is not an audit: its first line has other columns")
    rows = []
    for number, line in enumerate(lines[1:-1], start=2):
        try:
            row = fields_of(line, AUDIT_COLUMNS)
            numbers = [int(row[name]) for name in _WHOLE]
            radius, distance = float(row["radius"]), float(row["distance"])
            if not (0 <= radius < np.inf and distance >= 0 and all(-1 <= number < 2**53 for number in numbers)):
                raise ValueError("a number is out of range")
        except ValueError as error:
            raise UserError(f"{path} line {number} cannot be read ({error})") from error
        idx, label, certified, unperturbed, *points = numbers
        class_ = certified if certified >= 0 else unperturbed
        rows.append((idx, label, certified, radius, class_ == label, *points, distance))
    if not rows:
        raise UserError(f"{path} holds no attacked images")
    audit = Audit(*map(np.asarray, zip(*rows, strict=True)))
    if len(np.unique(audit.idx)) < len(audit.idx):
        raise UserError(f"{path} names an image twice; remove it to audit again")
    return audit


def _facts(path: Path) -> dict[str, Any]:
    """The content of audit.json beside an audit.tsv; raises UserError if a finished audit has changed."""
    facts = path.with_suffix(".json")
    if not facts.exists():
        raise UserError(f"{path} has no {facts.name} beside it; restore it, or move the audit away")
    stored = read_sealed(facts, _check_facts, f"move it and {path.name} away to audit again")
    if stored["audit"] not in (None, digest_of(path)):
        what = f"{path} has changed: its digest is not the one in {facts.name}"
        raise UserError(f"{what}; restore it, or move both away to audit again")
    return stored


def _check_facts(stored: dict[str, Any]) -> None:
    if stored["digest"] is None:
        raise ValueError("it has no digest of its own")
    facts = {"certificates": None, "settings": Settings._fields, "audit": None}
    refuse_unknown(stored, {"format": None, **facts, "digest": None})
    for name, kind in (("certificates", str), ("settings", dict), ("audit", str | None)):
        if not isinstance(stored[name], kind):
            raise TypeError(f"{name} is missing")
    fractions = stored["settings"].get("fractions")
    for name, least in {"images": 0, "restarts": 1, "steps": 1, "samples": 1, "votes": 1}.items():
        size = stored["settings"].get(name)
        if type(size) is not int or not least <= size <= _MOST:
            raise ValueError(f"settings.{name} is {str(size)[:40]!r}")
    if not isinstance(fractions, list) or not fractions or not all(0 < real(share) <= 1 for share in fractions):
        raise ValueError(f"settings.fractions is {str(fractions)[:40]!r}")


def read_finished(path: Path) -> tuple[str, Audit] | None:
    """``(digest of the attacked table, `Audit`)``, or None if unfinished; raises UserError if it has changed."""
    facts = _facts(path)
    return (facts["certificates"], read_audit(path)) if facts["audit"] else None


def attacked_rows(images: int, certificates: int) -> np.ndarray:
    """The rows of a table that an audit of so many images attacks: evenly spaced; 0 stands for all."""
    return np.unique(np.linspace(0, certificates - 1, min(images or certificates, certificates)).astype(int))


def check_attacked(path: Path, audit: Audit, table: Attacked) -> None:
    """Raises UserError unless the finished audit at `path` has one row for each image that its settings ask for.

    And unless these rows agree with the table that was attacked.
    """
    order = np.argsort(table.idx, kind="stable")
    rows = attacked_rows(_facts(path)["settings"]["images"], len(order))
    asked = set(table.idx[rows].tolist())
    if asked != set(audit.idx.tolist()):
        lacks, more = len(asked - set(audit.idx.tolist())), len(set(audit.idx.tolist()) - asked)
        raise UserError(
            f"{path} is not the audit of its settings: {lacks:,} images are missing, and {more:,} were not asked for; "
            "restore it, or move it away and audit again"
        )
    places = order[np.searchsorted(table.idx[order], audit.idx)]
    for name in ("label", "predict", "radius"):
        own, attacked = getattr(audit, name), getattr(table, name)[places]
        for row in np.flatnonzero(own != attacked)[:1]:
            raise UserError(
                f"{path}: image {audit.idx[row]} has the {name} {own[row].item()}, the table {attacked[row].item()}; "
                "restore it, or move it away and audit again"
            )


class Journal:
    """The audit of one folder of certificates. Writes it row by row, and resumes an unfinished one.

    `certificates` is the digest of the attacked table, `done` the indices of the images that the audit holds. Raises
    UserError if the folder holds an audit with other settings, or of another table.
    """

    def __init__(self, folder: Path, settings: Settings, certificates: str) -> None:
        self.path = path = folder / "audit.tsv"
        self._identity = plain({"certificates": certificates, "settings": settings._asdict()})
        self.done: set[int] = set()
        if not path.exists() or not (path.with_suffix(".json").exists() or path.read_bytes().count(b"\n") > 1):
            flips.check_absent(folder)
            self._seal(None)
            write_atomic(path, "\t".join(AUDIT_COLUMNS) + "\n")
            return
        stored = _facts(path)
        if difference := first_difference({name: stored[name] for name in self._identity}, self._identity):
            name, old, new = difference
            what = f"other certificates or settings ({name} was {old!r} and is now {new!r})"
            raise UserError(f"{path} is the audit of {what}; move it away, or give the old settings to resume")
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        write_atomic(path, "\n".join(lines[:-1]) + "\n")  # without the last line, which a kill may have cut off
        if len(lines) > 2:
            self.done = set(read_audit(path).idx.tolist())

    def _seal(self, audit: str | None) -> None:
        write_sealed(self.path.with_suffix(".json"), self._identity | {"audit": audit})

    def finish(self) -> None:
        """Seals the audit: readers refuse it if it changes from now on."""
        self._seal(digest_of(self.path))

    def append(self, rows: Attacked, found: Found) -> None:
        """Writes the results of some rows, without the images that the audit already holds."""
        columns = rows._asdict() | found._asdict()
        new = zip(*(columns[name] for name in AUDIT_COLUMNS), strict=True)
        new = [row for row in new if int(row[0]) not in self.done]
        cells = [[repr(float(cell)) if isinstance(cell, float) else str(cell) for cell in row] for row in new]
        with deferred():
            flips.write(self.path.parent, rows.idx, found.distance, found.answer, found.point)
            append(self.path, "".join("\t".join(row) + "\n" for row in cells))
            self.done |= set(rows.idx.tolist())
