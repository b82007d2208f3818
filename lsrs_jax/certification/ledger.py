"""Ledgers: counts on disk, append-only and resumable. Every certificate is derived from their rows.

A ledger is a TSV file with the header ``idx label slack purpose first stop votes seconds run crc``. A row says: for
image ``idx``, the sample blocks [first, stop) of the stream ``purpose`` gave these counts (``class:count`` pairs).
``slack`` is the ℓ2 distance in the latent that the certificate of the image loses to rounding, ``seconds`` the time
spent on the image for these blocks, ``run`` names the run (`identity.Identity.run`), ``crc`` is the CRC-32 of the
fields before it. Each process of a run has a ledger of its own, ``votes.<process>.tsv``; the counts of a folder come
from all its ledgers together. Folders that were begun in format 1 have ledgers without the column ``run``.
"""

import contextlib
import dataclasses
import hashlib
import re
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lsrs_jax.certification import OTHER_NAME
from lsrs_jax.certification.table import parse_number
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import fields_of, lock, write_all
from lsrs_jax.runtime.format import LEDGER_COLUMNS
from lsrs_jax.runtime.processes import ALONE, Process
from lsrs_jax.runtime.signals import deferred
from lsrs_jax.smoothing.counts import Counts, Row
from lsrs_jax.smoothing.schedule import Schedule

_NAME = re.compile(r"votes\.(0|[1-9][0-9]{0,17})\.tsv")
_MEMORY = 2**28  # bytes of counts for which so many classes are believed in any case
_SECONDS_PER_WRITE = 1.0  # a kill may lose this much work


def name(process: int | str) -> str:
    """The file name of the ledger of a process."""
    return f"votes.{process}.tsv"


def is_name(text: str) -> bool:
    """Whether a file of this name is a ledger."""
    return _NAME.fullmatch(text) is not None


def files(folder: Path) -> list[Path]:
    """The ledgers in a folder, in the order of their processes."""
    named = [path for path in folder.glob(name("*")) if is_name(path.name)]
    if strange := [path for path in named if not path.is_file()]:
        raise UserError(f"{strange[0]} is not a file; remove it, or {OTHER_NAME}")
    return sorted(named, key=lambda path: int(path.name.split(".")[1]))


def has_rows(folder: Path) -> bool:
    """Whether the ledgers in a folder hold more than their headers; takes no lock."""
    # Any row is longer than the column by which the headers of the two formats differ.
    return any(path.stat().st_size > len(_header("run")) for path in files(folder))


def digest(content: bytes) -> dict[str, Any]:
    """Size and SHA-256 of a ledger's bytes, in types of JSON."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def check_present(folder: Path, recorded: Mapping[str, dict[str, Any]]) -> None:
    """Raises UserError for a ledger that is missing, although certificates were derived from its rows."""
    for file in recorded:
        path = folder / file
        if not path.exists() and recorded[file]["bytes"] > len(_header("run")):
            raise UserError(f"{path} is missing: without its samples no certificate can be checked; restore it")


def check_recorded(folder: Path, recorded: Mapping[str, dict[str, Any]] | None, lost: bool = False) -> list[Path]:
    """Raises UserError if the part of the ledgers from which certificates were derived has changed; rows may follow it.

    `recorded` are the `digests` of that time, None if there were none. If `lost` is true, the end of a file or a whole
    file may be missing, because its samples can be drawn again; returns these files, whose digest says nothing.
    """
    shorter = []
    if not lost:
        check_present(folder, recorded or {})
    for file, wanted in (recorded or {}).items():
        path = folder / file
        content = path.read_bytes() if path.exists() else b""
        if lost and len(content) < wanted["bytes"]:
            shorter.append(path)
        elif path.exists() and digest(content[: wanted["bytes"]]) != wanted:
            why = "its digest is not the one in certificates.json"
            raise UserError(f"{path} has changed: {why}; restore it, or {OTHER_NAME}")
    return shorter


def read(
    folder: Path,
    schedule: Schedule,
    num_classes: int,
    run: str | None,
    recorded: Mapping[str, dict[str, Any]] | None = None,
) -> Counts:
    """The `Counts` of the ledgers in a folder, without locks or repair; raises UserError for a damaged ledger.

    If the digests of a table are given as `recorded`, only the rows from which it was derived are counted.
    """
    counts = Counts(schedule, num_classes)
    parts = {path: path.read_bytes() for path in files(folder)}
    if recorded is not None:
        parts = {path: parts[path][: wanted["bytes"]] for path in parts if (wanted := recorded.get(path.name))}
    _count(counts, {path: (_whole_lines(path, part, run), len(_header(run))) for path, part in parts.items()}, run)
    return counts


def _columns(run: str | None) -> tuple[str, ...]:
    """The columns of a ledger whose rows name this run; without a run, those of format 1."""
    return LEDGER_COLUMNS[1 if run is None else 2]


def _header(run: str | None) -> str:
    return "\t".join(_columns(run)) + "\n"


def _whole_lines(path: Path, content: bytes, run: str | None) -> bytes:
    """The complete lines of a ledger's bytes; a kill may have cut off the last line."""
    whole, header = content[: content.rfind(b"\n") + 1], _header(run).encode()
    if not (whole.startswith(header) or (not whole and header.startswith(content))):
        first = whole.partition(b"\n")[0].decode(errors="replace").split("\t")
        if tuple(first) in LEDGER_COLUMNS.values():
            names = "name no run" if run else "name a run"
            raise UserError(f"{path} is of another folder: its rows {names}, unlike this folder's; remove the file")
        raise UserError(f"{path} is not a ledger: its first line is another one; restore or remove the file")
    return whole


