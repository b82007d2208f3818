"""SIGTERM and SIGINT raise `Interrupted` now or at the end of a `deferred` block; a second signal exits immediately."""

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_ECHO = 0.5  # seconds; timeout(1) and others signal a process and then its group, so a second signal may be an echo
_state: dict[str, Any] = {"depth": 0, "pending": None, "first": None}


class Interrupted(BaseException):
    """A signal asked the process to end. `agreed` is true if all processes of the run end at the same point."""

    def __init__(self, number: int, agreed: bool = False) -> None:
        super().__init__(signal.Signals(number).name)
        self.code, self.agreed = 128 + number, agreed  # the exit code by convention
        self.left = "the same command resumes"  # the second half of the message to the user


def _exit_now(number: int, message: bytes) -> None:
    try:
        os.write(2, message)
    finally:
        os._exit(128 + number)


def _handle(number: int, _: FrameType | None) -> None:
    now = time.monotonic()
    if _state["first"] is not None:
        if now - _state["first"] > _ECHO:
            # Files are valid after every write, so this loses no more than a kill.
            _exit_now(number, b"interrupted twice, ended immediately; the same command resumes\n")
        return
    # Python drops an exception that is raised inside a finalizer. The signal therefore stays pending, and the end of
    # the next `deferred` block raises it again.
    _state["first"], _state["pending"] = now, number
    if not _state["depth"]:
        raise Interrupted(number)


def starting() -> None:
    """Prepares a command before its libraries are imported: its standard streams, and signals exit immediately.

    An exception that a signal raises during the imports may be raised in a callback that drops it. A closed standard
    stream is replaced by the null device; otherwise a ledger could get its file number and receive its lines. A
    character that the terminal cannot show is printed as its escape sequence, such as ``\\xf6``.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for number in _NUMBERS:
        signal.signal(number, _before_anything)


def _before_anything(number: int, _: FrameType | None) -> None:
    _exit_now(number, b"interrupted before anything was done\n")


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
    """A block in which SIGTERM and SIGINT raise `Interrupted` in the main thread, except inside `deferred` blocks.

    After the block signals have the effect that they had before, or their default effect in a process that `starting`
    prepared. If a finalizer dropped the exception, Python does not print it, and the end of the block raises it again.
    """
    _state.update(pending=None, first=None)
    hook = sys.unraisablehook
    sys.unraisablehook = lambda dropped: None if isinstance(dropped.exc_value, Interrupted) else hook(dropped)
    before = {number: signal.signal(number, _handle) for number in _NUMBERS}
    try:
        yield
        _raise_pending()
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler in (_before_anything, None) else handler)


def agreed() -> Interrupted:
    """The `Interrupted` to raise where all processes of a run stop together, because one of them received a signal."""
    return Interrupted(_state["pending"] or signal.SIGTERM, agreed=True)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """A block that a signal does not break off: its end raises `Interrupted`, unless another error ended the block.

    Yields a function that returns true if a signal is waiting, for loops that choose themselves where to stop.
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
