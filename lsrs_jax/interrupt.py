"""SIGTERM and Ctrl-C: at once where nothing can be lost, and after what must not be torn apart."""

import contextlib
import signal

_state = {"depth": 0, "pending": None}


class Interrupted(BaseException):
    """A signal asked the process to end; `code` is the exit code by convention, 128 + the signal's number."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


def _handle(number, _):
    # Noted in any case: raised inside a finalizer, an exception is dropped, and the next block must raise it again.
    _state["pending"] = number
    if not _state["depth"]:
        raise Interrupted(number)


def install():
    """From now on SIGTERM and SIGINT raise `Interrupted` in the main thread, at the end of `deferred` blocks only."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _handle)


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
    if not _state["depth"] and _state["pending"] is not None:
        number, _state["pending"] = _state["pending"], None
        raise Interrupted(number)
