"""Votes on disk: append-only, resumable. Every certificate is derived from these rows.

A ledger is a TSV file with the header ``idx label slack purpose first stop votes seconds crc``. A row says: for image
``idx``, the chunks [first, stop) of this purpose gave these votes (``class:count`` pairs). ``slack`` is the ℓ2
distance in the latent charged to this image, ``seconds`` the time charged to it for these chunks, ``crc`` the CRC-32 of
the row before it. Each process of a run has a ledger of its own, ``votes.<process>.tsv``; the rows of a folder are
those of all of them together, whichever process cast which.
"""

import contextlib
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


def name(process):
    """The file name of the ledger of a process."""
    return f"votes.{process}.tsv"


def files(folder):
    """The ledgers in a folder, in the order of their processes."""
    numbers = filter(_is_natural, (path.name.split(".")[1] for path in folder.glob(name("*"))))
    return [folder / name(number) for number in sorted(int(text) for text in numbers if text == str(int(text)))]


def has_rows(folder):
    """Whether a folder holds more than headers. Cheap, and without locks."""
    return any(path.stat().st_size > len(_HEADER) for path in files(folder))


def digest(content):
    """Size and SHA-256 of a ledger's bytes, as plain types."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read(paths, plan, num_classes):
    """The `Tallies` of ledgers, which are neither locked nor mended; raises UserError for a damaged one."""
    tallies = Tallies(plan, num_classes)
    _count(tallies, {path: (_whole_lines(path, path.read_bytes()), len(_HEADER)) for path in paths})
    return tallies


def _whole_lines(path, content):
    """Those of a ledger's bytes that a kill did not tear."""
    whole = content[: content.rfind(b"\n") + 1]
    if not (whole.startswith(_HEADER.encode()) or (not whole and _HEADER.encode().startswith(content))):
        raise UserError(f"{path} is not a vote ledger: its first line differs; restore it or remove it")
    return whole


def _count(tallies, contents):
    """Counts rows of ledgers, path → whole lines and the offset of the first that counts.

    Of one image they may lie in several files, in any order.
    """
    rows, order = [], list(tallies.plan.totals)
    for path, (content, offset) in contents.items():
        first = content[:offset].count(b"\n") + 1
        for number, line in enumerate(content[offset:].split(b"\n")[:-1], first):
            with _damage(path, number):
                rows.append((_parse(line.decode("utf-8"), tallies), path, number))
    rows.sort(key=lambda found: (found[0].idx, order.index(found[0].purpose), found[0].first))
    for row, path, number in rows:
        with _damage(path, number):
            tallies.count(row)


@contextlib.contextmanager
def _damage(path, number):
    """Names the line where something is wrong with one."""
    try:
        yield
    except ValueError as error:
        raise UserError(
            f"{path} line {number} is damaged ({error}); restore the file, or certify again under another "
            "--config.certify.name"
        ) from error


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
    """The ledgers of a folder, of which one is this process's to write, locked against a second process.

    Args:
      path: the own file; made if missing.
      plan: `tally.Plan`.
      num_classes: K.
      processes: how many of them write into the folder. Ledgers of others, left by a run of more processes, are locked
        by the first.
      meet: called when the own file is there and locked, and before the others are read: where several processes
        write, it returns when all of them have got there.

    Raises:
      UserError: for a malformed row, chunks counted twice or left out, or votes that do not add up. A half-written
        last line (a kill during a write) is cut off instead; its chunks run again.

    **Guarantee**: that of `tally.Tallies`, for what is read as for what is written. Rows reach the disk a second after
    they were appended at the latest (with the next append after it), and when the ledger is closed.
    """

    def __init__(self, path, plan, num_classes, processes=1, meet=lambda: None):
        super().__init__(plan, num_classes)
        self.path, self._unwritten, self._written = Path(path), [], time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open = contextlib.ExitStack()
        with contextlib.ExitStack() as opened:
            self._file = opened.enter_context(self.path.open("a+b", buffering=0))
            lock(self._file, f"writing {self.path}")
            if self.path.name == name(0):
                for path in files(self.path.parent)[1:]:
                    if path.name not in map(name, range(processes)):
                        lock(opened.enter_context(path.open("rb")), f"writing {path}")
            self._file.seek(0)
            content = self._file.readall()
            whole = _whole_lines(self.path, content)
            meet()
            self._sizes = {}
            _count(self, {self.path: (whole, len(_HEADER))} | self._news())
            # Last: a ledger that is refused is left as it is.
            self._mend(whole, len(content))
            self._open = opened.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Writes what is still in memory and gives the file free."""
        try:
            self.flush()
        finally:
            self._open.close()

    def _mend(self, whole, size):
        """Cuts half a line off the own file, and gives it a header."""
        if len(whole) < size:
            self._file.truncate(len(whole))
        self._size = len(whole)
        if not whole:
            self._write(_HEADER)

    def _news(self):
        """What the other files hold that was not counted yet."""
        news = {}
        for path in files(self.path.parent):
            if path != self.path:
                whole = _whole_lines(path, path.read_bytes())
                # Another process may not have written its header yet.
                news[path] = whole, max(self._sizes.get(path, 0), len(_HEADER))
                self._sizes[path] = len(whole)
        return news

    def refresh(self):
        """Counts what other processes have written since."""
        _count(self, self._news())

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

    def digests(self):
        """File name → size and SHA-256 of what was counted of it and is on disk; rows may follow it later."""
        sizes = self._sizes | {self.path: self._size}
        return {path.name: digest(path.read_bytes()[: sizes[path]]) for path in sorted(sizes)}

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


def _is_natural(text):
    return text.isascii() and text.isdigit() and len(text) <= 18


def _natural(text):
    if not _is_natural(text):
        raise ValueError(f"{text!r} is not a natural number")
    return int(text)
