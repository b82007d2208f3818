"""Silences libraries while the package calls them, where they log or warn about what the package handles itself."""

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from absl import logging as absl_logging

_state = {"debug": False, "depth": 0, "ignored": False}
_lock, _restore = threading.Lock(), contextlib.ExitStack()


def show_everything() -> None:
    """Silences nothing from now on: the option ``--debug`` of the commands."""
    _state["debug"] = True
    warnings.simplefilter("default")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A block in which absl, asyncio and warnings say nothing, and exceptions in finalizers are not printed.

    Orbax warns about read-only managers, and tensorflow-datasets recommends OpenCV. The settings are global: if the
    blocks of several threads overlap, the end of the last block restores them.
    """
    if _state["debug"]:
        yield
        return
    with _lock:
        _state["depth"] += 1
        if _state["depth"] == 1:
            _restore.callback(_show_leftovers, logging.getLogger("asyncio").level, sys.unraisablehook)
            _restore.callback(absl_logging.set_verbosity, absl_logging.get_verbosity())
            _restore.enter_context(warnings.catch_warnings(action="ignore"))
            absl_logging.set_verbosity(absl_logging.FATAL)
            _hide_leftovers()
    try:
        yield
    finally:
        with _lock:
            _state["depth"] -= 1
            if not _state["depth"]:
                _restore.close()


def ignore_warnings(beginning: str) -> None:
    """Hides warnings that begin like this regular expression, for the rest of the process."""
    if not _state["debug"]:
        warnings.filterwarnings("ignore", beginning)


def ignore_leftovers() -> None:
    """Hides exceptions in finalizers and messages of asyncio for the rest of the process.

    For a damaged checkpoint Orbax leaves tasks behind that end in finalizers at any later time.
    """
    if not _state["debug"]:
        _state["ignored"] = True
        _hide_leftovers()


def _hide_leftovers() -> None:
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None


def _show_leftovers(level: int, hook: Any) -> None:
    if not _state["ignored"]:
        logging.getLogger("asyncio").setLevel(level)
        sys.unraisablehook = hook
