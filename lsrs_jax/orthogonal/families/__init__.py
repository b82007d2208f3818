"""The registry of orthogonal convolution families. A new one is a file here, imported, and a line below."""

from lsrs_jax.errors import UserError
from lsrs_jax.orthogonal.families import adaptive, cayley, exponential, paraunitary
from lsrs_jax.orthogonal.families.family import ConvFamily

FAMILIES = {
    "adaptive": adaptive.FAMILY,
    "paraunitary": paraunitary.FAMILY,
    "exponential": exponential.FAMILY,
    "cayley": cayley.FAMILY,
}

__all__ = ["FAMILIES", "ConvFamily", "family"]


def family(method):
    """The family called `method`; raises UserError for an unknown name."""
    if method not in FAMILIES:
        raise UserError(f"unknown convolution method {method!r}: choose one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[method]
