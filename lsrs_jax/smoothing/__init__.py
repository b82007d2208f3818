"""Randomized smoothing of any JAX function: votes, statistics, radii.

`certify`, `predict` and `Votes` are loaded when first asked for: the statistics alone do without JAX.
"""

import importlib

from lsrs_jax.smoothing import confidence
from lsrs_jax.smoothing.certificates import Certificates, from_counts
from lsrs_jax.smoothing.radius import certified_radius

__all__ = ["Certificates", "Votes", "certified_radius", "certify", "confidence", "from_counts", "predict"]

_LAZY = {"certify": "montecarlo", "predict": "montecarlo", "Votes": "votes"}


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
