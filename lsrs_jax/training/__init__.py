"""Trains a split classifier under the noise with which it will be certified."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsrs_jax.training.session import fit

__all__ = ["fit"]


def __getattr__(name: str) -> Any:
    if name != "fit":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lsrs_jax.training.session import fit

    return fit
