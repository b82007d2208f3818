"""PyTorch itself, and what both ways to use a module check before they begin."""

import importlib
from typing import Any

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.validate import choice

LAYOUTS = ("NCHW", "NHWC")


def load_torch(what: str) -> Any:
    """The module torch; raises UserError if it is not installed. `what` says what needs it."""
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise UserError(f"{what} needs the extra torch of lsrs_jax: pip install torch ({error})") from error


def check_module(torch: Any, module: Any, layout: Any) -> None:
    """Raises UserError unless `module` is a module in eval mode and `layout` a layout."""
    choice("layout", layout, LAYOUTS)
    if not isinstance(module, torch.nn.Module):
        raise UserError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    for name, part in module.named_modules():
        if part.training:
            where = f"its part {name!r} is" if name else "it is"
            raise UserError(f"the module must be in eval mode, but {where} in training mode: call module.eval() first")
