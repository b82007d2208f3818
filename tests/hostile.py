"""How tests of hostile input draw examples, and what may answer them."""

from hypothesis import HealthCheck, settings

from lsrs_jax.errors import UserError


def examples(number):
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def answer(function, *arguments, **named):
    """What a function returns, or None where it refuses in one line; any other exception fails the test."""
    try:
        return function(*arguments, **named)
    except UserError as error:
        message = str(error)
        assert message.isprintable(), repr(message)
        assert 10 < len(message) < 2100
        return None
