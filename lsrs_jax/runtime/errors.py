"""Exceptions whose message is for the user."""

import re

_LONGEST = 1000  # number of characters kept at each end, because a message may quote a whole file


class UserError(ValueError):
    """Bad input: one line that says what is wrong and what to do. A command prints it and exits with `code`.

    Line breaks become spaces, control characters are escaped, and the middle of a very long message is left out.
    """

    code = 2

    def __init__(self, message: object) -> None:
        line = " ".join(str(message).split())
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        if len(line) > 2 * _LONGEST:
            line = f"{line[:_LONGEST]} ... {line[-_LONGEST:]}"
        super().__init__(line)


class OthersLost(UserError):
    """Another process of the run has ended. Nothing is wrong in this one; the same command resumes. Exit code 75."""

    code = 75  # EX_TEMPFAIL of sysexits.h: try again


class NotHere(UserError):
    """A checkpoint, a data set or a library that other files need is not on this machine."""


def reason(error: BaseException) -> str:
    """The line of an exception's message that says what is wrong: the last one of a traceback that it quotes."""
    text = str(error).strip()
    return text.splitlines()[-1].strip() if "Traceback (most recent call last)" in text else first_line(error)


def out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the host or of a device was too small."""
    found = isinstance(error, RuntimeError) and re.search("RESOURCE_EXHAUSTED|Out of memory", str(error))
    return isinstance(error, MemoryError) or bool(found)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its class if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