class _OtherRun(ValueError):
    """A row that names another run."""


class _Twice(ValueError):
    """Blocks that stand in two ledgers."""


def _overlap(one: Row, other: Row) -> bool:
    """Whether the later of two sorted rows repeats blocks of the other."""
    return (one.idx, one.stream) == (other.idx, other.stream) and other.first < one.stop


def _check_classes(rows: list[Row], num_classes: int) -> None:
    """Raises UserError if rows cannot be of so many classes, before memory is taken for them."""
    named = 1 + max((max(len(row.counts) - 1, row.label) for row in rows), default=0)
    if 8 * len(rows) * num_classes > _MEMORY and num_classes > 1000 * named:
        few = f"its samples and labels name no class above {named - 1}"
        raise UserError(f"certificates.json claims {num_classes:,} classes, but {few}; restore it, or {OTHER_NAME}")


def _count(counts: Counts, contents: Mapping[Path, tuple[bytes, int]], run: str | None) -> None:
    """Counts the rows of ledgers: path → complete lines, and the offset of the first line to count.

    Rows of one image may lie in several files, in any order.
    """
    rows, order, path, number = list[tuple[Row, Path, int]](), list(counts.schedule.totals), None, 0
    try:
        for path, (content, offset) in contents.items():
            first = content[:offset].count(b"\n") + 1
            for number, line in enumerate(content[offset:].split(b"\n")[:-1], first):
                rows.append((_parse(line.decode("utf-8"), counts, run), path, number))
        rows.sort(key=lambda found: (found[0].idx, order.index(found[0].stream), found[0].first))
        _check_classes([row for row, _, _ in rows], counts.num_classes)
        before = None
        for row, path, number in rows:  # noqa: B007 (the errors name it)
            if before and before[1] != path and _overlap(before[0], row):
                raise _Twice(f"{before[1]} and {path} both hold samples of image {row.idx}")
            before = row, path
            missing = counts.num_classes - len(row.counts)
            counts.count(dataclasses.replace(row, counts=np.pad(row.counts, (0, missing))))
    except _Twice as error:
        remedy = "ledgers of one run can be put together if they certified different images"
        raise UserError(f"{error}; {remedy}; remove one of the files") from error
    except _OtherRun as error:
        remedy = f"remove the file if it does not belong here, restore it, or {OTHER_NAME}"
        raise UserError(f"{path} line {number} is of another run: {error}; {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path} line {number} is damaged ({error}); restore the file, or {OTHER_NAME}") from error


def _parse(line: str, counts: Counts, run: str | None) -> Row:
    idx, label, slack, stream, first, stop, pairs, seconds, *named, crc = fields_of(line, _columns(run)).values()
    if crc != _crc(line.rpartition("\t")[0]):
        raise ValueError("its checksum differs")
    if named and named[0] != run:
        raise _OtherRun(f"it names {named[0][:40]!r}, the run of this folder is {run!r}")
    if stream not in counts.schedule.totals:
        raise ValueError(f"unknown purpose {stream!r}")
    votes = dict[int, int]()
    for pair in pairs.split(","):
        index, count = map(_natural, pair.split(":"))
        if index >= counts.num_classes or index in votes or not count:
            raise ValueError(f"bad count {pair!r}")
        votes[index] = count
    found = np.zeros(max(votes) + 1, np.int64)  # `_count` appends the other classes
    found[list(votes)] = list(votes.values())
    idx, label, first, stop = map(_natural, (idx, label, first, stop))
    return Row(idx, label, parse_number(slack), stream, first, stop, found, parse_number(seconds))


