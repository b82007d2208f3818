"""The one exception that is the user's to mend."""

_LONGEST = 1000  # of either end; what is quoted in between may be a whole file


class UserError(ValueError):
    """Bad input: a message of one line that says what is wrong and what to do. The commands exit with code 2.

    What a message quotes may hold line breaks, control characters or megabytes: they are folded, escaped, left out.
    """

    def __init__(self, message):
        line = " ".join(str(message).split())
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        if len(line) > 2 * _LONGEST:
            line = f"{line[:_LONGEST]} ... {line[-_LONGEST:]}"
        super().__init__(line)
