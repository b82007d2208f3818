"""Runs the commands: ``lsrs COMMAND …``, ``python -m lsrs_jax COMMAND …`` and ``python -m lsrs_jax.COMMAND …``.

Only light modules are imported here; libraries are loaded when signals are handled already.
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
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.types import Config

COMMANDS = {
    "train": "train a split classifier",
    "certify": "certify images, verify certificates",
    "audit": "attack the certificates of a workdir",
    "report": "compare certified classifiers: a table and a curve",
}
_USAGE = "\n".join(
    [
        "usage: lsrs COMMAND ...; lsrs COMMAND --help says more",
        *(f"  {name:<9}{what}" for name, what in COMMANDS.items()),
    ]
)

# Of errors of the operating system.
_REMEDIES = {
    (errno.ENOSPC, errno.EFBIG, errno.EDQUOT): "; make room, and give the same command again",
    (errno.EROFS,): "; choose a folder that can be written",
    (errno.EACCES, errno.EPERM): "; change its permissions, or choose another folder",
    (errno.ENOENT, errno.ENOTDIR): "; check the path",
}
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")  # as XLA says it
_FIELD = re.compile(r"--?config\.([^=]*)")


def main(name: str | None = None) -> None:
    """Runs a command of `COMMANDS`, by default that of the first argument, and ends the process.

    It ends without waiting for the threads of what was broken off, which could also crash.
    """
    signals.starting()
    try:
        if name is None:
            name = next(iter(sys.argv[1:]), "--help")
            del sys.argv[1:2]
            if name not in ("-h", "--help", *COMMANDS):
                _fail(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}")
        if name in ("-h", "--help"):
            execute(lambda _: print(_USAGE))
        else:
            execute(importlib.import_module(f"lsrs_jax.{name}").run)
        sys.exit(0)
    except SystemExit as end:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(end.code if isinstance(end.code, int) else 1 if end.code else 0)


def execute(run: Callable[[list[str]], None]) -> None:
    """Runs a command: expected errors become one line on stderr, and exit code 2.

    SIGTERM ends the process like an interrupt, a second one at once; what is on disk stays valid, and the same command
    resumes. With ``--debug`` among the arguments, tracebacks and warnings are shown.
    """
    if "--debug" in sys.argv:
        from lsrs_jax.runtime import logs

        logs.show_everything()
    try:
        with signals.handled():
            run(sys.argv[1:])
    except UserError as error:
        _fail(str(error), error.code)
    except BrokenPipeError:  # whoever read the output has gone
        sys.exit(141)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        remedy = next((text for numbers, text in _REMEDIES.items() if error.errno in numbers), "")
        _fail(f"{error.strerror}: {error.filename}{remedy}" if error.filename else f"{error}{remedy}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
        said = (str(error).strip() or "MemoryError").splitlines()[0][:160]
        _fail(
            f"out of memory ({said}): a training takes less with a smaller data.batch_size, a certification (and its "
            "audit) with a smaller certify.tile; train --plan says what both take. What is on disk is kept"
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
    with contextlib.suppress(OSError):  # where stderr is closed, the exit code must do
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m {self.prog} --help")


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """An argument parser for ``python -m lsrs_jax.<name>``; `doc` is the module's docstring."""
    epilog = "Every --config field, its default and its meaning: lsrs_jax/config.py."
    style = argparse.RawDescriptionHelpFormatter
    made = _Parser(f"lsrs_jax.{name}", description=doc, epilog=epilog, formatter_class=style, allow_abbrev=False)
    made.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    return made


def config_from_flags(rest: list[str], stored: Config | None = None) -> Config:
    """The configuration of ``--config=FILE[:variant] --config.field=value …``, the arguments that argparse left over.

    A `stored` configuration takes the place of ``--config=``; flags then only override it.
    """
    from absl import flags
    from ml_collections import config_flags

    from lsrs_jax.config import check_config, check_field, config_from_dict, config_to_dict

    values, arguments = flags.FlagValues(), ["lsrs_jax", *rest]
    stray = [a for a in rest if not a.startswith("--config")]
    if stray and not any(a.startswith("--config") and "=" not in a for a in rest):
        raise UserError(f"unknown argument {stray[0]!r}; see --help")
    for match in filter(None, map(_FIELD.match, rest)):
        check_field(match[1])
    file = next((a.split("=", 1)[1].partition(":")[0] for a in rest if a.startswith("--config=")), "")
    if stored is None and file and not os.path.isfile(file):
        raise UserError(f"no configuration file {file!r}")
    try:
        if stored is None:
            config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
        else:
            config_flags.DEFINE_config_dict("config", stored, flag_values=values, sys_argv=arguments)
        left, config = values(arguments)[1:], values["config"].value
        # A file that failed to load says so only when it is used; a value may be none that JSON has.
        plain = None if config is None else config_to_dict(config)
    except (Exception, SystemExit) as error:  # a configuration file is code, and may fail in any way
        raise UserError(f"bad configuration: {_location(error, file)}{_reason(error)}") from error
    if left:
        raise UserError(f"unknown argument {left[0]!r}; see --help")
    if plain is None:
        raise UserError("no configuration: give --config=configs/digits.py, or another file")
    # Through plain values and back: a field that the project does not know is refused, not ignored.
    return check_config(config_from_dict(plain))


