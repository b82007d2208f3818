"""Reads PyTorch checkpoint files of the field, weights only: nothing in a file is executed."""

import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lsrs_jax.pytorch.library import load_torch
from lsrs_jax.runtime.errors import UserError, first_line, out_of_memory
from lsrs_jax.runtime.validate import choice

_PARALLEL = re.compile(r"^(module\.)+")  # what DataParallel puts in front of every name
_SHOWN = 3  # names in a message
_NORMALIZE = ("cifar10", "imagenet")


def read_checkpoint(
    path: "str | os.PathLike[str]", arch: str | Callable[[], Any] | None = None, *, normalize: str | None = None
) -> Any:
    """Reads a file of `torch.save` and returns the network, a `torch.nn.Module` on the CPU in eval mode.

    Args:
      path: a dict with ``state_dict`` and perhaps ``arch``, as the field's training scripts write it, or a bare
        state_dict. Names may have the prefix ``module.`` of DataParallel, and ``1.`` of a network behind a
        normalisation layer in a Sequential, in any order.
      arch: ``"cifar_resnet20"``, ``"cifar_resnet110"``, ``"resnet50"``, a denoiser (``"cifar_dncnn"``,
        ``"cifar_dncnn_wide"``, ``"imagenet_dncnn"``), or a function without arguments that makes a module. None: the
        name that the file gives.
      normalize: ``"cifar10"`` or ``"imagenet"``: puts the layer ``(x - mean) / std`` in front. None: as the file says.
        If its names have the prefix ``1.``, the numbers come from its ``0.mean`` and ``0.std``, or else are those of
        the data set of `arch`; without such a prefix there is no layer.

    The number of classes is that of the file. Raises UserError for a file that is no checkpoint, is not whole, holds
    more than weights, or has other names or shapes than the network.

    **Guarantee**: the file is read by ``torch.load(weights_only=True)``, which makes tensors and plain values only.
    """
    torch = load_torch("read_checkpoint")
    from lsrs_jax.pytorch.architectures import ARCHITECTURES, NORMALIZATION, STATISTICS, Normalize

    if normalize is not None:
        choice("normalize", normalize, _NORMALIZE)
    stored, named = _load(torch, path)
    if arch is None and named is None:
        raise UserError(
            f"{path} does not name its architecture: give arch, one of {', '.join(ARCHITECTURES)}, or your own"
        )
    arch = named if arch is None else arch
    if not callable(arch):
        choice("arch", arch, ARCHITECTURES)
        if named in ARCHITECTURES and named != arch:
            raise UserError(f"{path} holds a {named}, not a {arch}")
    network = arch() if callable(arch) else ARCHITECTURES[str(arch)](_num_classes(stored))
    if not isinstance(network, torch.nn.Module):
        raise UserError(f"arch must make a torch.nn.Module, it made a {type(network).__name__}")
    weights, statistics = _matching(path, stored, network.state_dict())
    _fill(path, network, weights)
    if statistics is None and normalize is None:
        return network.eval()
    if statistics:
        front = Normalize(*_read_statistics(path, statistics))
        if normalize is not None and not _equal(front, Normalize(*STATISTICS[normalize])):
            raise UserError(f"{path} holds another normalisation than that of {normalize}: leave normalize out")
    else:
        name = normalize or NORMALIZATION.get(str(arch))
        if name is None:
            what = "names a normalisation layer in front of the network, without its numbers"
            raise UserError(f"{path} {what}: give normalize, {' or '.join(_NORMALIZE)}")
        front = Normalize(*STATISTICS[name])
    return torch.nn.Sequential(front, network).eval()


