"""What a family of orthogonal convolutions provides, and the registry of them.

A family turns raw parameters into a *plain* tree (a kernel, a spectrum) and runs it. To add one: write a file with
these functions and add a line to `FAMILIES`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from lsrs_jax.errors import UserError
from lsrs_jax.orthogonal import fourier, paraunitary
from lsrs_jax.orthogonal.shape import ConvShape


class ConvFamily(NamedTuple):
    """The functions of one family; `shape` is a `ConvShape`, `plain` whatever `build` returns."""

    check: Callable[[ConvShape], None]  # raises UserError where the family cannot be orthogonal
    init: Callable[[Any, ConvShape, str], Any]  # (key, shape, "identity" | "random") -> raw parameters, float32
    build: Callable[[Any, ConvShape], Any]  # raw -> plain, differentiable, dtype follows raw
    apply: Callable[[Any, Any, ConvShape], Any]  # (plain, x) -> y
    singular_values: Callable[[Any, ConvShape], Any]  # plain (NumPy float64) -> all singular values
    proof: str  # how the singular values are proven, for the report


FAMILIES = {
    "paraunitary": ConvFamily(
        paraunitary.check,
        paraunitary.init,
        paraunitary.build,
        paraunitary.apply,
        paraunitary.singular_values,
        "SVD per frequency of the kernel",
    ),
    "cayley": ConvFamily(
        fourier.check,
        fourier.init,
        fourier.build,
        fourier.apply,
        fourier.singular_values,
        "SVD per frequency of the spectrum",
    ),
}


def family(method):
    """The family called `method`; raises UserError for an unknown name."""
    if method not in FAMILIES:
        raise UserError(f"unknown convolution method {method!r}: choose one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[method]
