"""Checks of values that a caller gives. NumPy only."""

import math
from typing import Any

import numpy as np

from lsrs_jax.runtime.errors import UserError


def is_whole(value: object) -> bool:
    """True for one integer of Python or NumPy; a bool is not an integer here."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def real(value: Any) -> float:
    """Converts one real number to a float, for comparisons; returns NaN for anything else, also a bool.

    The number may also come as an array of NumPy or JAX without dimensions.
    """
    if value is np.ma.masked:
        return math.nan
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
    """Converts a caller's value to an array; raises UserError if NumPy cannot, or if an entry is masked."""
    try:
        refuse_masked(name, value)
        return np.asarray(value)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} must be one array of {what}: {error}") from error


def refuse_masked(name: str, value: Any) -> None:
    """Raises UserError if a masked array has a masked entry, also inside lists: NumPy would use what the mask hides."""
    if isinstance(value, list | tuple):
        for inner in value:
            refuse_masked(name, inner)
    elif isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise UserError(f"{name} must not have masked entries: fill them, or leave these rows out")


def numbers(name: str, value: Any) -> np.ndarray:
    """Converts a caller's real numbers, of any shape, to float64; raises UserError for anything else, such as text."""
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
