"""Changed copies of valid files, and campaigns that give thousands of them to a reader.

Everything follows from the seed of an input, so a failure can be repeated: `mutated(random.Random(seed), content)`.
"""

import contextlib
import copy
import json
import random
import re
import resource
import signal
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from support.hostile import NOT_NUMBERS, NOT_WHOLE, STRANGE, changed, json_text, places, sealed

SECONDS = 5.0  # CPU time that a reader may take for one file
MEMORY = 2**30  # bytes by which the process may grow

NUMBERS = re.compile(rb"-?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
EXTREME = [*NOT_NUMBERS, *NOT_WHOLE, "0", "-0", "-1", "00", "2147483648", "4294967297", "9007199254740993", "9" * 18]
EXTREME += [
    "1e308",
    "1.8e308",
    "1e-400",
    "5e-324",
    "-0.0",
    "1e",
    ".5",
    "5.",
    "1e+3",
    "0.1e1",
    "１",
    "௧",
    "²",
    "1,5",
    "1:5",
]
INSERTED = [b"\0", b"\r", b"\n", b"\t", b" ", b"\xff", b"\xc3", b"\xed\xa0\x80", "\ufeff".encode(), "\u2028".encode()]
INSERTED += [
    b"\x0b",
    b"\x0c",
    b"\x1b[2J",
    b'"',
    b"'",
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"-",
    b"+",
    b"_",
    b"e",
]
INSERTED += [b"\\u0000", b"\\ud800", "٣".encode(), b"NaN", b"Infinity", b"null", b"true", b"//", b"#"]


def _span(rng: random.Random, content: bytes, longest: int = 40) -> tuple[int, int]:
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + rng.randrange(longest))


def _bit(rng, content):
    if not content:
        return content
    where = rng.randrange(len(content))
    return content[:where] + bytes([content[where] ^ 1 << rng.randrange(8)]) + content[where + 1 :]


def _byte(rng, content):
    where = rng.randrange(len(content) + 1)
    new = bytes([rng.randrange(256)]) if rng.random() < 0.3 else rng.choice(INSERTED)
    return content[:where] + new + content[where + rng.randrange(2) :]


def _delete(rng, content):
    start, stop = _span(rng, content)
    return content[:start] + content[stop:]


def _repeat(rng, content):
    start, stop = _span(rng, content)
    return content[:stop] + content[start:stop] * rng.choice([1, 1, 1, 50]) + content[stop:]


def _move(rng, content):
    start, stop = _span(rng, content)
    rest, piece = content[:start] + content[stop:], content[start:stop]
    where = rng.randrange(len(rest) + 1)
    return rest[:where] + piece + rest[where:]


def _cut(rng, content):
    where = rng.randrange(len(content) + 1)
    return content[:where] if rng.random() < 0.8 else content[where:]


def _lines(rng, content):
    lines = content.splitlines(keepends=True) or [b""]
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(4)
    if kind == 0:
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == 1:
        lines.insert(j, lines[i])
    elif kind == 2:
        del lines[i]
    else:
        lines[i : i + 1] = [lines[i].rstrip(b"\r\n"), rng.choice([b"\r\n", b"\r", b"\n\n", b"\0\n", b""])]
    return b"".join(lines)


def _number(rng, content):
    found = list(NUMBERS.finditer(content))
    if not found:
        return content
    match, new = rng.choice(found), rng.choice(EXTREME).encode()
    if rng.random() < 0.3:
        other = rng.choice(found)
        new = other.group()
    return content[: match.start()] + new + content[match.end() :]


def _digit(rng, content):
    """The same digit in another script."""
    found = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
    if not found:
        return content
    where = rng.choice(found)
    zero = rng.choice([0x660, 0xFF10, 0x966, 0x1D7CE])
    return content[:where] + chr(zero + content[where] - 48).encode() + content[where + 1 :]


def _fields(rng, content):
    """Two fields of tables or lists change places, or one is missing or doubled."""
    separator = rng.choice([b"\t", b",", b":"])
    parts = content.split(separator)
    i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
    kind = rng.randrange(3)
    if kind == 0:
        parts[i], parts[j] = parts[j], parts[i]
    elif kind == 1:
        parts.insert(j, parts[i])
    elif len(parts) > 1:
        del parts[i]
    return separator.join(parts)


def _whole(rng, content):
    """A change of the whole file: line ends, byte order mark, encoding, leading or trailing characters."""
    kind = rng.randrange(7)
    if kind == 0:
        return content.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", "\u2028".encode(), b"\n\0"]))
    if kind == 1:
        return "\ufeff".encode() + content
    if kind == 2:
        return content.decode(errors="replace").encode(rng.choice(["utf-16", "utf-32", "utf-16-be", "utf-7"]))
    if kind == 3:
        return rng.choice(INSERTED) * rng.choice([1, 3, 1000]) + content
    if kind == 4:
        return content + rng.choice(INSERTED) * rng.choice([1, 3, 1000])
    if kind == 5:
        return content * 2
    return content.replace(b" ", b"").replace(b"\t", b" ")


def _long(rng, content):
    """A very long line, number or word somewhere."""
    where, size = rng.randrange(len(content) + 1), rng.choice([300, 5000, 5000, 100_000, 10**6])
    return content[:where] + rng.choice([b"9", b"a", b"\t", b",", b" ", b"1:1,", b"0", b"-"]) * size + content[where:]


def _deep(rng, content):
    where, depth = rng.randrange(len(content) + 1), rng.choice([50, 98, 99, 101, 900, 1000, 5000, 100_000])
    start, middle, end = rng.choice([(b"[", b"", b"]"), (b'{"a":', b"1", b"}"), (b"[", b"", b"")])
    return content[:where] + start * depth + middle + end * depth + content[where + rng.randrange(2) :]


