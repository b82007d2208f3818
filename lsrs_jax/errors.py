"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """Bad input: a message of one line that says what is wrong and what to do. The commands exit with code 2."""
