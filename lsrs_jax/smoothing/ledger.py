"""Votes on disk: append-only, resumable. Every certificate is derived from these rows.

A ledger is a TSV file with the header ``idx label slack purpose first stop votes seconds crc``. A row says: for image
``idx``, the chunks [first, stop) of this purpose gave these votes (``class:count`` pairs). ``slack`` is the ℓ2
distance in the latent charged to this image, ``seconds`` the time charged to it for these chunks, ``crc`` the CRC-32 of
the row before it.
"""

import dataclasses
import math
import os
import zlib
from pathlib import Path

import numpy as np

from lsrs_jax.errors import UserError
from lsrs_jax.files import lock

COLUMNS = ("idx", "label", "slack", "purpose", "first", "stop", "votes", "seconds", "crc")
_HEADER = "\t".join(COLUMNS) + "\n"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the ledger; `votes` are int64 counts over all classes."""

    idx: int
    label: int
    slack: float
    purpose: str
    first: int
    stop: int
    votes: np.ndarray
    seconds: float

    def line(self):
        votes = ",".join(f"{index}:{self.votes[index]}" for index in np.flatnonzero(self.votes))
        fields = (self.idx, self.label, repr(self.slack), self.purpose, self.first, self.stop, votes)
        content = "\t".join(map(str, fields)) + f"\t{self.seconds:.6f}"
        return f"{content}\t{_crc(content)}\n"


def has_rows(path):
    """Whether a ledger holds more than its header. Cheap, and without the lock."""
    return path.exists() and path.stat().st_size > len(_HEADER)


class Tally:
    """The votes of one image so far: chunks [0, next) of each purpose."""

    def __init__(self, idx, label, slack, plan, num_classes):
        self.idx, self.label, self.slack, self.seconds = idx, label, slack, 0.0
        self.counts = {purpose: np.zeros(num_classes, np.int64) for purpose in plan}
        self.next = dict.fromkeys(plan, 0)

    def add(self, row):
        self.counts[row.purpose] = self.counts[row.purpose] + row.votes
        self.next[row.purpose] = row.stop
        self.seconds += row.seconds


class Ledger:
    """An open ledger, locked against a second process.

    Args:
      path: the file; made if missing.
      plan: votes per purpose, for example ``{"selection": 100, "estimation": 10_000}``.
      samples: votes per chunk.
      num_classes: K.

    Raises:
      UserError: for a malformed row, chunks counted twice or left out, or votes that do not add up. A half-written
        last line (a kill during a write) is cut off instead; its chunks run again.

    **Guarantee**: `tallies` holds each chunk of an image exactly once, and the votes of each row add up to the number
    of samples in its chunks.
    """

    def __init__(self, path, plan, samples, num_classes):
        self.path, self._plan = Path(path), plan
        self._samples, self._num_classes = samples, num_classes
        self.tallies = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            lock(self._file, f"writing {self.path}")
            self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        self._file.close()

    def _read(self):
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if not (whole.startswith(_HEADER.encode()) or (not whole and _HEADER.encode().startswith(content))):
            raise UserError(f"{self.path} is not a vote ledger: its first line differs; restore it or remove it")
        for number, line in enumerate(whole[len(_HEADER) :].split(b"\n")[:-1], start=2):
            try:
                row = self._parse(line.decode("utf-8"))
                self._take(row)
            except ValueError as error:
                raise UserError(
                    f"{self.path} line {number} is damaged ({error}); restore the file, or certify again under "
                    "another --config.certify.name"
                ) from error
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        if not whole:
            self._file.write(_HEADER.encode())
            self._sync()

    def _parse(self, line):
        fields = line.split("\t")
        if len(fields) != len(COLUMNS):
            raise ValueError(f"{len(fields)} columns instead of {len(COLUMNS)}")
        idx, label, slack, purpose, first, stop, votes, seconds, crc = fields
        if crc != _crc(line.rpartition("\t")[0]):
            raise ValueError("its checksum differs")
        if purpose not in self._plan:
            raise ValueError(f"unknown purpose {purpose!r}")
        counts = np.zeros(self._num_classes, np.int64)
        for pair in votes.split(","):
            name, count = map(_natural, pair.split(":"))
            if name >= self._num_classes or counts[name] or not count:
                raise ValueError(f"bad vote {pair!r}")
            counts[name] = count
        row = Row(
            _natural(idx),
            _natural(label),
            float(slack),
            purpose,
            _natural(first),
            _natural(stop),
            counts,
            float(seconds),
        )
        if not (0 <= row.slack < math.inf and 0 <= row.seconds < math.inf):
            raise ValueError("slack or seconds out of range")
        return row

    def _take(self, row):
        total = self._plan[row.purpose]
        known = self.tallies.get(row.idx)
        tally = known or Tally(row.idx, row.label, row.slack, self._plan, self._num_classes)
        if row.first != tally.next[row.purpose]:
            raise ValueError(f"image {row.idx}: chunks from {row.first} where {tally.next[row.purpose]} come next")
        if row.first >= row.stop or (row.stop - 1) * self._samples >= total:
            raise ValueError(f"image {row.idx}: chunks [{row.first}, {row.stop}) are not among those of {total} votes")
        expected = min(row.stop * self._samples, total) - row.first * self._samples
        if row.votes.sum() != expected:
            raise ValueError(f"image {row.idx}: {row.votes.sum()} votes where {expected} belong")
        if (row.label, row.slack) != (tally.label, tally.slack):
            raise ValueError(f"image {row.idx}: label or slack changes between rows")
        tally.add(row)
        self.tallies[row.idx] = tally

    def append(self, rows):
        """Checks and writes rows, and waits until they are on disk."""
        try:
            for row in rows:
                self._take(row)
        except ValueError as error:
            raise UserError(
                f"{self.path} does not fit what was sampled ({error}); certify under another name"
            ) from error
        self._file.write("".join(row.line() for row in rows).encode())
        self._sync()

    def _sync(self):
        self._file.flush()
        os.fsync(self._file.fileno())

    def next_chunks(self, idx):
        """The next chunk of each purpose for an image, as a tuple in the order of the plan."""
        tally = self.tallies.get(idx)
        return tuple(tally.next.values()) if tally else (0,) * len(self._plan)

    def complete(self, idx):
        """Whether every vote of the plan is there."""
        ends = tuple(-(-votes // self._samples) for votes in self._plan.values())
        return self.next_chunks(idx) == ends

    def completed(self):
        """Tallies of the complete images, sorted by idx."""
        return [self.tallies[idx] for idx in sorted(self.tallies) if self.complete(idx)]


def _crc(content):
    return f"{zlib.crc32(content.encode()):08x}"


def _natural(text):
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ValueError(f"{text!r} is not a natural number")
    return int(text)
