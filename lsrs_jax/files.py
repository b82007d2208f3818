"""Files that are either old or new, never half of each, that one process writes at a time, and JSON from anybody."""

import contextlib
import fcntl
import json
import os
import tempfile
from pathlib import Path

from lsrs_jax.errors import UserError


def write_atomic(path, content):
    """Replaces `path` by `content`, text or bytes, in one step; an interrupted write leaves the old file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with naming(path), os.fdopen(handle, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path):
    """Lets an error of the operating system, such as a full disk, say which file it was about."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def append(path, text):
    """Adds text to a file and waits until it is on disk: all of it or, where the disk refuses, nothing."""
    with Path(path).open("ab", buffering=0) as file:
        write_all(file, path, text, os.fstat(file.fileno()).st_size)


def write_all(file, path, text, size):
    """`append` for a raw file of this size that is open; returns its new size."""
    rest = memoryview(text.encode())
    grown = size + len(rest)
    try:
        with naming(path):
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
    except OSError:
        file.truncate(size)
        raise
    return grown


_DEEPEST = 100  # of a JSON file


def read_json(path):
    """The content of a JSON file: plain values, nested so little that they can be compared, printed and written.

    Raises:
      ValueError: for any other content; the caller knows what to do about it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("its content is nested too deeply") from error
    level = [content]
    for _ in range(_DEEPEST):
        level = [inner for value in level for inner in _inside(value)]
    if level:
        raise ValueError("its content is nested too deeply")
    return content


def _inside(value):
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def lock(file, what):
    """Takes the exclusive lock of an open file until it is closed; raises UserError if another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"another process is {what}; wait for it, or write elsewhere") from error


@contextlib.contextmanager
def locked(path, what):
    """Holds the lock of a file made for it; the file stays behind, empty.

    Yields:
      a function that raises UserError once another file, or none, has that name: somebody has removed or moved the
      folder, and with it the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        lock(file, what)

        def check():
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
