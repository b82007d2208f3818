"""JSON documents with a format number and, where they are sealed, the digest of their own content.

Format 0 are the files that were written before documents had a number. A file that names a newer format than this
version writes is refused. Files without a digest (*unsealed*) were written before documents were sealed: nothing tells
whether they were changed, and no reader may call them intact.
"""

import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import write_atomic
from lsrs_jax.runtime.format import FORMAT

_DEEPEST = 100  # levels of nesting


def read_json(path: Path) -> Any:
    """The content of a JSON file, at most 100 levels deep. Raises ValueError otherwise, OSError where it is missing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("its content is nested too deeply") from error
    level = [content]
    for _ in range(_DEEPEST):
        level = [list(value.values()) if isinstance(value, dict) else value for value in level]
        level = [inner for value in level if isinstance(value, list) for inner in value]
    if level:
        raise ValueError("its content is nested too deeply")
    return content


def plain(content: Any) -> Any:
    """A value as a reader of its JSON finds it: lists for tuples, and nothing but plain types."""
    return json.loads(json.dumps(content))


def format_of(content: dict) -> int:
    """The format number of a document; raises UserError for a newer format, or a number that is none."""
    number = content.get("format", 0)
    if type(number) is not int or number < 0:
        raise UserError(f"it is damaged: its format is {number!r}")
    if number > FORMAT:
        raise UserError(f"it has format {number}, this version reads up to {FORMAT}: upgrade lsrs_jax to read it")
    return number


def digest(content: dict) -> str:
    """SHA-256 of a document without its field ``digest``, whatever the layout of its file."""
    content = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, content: dict) -> None:
    """Writes a document with its format number and its digest."""
    content = {"format": FORMAT} | plain(content)
    write_atomic(path, json.dumps(content | {"digest": digest(content)}, indent=2) + "\n")


def read_sealed(path: Path, check_content: Callable[[dict], Any], remedy: str) -> dict:
    """The content of a document, without format number; its ``digest`` is None where it is unsealed.

    Args:
      check_content: upgrades an old document in place; raises ValueError, KeyError or TypeError for content that no
        version has written.
      remedy: what to do where the file cannot be restored.

    Raises:
      UserError: for a damaged document, or one of a newer format.
    """
    try:
        stored = read_json(path)
        if not isinstance(stored, dict):
            raise ValueError("it holds no fields")
        number = format_of(stored)
        if number and "digest" not in stored:
            raise ValueError("its digest is missing")
        if stored.get("digest", None) != digest(stored) and "digest" in stored:
            raise ValueError("its content does not have the digest it names")
        stored = {name: value for name, value in stored.items() if name != "format"} | {"digest": stored.get("digest")}
        check_content(stored)
    except UserError as error:
        raise in_file(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or {remedy}") from error
    return stored


def refuse_unknown(values: dict, known: dict[str, Collection[str] | None], prefix: str = "") -> None:
    """Raises UserError for a field that is not known: field → the fields inside it, None where they are not checked."""
    for name, value in values.items():
        if name not in known:
            raise UserError(f"unknown field '{prefix}{name}'")
        inner = known[name]
        if inner is not None and isinstance(value, dict):
            refuse_unknown(value, dict.fromkeys(inner), f"{prefix}{name}.")


def in_file(path: Path, error: UserError) -> UserError:
    """An error about the content of a file, with its path; for an unknown field also what may be the cause."""
    newer = "; if a newer version wrote it, upgrade lsrs_jax" if "unknown" in str(error) else ""
    return UserError(f"{path}: {error}{newer}")


def first_difference(old: dict, new: dict, ignore: Collection[str] = ()) -> tuple[str, Any, Any] | None:
    """The first field, dotted, in which two nested dicts differ, with both values; None where they agree.

    `ignore` names fields or whole sections, dotted.
    """
    for name in sorted(set(old) | set(new)):
        if name in ignore:
            continue
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = [field[len(name) + 1 :] for field in ignore if field.startswith(f"{name}.")]
            if found := first_difference(a, b, inner):
                return (f"{name}.{found[0]}", *found[1:])
        elif a != b:
            return name, a, b
    return None
