"""A configuration file with a mistake in it."""


def get_config():
    return 1 / 0
