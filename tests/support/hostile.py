"""Examples of hostile input, and the check that a function answers them in an allowed way."""

import copy
import json
import math

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from lsrs_jax.runtime.documents import digest
from lsrs_jax.runtime.errors import UserError

CHARACTERS = ["\0", "\r", "\n", "\t", " ", "\ufeff", "\u2028", "\x85", "\x1b", "_", "-", "+", ".", "e", "٣", "９", "½"]
NOT_NUMBERS = ["nan", "-inf", "Infinity", "1e309", "1_0", "0x10", " 1", "1 ", "1\0", "٣", "９", "", "True", "x" * 10**5]
NOT_WHOLE = ["1.0", "1e3", "+1", "9" * 19, "9" * 5000]
DEEP = {f"<{depth}>": "[" * depth + "]" * depth for depth in (90, 400, 980, 100_000)}
STRANGE = [None, True, -1, 0, 3, 10**30, 10**400, 0.5, 1e308, math.nan, -math.inf, "", "0.5", "a\nb\x1b[2J"]
STRANGE += [[], [[]], ["a"], {}, {"name": "sound"}, *DEEP]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(STRANGE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def examples(number):
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def answer(function, *arguments, **named):
    """The result of a function, or None if it refuses with one line; any other exception fails the test."""
    try:
        return function(*arguments, **named)
    except UserError as error:
        message = str(error)
        assert message.isprintable(), repr(message)
        assert 10 < len(message) < 2100
        return None


def json_text(value):
    """The value as JSON, with lists that are nested too deeply for `json.dumps`."""
    text = json.dumps(value)
    for name, nested in DEEP.items():
        text = text.replace(json.dumps(name), nested)
    return text


def sealed(value):
    """`json_text` with the digest that belongs to this content, if a reader could compute one."""
    try:
        value = json.loads(json_text(value))
        return json.dumps(value | {"digest": digest(value)})
    except (RecursionError, TypeError):
        return json_text(value)


def places(value, path=()):
    """The paths of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(value, path, new):
    value = copy.deepcopy(value)
    part = value
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = new
    return value
