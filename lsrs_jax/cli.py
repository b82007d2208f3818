"""Runs the commands: ``lsrs COMMAND …``, ``python -m lsrs_jax COMMAND …`` and ``python -m lsrs_jax.COMMAND …``.

This module imports light modules only. `main` loads the libraries after it has set how signals are handled.
"""

import argparse
import contextlib
import errno
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from lsrs_jax.runtime import signals
from lsrs_jax.runtime.documents import first_difference
from lsrs_jax.runtime.errors import UserError, first_line
from lsrs_jax.runtime.types import Config

COMMANDS = {
    "train": "train a split classifier",
    "certify": "certify images, verify certificates",
    "audit": "attack the certificates of a workdir",
    "report": "compare certified classifiers: a table and a curve",
}
_REMEDIES = {  # for errors of the operating system
    (errno.ENOSPC, errno.EFBIG, errno.EDQUOT): "; make room, and give the same command again",
    (errno.EROFS,): "; choose a folder that can be written",
    (errno.EACCES, errno.EPERM): "; change its permissions, or choose another folder",
    (errno.ENOENT, errno.ENOTDIR): "; check the path",
}


def main(name: str | None = None) -> None:
    """Runs a command of `COMMANDS`, by default the one that the first argument names, and ends the process.

    It does not wait for threads of work that was broken off, because they could crash.
    """
    signals.starting()
    try:
        if name is None:
            name = next(iter(sys.argv[1:]), "--help")
            del sys.argv[1:2]
            if name not in ("-h", "--help", *COMMANDS):
                _fail(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}")
        if name in ("-h", "--help"):
            usage = "usage: lsrs COMMAND ...; lsrs COMMAND --help says more"
            execute(lambda _: print(usage, *(f"  {name:<9}{what}" for name, what in COMMANDS.items()), sep="\n"))
        else:
            execute(importlib.import_module(f"lsrs_jax.{name}").run)
        sys.exit(0)
    except SystemExit as end:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(end.code if isinstance(end.code, int) else 1 if end.code else 0)


def execute(run: Callable[[list[str]], None]) -> None:
    """Runs a command; expected errors become one line on stderr and exit code 2.

    SIGTERM ends the process as Ctrl-C does, and a second signal ends it immediately. Files stay valid, and the same
    command resumes. With ``--debug`` among the arguments, tracebacks and warnings are shown.
    """
    if "--debug" in sys.argv:
        from lsrs_jax.runtime import logs

        logs.show_everything()
    try:
        with signals.handled():
            run(sys.argv[1:])
    except UserError as error:
        _fail(str(error), error.code)
    except BrokenPipeError:  # the program that read the output has ended
        sys.exit(141)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        remedy = next((text for numbers, text in _REMEDIES.items() if error.errno in numbers), "")
        _fail(f"{error.strerror}: {error.filename}{remedy}" if error.filename else f"{error}{remedy}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("RESOURCE_EXHAUSTED|Out of memory", str(error)):
            raise
        _fail(
            f"out of memory ({first_line(error)[:160]}): a training takes less with a smaller data.batch_size, a "
            "certification (and its audit) with a smaller certify.tile; train --plan says what both take. All files "
            "are kept"
        )
    except signals.Interrupted as stop:
        print(f"interrupted; {stop.left}", file=sys.stderr)
        sys.exit(stop.code)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int = 2) -> NoReturn:
    if "--debug" in sys.argv and sys.exc_info()[0]:
        traceback.print_exc()
    with contextlib.suppress(OSError):  # if stderr is closed, the exit code is all that can be said
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m {self.prog} --help")


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """An argument parser for ``python -m lsrs_jax.<name>``; `doc` is the module's docstring."""
    epilog = "lsrs_jax/config.py lists every --config field with its default and its meaning."
    style = argparse.RawDescriptionHelpFormatter
    made = _Parser(f"lsrs_jax.{name}", description=doc, epilog=epilog, formatter_class=style, allow_abbrev=False)
    made.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    return made


