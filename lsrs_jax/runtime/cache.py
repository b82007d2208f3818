"""Keeps what takes long to compute in the user's cache folder; only the commands name one."""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

from lsrs_jax.runtime import files
from lsrs_jax.runtime.errors import UserError

_DIGEST = 32  # bytes of SHA-256 in front of the content

folder: Path | None = None  # of the files; None keeps nothing


def cached(name: str, compute: Callable[[], bytes]) -> bytes:
    """The content called `name`, from its file or from `compute`.

    A file that does not have the digest of its name and content is made again. `name` must say all on which the
    content depends.
    """
    found = find(name)
    if found is None:
        found = compute()
        keep(name, found)
    return found


def find(name: str) -> bytes | None:
    """The kept content called `name`; None if there is none, or if its file is damaged."""
    if folder is None:
        return None
    with contextlib.suppress(OSError):
        found = (folder / name).read_bytes()
        if _digest(name, found[_DIGEST:]) == found[:_DIGEST]:
            return found[_DIGEST:]
    return None


def keep(name: str, content: bytes) -> None:
    """Keeps the content called `name`, if a folder is named and can be written."""
    if folder is not None:
        with contextlib.suppress(OSError, UserError):  # a cache that cannot be written costs time only
            folder.mkdir(parents=True, exist_ok=True)
            files.write_atomic(folder / name, _digest(name, content) + content)


def _digest(name: str, content: bytes) -> bytes:
    """Of name and content, so that a renamed file is found too."""
    return hashlib.sha256(name.encode() + b"\n" + content).digest()
