"""Atomic writes, appends that are complete or absent, and locks."""

import contextlib
import errno
import hashlib
import io
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from lsrs_jax.runtime.errors import UserError

_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # by another process
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path | str, content: str | bytes) -> None:
    """Replaces a file in one step; an interrupted write leaves the old file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with with_filename(path), temporary.open("xb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def with_filename(path: Path) -> Iterator[None]:
    """Adds the name of a file to an error of the operating system that names no file, such as a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def append(path: Path, text: str) -> None:
    """Appends text to a file and waits until it is on disk. If the disk refuses, the file stays as it was."""
    with path.open("ab", buffering=0) as file:
        write_all(file, path, text, os.fstat(file.fileno()).st_size)


def write_all(file: io.FileIO, path: Path, text: str, size: int) -> int:
    """Does what `append` does, for an open raw file that has `size` bytes; returns its new size."""
    rest = memoryview(text.encode())
    grown = size + len(rest)
    try:
        with with_filename(path):
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
    except OSError:
        file.truncate(size)
        raise
    return grown


def lock(file: IO, what: str) -> None:
    """Takes the exclusive lock of an open file until it is closed; the file must be open for writing.

    Raises UserError if another process holds the lock, or if the operating system or the file system has no locks.
    """
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise UserError(f"the commands that write run on Linux and macOS, not on {sys.platform}: no locks") from error
    try:
        with with_filename(Path(file.name)):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise UserError(f"another process is {what}; wait for it, or write elsewhere") from error
        if error.errno in _NO_LOCKS:
            remedy = "give the workdir as a URL, --workdir=file:///..., which needs no locks there (docs/scale.md)"
            raise UserError(f"the file system of {file.name} has no locks ({error.strerror}); {remedy}") from error
        raise


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[Callable[[], None]]:
    """Creates an empty file and holds its lock; the file stays afterwards.

    Yields a function that raises UserError if somebody has removed or moved the folder, and with it the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        lock(file, what)

        def check() -> None:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samefile(path, file.fileno()):
                    return
            remedy = "move it back and give the same command again, or start anew"
            raise UserError(f"{path.parent} was removed or moved away while it was written; {remedy}")

        yield check


def fields_of(line: str, columns: Sequence[str]) -> dict[str, str]:
    """Splits a line of a TSV file into ``{column: text}``; raises ValueError for another number of columns."""
    fields = line.split("\t")
    if len(fields) != len(columns):
        raise ValueError(f"{len(fields)} columns instead of {len(columns)}")
    return dict(zip(columns, fields, strict=True))
