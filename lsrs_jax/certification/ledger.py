"""Ledgers: counts on disk, append-only and resumable. Every certificate is derived from their rows.

A ledger is a TSV file with the header ``idx label slack purpose first stop votes seconds run crc``. A row says: for
image ``idx``, the sample blocks [first, stop) of the stream ``purpose`` gave these counts (``class:count`` pairs).
``slack`` is the ℓ2 distance in the latent that the certificate of the image loses to rounding, ``seconds`` the time
spent on the image for these blocks, ``run`` names the run (`identity.Identity.run`), ``crc`` is the CRC-32 of the
fields before it. Each process of a run has a ledger of its own, ``votes.<process>.tsv``; the counts of a folder come
from all its ledgers together. Folders that were begun in format 1 have ledgers without the column ``run``.
"""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lsrs_jax.certification import OTHER_NAME
from lsrs_jax.certification.rows import Lines, OtherRun, Parts, header_of, line_of
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import lock, write_all
from lsrs_jax.runtime.processes import ALONE, Process
from lsrs_jax.runtime.signals import deferred
from lsrs_jax.smoothing.counts import Counts, Row
from lsrs_jax.smoothing.schedule import Schedule

_NAME = re.compile(r"votes\.(0|[1-9][0-9]{0,17})\.tsv")
_MEMORY = 2**28  # bytes of counts for which so many classes are believed in any case
_PIECE = 2**20  # bytes that are read at once
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
    return any(path.stat().st_size > len(header_of("run")) for path in files(folder))


