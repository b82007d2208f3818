"""What the commands share: arguments, configuration flags, and errors of one line."""

import argparse
import contextlib
import logging as stdlib_logging
import os
import signal
import sys
import warnings
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from lsrs_jax import config as configuration
from lsrs_jax.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see python -m {self.prog} --help")


def parser(name, doc):
    """An argument parser for ``python -m lsrs_jax.<name>``; `doc` is the module's docstring."""
    return _Parser(
        f"lsrs_jax.{name}",
        description=doc,
        epilog="Every --config field, its default and its meaning: lsrs_jax/config.py.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def config_from_flags(rest, stored=None):
    """The configuration of ``--config=FILE[:variant] --config.field=value …`` flags.

    Args:
      rest: the arguments argparse left over.
      stored: a configuration that takes the place of ``--config=``; flags then only override it.
    """
    values = flags.FlagValues()
    arguments = ["lsrs_jax", *rest]
    stray = [a for a in rest if not a.startswith("--config")]
    if stray and not any(a.startswith("--config") and "=" not in a for a in rest):
        raise UserError(f"unknown argument {stray[0]!r}; see --help")
    file = next((a.split("=", 1)[1].partition(":")[0] for a in rest if a.startswith("--config=")), "")
    if stored is None and file and not Path(file).is_file():
        raise UserError(f"no configuration file {file!r}")
    try:
        if stored is None:
            config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
        else:
            config_flags.DEFINE_config_dict("config", stored, flag_values=values, sys_argv=arguments)
        left = values(arguments)[1:]
        config = values["config"].value
        if config is not None:
            config.to_dict()  # a file that failed to load says so only when it is used
    except Exception as error:  # a configuration file is code, and may fail in any way
        raise UserError(f"bad configuration: {_reason(error)}") from error
    if left:
        raise UserError(f"unknown argument {left[0]!r}; see --help")
    if config is None:
        raise UserError("no configuration: give --config=configs/digits.py, or another file")
    # Through plain values and back: a field that the project does not know is refused, not ignored.
    return configuration.check(configuration.from_dict(configuration.to_dict(config)))


def _reason(error):
    """The one sentence that matters of a flag or configuration error."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.replace("\\n", "\n").splitlines() if line.strip()]
    if "Traceback" in text:  # the library quotes the whole traceback of a failing file
        lines = lines[-1:]
    text = " ".join(lines).replace("Flags parsing error: ", "").replace("flag --config=None: ", "")
    # A misspelt field arrives as the repr of a KeyError's message.
    text = text.replace("\\'", "'").removeprefix("ValueError: ").strip()
    if text[:2] == "''" and text[-1:] == "'":
        text = text[1:-1]
    return text or type(error).__name__


def folder(text):
    """Argument type: a folder that exists or can be made."""
    path = Path(text)
    if not text or (path.exists() and not path.is_dir()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return path


def main(run):
    """Runs a command: expected errors become one line on stderr and exit code 2.

    SIGTERM ends the process like an interrupt; what is on disk stays valid and the same command resumes.
    """
    warnings.filterwarnings("ignore")
    logging.set_verbosity(logging.FATAL)
    # Orbax leaves half-finished tasks behind when a checkpoint is damaged; its own exception is the message.
    stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run(sys.argv[1:])
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        sys.exit(130)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message):
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
