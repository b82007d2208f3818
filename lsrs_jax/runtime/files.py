"""Atomic writes, appends that are whole or absent, and locks."""

import contextlib
import fcntl
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from lsrs_jax.runtime.errors import UserError


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_atomic(path: Path | str, content: str | bytes) -> None:
    """Replaces a file in one step; an interrupted write leaves the old one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with with_filename(path), os.fdopen(handle, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def with_filename(path: Path) -> Iterator[None]:
    """Adds the name of a file to an error of the operating system that names none, such as a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def append(path: Path, text: str) -> None:
    """Appends text to a file and waits until it is on disk: all of it or, where the disk refuses, nothing."""
    with path.open("ab", buffering=0) as file:
        write_all(file, path, text, os.fstat(file.fileno()).st_size)


def write_all(file: io.FileIO, path: Path, text: str, size: int) -> int:
    """`append` for an open raw file of this size; returns its new size."""
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def lock(file: IO, what: str) -> None:
    """Takes the exclusive lock of an open file until it is closed; raises UserError if another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"another process is {what}; wait for it, or write elsewhere") from error


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[Callable[[], None]]:
    """Holds the lock of an empty file, which is made for it and stays behind.

    Yields:
      a function that raises UserError where the file is gone or another one has its name: somebody has removed or moved
      the folder, and with it the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        lock(file, what)

        def check() -> None:
            try:
                held = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                held = False
            if not held:
                raise UserError(
                    f"{path.parent} was removed or moved away while it was written; move it back and give the same "
                    "command again, or start anew"
                )

        yield check


def fields_of(line: str, columns: Sequence[str]) -> dict[str, str]:
    """``{column: text}`` of a line of a TSV file; raises ValueError where it has more or fewer."""
    fields = line.split("\t")
    if len(fields) != len(columns):
        raise ValueError(f"{len(fields)} columns instead of {len(columns)}")
    return dict(zip(columns, fields, strict=True))