def _load(torch: Any, path: Any) -> tuple[dict[str, Any], str | None]:
    """The state_dict of a file, and the name of its architecture or None."""
    try:
        with warnings.catch_warnings(action="ignore"):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or first_line(error)}") from error
    except Exception as error:  # torch raises many kinds for files that are damaged or hold code
        if out_of_memory(error):
            raise
        raise UserError(_refusal(path, error)) from error
    named = found.get("arch") if isinstance(found, Mapping) else None
    stored = found.get("state_dict", found) if isinstance(found, Mapping) else None
    if not isinstance(stored, Mapping) or not stored or not all(isinstance(name, str) for name in stored):
        raise UserError(f"{path} is no checkpoint: it holds no state_dict")
    wrong = [name for name, tensor in stored.items() if not isinstance(tensor, torch.Tensor)]
    if wrong:
        raise UserError(f"{path} is no checkpoint: {wrong[0]!r} is no tensor, and there is no state_dict")
    return dict(stored), named if isinstance(named, str) else None


def _refusal(path: Any, error: Exception) -> str:
    found = re.search(r"(?:GLOBAL|global:? GLOBAL|function) (\w+\.[\w.]+)", str(error))
    if "weights_only" in str(error).lower() or "Unsupported" in str(error):
        what = f" ({found.group(1)})" if found else ""
        remedy = "save it again with torch.save({'arch': ..., 'state_dict': model.state_dict()}, file)"
        return f"{path} is no checkpoint, or holds more than weights{what}, which is never loaded: {remedy}"
    return f"{path} is no checkpoint of PyTorch, or not whole: {first_line(error)}"


def _num_classes(stored: Mapping[str, Any]) -> int:
    """The number of rows of the last linear layer, or 10 where the file has none."""
    sizes = [len(tensor) for name, tensor in stored.items() if name.endswith("fc.weight") and tensor.ndim == 2]
    return sizes[0] if sizes else 10


def _matching(path: Any, stored: dict[str, Any], expected: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """The weights under the names of the network, and the tensors of a normalisation layer in front of it.

    The latter are None where the names speak of no such layer.
    """
    plain = {_PARALLEL.sub("", name): tensor for name, tensor in stored.items()}
    behind = {_PARALLEL.sub("", name[2:]): tensor for name, tensor in plain.items() if name.startswith("1.")}
    front = {name[2:]: tensor for name, tensor in plain.items() if name.startswith("0.")}
    for weights, statistics in ((stored, None), (plain, None), (behind, front)):
        one_each = len(weights) + len(statistics or ()) == len(stored)  # no two names became one
        if one_each and _names(weights) == _names(expected):
            return weights, statistics
    found = max((stored, plain, behind), key=lambda weights: len(_names(weights) & _names(expected)))
    missing, unexpected = _names(expected) - _names(found), _names(found) - _names(expected)
    parts = [f"{what} {_some(names)}" for what, names in (("missing", missing), ("unexpected", unexpected)) if names]
    raise UserError(f"{path} does not have the names of this network: {'; '.join(parts) or 'it holds some twice'}")


def _names(tensors: Iterable[str]) -> set[str]:
    """The names that must be there: batch norm counts its training steps only in newer files."""
    return {name for name in tensors if not name.endswith("num_batches_tracked")}


def _some(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


def _fill(path: Any, network: Any, weights: dict[str, Any]) -> None:
    expected = network.state_dict()
    for name, tensor in weights.items():
        if name in expected and tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            raise UserError(f"{path} does not have the shapes of this network: {name} is {shapes}")
    try:
        network.load_state_dict({name: tensor for name, tensor in weights.items() if name in expected}, strict=False)
    except Exception as error:  # sparse tensors, and those without data
        raise UserError(f"{path} has weights that cannot be copied into the network: {first_line(error)}") from error


def _read_statistics(path: Any, statistics: dict[str, Any]) -> tuple[Any, Any]:
    means = [tensor for name, tensor in statistics.items() if "mean" in name]
    deviations = [tensor for name, tensor in statistics.items() if name.startswith(("std", "sd"))]
    known = len(statistics) == 2 and len(means) == len(deviations) == 1
    if not known or means[0].numel() != deviations[0].numel():
        found = ", ".join(f"0.{name}" for name in sorted(statistics))
        raise UserError(f"{path} has a normalisation layer other than one mean and one std per channel: {found}")
    return means[0], deviations[0]


def _equal(one: Any, other: Any) -> bool:
    return one.mean.shape == other.mean.shape and bool(((one.mean == other.mean) & (one.std == other.std)).all())
