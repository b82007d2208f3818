"""Randomized smoothing of any JAX function: sampling, statistics, certificates.

`certify` and `predict` are loaded when they are first used: the statistics alone need no JAX. `SmoothedClassifier` is
`lsrs_jax.SmoothedClassifier`.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from lsrs_jax.smoothing import confidence
from lsrs_jax.smoothing.derivation import Certificates, certified_radius, from_counts

if TYPE_CHECKING:
    from lsrs_jax.smoothing.api import certify, predict
    from lsrs_jax.smoothing.composition import compose
    from lsrs_jax.smoothing.first_layer import FirstLayer
    from lsrs_jax.smoothing.sampler import Sampler

__all__ = [
    "Certificates",
    "FirstLayer",
    "Sampler",
    "certified_radius",
    "certify",
    "compose",
    "confidence",
    "from_counts",
    "predict",
]

_LAZY = dict.fromkeys(("certify", "predict"), f"{__name__}.api") | {
    "Sampler": f"{__name__}.sampler",
    "FirstLayer": f"{__name__}.first_layer",
    "compose": f"{__name__}.composition",
}
_LAZY["SmoothedClassifier"] = "lsrs_jax.api.classifier"  # its place in earlier versions was here


def __getattr__(name: str) -> Any:
    if name == "Votes":
        warnings.warn("smoothing.Votes is now Sampler, whose `keys` takes the key", DeprecationWarning, stacklevel=2)
        name = "Sampler"
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
