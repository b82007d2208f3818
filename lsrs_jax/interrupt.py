"""SIGTERM and Ctrl-C: at once where nothing can be lost, else after what must not be torn; the second time at once."""

import contextlib
import os
import signal
import time

_NUMBERS = (signal.SIGTERM, signal.SIGINT)
# Seconds in which a second signal is the first one again: timeout(1) and others send theirs to process and group alike.
_ECHO = 0.5
_state = {"depth": 0, "pending": None, "first": None}


class Interrupted(BaseException):
    """A signal asked the process to end; `code` is the exit code by convention, 128 + the signal's number.

    `agreed` where all processes of the run end at the same place; `left` says what the process leaves behind.
    """

    def __init__(self, number, agreed=False):
        super().__init__(signal.Signals(number).name)
        self.code, self.agreed, self.left = 128 + number, agreed, "the same command resumes"


def _handle(number, _):
    now = time.monotonic()
    if _state["first"] is not None:
        if now - _state["first"] > _ECHO:
            # What is on disk is valid after every write: this loses no more than a kill does.
            try:
                os.write(2, b"interrupted twice, ended at once; the same command resumes\n")
            finally:
                os._exit(128 + number)
        return
    # Noted in any case: raised inside a finalizer, an exception is dropped, and the next block must raise it again.
    _state["first"], _state["pending"] = now, number
    if not _state["depth"]:
        raise Interrupted(number)


def end_imports():
    """Until `handled`, SIGTERM and SIGINT end the process at once.

    An exception raised while libraries are imported may fall into a callback that drops it, and the command would run.
    """

    def end(number, _):
        try:
            os.write(2, b"interrupted before anything was done\n")
        finally:
            os._exit(128 + number)

    for number in _NUMBERS:
        signal.signal(number, end)


@contextlib.contextmanager
def reading():
    """A block that changes nothing on disk, which whoever interrupts it is told."""
    try:
        yield
    except Interrupted as stop:
        stop.left = "nothing was changed"
        raise


@contextlib.contextmanager
def handled():
    """Inside, SIGTERM and SIGINT raise `Interrupted` in the main thread, at the end of `deferred` blocks only.

    A second one, while the first is served, ends the process. Behind the block signals do what they do to any process.
    A signal that nobody has seen, for it came in a finalizer and after the last deferred block, is raised at the end.
    """
    _state.update(pending=None, first=None)
    for number in _NUMBERS:
        signal.signal(number, _handle)
    try:
        yield
        _raise_pending()
    finally:
        for number in _NUMBERS:
            signal.signal(number, signal.SIG_DFL)


def agreed():
    """The `Interrupted` of a process that stops because one of its run was told to; that may be another one."""
    return Interrupted(_state["pending"] or signal.SIGTERM, agreed=True)


@contextlib.contextmanager
def deferred():
    """A block that a signal does not break off: it ends the process when the block is done.

    An error inside goes its own way, for it says more than the signal.

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


def _raise_pending():
    if _state["pending"] is not None:
        number, _state["pending"] = _state["pending"], None
        raise Interrupted(number)
