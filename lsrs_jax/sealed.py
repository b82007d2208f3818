"""JSON files that name their own digest: who reads one knows that nothing in it was changed by accident."""

import hashlib
import json

from lsrs_jax.errors import UserError
from lsrs_jax.files import read_json, write_atomic


def digest(content):
    """SHA-256 of a dict without its field ``digest``, whatever the layout of its file."""
    content = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check(content):
    """Raises ValueError for a dict that does not have the digest it names, or names none."""
    if content.get("digest") != digest(content):
        raise ValueError("its content does not have the digest it names")


def write(path, content):
    """Writes a dict with its digest."""
    # Through text and back: the digest is that of what a reader finds.
    plain = json.loads(json.dumps(content))
    write_atomic(path, json.dumps(plain | {"digest": digest(plain)}, indent=2) + "\n")


def read(path, check_content, remedy):
    """The content of such a file, intact.

    Args:
      check_content: raises ValueError, KeyError or TypeError for content that would not have been written.
      remedy: what to do where the file cannot be restored.

    Raises:
      UserError: for a damaged file, or one of another version.
    """
    try:
        stored = read_json(path)
        outdated = isinstance(stored, dict) and "digest" not in stored
        if not outdated:
            if not isinstance(stored, dict):
                raise ValueError("it holds no fields")
            check(stored)
            check_content(stored)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or {remedy}") from error
    if outdated:
        raise UserError(f"{path} was written by another version; {remedy}")
    return stored