def config_from_flags(rest: list[str], stored: Config | None = None) -> Config:
    """Reads ``--config=FILE[:variant] --config.field=value …`` from the arguments that argparse has left over.

    If a `stored` configuration is given, it takes the place of ``--config=FILE``, and flags override its fields.
    """
    from absl import flags
    from ml_collections import config_flags

    from lsrs_jax.config import check_config, check_field, config_from_dict, config_to_dict

    values, arguments = flags.FlagValues(), ["lsrs_jax", *rest]
    stray = [a for a in rest if not a.startswith("--config")]
    if stray and not any(a.startswith("--config") and "=" not in a for a in rest):
        raise UserError(f"unknown argument {stray[0]!r}; see --help")
    for flag in rest:
        if match := re.match(r"--?config\.([^=]*)", flag):
            check_field(match[1])
    if stored is not None and any(a.partition("=")[0] == "--config" for a in rest):
        own = "its configuration is that of the training in --workdir=DIR"
        raise UserError(f"this command takes no --config=FILE: {own}; change a field with --config.field=value")
    file = next((a.split("=", 1)[1].partition(":")[0] for a in rest if a.startswith("--config=")), "")
    if stored is None and file and not os.path.isfile(file):
        raise UserError(f"no configuration file {file!r}")
    try:
        if stored is None:
            config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
        else:
            config_flags.DEFINE_config_dict("config", stored, flag_values=values, sys_argv=arguments)
        left, config = values(arguments)[1:], values["config"].value
        # If a file failed to load, only its use raises the error. A value may have a type that JSON does not have.
        plain = None if config is None else config_to_dict(config)
    except (Exception, SystemExit) as error:  # a configuration file is code, and may fail in any way
        raise UserError(f"bad configuration: {_location(error, file)}{_reason(error)}") from error
    if left:
        raise UserError(f"unknown argument {left[0]!r}; see --help")
    if plain is None:
        raise UserError("no configuration: give --config=configs/digits.py, or another file")
    # Convert to plain values and back, because this refuses a field that the project does not know.
    return check_config(config_from_dict(plain))


def config_of_training(workdir: Path, rest: list[str], reader: str = "", fields: tuple[str, ...] = ()) -> Config:
    """The configuration of a training, changed by flags; refuses changes of the network and the training.

    If a command only reads certificates, `reader` is its name, and flags may only change `fields`.
    """
    from lsrs_jax.config import SEED_OF_TRAINING, config_to_dict, load_config

    trained = load_config(workdir / "config.json")
    config = config_from_flags(rest, trained.copy_and_resolve_references())
    before, after = config_to_dict(trained), config_to_dict(config)
    others = [name for name in before if name not in ("model", "train")]
    if difference := first_difference(before, after, ("model.noise", *others)):
        name, old, new = difference
        raise UserError(f"the network was trained with {name}={old!r}, not {new!r}; train with the new value first")
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
            package = os.path.dirname(os.path.abspath(__file__)) + os.sep
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


def checked(convert: Callable[[str], Any], allowed: Callable[[Any], bool], words: str) -> Callable[[str], Any]:
    """Argument type: a value that `convert` reads from the text and that is `allowed`; `words` describe such values."""

    def read(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if allowed(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {words}, got {text!r}")

    return read


def numbers(text: str) -> tuple[float, ...]:
    """Reads numbers with commas between them, and sorts them."""
    return tuple(sorted({float(part) for part in text.split(",")}))


def add_profile(parser: argparse._ActionsContainer) -> None:
    """Gives a command the option ``--profile``."""
    seconds = checked(float, lambda value: 0 < value < float("inf"), "a positive number of seconds")
    parser.add_argument(
        "--profile", type=seconds, help="record a JAX profile of this many seconds in <workdir>/profile"
    )


def folder(text: str) -> Path:
    """Argument type: a folder that exists or can be made."""
    path = Path(text)
    if not text or (path.exists() and not path.is_dir()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return path


def workdir(text: str) -> Path | str:
    """Argument type: a folder, or the URL of a folder in a bucket; for `workdir.opened`."""
    from lsrs_jax.runtime.workdir import SCHEMES

    if "://" not in text:
        return folder(text)
    if not text.startswith(SCHEMES) or text in SCHEMES or text.startswith("gs:///"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a folder nor the URL of one ({', '.join(SCHEMES)})")
    if text.startswith("file://") and not text.startswith("file:///"):
        raise argparse.ArgumentTypeError(f"{text!r} must name a folder from the root on: file:///...")
    return text
