"""A PyTorch network as a head: the program of `lsrs_jax.from_torch`, with its parameters as a plain tree of arrays.

PyTorch makes the network and its program, when a model is built. Training, sampling and attacks run without it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax.config import TORCH
from lsrs_jax.runtime.errors import NotHere, UserError, reason

_SIDES = {"cifar_resnet20": 32, "cifar_resnet110": 32}  # of images; the other architectures take any size
_CHANNELS = 3  # of the images of every architecture
_SHIFTS = 0, 8, 16, 24
_PLACE = "head", "torch"  # of the arrays among the parameters of a model
Tree = dict[str, dict[str, Any]]  # {"parameters": …, "buffers": …}, as in `Imported.params`


class TorchHead(nn.Module):
    """A PyTorch classifier in eval mode behind a normalisation ``(x - mean) / std``, on latents ``(B, H, W, C)``.

    Its parameters are ``{"torch": {"parameters": {name: array}, "buffers": {name: array}}}``, all float32; a buffer of
    whole numbers has one more axis, of their four bytes. The names are those of a Sequential: ``0.mean`` and ``0.std``
    of the normalisation, and ``1.`` in front of those of the network. New parameters are those that PyTorch draws, with
    a seed from the key; the normalisation is the identity. Buffers, such as the statistics of batch normalization, have
    no gradient.

    The network computes in float32. On latents and parameters of another dtype it computes with their values.
    """

    label: str  # the value of model.head
    architecture: str  # the name of one of `pytorch.architectures`, or "" for code of the user
    make: Callable[[], Any]  # the network, with new parameters
    imported: Any  # the `Imported` of normalisation and network

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        stored = self.imported.params
        values = self.param("torch", functools.partial(_draw, self.make, stored))
        return self.imported.apply(jax.tree.map(_decoded, values, stored), z)


def is_buffer(path: Sequence[Any]) -> bool:
    """Whether the leaf of a model's parameters at this path is a buffer of a `TorchHead`."""
    return tuple(entry.key for entry in path[:3]) == (*_PLACE, "buffers")


def is_kernel(path: Sequence[Any], leaf: Any) -> bool:
    """Whether the leaf is the kernel of a convolution or a linear layer of a `TorchHead`.

    PyTorch also calls the scale of a normalisation ``weight``, which has one axis.
    """
    keys = tuple(entry.key for entry in path)
    return keys[:3] == (*_PLACE, "parameters") and keys[-1].endswith("weight") and np.ndim(leaf) > 1


def of_architecture(label: str, num_classes: int, latent_shape: tuple[int, ...]) -> TorchHead:
    """The head ``torch:NAME``; raises UserError for an unknown name, or a latent that the architecture cannot take."""
    require_torch(label)
    from lsrs_jax.pytorch.architectures import ARCHITECTURES, NORMALIZATION

    name = label.removeprefix(TORCH)
    if name not in NORMALIZATION:
        known = ", ".join(f"{TORCH}{known}" for known in sorted(NORMALIZATION))
        raise UserError(
            f"model.head={label} is no network: give {known}, or {TORCH}FILE.py:FUNCTION or "
            f"{TORCH}package.module:FUNCTION for your own code"
        )
    side = _SIDES.get(name)
    sides = (side, side) if side else latent_shape[:2]
    if latent_shape != (*sides, _CHANNELS):
        size = f"of {side}x{side} pixels " if side else ""
        found = "x".join(map(str, latent_shape))
        raise UserError(f"model.head={label} takes images {size}with {_CHANNELS} channels, the latent is {found}")
    return make_head(label, functools.partial(ARCHITECTURES[name], num_classes), num_classes, latent_shape, name)


def make_head(
    label: str, make: Callable[[], Any], num_classes: int, latent_shape: tuple[int, ...], architecture: str = ""
) -> TorchHead:
    """The head of the network that `make` returns, for latents of this shape.

    Raises UserError for a network that fails or cannot be imported, and NotHere without PyTorch.
    """
    torch = require_torch(label)
    if len(latent_shape) != 3:
        raise UserError(f"model.head={label} takes a latent (H, W, C), not {latent_shape}: use another encoder")
    network = _seeded(torch, make, 0)
    if not isinstance(network, torch.nn.Module):
        raise UserError(f"model.head={label} must make a torch.nn.Module, it made a {type(network).__name__}")
    imported = _imported(torch, f"model.head={label}", network, None, latent_shape)
    if imported.num_classes != num_classes:
        found = f"{imported.num_classes} logits, the data has {num_classes} classes"
        raise UserError(f"model.head={label} returns {found}: take num_classes as an argument")
    return TorchHead(label, architecture, make, imported)


