"""Configurations from the command line: ``--config=NAME`` and ``--config.FIELD=VALUE``."""

import difflib
import os
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags as absl_flags
from ml_collections import config_flags

from lsrs_jax.config import (
    FIELDS,
    SEED_OF_TRAINING,
    SOURCES,
    TORCH,
    check_config,
    check_field,
    check_text,
    config_from_dict,
    config_to_dict,
    load_config,
    value_of,
)
from lsrs_jax.runtime.documents import first_difference
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.types import Config

_OPTIONS = ("--workdir", "--plan", "--profile", "--verify", "--recast", "--from-counts", "--json", "--out", "--debug")
_PACKAGE = Path(__file__).absolute().parent


def experiments() -> dict[str, Path]:
    """The experiments that come with the program, by name: in an installed package, or beside it in a clone."""
    homes = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
    home = next((home for home in homes if (home / "digits.py").is_file()), None)
    return {path.stem: path for path in sorted(home.glob("[!_]*.py"))} if home else {}


def _file_of(name: str) -> str:
    """The file of a configuration; `name` is its path, or the name of an experiment."""
    path, known = os.path.expanduser(name), experiments()
    if os.path.isfile(path):
        return path
    if name in known:
        return str(known[name])
    near = difflib.get_close_matches(Path(name[:99]).stem, known, 1)
    hint = f"did you mean {near[0]}? " if near and near[0] != name else ""
    raise UserError(f"no configuration file {name!r}; {hint}give a file, or one of {', '.join(known)}")


def config_from_flags(rest: list[str], stored: Config | None = None) -> Config:
    """Reads ``--config=NAME[:variant] --config.field=value …`` from the arguments that argparse has left over.

    NAME is a file, or one of `experiments`. If a `stored` configuration is given, it takes its place, and flags
    override its fields. Relative paths in the result are made absolute.
    """
    given, file = normalised(rest), ""
    named = [flag for flag in given if flag.startswith("--config=")]
    if len(named) > 1:
        raise UserError(f"two configurations: {' and '.join(named)}; give one")
    if nameless := [flag for flag in given if flag.partition("=")[0] == "--config."]:
        raise UserError(f"{nameless[0]} names no field: write --config.FIELD=VALUE")
    given = list({flag.partition("=")[0]: flag for flag in given}.values())  # the last one counts; tuples would grow
    source = next((flag for flag in given if flag.startswith("--config.data.name=")), "").partition("=")[2]
    if source.partition(":")[0] in SOURCES and ":" in source and any("--config.data.dir=" in flag for flag in given):
        raise UserError(f"--config.data.name={source} contains the path already: leave --config.data.dir out")
    for position, flag in enumerate(given):
        if not flag.startswith("--config="):
            continue
        if stored is not None:
            own = "its configuration is that of the training in --workdir=DIR"
            raise UserError(f"this command takes no --config=FILE: {own}; change a field with --config.field=value")
        name, colon, variant = flag.removeprefix("--config=").partition(":")
        file, _ = _file_of(name), given.pop(position)
        given.insert(0, f"--config={file}{colon}{variant}")  # ml_collections wants it first
    if stored is None and not file:
        raise UserError(f"no configuration: give --config=NAME, a file or one of {', '.join(experiments())}")
    values, arguments = absl_flags.FlagValues(), ["lsrs", *given]
    try:
        if stored is None:
            config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
        else:
            config_flags.DEFINE_config_dict("config", stored, flag_values=values, sys_argv=arguments)
        left, config = values(arguments)[1:], values["config"].value
        # If a file failed to load, only its use raises the error. A value may have a type that JSON does not have.
        plain = config_to_dict(config)
    except (Exception, SystemExit) as error:  # a configuration file is code, and may fail in any way
        raise UserError(f"bad configuration: {_location(error, file)}{_reason(error)}") from error
    if left:
        raise UserError(f"unknown argument {left[0]!r}; see --help")
    # Convert to plain values and back, because this refuses a field that the project does not know.
    config = check_config(config_from_dict(plain))
    config.data.dir, config.train.start_from = _absolute_data(config.data), _absolute_start(config.train.start_from)
    config.certify.fallback = _absolute(config.certify.fallback)
    return config


def normalised(rest: list[str]) -> list[str]:
    """The arguments as ``--config…=value``; raises UserError for one that is none, with the right spelling."""
    found = []
    for argument in rest:
        name, equals, value = argument.partition("=")
        name = re.sub(r"^--?(?=config(\.|$))", "--", name)
        if found and argument.startswith("="):
            raise UserError(f"spaces around =: write {found[-1]}=VALUE")
        if found and "=" not in found[-1] and not argument.startswith("-"):
            found[-1] += f"={argument}"  # --config digits
            continue
        if name != "--config" and not name.startswith("--config."):
            raise UserError(f"unknown argument {argument!r}; {_spelling(name, value)}")
        found.append(name + equals + value)
    for position, argument in enumerate(found):
        name, _, value = argument.partition("=")
        if field := name.removeprefix("--config").removeprefix("."):
            check_field(field)
            if "=" in argument:
                check_text(field, value := _whole(field, value))
                found[position] = f"{name}={value}"
    if bare := next((argument for argument in found if "=" not in argument and not _is_switch(argument)), None):
        raise UserError(f"{bare} needs a value: write {bare}=VALUE")
    return found