def digest(content: bytes) -> dict[str, Any]:
    """Size and SHA-256 of a ledger's bytes, in types of JSON."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _digest_of(path: Path, size: int) -> dict[str, Any]:
    """`digest` of the first `size` bytes of a file, which are read piece by piece."""
    total, left = hashlib.sha256(), size
    with path.open("rb") as file:
        while part := file.read(min(left, _PIECE)):
            total.update(part)
            left -= len(part)
    return {"bytes": size - left, "sha256": total.hexdigest()}


def check_present(folder: Path, recorded: Mapping[str, dict[str, Any]]) -> None:
    """Raises UserError for a ledger that is missing, although certificates were derived from its rows."""
    for file in recorded:
        path = folder / file
        if not path.exists() and recorded[file]["bytes"] > len(header_of("run")):
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
        if lost and (path.stat().st_size if path.exists() else 0) < wanted["bytes"]:
            shorter.append(path)
        elif path.exists() and _digest_of(path, wanted["bytes"]) != wanted:
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
    _count(counts, parts_of(folder, run, recorded), run)
    return counts


def parts_of(folder: Path, run: str | None, recorded: Mapping[str, dict[str, Any]] | None = None) -> Parts:
    """Where the complete lines of the ledgers in a folder are, or of the parts that are `recorded`."""
    begin, none = len(header_of(run)), {"bytes": 0}
    most = {path: None if recorded is None else recorded.get(path.name, none)["bytes"] for path in files(folder)}
    return {path: (begin, _extent(path, run, size)) for path, size in most.items()}


def _extent(path: Path, run: str | None, most: int | None = None) -> int:
    """The size of the complete lines of a ledger, or of its first `most` bytes; a kill may have cut off the last line.

    Raises UserError for a file that does not begin as a ledger of this run.
    """
    header = header_of(run).encode()
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        end = end if most is None else min(end, most)
        file.seek(0)
        if header.startswith(file.read(min(end, len(header)))):
            while end >= len(header):
                file.seek(begin := max(0, end - _PIECE))
                if (last := file.read(end - begin).rfind(b"\n")) >= 0:
                    return begin + last + 1
                end = begin
            return 0
        file.seek(0)
        first = file.readline(len(header) + len(header_of("run"))).decode(errors="replace")
    if first in map(header_of, (None, "run")):
        names = "name no run" if run else "name a run"
        raise UserError(f"{path} is of another folder: its rows {names}, unlike this folder's; remove the file")
    raise UserError(f"{path} is not a ledger: its first line is another one; restore or remove the file")


def _overlap(one: Row, other: Row) -> bool:
    """Whether the later of two sorted rows repeats blocks of the other."""
    return (one.idx, one.stream) == (other.idx, other.stream) and other.first < one.stop


def _check_classes(lines: Lines, num_classes: int) -> None:
    """Raises UserError if rows cannot be of so many classes, before memory is taken for them."""
    if 8 * len(lines) * num_classes > _MEMORY and num_classes > 1000 * (1 + lines.largest):
        few = f"its samples and labels name no class above {lines.largest}"
        raise UserError(f"certificates.json claims {num_classes:,} classes, but {few}; restore it, or {OTHER_NAME}")


def _count(counts: Counts, parts: Parts, run: str | None) -> None:
    """Counts the rows of ledgers. Rows of one image may lie in several files, in any order."""
    lines, before = Lines(counts, run), None
    with explained(lines):
        lines.find(parts)
        _check_classes(lines, counts.num_classes)
        for row in lines:
            if before and before[1] != lines.path and _overlap(before[0], row):
                twice = f"{before[1]} and {lines.path} both hold samples of image {row.idx}"
                remedy = "ledgers of one run can be put together if they certified different images"
                raise UserError(f"{twice}; {remedy}; remove one of the files")
            before = row, lines.path
            counts.count(row)


@contextlib.contextmanager
def explained(lines: Lines) -> Iterator[None]:
    """A block that reads lines of ledgers: an error becomes a UserError that names the line."""
    try:
        yield
    except UserError:
        raise
    except OtherRun as error:
        remedy = f"remove the file if it does not belong here, restore it, or {OTHER_NAME}"
        raise UserError(f"{lines.place} is of another run: {error}; {remedy}") from error
    except ValueError as error:
        raise UserError(f"{lines.place} is damaged ({error}); restore the file, or {OTHER_NAME}") from error


class Ledger(Counts, contextlib.AbstractContextManager["Ledger"]):
    """The counts of all ledgers in a folder. This process writes the one at `path`, and locks it.

    The file at `path` is made if missing. The processes of a run wait until each has locked its file, and only then
    read the others; the first process also locks ledgers that an earlier run with more processes left.

    `run` is the name of the run that every row carries; None in folders that were begun in format 1. `size` is that of
    the file, in bytes.

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
        self._run, header = run, header_of(run)
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
            self.size = _extent(self.path, run)
            process.wait("ledgers")
            _count(self, {self.path: (len(header), self.size)} | self._news(), run)
            self._file.truncate(self.size)  # after all checks, so that a refused ledger stays as it is
            if not self.size:
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

    def _news(self) -> dict[Path, tuple[int, int]]:
        """Where the complete lines of the other files are that were not counted yet."""
        news, header = {}, len(header_of(self._run))
        for path in files(self.path.parent):
            if path != self.path:
                # Another process may not have written its header yet.
                news[path] = max(self._sizes.get(path, 0), header), _extent(path, self._run)
                self._sizes[path] = news[path][1]
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
        self.write(rows)

    def write(self, rows: Iterable[Row]) -> None:
        """Writes rows to disk that are counted, now or with a later call."""
        self._unwritten += [line_of(row, self._run) for row in rows]
        if time.monotonic() - self._written > _SECONDS_PER_WRITE:
            self.flush()

    def cut(self, size: int) -> None:
        """Removes the rows after the first `size` bytes, and those that are still in memory; they stay counted."""
        self._unwritten = []
        self._file.truncate(size)
        self.size = size

    def digests(self) -> dict[str, dict[str, Any]]:
        """File name → size and SHA-256 of the part that was counted and is on disk; rows may follow it later."""
        sizes = self._sizes | {self.path: self.size}
        return {path.name: _digest_of(path, sizes[path]) for path in sorted(sizes)}

    def flush(self) -> None:
        """Writes the rows in memory and waits until they are on disk."""
        if self._unwritten:
            with deferred():
                self._write("".join(self._unwritten))
                self._unwritten = []
        self._written = time.monotonic()

    def _write(self, text: str) -> None:
        self.size = write_all(self._file, self.path, text, self.size)
