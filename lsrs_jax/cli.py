"""Runs the commands: ``python -m lsrs_jax.train …`` and so on; ``lsrs train …`` is the same.

This module imports light modules only. `main` loads the libraries after it has set how signals are handled.
"""

import argparse
import contextlib
import difflib
import errno
import importlib
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lsrs_jax.runtime import progress, signals
from lsrs_jax.runtime.errors import UserError, first_line, out_of_memory

COMMANDS = {  # name -> module, what it does
    "train": ("train", "train a split classifier"),
    "certify": ("certify", "certify images, verify certificates"),
    "merge": ("merge", "join the shards of a certification (certify --shard=i/N)"),
    "certify-torch": ("certify_torch", "certify a published PyTorch checkpoint"),
    "audit": ("audit", "attack the certificates of a workdir"),
    "sweep": ("sweep", "train, certify and compare a grid of classifiers"),
    "report": ("report", "compare certified classifiers: a table and a curve"),
    "export": ("export", "write a trained classifier for use without this package"),
    "config": ("show_config", "print every field of a configuration, or the names of the experiments"),
    "data": ("show_data", "print and draw what is in a data set, also in your own folder or file"),
}
_PROGRAM = "python -m lsrs_jax."  # a module of COMMANDS follows
_MODULES = {module: name for name, (module, _) in COMMANDS.items()}
_QUICK = ("sweep", "report", "config")  # they load within a second
_USAGE = """usage: lsrs COMMAND [ARGUMENTS], or python -m lsrs_jax COMMAND [ARGUMENTS]; COMMAND --help says more

{commands}

  python -m lsrs_jax.train --config=digits --workdir=runs/digits
  python -m lsrs_jax.certify --workdir=runs/digits
  python -m lsrs_jax.report runs/digits --out=report"""
_REMEDIES = {  # for errors of the operating system
    (errno.ENOSPC, errno.EFBIG, errno.EDQUOT): "; make room, and give the same command again",
    (errno.EROFS,): "; choose a folder that can be written",
    (errno.EACCES, errno.EPERM): "; change its permissions, or choose another folder",
    (errno.ENOENT, errno.ENOTDIR): "; check the path",
}


def main(name: str | None = None) -> None:
    """Runs a command of `COMMANDS`, by default the one that the first argument names, and ends the process.

    It does not wait for threads of work that was broken off, because they could crash. In a process that was started
    for something else, as in a notebook, it only raises SystemExit.
    """
    if not _owns_process():
        _choose_and_run(name)
    signals.starting()
    try:
        _choose_and_run(name)
    except SystemExit as end:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(end.code if isinstance(end.code, int) else 1 if end.code else 0)


def _owns_process() -> bool:
    """Whether this process was started as ``lsrs`` or ``python -m lsrs_jax…``, also by a profiler or launcher."""
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
        return False
    started = sys.orig_argv[1:]
    as_module = any(flag == "-m" and name.split(".")[0] == "lsrs_jax" for flag, name in itertools.pairwise(started))
    as_program = any(os.path.basename(word).removesuffix(".exe") == "lsrs" for word in started[:2])
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return as_module or as_program or (spec is not None and spec.name.split(".")[0] == "lsrs_jax")


def _choose_and_run(module: str | None) -> NoReturn:
    """Runs a command of this module, or the one that the first argument names; ends with SystemExit."""
    if module is None:
        name = next(iter(sys.argv[1:]), "--help")
        del sys.argv[1:2]
        if name in ("-h", "--help", "help"):
            lines = "\n".join(f"  {name:<15}{what}" for name, (_, what) in COMMANDS.items())
            execute(lambda _: print(_USAGE.format(commands=lines)))
            sys.exit(0)
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
            _fail(f"unknown command {name!r}: {hint}")
        module = COMMANDS[name][0]
    if (name := _MODULES.get(module)) and name not in _QUICK and not {"-h", "--help"} & set(sys.argv):
        stream = sys.stderr if "--json" in sys.argv else sys.stdout
        with contextlib.suppress(OSError):  # whoever reads the output may have ended
            print(f"{name}: loading JAX ...", file=stream, flush=True)
    execute(importlib.import_module(f"lsrs_jax.{module}").run)
    sys.exit(0)


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
            try:
                run(sys.argv[1:])
            finally:
                progress.remove_bar()
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
        if not out_of_memory(error):
            raise
        _fail(
            f"out of memory ({first_line(error)[:160]}): give a training a smaller --config.data.batch_size, a "
            "certification (and its audit) a smaller --config.certify.tile; train --plan says what both take. All "
            "files are kept"
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
        raise UserError(f"{message}; see {self.prog} --help")


def parser(module: str, doc: str | None, fields: Sequence[str], usage: str) -> argparse.ArgumentParser:
    """An argument parser for a command; `doc` is the docstring of its module.

    `fields` are the configuration's fields that are most used with it; `usage` is what stands before them.
    """
    epilog = ""
    if fields:
        from lsrs_jax.config import FIELDS

        lines = [f"  --config.{name}={FIELDS[name].default!r}\n        {FIELDS[name].meaning}" for name in fields]
        last = f"{_PROGRAM}show_config prints all of them."
        epilog = "\n".join(["most used fields, with their defaults:", *lines, last])
    style, prog = argparse.RawDescriptionHelpFormatter, f"{_PROGRAM}{module}"
    made = _Parser(prog, f"{prog} {usage}", doc, epilog, formatter_class=style, allow_abbrev=False)
    made.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    return made


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


def add_allow_code(parser: argparse.ArgumentParser) -> None:
    """Adds ``--allow-code``, for `models.custom.allowing`."""
    help_text = "import this code: package.module:Class or FILE.py:Class of the network, or a module; may be repeated"
    parser.add_argument("--allow-code", action="append", default=[], metavar="NAME", help=help_text)


def folder(text: str) -> Path:
    """Argument type: a folder that exists or can be made."""
    path = Path(text).expanduser()
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
