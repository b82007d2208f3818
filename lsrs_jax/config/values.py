"""Configurations: their defaults, their variants, checks of their values, and how they are stored."""

import ast
import difflib
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from lsrs_jax.config.fields import FIELDS, REQUIRED, SOURCES
from lsrs_jax.runtime.documents import first_difference, format_of, in_file, plain, read_json
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import write_atomic
from lsrs_jax.runtime.format import FORMAT
from lsrs_jax.runtime.types import Config

# These fields may change between the first start of a training and its resumption.
_MAY_CHANGE = (
    *("certify", "data.dir", "data.split", "data.workers", "train.start_from"),
    *("train.log_every", "train.evaluate_every", "train.checkpoint_every", "train.keep_checkpoints"),
)

_PARSERS = {bool: flags.BooleanParser(), int: flags.IntegerParser(), float: flags.FloatParser()}  # of absl

# Variant -> values of dotted fields: what every experiment with an orthogonal encoder can be compared with.
COMPARISONS = {
    "lsrs": {},
    "cayley": {"model.method": "cayley"},  # another family of convolutions
    "isrs": {"model.encoder": "identity"},  # no encoder: the head smoothed in input space
    "isrs_split": {"model.noise": "input"},  # the same network smoothed in input space
}


def default() -> Config:
    """The defaults of all fields. Experiments in ``configs/`` start here; flags ``--config.<field>=`` override."""
    fields: dict[str, Any] = {}
    for name, field in FIELDS.items():
        *sections, last = name.split(".")
        functools.reduce(lambda inner, section: inner.setdefault(section, {}), sections, fields)[last] = field.default
    return ConfigDict(fields)


def choose(config: Config, variant: str, variants: Mapping[str, Mapping[str, Any]] = COMPARISONS) -> Config:
    """Changes a configuration into one of its variants; raises ValueError, which lists them, for an unknown variant."""
    if variant not in variants:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(variants)}")
    config.update_from_flattened_dict(variants[variant])
    return config


def _section(config: Config, name: str) -> tuple[Any, str]:
    """The section of a dotted field, and the field's name inside it."""
    *sections, last = name.split(".")
    return functools.reduce(lambda section, part: section[part], sections, config), last


def split_source(data: Config) -> Config:
    """Replaces a ``data.name`` such as ``folder:PATH`` by ``data.name=folder`` and ``data.dir=PATH``, in place."""
    kind, colon, path = data.name.partition(":")
    if colon and kind in SOURCES:
        data.name, data.dir = kind, path
    return data


def value_of(config: Config, name: str) -> Any:
    """The value of the field with this dotted name."""
    section, last = _section(config, name)
    return section[last]


def check_config(config: Config) -> Config:
    """Returns the configuration; raises UserError, which names the field, for a value outside its limit."""
    split_source(config.data)
    for name, field in FIELDS.items():
        value = value_of(config, name)
        if field.limit and not field.limit.holds(value, config):
            raise UserError(f"config field {name} must be {field.limit.words.format(**config)}, got {value!r}")
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain types, as they come back from JSON, with the format number."""
    if "format" in config:
        raise UserError("unknown config field 'format': the program writes it itself")
    return {"format": FORMAT} | plain(config.to_dict())


def config_from_dict(values: Any) -> Config:
    """The configuration that `config_to_dict` has converted, in this format or an older one.

    Raises:
      UserError: for a newer format, an unknown field, a wrong type, or a missing field that every version has written.
    """
    if not isinstance(values, dict):
        raise UserError("a configuration holds fields; restore it, or train again into a new workdir")
    format_of(values)
    given = dict(_leaves({name: value for name, value in values.items() if name != "format"}))
    config = default()
    for name, field in FIELDS.items():
        value, (section, last) = given.get(name, field.absent), _section(config, name)
        if value is REQUIRED:
            raise UserError(f"config field {name} is missing, which every version has written; restore the file")
        if name == "certify.stop" and value is None:  # the first version wrote None for "to the end"
            value = 0
        try:
            if value is None or isinstance(value, bool) != isinstance(field.default, bool):
                raise TypeError("another type")
            section[last] = _elements(field.default, value) if isinstance(value, list) else value
        except (TypeError, OverflowError) as error:
            raise UserError(f"config field {name} has the wrong type: {value!r}") from error
    return config.lock()


def chosen_images(config: Config, images: int | None) -> range | None:
    """The images to certify in a split of this size; None if neither the size nor an end is known."""
    certify, images = config.certify, images or config.certify.stop
    return range(certify.start, min(certify.stop or images, images), certify.step) if images else None


def upgrade_section(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Adds to a stored section what its missing fields mean; see `Field.absent`."""
    names = [name for name in FIELDS if name.startswith(prefix)]
    missing = {name.removeprefix(prefix): FIELDS[name].absent for name in names if FIELDS[name].absent is not REQUIRED}
    return plain(missing) | values


