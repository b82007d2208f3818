"""The lines of ledgers, each one `Row` of counts: how they are written, and read in order without keeping them."""

import array
import contextlib
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lsrs_jax.certification.table import parse_number
from lsrs_jax.runtime.files import fields_of
from lsrs_jax.runtime.format import LEDGER_COLUMNS
from lsrs_jax.smoothing.counts import Counts, Row
from lsrs_jax.smoothing.schedule import CERTIFYING

_VOTES = re.compile(r"[0-9]{1,18}:[0-9]{1,18}(,[0-9]{1,18}:[0-9]{1,18})*")
_STREAMS = {stream.encode(): number << 60 for number, stream in enumerate(CERTIFYING)}  # no block number is above 2**60
_TOGETHER = 2**16  # lines whose places are converted at once
Parts = Mapping[Path, tuple[int, int]]  # of ledgers: path → first byte and end of complete lines


class OtherRun(ValueError):
    """A row that names another run."""


def columns_of(run: str | None) -> tuple[str, ...]:
    """The columns of a ledger whose rows name this run; without a run, those of format 1."""
    return LEDGER_COLUMNS[1 if run is None else 2]


def header_of(run: str | None) -> str:
    """The first line of such a ledger."""
    return "\t".join(columns_of(run)) + "\n"


def line_of(row: Row, run: str | None) -> str:
    """The line of a row."""
    counts = ",".join(f"{index}:{row.counts[index]}" for index in np.flatnonzero(row.counts).tolist())
    fields = (row.idx, row.label, repr(row.slack), row.stream, row.first, row.stop, counts, f"{row.seconds:.6f}")
    content = "\t".join(map(str, fields if run is None else (*fields, run)))
    return f"{content}\t{crc_of(content)}\n"


def crc_of(content: str) -> str:
    """The checksum of a line, without itself."""
    return f"{zlib.crc32(content.encode()):08x}"


class Lines:
    """The rows of ledgers in the order in which they are counted: by image, stream and first block.

    Each line is read when it is needed; only its place is kept. Raises ValueError for a damaged one, whose place is
    then `path` and `begin`. `largest` is the largest number of a class, if the classes of every row are in order.
    """

    def __init__(self, counts: Counts, run: str | None) -> None:
        self._counts, self._run, self.largest = counts, run, 0
        self.path, self.begin, self._paths, self._places = Path(), 0, list[Path](), np.zeros((0, 3), np.int64)

    def find(self, parts: Parts) -> None:
        """Finds the lines, and checks their checksums."""
        self._paths, found = list(parts), array.array("q")
        for file, (self.path, (self.begin, end)) in enumerate(parts.items()):
            with self.path.open("rb") as opened:
                opened.seek(self.begin)
                while self.begin < end:
                    line = opened.readline()
                    found.extend((*self._key(line[:-1]), file, self.begin, len(line)))
                    self.begin += len(line)
        table = np.frombuffer(found, np.int64).reshape(-1, 5)
        self._places = table[np.lexsort((table[:, 1], table[:, 0])), 2:]

    def __len__(self) -> int:
        return len(self._places)

    def _key(self, line: bytes) -> tuple[int, int]:
        """What a line is sorted by: its image; its stream and first block."""
        body, _, crc = line.rpartition(b"\t")
        fields = body.split(b"\t", 7)
        if b"%08x" % zlib.crc32(body) == crc and len(fields) == 8 and fields[3] in _STREAMS:
            last = fields[6].rpartition(b",")[2].partition(b":")[0]
            if all(part.isdigit() and len(part) <= 18 for part in (fields[0], fields[1], fields[4], last)):
                self.largest = max(self.largest, int(fields[1]), int(last))
                return int(fields[0]), _STREAMS[fields[3]] + int(fields[4])
        _parse(line.decode("utf-8"), self._counts, self._run)  # says what is wrong with it
        raise ValueError("it is no row")

    def __iter__(self) -> Iterator[Row]:
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(path.open("rb")).fileno() for path in self._paths]
            for start in range(0, len(self), _TOGETHER):
                for file, begin, size in self._places[start : start + _TOGETHER].tolist():
                    self.path, self.begin = self._paths[file], begin
                    yield _parse(os.pread(opened[file], size - 1, begin).decode("utf-8"), self._counts, self._run)

    @property
    def place(self) -> str:
        """Path and number of the line that was read last."""
        with self.path.open("rb") as file:
            number = 1 + sum(file.read(min(2**20, self.begin - at)).count(b"\n") for at in range(0, self.begin, 2**20))
        return f"{self.path} line {number}"


def _parse(line: str, counts: Counts, run: str | None) -> Row:
    """The row of a line; its counts end with the last class that has samples."""
    idx, label, slack, stream, first, stop, pairs, seconds, *named, crc = fields_of(line, columns_of(run)).values()
    if crc != crc_of(line.rpartition("\t")[0]):
        raise ValueError("its checksum differs")
    if named and named[0] != run:
        raise OtherRun(f"it names {named[0][:40]!r}, the run of this folder is {run!r}")
    if stream not in counts.schedule.totals:
        raise ValueError(f"unknown purpose {stream!r}")
    if not _VOTES.fullmatch(pairs):
        raise ValueError(f"a class or count in {pairs[:40]!r} is not a natural number")
    numbers = np.array(pairs.replace(":", ",").split(","), np.int64)
    classes, votes = numbers[::2], numbers[1::2]
    found = np.zeros(min(int(classes.max()) + 1, counts.num_classes + 1), np.int64)
    if len(found) > counts.num_classes or not votes.all() or len(set(classes.tolist())) < len(classes):
        raise ValueError(f"bad count in {pairs[:40]!r}: a class that does not exist, or twice, or without samples")
    found[classes] = votes
    idx, label, first, stop = map(_natural, (idx, label, first, stop))
    return Row(idx, label, parse_number(slack), stream, first, stop, found, parse_number(seconds))


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ValueError(f"{text!r} is not a natural number")
    return int(text)
