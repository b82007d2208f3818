"""The registry of orthogonal convolution families. To add one, write a file here and enter it in `FAMILIES`."""

from lsrs_jax.orthogonal.families import adaptive, cayley, exponential, paraunitary
from lsrs_jax.orthogonal.families.family import ConvFamily
from lsrs_jax.runtime.errors import UserError

FAMILIES: dict[str, ConvFamily] = {
    "adaptive": adaptive.FAMILY,
    "paraunitary": paraunitary.FAMILY,
    "exponential": exponential.FAMILY,
    "cayley": cayley.FAMILY,
}

__all__ = ["FAMILIES", "ConvFamily", "family"]


def family(method: str) -> ConvFamily:
    """The family called `method`; raises UserError for an unknown name."""
    if method not in FAMILIES:
        raise UserError(f"unknown convolution method {method!r}: choose one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[method]
