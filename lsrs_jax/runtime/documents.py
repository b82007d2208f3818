"""JSON documents with a format number; sealed documents also contain the digest of their own content.

Files that were written before documents had a number have format 0. A file with a newer format than this version
writes is refused. Files without a digest are *unsealed*: they were written before documents were sealed. Nothing shows
whether they were changed, so no reader may call them intact.
"""

import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import write_atomic
from lsrs_jax.runtime.format import FORMAT


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises ValueError for bad JSON or more than 100 levels, OSError for a missing file.

    A name that stands twice in an object is refused, because readers disagree which value counts; so are NaN and
    infinities, which JSON does not have.
    """

    def check(value: Any, levels: int) -> None:
        if levels < 0:
            raise RecursionError
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(inner, levels - 1)

    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_number)
        check(content, levels=99)
    except RecursionError as error:
        raise ValueError("its content is nested too deeply") from error
    return content


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("it names a field twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a number of JSON")


def plain(content: Any) -> Any:
    """Converts a value to the types that JSON returns: lists for tuples, and nothing but plain types."""
    return json.loads(json.dumps(content))


def format_of(content: dict) -> int:
    """The format number of a document; raises UserError for a newer format or an invalid number."""
    if type(number := content.get("format", 0)) is not int or number < 0:
        raise UserError(f"it is damaged: its format number is {number!r}")
    if number > FORMAT:
        raise UserError(f"it has format {number}, this version reads up to {FORMAT}: upgrade lsrs_jax to read it")
    return number


def digest(content: dict) -> str:
    """SHA-256 of a document without its field ``digest``. The layout of the file does not matter."""
    content = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, content: dict) -> None:
    """Writes a document with its format number and its digest."""
    content = {"format": FORMAT} | plain(content)
    write_atomic(path, json.dumps(content | {"digest": digest(content)}, indent=2) + "\n")


def read_sealed(path: Path, check_content: Callable[[dict], Any], remedy: str) -> dict:
    """Reads a document; its ``format`` is a number in any case, its ``digest`` is None if it is unsealed.

    `check_content` upgrades an old document in place; it raises ValueError, KeyError or TypeError for content that no
    version has written. Raises UserError for a newer format or a damaged document; then `remedy` says what to do if the
    file cannot be restored.
    """
    try:
        stored = read_json(path)
        if not isinstance(stored, dict):
            raise ValueError("it holds no fields")
        if (number := format_of(stored)) and "digest" not in stored:
            raise ValueError("its digest is missing")
        if "digest" in stored and stored["digest"] != digest(stored):
            raise ValueError("its digest does not match its content")
        stored |= {"format": number, "digest": stored.get("digest")}
        check_content(stored)
    except UserError as error:
        raise in_file(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or {remedy}") from error
    return stored


def refuse_unknown(values: dict, known: dict[str, Collection[str] | None], prefix: str = "") -> None:
    """Raises UserError for an unknown field. `known` maps each field to its inner fields, or to None for any."""
    for name, value in values.items():
        if name not in known:
            raise UserError(f"unknown field '{prefix}{name}'")
        inner = known[name]
        if inner is not None and isinstance(value, dict):
            refuse_unknown(value, dict.fromkeys(inner), f"{prefix}{name}.")


def in_file(path: Path, error: UserError) -> UserError:
    """Adds the path of a file to an error about its content; for an unknown field also the likely cause."""
    newer = "; if a newer version wrote it, upgrade lsrs_jax" if "unknown" in str(error) else ""
    return UserError(f"{path}: {error}{newer}")


def first_difference(
    old: dict, new: dict, ignore: Collection[str] = (), prefix: str = ""
) -> tuple[str, Any, Any] | None:
    """The first field in which two nested dicts differ, as ``(dotted name, old value, new value)``; None if equal.

    `ignore` contains names, with `prefix` before them, of fields or of whole sections.
    """
    for name in sorted(old.keys() | new.keys()):
        field, a, b = f"{prefix}{name}", old.get(name), new.get(name)
        if field in ignore or a == b:
            continue
        if not (isinstance(a, dict) and isinstance(b, dict)):
            return field, a, b
        if found := first_difference(a, b, ignore, f"{field}."):
            return found
    return None
