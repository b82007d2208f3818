"""PyTorch classifiers as JAX functions: import through `torch.export`, a callback, and the field's checkpoint files.

All names are loaded when they are first used, and PyTorch itself inside the functions that need it (extra ``torch``).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsrs_jax.pytorch.callback import torch_callback
    from lsrs_jax.pytorch.checkpoint_file import read_checkpoint
    from lsrs_jax.pytorch.importer import Imported, from_torch

__all__ = ["Imported", "from_torch", "read_checkpoint", "torch_callback"]

_LAZY = {
    "Imported": "importer",
    "from_torch": "importer",
    "read_checkpoint": "checkpoint_file",
    "torch_callback": "callback",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
