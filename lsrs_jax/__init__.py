"""Certified defence by latent-space randomized smoothing (LSRS) with orthogonal encoders.

A classifier is split into an encoder of orthogonal, 1-Lipschitz layers and a free head. Gaussian noise is added to
the latent between them, so that one pass of the encoder serves every noisy sample. The radius certified in the latent
is carried back to the image by the encoder's Lipschitz constant (Zeng, Su and Huang 2021; the bound is Cohen,
Rosenfeld and Kolter 2019).

Folders, each importing only those after it: the commands (`train`, `certify`, `audit`, `report`, `export`,
`show_config`, `show_data`; `cli` runs them), `api` (`SmoothedClassifier` and `load`), `reporting` (tables and curves),
`certification` (folders of certificates), `auditing` (attacks), `training`, `data`, `models` (encoder, head and both),
`pytorch` (PyTorch networks as heads), `layers` (Flax layers; `layers.lipschitz` proves their constant), `orthogonal`
(pure functions), `config` (fields and their meaning), `smoothing` (sampling and statistics for any JAX function),
`runtime` (files, errors, processes).
"""

import importlib
from typing import TYPE_CHECKING, Any

from lsrs_jax.runtime import moved

if TYPE_CHECKING:
    from lsrs_jax.api.classifier import SmoothedClassifier
    from lsrs_jax.api.loading import load
    from lsrs_jax.pytorch.importer import from_torch

__all__ = ["SmoothedClassifier", "from_torch", "load"]
__version__ = "0.1.0"

_LAZY = {
    "SmoothedClassifier": "lsrs_jax.api.classifier",
    "from_torch": "lsrs_jax.pytorch.importer",
    "load": "lsrs_jax.api.loading",
}

moved.redirect_imports()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