def no_config_file(name: str, arguments: list[str]) -> None:
    """Raises UserError for ``--config=FILE`` given to a command that takes its configuration from the workdir."""
    if any(argument.partition("=")[0] == "--config" for argument in arguments):
        own = "its configuration is that of the training in --workdir=DIR"
        raise UserError(f"{name} takes no --config=FILE: {own}, and what is to differ is given as --config.field=value")


def config_of_training(workdir: Path, rest: list[str]) -> Config:
    """The configuration of a training, with ``--config.field=value`` flags that leave network and training alone."""
    from lsrs_jax.config import config_to_dict, load_config
    from lsrs_jax.runtime.documents import first_difference

    stored = workdir / "config.json"
    if not stored.exists():
        if (workdir / "checkpoints").is_dir():
            raise UserError(f"{workdir} holds checkpoints but no config.json: restore it from a copy")
        raise UserError(f"{workdir} holds no training: run python -m lsrs_jax.train --workdir={workdir} ...")
    trained, config = load_config(stored), config_from_flags(rest, load_config(stored))
    before, after = ({name: config_to_dict(one)[name] for name in ("model", "train")} for one in (trained, config))
    if difference := first_difference(before, after, ("model.noise",)):
        name, old, new = difference
        raise UserError(f"the network was trained with {name}={old!r}, not {new!r}; train that one first")
    return config


def only(workdir: Path, config: Config, fields: tuple[str, ...], what: str) -> None:
    """Raises UserError where a configuration differs from that of its training in other than these fields."""
    from lsrs_jax.config import config_to_dict
    from lsrs_jax.runtime.documents import first_difference

    trained, given = (config_to_dict(one) for one in (config_of_training(workdir, []), config))
    if difference := first_difference(trained, given, fields):
        raise UserError(f"{what} takes {difference[0]} from the certificates; only {' and '.join(fields)} may be given")


def _location(error: BaseException | None, file: str) -> str:
    """File and line of an error in a configuration file, to begin a message; "" where this package raised it."""
    quoted = re.findall(r'File "([^"\n]*)", line (\d+)', str(error).replace("\\n", "\n"))
    raised: list[list[tuple[str, Any]]] = []
    while error:
        raised.insert(0, [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)])
        error = error.__context__
    for frames in (quoted, *raised):
        own = [line for path, line in frames if file and os.path.abspath(path) == os.path.abspath(file)]
        if own:
            package = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")
            return "" if os.path.abspath(frames[-1][0]).startswith(package) else f"{file} line {own[-1]}: "
    return ""


def _reason(error: BaseException) -> str:
    """The one sentence that matters of a flag or configuration error."""
    text = f"KeyError: {error}" if isinstance(error, KeyError) else str(error)
    lines = [line.strip() for line in text.replace("\\n", "\n").splitlines() if line.strip()]
    if "Traceback" in text:  # the library quotes the whole traceback of a failing file
        lines = lines[-1:]
    text = " ".join(lines).replace("Flags parsing error: ", "").replace("flag --config=None: ", "")
    return text.removeprefix("ValueError: ").strip() or type(error).__name__


def numbers(flag: str, text: str, words: str, allowed: Callable[[float], bool]) -> tuple[float, ...]:
    """The numbers of a flag, in order; `words` says in its error which are `allowed`."""
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        found = (float("nan"),)
    if not all(map(allowed, found)):
        raise UserError(f"--{flag} takes numbers {words} with commas between, got {text!r}")
    return found


def folder(text: str) -> Path:
    """Argument type: a folder that exists or can be made."""
    path = Path(text)
    if not text or (path.exists() and not path.is_dir()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return path


def workdir(text: str) -> Path | str:
    """Argument type: a folder, or the URL of one in a bucket; for `workdir.opened`."""
    from lsrs_jax.runtime.workdir import SCHEMES

    if "://" not in text:
        return folder(text)
    if not text.startswith(SCHEMES) or text in SCHEMES or text.startswith("gs:///"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a folder nor the URL of one ({', '.join(SCHEMES)})")
    if text.startswith("file://") and not text.startswith("file:///"):
        raise argparse.ArgumentTypeError(f"{text!r} must name a folder from the root on: file:///...")
    return text
