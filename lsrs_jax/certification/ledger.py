"""Ledgers: counts on disk, append-only and resumable. Every certificate is derived from their rows.

A ledger is a TSV file with the header ``idx label slack purpose first stop votes seconds crc``. A row says: for image
``idx``, the sample blocks [first, stop) of the stream ``purpose`` gave these counts (``class:count`` pairs). ``slack``
is the ℓ2 distance in the latent that the certificate of the image loses to rounding, ``seconds`` the time spent on it
for these blocks, ``crc`` the CRC-32 of the row before it. Each process of a run has a ledger of its own,
``votes.<process>.tsv``; the rows of a folder are those of all its ledgers together.
"""

import contextlib
import hashlib
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lsrs_jax.certification import OTHER_NAME
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import fields_of, lock, write_all
from lsrs_jax.runtime.format import LEDGER_COLUMNS
from lsrs_jax.runtime.processes import ALONE, Process
from lsrs_jax.runtime.signals import deferred
from lsrs_jax.smoothing.counts import Counts, Row
from lsrs_jax.smoothing.schedule import Schedule

_HEADER = "\t".join(LEDGER_COLUMNS) + "\n"
_NAME = re.compile(r"votes\.(0|[1-9][0-9]{0,17})\.tsv")
_SECONDS_PER_WRITE = 1.0  # how much work a kill may lose


def _line(row: Row) -> str:
    counts = ",".join(f"{index}:{row.counts[index]}" for index in np.flatnonzero(row.counts))
    fields = (row.idx, row.label, repr(row.slack), row.stream, row.first, row.stop, counts, f"{row.seconds:.6f}")
    content = "\t".join(map(str, fields))
    return f"{content}\t{_crc(content)}\n"


def name(process: int | str) -> str:
    """The file name of the ledger of a process."""
    return f"votes.{process}.tsv"


def files(folder: Path) -> list[Path]:
    """The ledgers in a folder, in the order of their processes."""
    named = filter(None, (_NAME.fullmatch(path.name) for path in folder.glob(name("*"))))
    return [folder / found[0] for found in sorted(named, key=lambda found: int(found[1]))]


def has_rows(folder: Path) -> bool:
    """Whether a folder holds more than headers. Cheap, and without locks."""
    return any(path.stat().st_size > len(_HEADER) for path in files(folder))


def digest(content: bytes) -> dict[str, Any]:
    """Size and SHA-256 of a ledger's bytes, as plain types."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read(folder: Path, schedule: Schedule, num_classes: int) -> Counts:
    """The `Counts` of the ledgers in a folder, which are neither locked nor repaired; UserError for a damaged one."""
    counts = Counts(schedule, num_classes)
    _count(counts, {path: (_whole_lines(path, path.read_bytes()), len(_HEADER)) for path in files(folder)})
    return counts


def _whole_lines(path: Path, content: bytes) -> bytes:
    """The complete lines of a ledger's bytes: a kill may have cut off the last one."""
    whole = content[: content.rfind(b"\n") + 1]
    if not (whole.startswith(_HEADER.encode()) or (not whole and _HEADER.encode().startswith(content))):
        raise UserError(f"{path} is not a vote ledger: its first line differs; restore it or remove it")
    return whole


def _count(counts: Counts, contents: Mapping[Path, tuple[bytes, int]]) -> None:
    """Counts the rows of ledgers: path → complete lines, and the offset of the first line that counts.

    Rows of one image may lie in several files, in any order.
    """
    rows, order = [], list(counts.schedule.totals)
    for path, (content, offset) in contents.items():
        first = content[:offset].count(b"\n") + 1
        for number, line in enumerate(content[offset:].split(b"\n")[:-1], first):
            with _damage(path, number):
                rows.append((_parse(line.decode("utf-8"), counts), path, number))
    rows.sort(key=lambda found: (found[0].idx, order.index(found[0].stream), found[0].first))
    for row, path, number in rows:
        with _damage(path, number):
            counts.count(row)


