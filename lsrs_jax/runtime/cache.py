"""Keeps what takes long to compute in the user's cache folder; only the commands name one."""

import contextlib
import hashlib
import math
from collections.abc import Callable
from pathlib import Path

from lsrs_jax.runtime import files
from lsrs_jax.runtime.errors import UserError

_DIGEST = 32  # bytes of SHA-256 in front of the content

folder: Path | None = None  # of the files; None keeps nothing


def cached(name: str, compute: Callable[[], bytes], most: float = math.inf) -> bytes:
    """The content called `name`, from its file or from `compute`.

    A file that does not have the digest of its name and content is made again. `name` must say all on which the
    content depends. More than `most` bytes are not kept.
    """
    if folder is None:
        return compute()
    path = folder / name
    with contextlib.suppress(OSError):
        found = path.read_bytes()
        if _digest(name, found[_DIGEST:]) == found[:_DIGEST]:
            return found[_DIGEST:]
    content = compute()
    if len(content) > most:
        return content
    with contextlib.suppress(OSError, UserError):  # a cache that cannot be written costs time only
        folder.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, _digest(name, content) + content)
    return content


def _digest(name: str, content: bytes) -> bytes:
    """Of name and content, so that a renamed file is found too."""
    return hashlib.sha256(name.encode() + b"\n" + content).digest()
