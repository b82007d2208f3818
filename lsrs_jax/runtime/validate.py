"""Checks of numbers that a caller hands in. NumPy only."""

import math
from typing import Any

import numpy as np

from lsrs_jax.runtime.errors import UserError


def is_whole(value: object) -> bool:
    """Whether a value is one integer of Python or NumPy; a bool is not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def real(value: Any) -> float:
    """One real number as a float, for comparisons; NaN for anything else, a bool or a complex number included.

    An array of no dimensions, of NumPy or JAX, is the number that it holds.
    """
    if getattr(value, "shape", None) == () and not isinstance(value, np.generic):
        try:
            value = np.asarray(value)[()]
        except (TypeError, ValueError):  # an array that JAX only traces
            return math.nan
    if not is_whole(value) and not isinstance(value, float | np.floating):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if int(value) > 0 else -math.inf


def array(name: str, value: Any, what: str = "numbers") -> np.ndarray:
    """A caller's array; raises UserError where NumPy cannot make one of it."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} must be one array of {what}: {error}") from error


def numbers(name: str, value: Any) -> np.ndarray:
    """A caller's real numbers as float64, any shape; raises UserError for anything else, such as text."""
    found = array(name, value)
    try:
        if found.dtype.kind in "cmMOSU":
            raise TypeError(found.dtype)
        with np.errstate(over="ignore"):  # the caller decides about an infinity
            return found.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} must be numbers, got {value!r}") from error


def choice(name: str, value: object, allowed: Any) -> None:
    """Raises UserError unless a value is one of the names `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise UserError(f"unknown {name} {value!r}: choose one of {', '.join(allowed)}")
