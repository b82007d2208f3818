"""audit.tsv and audit.json beside the certificates they are about.

audit.json holds the digest of the table that is attacked, the settings, and, once the audit is finished, the digest of
audit.tsv: None until then. Like certificates.json it names its own digest.
"""

import hashlib
import json
from typing import NamedTuple

import numpy as np

from lsrs_jax import config as configuration
from lsrs_jax import interrupt, sealed
from lsrs_jax.errors import UserError
from lsrs_jax.files import append, write_atomic
from lsrs_jax.smoothing.table import fields_of

COLUMNS = ("idx", "label", "predict", "radius", "unperturbed", "pairs", "flips", "undecided", "distance", "attack")

_WHOLE = ("idx", "label", "predict", "unperturbed", "pairs", "flips", "undecided")


class Audit(NamedTuple):
    """An audit.tsv; arrays over images.

    Attributes:
      idx, predict, radius: of the certificates.
      correct: whether the image is right without an attack: by its certificate, or where there is none by `predict`.
      pairs, flips, undecided, distance: as in `auditor.Found`.
    """

    idx: np.ndarray
    predict: np.ndarray
    radius: np.ndarray
    correct: np.ndarray
    pairs: np.ndarray
    flips: np.ndarray
    undecided: np.ndarray
    distance: np.ndarray

    def robust_accuracy(self, radius):
        """Empirical upper bound: share of images that are right and that no attack flipped within this radius.

        An image without certificate on which `predict` abstains counts as wrong, as in certified accuracy.
        """
        return float(np.mean(self.correct & (self.distance > radius)))


def read(path):
    """Reads an audit.tsv; raises UserError naming the line that cannot be read."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if lines[0].split("\t") != list(COLUMNS):
        raise UserError(f"{path} is not an audit: its first line differs")
    rows = []
    for number, line in enumerate(lines[1:-1], start=2):
        try:
            row = fields_of(line, COLUMNS)
            numbers = [int(row[name]) for name in _WHOLE]
            radius, distance = float(row["radius"]), float(row["distance"])
            if not (0 <= radius < np.inf and distance >= 0 and all(-1 <= number < 2**53 for number in numbers)):
                raise ValueError("a number is out of range")
        except ValueError as error:
            raise UserError(f"{path} line {number} cannot be read ({error})") from error
        idx, label, certified, unperturbed, *points = numbers
        class_ = certified if certified >= 0 else unperturbed
        rows.append((idx, certified, radius, class_ == label, *points, distance))
    if not rows:
        raise UserError(f"{path} holds no attacked images")
    audit = Audit(*map(np.asarray, zip(*rows, strict=True)))
    if len(np.unique(audit.idx)) < len(audit.idx):
        raise UserError(f"{path} names an image twice; remove it to audit again")
    return audit


def _facts(path):
    """The content of audit.json beside an audit.tsv, which is intact if it is finished."""
    facts = path.with_suffix(".json")
    if not facts.exists():
        raise UserError(f"{path} has no {facts.name} beside it; restore it, or move the audit away")
    stored = sealed.read(facts, _check_facts, f"move it and {path.name} away to audit again")
    if stored["audit"] not in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
        raise UserError(
            f"{path} has changed: its digest is not the one in {facts.name}; restore it, or move both away to audit "
            "again"
        )
    return stored


def _check_facts(stored):
    if not isinstance(stored["certificates"], str) or not isinstance(stored["settings"], dict):
        raise TypeError("certificates or settings are missing")
    if not isinstance(stored["audit"], str | None):
        raise TypeError("audit is no digest")


def read_finished(path):
    """``(digest of the table that was attacked, `Audit`)`` of a finished audit, else None.

    Raises:
      UserError: for one that has changed since, or cannot be read.
    """
    facts = _facts(path)
    return (facts["certificates"], read(path)) if facts["audit"] else None


class Journal:
    """The audit of one folder of certificates, row by row; what an earlier session has written stays.

    Args:
      place: the folder.
      settings: `auditor.Settings`; another audit's are refused.
      certificates: digest of the table that is attacked.

    Attributes:
      done: indices of the images that are in it.
    """

    def __init__(self, place, settings, certificates):
        self.path = place / "audit.tsv"
        self._identity = json.loads(json.dumps({"certificates": certificates, "settings": settings._asdict()}))
        self.done = self._resume()

    def _resume(self):
        """Images that an earlier session of the same audit has done; begins a new one where there is none."""
        path = self.path
        if path.exists() and (path.with_suffix(".json").exists() or path.read_bytes().count(b"\n") > 1):
            stored = _facts(path)
            identity = {name: stored[name] for name in self._identity}
            difference = configuration.first_difference(identity, self._identity)
            if difference:
                raise UserError(
                    f"{path} is the audit of other certificates or settings ({difference[0]} was {difference[1]!r} and "
                    f"is now {difference[2]!r}); move it away, or give the old settings to resume"
                )
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            write_atomic(path, "\n".join(lines[:-1]) + "\n")  # without what a kill may have left of a line
            return set(read(path).idx.tolist()) if len(lines) > 2 else set()
        self._seal(None)
        write_atomic(path, "\t".join(COLUMNS) + "\n")
        return set()

    def _seal(self, audit):
        sealed.write(self.path.with_suffix(".json"), self._identity | {"audit": audit})

    def finish(self):
        """Seals what was found: from now on a change of it is noticed."""
        self._seal(hashlib.sha256(self.path.read_bytes()).hexdigest())

    def append(self, table, rows, found):
        """Writes what was `auditor.Found` about these rows of a table, but for images that are in it."""
        columns = (
            table.idx[rows],
            table.label[rows],
            table.predict[rows],
            [repr(float(radius)) for radius in table.radius[rows]],
            found.unperturbed,
            found.pairs,
            found.flips,
            found.undecided,
            [repr(float(distance)) for distance in found.distance],
            found.attack,
        )
        new = [values for values in zip(*columns, strict=True) if int(values[0]) not in self.done]
        text = "".join("\t".join(map(str, values)) + "\n" for values in new)
        with interrupt.deferred():
            append(self.path, text)
            self.done |= set(table.idx[rows].tolist())