def read_parameters(head: TorchHead, path: Path) -> dict[str, Tree]:
    """The parameters of a head from a checkpoint file of the field (`lsrs_jax.pytorch.read_checkpoint`).

    A normalisation in front of the network in the file becomes that of the head. Raises UserError for a file that does
    not fit the head, by names, shapes, or the program that results.

    **Guarantee**: of the file, only weights are loaded, and nothing is executed. The head then computes what PyTorch
    computes with these weights, as far as `from_torch` checks it.
    """
    torch = require_torch(head.label)
    from lsrs_jax.pytorch import read_checkpoint

    made: list[Any] = []

    def make() -> Any:
        made.append(_seeded(torch, head.make, 0))  # also for buffers that no file holds
        return made[-1]

    found = read_checkpoint(path, head.architecture or make)
    in_front = isinstance(found, torch.nn.Sequential) if head.architecture else found is not made[-1]
    front, network = found if in_front else (None, found)
    shape = head.imported.input_shape
    if front is not None and front.mean.numel() not in (1, shape[-1]):
        sizes = f"{front.mean.numel()} channels, the latent has {shape[-1]}"
        raise UserError(f"{path} does not fit model.head={head.label}: it normalises {sizes}")
    given, own = network.state_dict(), _seeded(torch, head.make, 0).state_dict()
    for name, tensor in own.items():
        if (found_shape := tuple(given[name].shape)) != tuple(tensor.shape):
            what = f"{name} has the shape {found_shape}, not {tuple(tensor.shape)}"
            raise UserError(f"{path} does not fit model.head={head.label}: {what}")
    loaded = _imported(torch, str(path), network, front, shape)
    if loaded.steps != head.imported.steps or loaded.tensors != head.imported.tensors:
        raise UserError(f"{path} does not fit model.head={head.label}: with its weights the network does other steps")
    return {"torch": jax.tree.map(_encoded, dict(loaded.params))}


def check_dtype(head: Any, field: str, dtype: str) -> None:
    """Raises UserError if the field of the configuration asks for a dtype that a `TorchHead` does not compute in."""
    if isinstance(head, TorchHead) and dtype != "float32":
        raise UserError(f"model.head={head.label} computes in float32: {field} must be float32, got {dtype}")


def require_torch(label: str) -> Any:
    """The module torch; raises NotHere if it is not installed."""
    from lsrs_jax.pytorch.library import load_torch

    try:
        return load_torch(f"model.head={label}")
    except UserError as error:
        raise NotHere(error) from error


def _seeded(torch: Any, make: Callable[[], Any], seed: int) -> Any:
    """A new network with the parameters of this seed; the state of PyTorch's generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _imported(torch: Any, name: str, network: Any, front: Any, latent_shape: tuple[int, ...]) -> Any:
    """The `Imported` of a network behind a normalisation, by default the identity."""
    from lsrs_jax.pytorch import from_torch
    from lsrs_jax.pytorch.architectures import Normalize

    height, width, channels = latent_shape
    mean, std = (torch.zeros(()), torch.ones(())) if front is None else (front.mean.flatten(), front.std.flatten())
    front = Normalize(mean.expand(channels).clone(), std.expand(channels).clone())
    module = torch.nn.Sequential(front, network).eval()
    images = torch.zeros(2, channels, height, width)
    try:
        with torch.inference_mode():
            module(images)
    except Exception as error:  # whatever the network raises
        raise UserError(f"{name} fails for a latent of shape {latent_shape}: {reason(error)}") from error
    try:
        return from_torch(module, images, layout="NHWC")
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _encoded(array: np.ndarray) -> np.ndarray:
    """An array as float32; of whole numbers the four bytes, which no dtype rounds."""
    if array.dtype == np.float32:
        return array
    words = array.astype(np.int64) % 2**32
    return np.stack([words >> shift & 255 for shift in _SHIFTS], axis=-1).astype(np.float32)


def _decoded(leaf: jax.Array, own: np.ndarray) -> jax.Array:
    """The array of `_encoded`, with the dtype of `own`."""
    if own.dtype == np.float32:
        return leaf.astype(jnp.float32)
    words = sum(leaf[..., byte].astype(jnp.uint32) << shift for byte, shift in enumerate(_SHIFTS))
    return jax.lax.bitcast_convert_type(words, jnp.int32).astype(own.dtype)


def _draw(make: Callable[[], Any], stored: Mapping[str, Mapping[str, Any]], key: jax.Array) -> Tree:
    """The parameters that PyTorch draws for a new network, also where JAX traces the call.

    Tensors that are no part of the module, such as constants of its code, are those of `stored`.
    """

    def on_host(words: Any) -> Tree:
        import torch

        seed = int.from_bytes(np.asarray(words).tobytes(), "little") % 2**63
        module = torch.nn.Sequential(torch.nn.Identity(), _seeded(torch, make, seed))
        tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}

        def drawn(name: str, own: Any) -> np.ndarray:
            return _encoded(tensors[name].detach().numpy().astype(own.dtype) if name in tensors else own)

        return {kind: {name: drawn(name, own) for name, own in leaves.items()} for kind, leaves in stored.items()}

    shapes = jax.tree.map(lambda own: jax.ShapeDtypeStruct(_encoded(own).shape, jnp.float32), dict(stored))
    return jax.pure_callback(on_host, shapes, jax.random.key_data(key))
