"""Old import paths of public modules. They keep working, with a DeprecationWarning."""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "lsrs_jax.checkpoint": "lsrs_jax.training.checkpoint",
    "lsrs_jax.encoders": "lsrs_jax.models.encoders",
    "lsrs_jax.errors": "lsrs_jax.runtime.errors",
    "lsrs_jax.flops": "lsrs_jax.models.flops",
    "lsrs_jax.heads": "lsrs_jax.models.heads",
    "lsrs_jax.keys": "lsrs_jax.runtime.rng",
    "lsrs_jax.materialize": "lsrs_jax.layers.lipschitz",
    "lsrs_jax.smoothing.certificates": "lsrs_jax.smoothing.derivation",
    "lsrs_jax.smoothing.partition": "lsrs_jax.smoothing.confidence",
    "lsrs_jax.smoothing.radius": "lsrs_jax.smoothing.derivation",
    "lsrs_jax.span": "lsrs_jax.models.linear_head",
}
PUBLIC = {"lsrs_jax.margin": "lsrs_jax.certification.margin"}  # short names that stay


class _Redirect(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED | PUBLIC else None

    def exec_module(self, module: ModuleType) -> None:
        name, new = module.__name__, (MOVED | PUBLIC)[module.__name__]
        if name in MOVED:
            warnings.warn(f"{name} has moved to {new}", DeprecationWarning, stacklevel=2)
        sys.modules[name] = importlib.import_module(new)


def redirect_imports() -> None:
    """Lets Python find the modules of `MOVED` and `PUBLIC` under these names."""
    sys.meta_path.append(_Redirect())
