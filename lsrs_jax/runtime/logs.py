"""Silences libraries that log or warn about what the package handles itself, around their calls only."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

from absl import logging as absl_logging

_state = {"debug": False}


def show_everything() -> None:
    """From now on nothing is silenced: the option ``--debug`` of the commands."""
    _state["debug"] = True
    warnings.simplefilter("default")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, absl, asyncio and warnings say nothing, and exceptions in finalizers are not printed.

    Orbax warns about read-only managers, and leaves half-finished tasks behind where a checkpoint is damaged: its own
    exception is the message. tensorflow-datasets recommends OpenCV.
    """
    if _state["debug"]:
        yield
        return
    asyncio_logger, hook, verbosity = logging.getLogger("asyncio"), sys.unraisablehook, absl_logging.get_verbosity()
    level = asyncio_logger.level
    absl_logging.set_verbosity(absl_logging.FATAL)
    asyncio_logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        absl_logging.set_verbosity(verbosity)
        asyncio_logger.setLevel(level)
        sys.unraisablehook = hook
