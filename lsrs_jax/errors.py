"""Exceptions whose message is for the user."""

_LONGEST = 1000  # of either end; what is quoted in between may be a whole file


class UserError(ValueError):
    """Bad input: a message of one line that says what is wrong and what to do. The commands exit with code 2.

    Attributes:
      code: the exit code of a command that ends with it.

    What a message quotes may hold line breaks, control characters or megabytes: they are folded, escaped, left out.
    """

    code = 2

    def __init__(self, message):
        line = " ".join(str(message).split())
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        if len(line) > 2 * _LONGEST:
            line = f"{line[:_LONGEST]} ... {line[-_LONGEST:]}"
        super().__init__(line)


class OthersLost(UserError):
    """Other processes of the run are not there: nothing is wrong here, and the same command resumes. Exit code 75."""

    code = 75  # EX_TEMPFAIL of sysexits.h: try again