class Ledger(Counts, contextlib.AbstractContextManager["Ledger"]):
    """The counts of all ledgers in a folder. This process writes the one at `path`, and locks it.

    The file at `path` is made if missing. The processes of a run wait until each has locked its file, and only then
    read the others; the first process also locks ledgers that an earlier run with more processes left.

    `run` is the name of the run that every row carries; None in folders that were begun in format 1.

    Raises UserError for a malformed row, a row of another run, blocks counted twice or left out, or counts that do not
    add up. A half-written last line (a kill during a write) is cut off instead; its blocks are sampled again.

    **Guarantee**: that of `counts.Counts`, both for rows that are read and for rows that are written. A row reaches the
    disk with the first append that is more than a second after the last write, or when the ledger is closed.
    """

    def __init__(
        self,
        path: Path | str,
        schedule: Schedule,
        num_classes: int,
        run: str | None = None,
        process: Process = ALONE,
    ) -> None:
        super().__init__(schedule, num_classes)
        self._run, header = run, _header(run)
        self.path, self._written, self._unwritten = Path(path), time.monotonic(), list[str]()
        self._sizes = dict[Path, int]()  # bytes of the other files that were counted
        self.path.parent.mkdir(parents=True, exist_ok=True)
        home = self.path.parent.resolve().parents[1]
        if self.path.is_symlink() and not self.path.resolve().is_relative_to(home):
            remedy = "copy that file to its place, so that new samples are not written there"
            raise UserError(f"{self.path} is a link to {self.path.resolve()}, outside of {home}; {remedy}")
        with contextlib.ExitStack() as opened:
            self._file = opened.enter_context(self.path.open("a+b", buffering=0))
            lock(self._file, f"writing {self.path}")
            own = set(map(name, range(process.count)))
            for other in files(self.path.parent) if self.path.name == name(0) else ():
                if other.name not in own:
                    lock(opened.enter_context(other.open("r+b")), f"writing {other}")
            self._file.seek(0)
            content = self._file.readall()
            whole = _whole_lines(self.path, content, run)
            process.wait("ledgers")
            _count(self, {self.path: (whole, len(header))} | self._news(), run)
            if len(whole) < len(content):
                self._file.truncate(len(whole))  # after all checks, so that a refused ledger stays as it is
            self._size = len(whole)
            if not whole:
                self._write(header)
            self._open = opened.pop_all()

    def __exit__(self, *exception: object) -> None:
        """Writes the rows that are still in memory, and releases the file."""
        try:
            self.flush()
        finally:
            self.close()

    def close(self) -> None:
        """Releases the file."""
        self._open.close()

    def _news(self) -> dict[Path, tuple[bytes, int]]:
        """The complete lines of the other files, and the offset of what was not counted yet."""
        news = {}
        for path in files(self.path.parent):
            if path != self.path:
                whole = _whole_lines(path, path.read_bytes(), self._run)
                # Another process may not have written its header yet.
                news[path] = whole, max(self._sizes.get(path, 0), len(_header(self._run)))
                self._sizes[path] = len(whole)
        return news

    def refresh(self) -> None:
        """Counts the rows that other processes have written since the last call."""
        _count(self, self._news(), self._run)

    def append(self, rows: Iterable[Row]) -> None:
        """Counts rows, and writes them to disk now or with a later call."""
        rows = list(rows)
        try:
            super().append(rows)
        except ValueError as error:
            raise UserError(f"{self.path} does not fit the new samples ({error}); {OTHER_NAME}") from error
        self._unwritten += [_line(row, self._run) for row in rows]
        if time.monotonic() - self._written > _SECONDS_PER_WRITE:
            self.flush()

    def digests(self) -> dict[str, dict[str, Any]]:
        """File name → size and SHA-256 of the part that was counted and is on disk; rows may follow it later."""
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


def _line(row: Row, run: str | None) -> str:
    counts = ",".join(f"{index}:{row.counts[index]}" for index in np.flatnonzero(row.counts))
    fields = (row.idx, row.label, repr(row.slack), row.stream, row.first, row.stop, counts, f"{row.seconds:.6f}")
    content = "\t".join(map(str, fields if run is None else (*fields, run)))
    return f"{content}\t{_crc(content)}\n"


def _crc(content: str) -> str:
    return f"{zlib.crc32(content.encode()):08x}"


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ValueError(f"{text!r} is not a natural number")
    return int(text)
