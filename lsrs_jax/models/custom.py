"""Networks that are not part of this package: code that a user names, and heads that a library registers.

Files never execute code. The name of a class in a stored configuration is imported only inside `allowing`, for names
that the user has typed; its digest tells whether it is still the code of the training.
"""

import contextlib
import contextvars
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn

from lsrs_jax.config import TORCH
from lsrs_jax.models import torch_head
from lsrs_jax.models.heads import HEADS
from lsrs_jax.runtime.errors import UserError, reason
from lsrs_jax.runtime.types import Config

_allowed: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("allowed", default=())
REGISTERED: dict[str, Callable[[int], nn.Module]] = {}  # heads by name


def register_head(name: str, make: Callable[[int], nn.Module]) -> None:
    """Adds a head under a plain name to those of ``model.head``: `make` gets the number of classes.

    For libraries, which call it when they are imported. Raises UserError for a name that is taken or not plain.
    """
    if not name.isidentifier() or name in HEADS or REGISTERED.get(name, make) is not make:
        raise UserError(f"a head cannot be registered as {name!r}: it must be a new plain name")
    REGISTERED[name] = make


@contextlib.contextmanager
def allowing(names: Sequence[str]) -> Iterator[None]:
    """Allows the import of code that the user has named: ``package.module:Class`` or ``path/to/file.py:Class``.

    A name without a class is a module, imported here, such as a library that registers heads. The name of a PyTorch
    network may begin with ``torch:``, as in the configuration.
    """
    for name in names:
        if not all(name.rpartition(":")[::2] if ":" in name else [name]):
            raise UserError(f"--allow-code={name} names no code: give package.module:Class, FILE.py:Class or a module")
        if ":" not in name:
            _import_module(name)
    token = _allowed.set((*_allowed.get(), *filter(None, map(_code_in, names))))
    try:
        yield
    finally:
        _allowed.reset(token)


def is_code(name: str) -> bool:
    """Whether a name in a configuration is that of a class or function in a module or file."""
    return bool(_code_in(name))


def _code_in(name: str) -> str:
    """The code that a name in a configuration stands for, without ``torch:``; "" if it is a name of this package."""
    code = name.removeprefix(TORCH)
    return code if ":" in code else ""


def code_of(model: Config) -> list[str]:
    """The names of code in a section ``model``."""
    return list(filter(None, (_code_in(model[part]) for part in ("encoder", "head"))))


def typed_code(config: Config) -> contextlib.AbstractContextManager[None]:
    """`allowing` for the code in a configuration that the user gives now; stores its digests in the configuration."""
    names = code_of(config.model)
    with config.unlocked():
        for part in ("encoder", "head"):
            name = _code_in(config.model[part])
            config.model[f"{part}_digest"] = _digest(_source(name)) if name else ""
    return allowing(names)


def make(model: Config, part: str, **offered: Any) -> nn.Module:
    """The module that ``model.<part>`` names, called with ``model.<part>_args``.

    It also gets those of the `offered` arguments that it accepts, and that are not given. A class of NNX, and a PyTorch
    network, is wrapped into a module of Linen. Raises UserError for code that is not allowed, missing, changed, or that
    fails.
    """
    name, stored = model[part], model[f"{part}_digest"]
    if (is_torch := name.startswith(TORCH)) and part != "head":
        raise UserError(f"model.{part}={name}: a PyTorch network can be a head only, it has no proven constant")
    chosen = _chosen(_code_in(name), stored)
    if is_torch:  # before the code, which imports it
        torch_head.require_torch(name)
    made = resolve(chosen)
    given = arguments(model[f"{part}_args"])
    with errors_of(f"model.{part}={name}"):
        nnx = sys.modules.get("flax.nnx")  # imported if a class of it was; it takes 0.2 s
        is_nnx = nnx is not None and isinstance(made, type) and issubclass(made, nnx.Module)
        accepted = inspect.signature(made.__init__ if is_nnx else made).parameters
        given = {key: value for key, value in offered.items() if key in accepted} | given
        if is_nnx:
            from lsrs_jax.models.nnx_head import NnxModule

            return NnxModule(made, tuple(sorted(given.items())))
        if is_torch:
            built = functools.partial(made, **given)
            return torch_head.make_head(name, built, offered["num_classes"], offered["latent_shape"])
        module = made(**given)
    if not isinstance(module, nn.Module):
        what = f"must be a module of Flax (Linen or NNX), got {type(module).__name__}"
        raise UserError(f"model.{part}={name} {what}; a head of PyTorch is {TORCH}{name}")
    return module


@contextlib.contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Makes one line of an error of the user's code."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise UserError(f"{name} failed: {reason(error)}") from error


def arguments(text: str) -> dict[str, Any]:
    """The keyword arguments in a field ``…_args``, a JSON object; raises UserError for anything else."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"arguments must be a JSON object such as '{{\"width\": 32}}', got {text!r}: {error}"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"arguments must be a JSON object such as '{{\"width\": 32}}', got {text!r}")
    return {key: _hashable(value) for key, value in found.items()}


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _chosen(name: str, stored: str) -> str:
    """The name that the user has typed for the code `name` with the digest `stored`."""
    typed, class_ = _allowed.get(), name.rpartition(":")[2]
    for own in typed:
        if own.rpartition(":")[2] == class_ and (own == name or _digest(_source(own)) == stored):
            if stored and _digest(_source(own)) != stored:
                raise UserError(f"the code {own} has changed since the training: its digest is another one; restore it")
            return own
    raise UserError(
        f"the network is code, {name}, which is not imported because a file names it: if you trust it, give "
        f"--allow-code={name} (in Python allow_code=[{name!r}])"
    )


def _source(name: str) -> Path:
    """The file of the code with this name."""
    where = name.rpartition(":")[0]
    if where.endswith(".py"):
        path = Path(where).expanduser()
    else:
        try:
            spec = importlib.util.find_spec(where)
        except (ImportError, ValueError) as error:
            raise UserError(f"no module {where!r} for {name} ({error})") from error
        path = Path(spec.origin) if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(f"there is no file with the code {name}: check the path, or install the package")
    return path


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _import_module(name: str) -> ModuleType:
    with errors_of(f"the import of {name}"):
        return importlib.import_module(name)


def resolve(name: str) -> Any:
    """Imports what a name of code stands for; the user must have typed the name on this command line."""
    where, _, attribute = name.rpartition(":")
    if where.endswith(".py"):
        path = _source(name).resolve()
        key = f"lsrs_jax_code_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module  # dataclasses, and so Linen, look their module up
        with errors_of(f"the import of {where}"):
            spec.loader.exec_module(module)
    else:
        module = _import_module(where)
    if not hasattr(module, attribute):
        raise UserError(f"{where} has no {attribute!r}")
    return getattr(module, attribute)
