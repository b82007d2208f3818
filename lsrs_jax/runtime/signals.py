"""SIGTERM and SIGINT raise `Interrupted` now or at the end of a `deferred` block; a second signal exits at once."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_NUMBERS = (signal.SIGTERM, signal.SIGINT)
# A second signal within so many seconds is the first one again: timeout(1) and others signal the process and its group.
_ECHO = 0.5
_state: dict[str, Any] = {"depth": 0, "pending": None, "first": None}


class Interrupted(BaseException):
    """A signal asked the process to end; `agreed` where all processes of the run end at the same point."""

    def __init__(self, number: int, agreed: bool = False) -> None:
        super().__init__(signal.Signals(number).name)
        self.code, self.agreed = 128 + number, agreed  # the exit code by convention
        self.left = "the same command resumes"  # what the process leaves behind, for the message


def _exit_now(number: int, message: bytes) -> None:
    try:
        os.write(2, message)
    finally:
        os._exit(128 + number)


def _handle(number: int, _: FrameType | None) -> None:
    now = time.monotonic()
    if _state["first"] is not None:
        if now - _state["first"] > _ECHO:
            # Files are valid after every write: this loses no more than a kill does.
            _exit_now(number, b"interrupted twice, ended at once; the same command resumes\n")
        return
    # Recorded in any case: an exception raised inside a finalizer is dropped, and the next block must raise it again.
    _state["first"], _state["pending"] = now, number
    if not _state["depth"]:
        raise Interrupted(number)


def starting() -> None:
    """For a command, before its libraries are imported: opens closed streams; SIGTERM and SIGINT exit immediately.

    An exception that is raised while libraries are imported may fall into a callback that drops it. A closed standard
    stream is replaced by the null device, for otherwise a ledger would get its file number, and its lines.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    for number in _NUMBERS:
        signal.signal(number, lambda number, _: _exit_now(number, b"interrupted before anything was done\n"))


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """A block that changes nothing on disk; the message after a signal says so."""
    try:
        yield
    except Interrupted as stop:
        stop.left = "nothing was changed"
        raise


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Inside, SIGTERM and SIGINT raise `Interrupted` in the main thread, but not within `deferred` blocks.

    After the block signals have their default effect. Python does not print a signal that a finalizer dropped; it is
    raised at the end.
    """
    _state.update(pending=None, first=None)
    hook = sys.unraisablehook
    sys.unraisablehook = lambda dropped: None if isinstance(dropped.exc_value, Interrupted) else hook(dropped)
    for number in _NUMBERS:
        signal.signal(number, _handle)
    try:
        yield
        _raise_pending()
    finally:
        sys.unraisablehook = hook
        for number in _NUMBERS:
            signal.signal(number, signal.SIG_DFL)


def agreed() -> Interrupted:
    """The `Interrupted` of a process that stops because some process of its run was signalled."""
    return Interrupted(_state["pending"] or signal.SIGTERM, agreed=True)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """A block that a signal does not break off: `Interrupted` is raised at its end, unless an error is on its way.

    Yields:
      a function that says whether a signal is waiting, for loops that stop early on their own terms.
    """
    _state["depth"] += 1
    try:
        yield lambda: _state["pending"] is not None
    finally:
        _state["depth"] -= 1
    if not _state["depth"]:
        _raise_pending()


def _raise_pending() -> None:
    if _state["pending"] is not None:
        number, _state["pending"] = _state["pending"], None
        raise Interrupted(number)