def without_absent(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Leaves out of a section what `upgrade_section` would add: it stays the same when later versions add fields."""
    absent = upgrade_section({}, prefix)
    return {name: value for name, value in values.items() if name not in absent or absent[name] != value}


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``(dotted name, value)`` of every field in a nested dict; raises UserError for anything that is no field."""
    inside = sorted(name.removeprefix(prefix) for name in FIELDS if name.startswith(prefix))
    known = list(dict.fromkeys(name.partition(".")[0] for name in inside))
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in known:
            near = [f"{prefix}{other}" for other in difflib.get_close_matches(key, known, 1)]
            near += [other for other in FIELDS if other.count(".") == 1 and other.endswith(f".{key}")]
            hint = f"did you mean {near[0]}?" if near else f"{prefix[:-1] or 'a configuration'} has {', '.join(known)}"
            raise UserError(f"unknown config field {name!r}; {hint}")
        if name in FIELDS and isinstance(value, dict):
            raise UserError(f"config field {name} is no section: it takes a value")
        if name in FIELDS:
            yield name, value
        elif isinstance(value, dict):
            yield from _leaves(value, f"{name}.")
        else:
            fields = ", ".join(f"{prefix}{other}" for other in inside if other.startswith(f"{key}."))
            raise UserError(f"config field {name} is a section: set one of {fields}")


def check_field(name: str) -> None:
    """Raises UserError unless `name` is the dotted name of a field."""
    nested: Any = None
    for part in reversed(name.split(".")):
        nested = {part: nested}
    list(_leaves(nested))


def check_text(name: str, text: str) -> None:
    """Raises UserError unless `text` after ``--config.<name>=`` can be read as a value of the field's type."""
    default = FIELDS[name].default
    try:
        if isinstance(default, tuple):
            value = ast.literal_eval(text)
            _elements(default, list(value if isinstance(value, tuple | list) else (value,)))
        elif type(default) in _PARSERS:
            _PARSERS[type(default)].parse(text)
    except (TypeError, ValueError, SyntaxError, OverflowError, MemoryError, RecursionError) as error:  # of any parser
        raise UserError(f"--config.{name}={text}: it must be {_words(default)}") from error


def _words(default: Any) -> str:
    """What a field with this default takes."""
    if isinstance(default, bool):
        return "true or false"
    if isinstance(default, tuple):
        whole = "whole " if default and isinstance(default[0], int) else ""
        return f"{whole}numbers with commas between them, such as {','.join(map(str, default or (0.25, 0.5)))}"
    return f"a {'whole ' if isinstance(default, int) else ''}number, such as {default}"


def _elements(default: Any, values: list) -> tuple:
    """Converts a list to a tuple whose elements have the type of the default's elements; integers become floats."""
    kind = float if default == () else type(default[0]) if isinstance(default, tuple) else object
    allowed = (int, float) if kind is float else kind
    if not all(isinstance(value, allowed) and not isinstance(value, bool) for value in values):
        raise TypeError("elements of another type")
    return tuple(float(value) for value in values) if kind is float else tuple(values)


def save_config(config: Config, path: Path) -> None:
    """Writes a configuration as JSON; leaves a file with the same meaning as it is."""
    if not (path.exists() and config_to_dict(load_config(path)) == config_to_dict(config)):
        write_atomic(path, json.dumps(config_to_dict(config), indent=2) + "\n")


def load_config(path: Path) -> Config:
    """Reads a configuration that this version or an older one has written; raises UserError if it cannot be read."""
    try:
        return config_from_dict(read_json(path))
    except FileNotFoundError as error:
        if (path.parent / "checkpoints").exists():
            raise UserError(f"{path.parent} holds checkpoints but no config.json: restore it from a copy") from error
        remedy = f"run python -m lsrs_jax.train --config=NAME --workdir={path.parent} first"
        raise UserError(f"{path.parent} holds no training: {remedy}") from error
    except UserError as error:
        raise in_file(path, error) from error
    except ValueError as error:
        raise UserError(f"{path} is not a stored configuration ({error}); train again into a new workdir") from error


def other_training(old: dict, new: dict) -> tuple[str, Any, Any] | None:
    """The `first_difference` of two configurations, as dicts, in fields on which a trained model depends."""
    return first_difference(old, new, _MAY_CHANGE)