@contextlib.contextmanager
def _damage(path: Path, number: int) -> Iterator[None]:
    """Adds file and line to a ValueError about a row."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path} line {number} is damaged ({error}); restore the file, or {OTHER_NAME}") from error


def _parse(line: str, counts: Counts) -> Row:
    idx, label, slack, stream, first, stop, pairs, seconds, crc = fields_of(line, LEDGER_COLUMNS).values()
    if crc != _crc(line.rpartition("\t")[0]):
        raise ValueError("its checksum differs")
    if stream not in counts.schedule.totals:
        raise ValueError(f"unknown purpose {stream!r}")
    found = np.zeros(counts.num_classes, np.int64)
    for pair in pairs.split(","):
        index, count = map(_natural, pair.split(":"))
        if index >= counts.num_classes or found[index] or not count:
            raise ValueError(f"bad vote {pair!r}")
        found[index] = count
    idx, label, first, stop = map(_natural, (idx, label, first, stop))
    return Row(idx, label, float(slack), stream, first, stop, found, float(seconds))


class Ledger(Counts):
    """The ledgers of a folder, of which one is this process's to write, locked against a second process.

    The file at `path` is made if missing. The processes of a run wait until each has locked its file, and only then
    read the others; the first one also locks ledgers that a run of more processes left.

    Raises UserError for a malformed row, blocks counted twice or left out, or counts that do not add up. A half-written
    last line (a kill during a write) is cut off instead; its blocks are sampled again.

    **Guarantee**: that of `counts.Counts`, for rows that are read as for rows that are written. Rows reach the disk a
    second after they were appended at the latest (with the next append after it), and when the ledger is closed.
    """

    def __init__(self, path: Path | str, schedule: Schedule, num_classes: int, process: Process = ALONE) -> None:
        super().__init__(schedule, num_classes)
        self.path, self._written, self._unwritten = Path(path), time.monotonic(), list[str]()
        self._sizes: dict[Path, int] = {}  # how much of the other files was counted
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            self._file = opened.enter_context(self.path.open("a+b", buffering=0))
            lock(self._file, f"writing {self.path}")
            if self.path.name == name(0):
                for other in files(self.path.parent)[1:]:
                    if other.name not in map(name, range(process.count)):
                        lock(opened.enter_context(other.open("rb")), f"writing {other}")
            self._file.seek(0)
            content = self._file.readall()
            whole = _whole_lines(self.path, content)
            process.wait("ledgers")
            _count(self, {self.path: (whole, len(_HEADER))} | self._news())
            if len(whole) < len(content):
                self._file.truncate(len(whole))  # last: a ledger that is refused is left as it is
            self._size = len(whole)
            if not whole:
                self._write(_HEADER)
            self._open = opened.pop_all()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Writes the rows that are still in memory, and releases the file."""
        try:
            self.flush()
        finally:
            self._open.close()

    def _news(self) -> dict[Path, tuple[bytes, int]]:
        """What the other files hold, and from where on it was not counted yet."""
        news = {}
        for path in files(self.path.parent):
            if path != self.path:
                whole = _whole_lines(path, path.read_bytes())
                # Another process may not have written its header yet.
                news[path] = whole, max(self._sizes.get(path, 0), len(_HEADER))
                self._sizes[path] = len(whole)
        return news

    def refresh(self) -> None:
        """Counts what other processes have written since."""
        _count(self, self._news())

    def append(self, rows: Iterable[Row]) -> None:
        """Counts rows and writes them, soon."""
        rows = list(rows)
        try:
            super().append(rows)
        except ValueError as error:
            raise UserError(f"{self.path} does not fit what was sampled ({error}); {OTHER_NAME}") from error
        self._unwritten += [_line(row) for row in rows]
        if time.monotonic() - self._written > _SECONDS_PER_WRITE:
            self.flush()

    def digests(self) -> dict[str, dict[str, Any]]:
        """File name → size and SHA-256 of what was counted of it and is on disk; rows may follow it later."""
        sizes = self._sizes | {self.path: self._size}
        return {path.name: digest(path.read_bytes()[: sizes[path]]) for path in sorted(sizes)}

    def flush(self) -> None:
        """Writes the rows in memory and waits until they are on disk."""
        if self._unwritten:
            with deferred():
                self._write("".join(self._unwritten))
                self._unwritten = []
        self._written = time.monotonic()

    def _write(self, text: str) -> None:
        self._size = write_all(self._file, self.path, text, self._size)


def _crc(content: str) -> str:
    return f"{zlib.crc32(content.encode()):08x}"


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ValueError(f"{text!r} is not a natural number")
    return int(text)
