"""What a caller may give as numbers. NumPy only."""

import math

import numpy as np

from lsrs_jax.errors import UserError


def is_whole(value):
    """Whether a value is one integer, of Python or NumPy: no bool, and no span of time."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool | np.timedelta64)


def real(value):
    """One real number as a float, for comparisons; NaN for anything else, a bool or a complex number included.

    An array of no dimensions, of NumPy or JAX, is the number that it holds.
    """
    if getattr(value, "shape", None) == () and not isinstance(value, np.generic):
        try:
            value = np.asarray(value)[()]
        except (TypeError, ValueError):  # one that JAX only traces
            return math.nan
    if not is_whole(value) and not isinstance(value, float | np.floating):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def array(name, value, what="numbers"):
    """A caller's array; raises UserError for what NumPy makes none of."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} must be one array of {what}: {error}") from error


def numbers(name, value):
    """A caller's real numbers as float64, any shape; raises UserError for anything else, texts of digits included."""
    found = array(name, value)
    try:
        if found.dtype.kind in "cmMOSU":
            raise TypeError(found.dtype)
        with np.errstate(over="ignore"):  # an infinity is for the caller to judge
            return found.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} must be numbers, got {value!r}") from error
