"""Files that are either old or new, never half of each, and that one process writes at a time."""

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path

from lsrs_jax.errors import UserError


def write_atomic(path, content):
    """Replaces `path` by the text `content` in one step; an interrupted write leaves the old file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
    """Holds the lock of a file made for it; the file stays behind, empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        lock(file, what)
        yield
