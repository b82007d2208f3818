"""Votes on disk: append-only, resumable. Every certificate is derived from these rows.

A ledger is a TSV file with the header ``idx label slack purpose first stop votes seconds crc``. A row says: for image
``idx``, the chunks [first, stop) of this purpose gave these votes (``class:count`` pairs). ``slack`` is the ℓ2
distance in the latent charged to this image, ``seconds`` the time charged to it for these chunks, ``crc`` the CRC-32 of
the row before it.
"""

import hashlib
import time
import zlib
from pathlib import Path

import numpy as np

from lsrs_jax import interrupt
from lsrs_jax.errors import UserError
from lsrs_jax.files import lock, write_all
from lsrs_jax.smoothing.tally import Row, Tallies

COLUMNS = ("idx", "label", "slack", "purpose", "first", "stop", "votes", "seconds", "crc")
_HEADER = "\t".join(COLUMNS) + "\n"
_SECONDS_PER_WRITE = 1.0  # how much work a kill may lose


def _line(row):
    votes = ",".join(f"{index}:{row.votes[index]}" for index in np.flatnonzero(row.votes))
    fields = (row.idx, row.label, repr(row.slack), row.purpose, row.first, row.stop, votes)
    content = "\t".join(map(str, fields)) + f"\t{row.seconds:.6f}"
    return f"{content}\t{_crc(content)}\n"


def has_rows(path):
    """Whether a ledger holds more than its header. Cheap, and without the lock."""
    return path.exists() and path.stat().st_size > len(_HEADER)


def digest(content):
    """Size and SHA-256 of a ledger's bytes, as plain types."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read(path, plan, num_classes):
    """The `Tallies` of a ledger, which is neither locked nor mended; raises UserError for a damaged one."""
    tallies = Tallies(plan, num_classes)
    _count_lines(tallies, path, path.read_bytes())
    return tallies


def _count_lines(tallies, path, content):
    """Counts the rows of a ledger's bytes; returns the whole lines among them."""
    whole = content[: content.rfind(b"\n") + 1]
    if not (whole.startswith(_HEADER.encode()) or (not whole and _HEADER.encode().startswith(content))):
        raise UserError(f"{path} is not a vote ledger: its first line differs; restore it or remove it")
    for number, line in enumerate(whole[len(_HEADER) :].split(b"\n")[:-1], start=2):
        try:
            tallies.count(_parse(line.decode("utf-8"), tallies))
        except ValueError as error:
            raise UserError(
                f"{path} line {number} is damaged ({error}); restore the file, or certify again under "
                "another --config.certify.name"
            ) from error
    return whole


def _parse(line, tallies):
    fields = line.split("\t")
    if len(fields) != len(COLUMNS):
        raise ValueError(f"{len(fields)} columns instead of {len(COLUMNS)}")
    idx, label, slack, purpose, first, stop, votes, seconds, crc = fields
    if crc != _crc(line.rpartition("\t")[0]):
        raise ValueError("its checksum differs")
    if purpose not in tallies.plan.totals:
        raise ValueError(f"unknown purpose {purpose!r}")
    counts = np.zeros(tallies.num_classes, np.int64)
    for pair in votes.split(","):
        name, count = map(_natural, pair.split(":"))
        if name >= tallies.num_classes or counts[name] or not count:
            raise ValueError(f"bad vote {pair!r}")
        counts[name] = count
    whole = {"idx": idx, "label": label, "first": first, "stop": stop}
    whole = {name: _natural(text) for name, text in whole.items()}
    return Row(**whole, slack=float(slack), purpose=purpose, votes=counts, seconds=float(seconds))


class Ledger(Tallies):
    """An open ledger, locked against a second process.

    Args:
      path: the file; made if missing.
      plan: `tally.Plan`.
      num_classes: K.

    Raises:
      UserError: for a malformed row, chunks counted twice or left out, or votes that do not add up. A half-written
        last line (a kill during a write) is cut off instead; its chunks run again.

    **Guarantee**: that of `tally.Tallies`, for what is read as for what is written. Rows reach the disk a second after
    they were appended at the latest (with the next append after it), and when the ledger is closed.
    """

    def __init__(self, path, plan, num_classes):
        super().__init__(plan, num_classes)
        self.path, self._unwritten, self._written = Path(path), [], time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b", buffering=0)
        try:
            lock(self._file, f"writing {self.path}")
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Writes what is still in memory and gives the file free."""
        try:
            self.flush()
        finally:
            self._file.close()

    def _read(self):
        self._file.seek(0)
        content = self._file.readall()
        whole = _count_lines(self, self.path, content)
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        self._size = len(whole)
        if not whole:
            self._write(_HEADER)

    def append(self, rows):
        """Counts rows and writes them, soon."""
        try:
            super().append(rows)
        except ValueError as error:
            raise UserError(
                f"{self.path} does not fit what was sampled ({error}); certify under another name"
            ) from error
        self._unwritten += [_line(row) for row in rows]
        if time.monotonic() - self._written > _SECONDS_PER_WRITE:
            self.flush()

    def digest(self):
        """Size and SHA-256 of what is on disk; rows may follow it later."""
        return digest(self.path.read_bytes()[: self._size])

    def flush(self):
        """Writes the rows in memory and waits until they are on disk."""
        if self._unwritten:
            with interrupt.deferred():
                self._write("".join(self._unwritten))
                self._unwritten = []
        self._written = time.monotonic()

    def _write(self, text):
        self._size = write_all(self._file, self.path, text, self._size)


def _crc(content):
    return f"{zlib.crc32(content.encode()):08x}"


def _natural(text):
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ValueError(f"{text!r} is not a natural number")
    return int(text)
