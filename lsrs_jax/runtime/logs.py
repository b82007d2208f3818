"""Silences libraries that log or warn about what the package handles itself, around their calls only."""

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from absl import logging as absl_logging

_state: dict[str, Any] = {"debug": False, "depth": 0, "restore": None}
_lock = threading.Lock()


def show_everything() -> None:
    """From now on nothing is silenced: the option ``--debug`` of the commands."""
    _state["debug"] = True
    warnings.simplefilter("default")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, absl, asyncio and warnings say nothing, and exceptions in finalizers are not printed.

    Orbax warns about read-only managers, and leaves half-finished tasks behind where a checkpoint is damaged: its own
    exception is the message. tensorflow-datasets recommends OpenCV. Blocks of several threads may overlap: the settings
    are global, and restored at the end of the last one.
    """
    if _state["debug"]:
        yield
        return
    with _lock:
        _state["depth"] += 1
        if _state["depth"] == 1:
            _state["restore"] = contextlib.ExitStack()
            _state["restore"].enter_context(_silenced())
    try:
        yield
    finally:
        with _lock:
            _state["depth"] -= 1
            if not _state["depth"]:
                _state["restore"].close()


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    asyncio_logger, hook, verbosity = logging.getLogger("asyncio"), sys.unraisablehook, absl_logging.get_verbosity()
    level = asyncio_logger.level
    asyncio_logger.setLevel(logging.CRITICAL)
    absl_logging.set_verbosity(absl_logging.FATAL)
    sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        asyncio_logger.setLevel(level)
        absl_logging.set_verbosity(verbosity)
        sys.unraisablehook = hook


def ignore_leftovers() -> None:
    """For the rest of the process exceptions in finalizers and messages of asyncio are not shown.

    Where a checkpoint is damaged, Orbax leaves tasks behind that end in finalizers, at any later time.
    """
    if not _state["debug"]:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        sys.unraisablehook = lambda _: None