def _is_switch(argument: str) -> bool:
    field = FIELDS.get(argument.removeprefix("--config."))
    return field is not None and isinstance(field.default, bool)


def _whole(field: str, value: str) -> str:
    """A value for a field that takes whole numbers: 1e4 is 10000."""
    if type(FIELDS[field].default) is int and re.fullmatch(r"-?\d+(\.\d*)?[eE]\+?\d{1,2}|-?\d+\.0*", value):
        number = float(value)
        return str(int(number)) if number == int(number) else value
    return value


def _spelling(name: str, value: str) -> str:
    """What the user may have meant by an unknown argument."""
    plain = f"--{name.lstrip('-').lower().replace('_', '-')}"
    if plain.startswith("--config") or plain in _OPTIONS:
        equals = f"={value}" if value else ""
        return f"did you mean {plain}{equals}?"
    if not name.startswith("-") and not name.startswith("config."):
        return "options begin with --, and a value follows = without spaces; see --help"
    word = name.lstrip("-").removeprefix("config.").replace("-", "_")
    fields = [field for field in FIELDS if word in (field, field.rpartition(".")[2])]
    if not fields:
        near = difflib.get_close_matches(word, [field.rpartition(".")[2] for field in FIELDS] + list(FIELDS), 1)
        fields = [field for field in FIELDS if near and near[0] in (field, field.rpartition(".")[2])]
    equals = f"={value}" if value else "=VALUE"
    return f"did you mean {' or '.join(f'--config.{field}{equals}' for field in fields)}?" if fields else "see --help"


def _absolute(path: str) -> str:
    """A local path as it is reached from any other folder."""
    return str(Path(path).expanduser().absolute()) if path and "://" not in path else path


def _absolute_start(start: str) -> str:
    """``train.start_from``, a workdir or ``torch:FILE``, as it is reached from any other folder."""
    return f"{TORCH}{_absolute(start.removeprefix(TORCH))}" if start.startswith(TORCH) else _absolute(start)


def _absolute_data(data: Mapping[str, Any]) -> str:
    """``data.dir`` as it is reached from any other folder; the name of a set is no path."""
    path = data["dir"]
    if data["name"] == SOURCES[-1] and not Path(path).expanduser().exists():
        return path
    return _absolute(path)


def given(rest: list[str], config: Config, name: str) -> str:
    """The field `name` of a configuration if the arguments give it, otherwise ""."""
    return value_of(config, name) if any(flag.startswith(f"--config.{name}=") for flag in normalised(rest)) else ""


def config_of_training(workdir: Path, rest: list[str], reader: str = "", fields: tuple[str, ...] = ()) -> Config:
    """The configuration of a training, changed by flags; refuses changes of the network and the training.

    If a command only reads certificates, `reader` is its name, and flags may only change `fields`.
    """
    trained = load_config(workdir / "config.json")
    config = config_from_flags(rest, trained.copy_and_resolve_references())
    before, after = config_to_dict(trained), config_to_dict(config)
    others = [name for name in before if name not in ("model", "train")]
    if difference := first_difference(before, after, ("model.noise", *others)):
        name, old, new = difference
        raise UserError(f"the network was trained with {name}={old!r}, not {new!r}; train with the new value first")
    shares = ("data.name", "data.test_share", "data.share_seed")
    old, new = (tuple(value_of(one, name) for name in shares) for one in (trained, config))
    if old[0] == new[0] and old != new and config.data.name in SOURCES:
        raise UserError(
            f"the training divided the images with data.test_share={old[1]} and data.share_seed={old[2]}; another "
            "division would certify images on which it was trained"
        )
    if config.certify.seed != SEED_OF_TRAINING and before["seed"] != after["seed"]:
        seed = after["seed"]
        raise UserError(f"seed is that of the training; to draw other noise, give --config.certify.seed={seed} instead")
    if reader and (difference := first_difference(before, after, fields)):
        raise UserError(
            f"{reader} takes {difference[0]} from the certificates; only {' and '.join(fields)} may be given"
        )
    return config


def _location(error: BaseException | None, file: str) -> str:
    """File and line of an error in a configuration file, to begin a message; "" if this package raised the error."""
    chain: list[list[tuple[str, Any]]] = [re.findall(r'File "([^"\n]*)", line (\d+)', str(error).replace("\\n", "\n"))]
    while error:
        chain.insert(1, [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)])
        error = error.__context__
    for frames in chain:
        own = [line for path, line in frames if file and os.path.abspath(path) == os.path.abspath(file)]
        if own:
            package = f"{_PACKAGE}{os.sep}"
            return "" if os.path.abspath(frames[-1][0]).startswith(package) else f"{file} line {own[-1]}: "
    return ""


def _reason(error: BaseException) -> str:
    """The sentence of a flag or configuration error that tells the user what is wrong."""
    text = f"KeyError: {error}" if isinstance(error, KeyError) else str(error)
    lines = [line.strip() for line in text.replace("\\n", "\n").splitlines() if line.strip()]
    if "Traceback" in text:  # the library quotes the whole traceback of a failing file
        lines = lines[-1:]
    text = " ".join(lines).replace("Flags parsing error: ", "").replace("flag --config=None: ", "")
    return text.removeprefix("ValueError: ").strip() or type(error).__name__
