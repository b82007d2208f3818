"""Keeps tables that take long to compute in the user's cache folder; only the commands name one."""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

from lsrs_jax.runtime import files

_DIGEST = 32  # bytes of SHA-256 in front of the content

folder: Path | None = None  # of the files; None keeps nothing


def cached(name: str, compute: Callable[[], bytes]) -> bytes:
    """The content called `name`, from its file or from `compute`.

    A file that does not have its own digest is made again. `name` must say all on which the content depends.
    """
    if folder is None:
        return compute()
    path = folder / name
    with contextlib.suppress(OSError):
        found = path.read_bytes()
        if hashlib.sha256(found[_DIGEST:]).digest() == found[:_DIGEST]:
            return found[_DIGEST:]
    content = compute()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        folder.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, hashlib.sha256(content).digest() + content)
    return content