def _key(rng, content):
    """A JSON key that stands twice, with two values."""
    found = list(re.finditer(rb'"[^"\n]*"\s*:\s*("[^"\n]*"|[^\[{},\n]+)', content))
    if not found:
        return content
    match = rng.choice(found)
    name = match.group().partition(b":")[0]
    value = rng.choice([b"null", b"0", b"1e999", b'""', b"[]", b"{}", b"true", match.group(1)])
    twice = [match.group(), name + b": " + value]
    rng.shuffle(twice)
    return content[: match.start()] + b", ".join(twice) + content[match.end() :]


CHANGES = (_bit, _byte, _byte, _delete, _repeat, _move, _cut, _lines, _number, _number, _digit, _fields, _whole, _key)
RARE = (_long, _deep)  # large inputs, which take longer


def mutated(rng: random.Random, content: bytes) -> bytes:
    """The content with one to three changes."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        content = rng.choice(RARE if rng.random() < 0.04 else CHANGES)(rng, content)
    return content


def mutated_value(rng: random.Random, value: Any) -> Any:
    """A JSON value in which one to three parts are replaced, renamed, removed, or put where another one was."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2, 3])):
        found = list(places(value))
        if not found:
            break
        path, other = rng.choice(found), rng.choice(found)
        kind = rng.randrange(5)
        if kind == 0:
            value = changed(value, path, rng.choice(STRANGE))
        elif kind == 1:
            value = changed(value, path, copy.deepcopy(_part(value, other)))
        else:
            home = _part(value, path[:-1])
            if kind == 2:
                del home[path[-1]]
            elif isinstance(home, list):
                home.insert(rng.randrange(len(home) + 1), rng.choice(STRANGE))
            elif kind == 3:
                home[rng.choice(["", "a\nb", "format", "digest", f"{path[-1]}x", "__class__"])] = home[path[-1]]
            else:
                home[path[-1]] = _near(rng, home[path[-1]])
    return value


def _part(value, path):
    for key in path:
        value = value[key]
    return value


def _near(rng, value):
    """A value of the same type, where there is one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([0, 1, -1, value + 1, -value, 2 * value, 2**31, 2**63, 10**12])
    if isinstance(value, float):
        return rng.choice([0.0, -value, value * (1 + 1e-15), value / 2, value * 1e300, 5e-324, 1.0])
    if isinstance(value, str):
        return rng.choice(["", value[:-1], value + "\0", value.upper(), value * 1000, "\ud800", f"../{value}"])
    return rng.choice(STRANGE)


def sealed_value(rng: random.Random, value: Any) -> bytes:
    """`mutated_value` as JSON with the digest that belongs to it."""
    try:
        return sealed(mutated_value(rng, value)).encode("utf-8", "surrogatepass")
    except (AttributeError, KeyError, TypeError, ValueError):  # no digest can be computed
        return json_text(mutated_value(rng, value)).encode("utf-8", "surrogatepass")


def same_json(rng: random.Random, value: Any) -> bytes:
    """A JSON value in another layout: a reader must find the same value."""
    text = json.dumps(
        _reordered(rng, value),
        indent=rng.choice([None, 0, 2, "\t", " " * 1000]),
        separators=rng.choice([None, (",", ":"), (" , ", " : ")]),
        ensure_ascii=rng.random() < 0.5,
    )
    text = rng.choice(["", " ", "\n", "\t\r\n"]) + text + rng.choice(["", "\n", " \r\n", "\n" * 10_000])
    return text.replace("\n", rng.choice(["\n", "\r\n"])).encode()


def _reordered(rng, value):
    if isinstance(value, dict):
        names = list(value)
        rng.shuffle(names)
        return {name: _reordered(rng, value[name]) for name in names}
    return [_reordered(rng, part) for part in value] if isinstance(value, list) else value


def with_checksums(content: bytes) -> bytes:
    """The lines of a ledger with the checksums that belong to them."""
    head, *lines = content.split(b"\n")
    bodies = (line.rpartition(b"\t")[0] for line in lines[:-1])
    return b"\n".join([head, *(body + b"\t%08x" % zlib.crc32(body) for body in bodies), lines[-1] if lines else b""])


# ------------------------------------------------------------------------------------------------------- campaigns


class Hang(BaseException):
    """A reader took more than SECONDS; no `except Exception` of a reader can hide it."""


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang(f"the reader took more than {seconds:g} s of CPU time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def limited_memory(size: int = MEMORY) -> Iterator[None]:
    """Allocations raise MemoryError when the process has grown by `size` bytes (on Linux)."""
    if sys.platform != "linux":
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def campaign(
    number: int,
    make: Callable[[random.Random], bytes],
    read: Callable[[bytes], Any],
    start: int = 0,
    most: int = 5,
) -> int:
    """Gives `number` inputs to a reader, from the seed `start` on; returns how many it did not refuse.

    `read(content)` must return a result, or None after a refusal with one line (`hostile.answer`), and check every
    result. Fails with the first inputs that lead to anything else: another exception, a hang, too much memory.
    """
    accepted, failures = 0, dict[str, str]()
    for seed in range(start, start + number):
        content = make(random.Random(seed))
        try:
            with limited_memory(), _at_most(SECONDS):
                accepted += read(content) is not None
        except (Exception, Hang) as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = [frame for frame in frames if frame.name != "stop"][-1]
            cause = f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}"
            short = content if len(content) < 1500 else content[:1500] + b"..."
            text = f"seed {seed}: {str(error)[:300]}\n  {len(content)} bytes: {short!r}"
            if failures.setdefault(cause, text) == text and len(failures) == most:
                break
    assert not failures, "\n".join(f"{cause}, {text}" for cause, text in failures.items())
    return accepted
