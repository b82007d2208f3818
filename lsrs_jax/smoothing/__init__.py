"""Randomized smoothing of any JAX function: sampling, statistics, certificates.

`certify`, `predict` and `SmoothedClassifier` are loaded when they are first used: the statistics alone need no JAX.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from lsrs_jax.smoothing import confidence
from lsrs_jax.smoothing.derivation import Certificates, certified_radius, from_counts

if TYPE_CHECKING:
    from lsrs_jax.smoothing.api import SmoothedClassifier, certify, predict
    from lsrs_jax.smoothing.sampler import Sampler

__all__ = [
    "Certificates", "Sampler", "SmoothedClassifier", "certified_radius", "certify", "confidence", "from_counts",
    "predict",
]  # fmt: skip

_LAZY = {"certify": "api", "predict": "api", "SmoothedClassifier": "api", "Sampler": "sampler"}


def __getattr__(name: str) -> Any:
    if name == "Votes":
        warnings.warn("smoothing.Votes is now Sampler, whose `keys` takes the key", DeprecationWarning, stacklevel=2)
        name = "Sampler"
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
