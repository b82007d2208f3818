"""A PyTorch module as a head through `jax.pure_callback`: slower than an import, but for any module."""

import copy
import hashlib
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax.pytorch.library import check_module, load_torch
from lsrs_jax.runtime.errors import UserError, first_line
from lsrs_jax.runtime.validate import is_whole


class TorchCallback:
    """A head ``(B, …)`` float32 → logits ``(B, K)`` float32 that calls a module of PyTorch on the host.

    It is made by `torch_callback`. `digest` tells modules apart: their parameters are not in the JAX program.
    """

    def __init__(self, torch: Any, module: Any, num_classes: int, layout: str) -> None:
        self.num_classes, self.layout, self.digest = num_classes, layout, digest(torch, module, layout)
        self._torch, self._module, self._lock = torch, module, threading.Lock()
        tensors = [*module.parameters(), *module.buffers()]
        self._device, self._tried = tensors[0].device if tensors else "cpu", set()

    def __call__(self, x: Any) -> jax.Array:
        """Logits of inputs ``(B, …)``; vectorised by `jax.vmap`, without derivatives."""
        x = jnp.asarray(x, jnp.float32)
        if self.layout == "NHWC":
            if x.ndim != 4:
                raise UserError(f'layout="NHWC" is for images (B, H, W, C), got {x.shape}')
            x = jnp.transpose(x, (0, 3, 1, 2))
        shape = x.shape[1:]
        if shape not in self._tried:  # an error here is one line; in a callback it is a traceback
            self._logits(np.zeros((2, *shape), np.float32))
            self._tried.add(shape)
        result = jax.ShapeDtypeStruct((x.shape[0], self.num_classes), jnp.float32)

        def host(rows: Any) -> np.ndarray:
            rows = np.asarray(rows)
            batch = rows.shape[: rows.ndim - len(shape)]
            return self._logits(rows.reshape(-1, *shape)).reshape(*batch, self.num_classes)

        return jax.pure_callback(host, result, x, vmap_method="expand_dims")

    def _logits(self, rows: np.ndarray) -> np.ndarray:
        """Logits of rows on the host, one call at a time: a module may keep intermediate results in itself."""
        with self._lock, self._torch.inference_mode():
            found = self._module(self._torch.from_numpy(np.array(rows)).to(self._device))
        if not isinstance(found, self._torch.Tensor) or tuple(found.shape) != (len(rows), self.num_classes):
            shape = tuple(found.shape) if isinstance(found, self._torch.Tensor) else type(found).__name__
            raise UserError(f"the module must return logits {(len(rows), self.num_classes)}, got {shape}")
        return np.ascontiguousarray(found.float().cpu().numpy())


def torch_callback(module: Any, num_classes: int, *, layout: str = "NCHW") -> TorchCallback:
    """Makes a head of any PyTorch module in eval mode, which is called on the host for every batch of samples.

    Args:
      module: a `torch.nn.Module` that returns logits ``(B, num_classes)``. It is copied: later changes of its
        parameters do not change the head.
      num_classes: K.
      layout: what the caller of the head passes: ``"NCHW"``, as the module takes it, or ``"NHWC"``.

    The head works inside `jax.jit`, loops and `shard_map`; it has no gradient. `head.digest` covers the layout, the
    modules with their code and hyperparameters, and the state_dict. What a module keeps elsewhere (a tensor that is not
    registered, an attribute that it does not print, a function that ``forward`` calls) is not in the digest. Another
    version of Python may compile the code otherwise, and so give another digest.

    Raises UserError for a module in training mode, or one that cannot be copied.

    **Guarantee**: that of any head: the sampler checks that rows are independent and deterministic. Prefer
    `from_torch`: it is faster, and what it returns is one fixed function.
    """
    torch = load_torch("torch_callback")
    check_module(torch, module, layout)
    if not is_whole(num_classes) or num_classes < 2:
        raise UserError(f"num_classes must be a whole number >= 2, got {num_classes!r}")
    try:
        own = copy.deepcopy(module).requires_grad_(False)
    except Exception as error:  # whatever a part of the module raises
        raise UserError(f"torch_callback cannot copy the module: {first_line(error)}") from error
    return TorchCallback(torch, own, int(num_classes), layout)


def digest(torch: Any, module: Any, layout: str) -> str:
    """SHA-256 of the layout, the modules inside a module, their code and hyperparameters, and of its state_dict.

    Of a module: name, class, what it prints about itself, and the code of its ``forward``. Of the state_dict: names,
    types, shapes and bytes.
    """
    total = hashlib.sha256(f"{layout} {type(module).__module__}\n{module!r}\n".encode())
    for name, part in module.named_modules():
        total.update(f"{name} {type(part).__module__}.{type(part).__qualname__}\n".encode())
        code = getattr(type(part).forward, "__code__", None)
        if code is not None:
            total.update(code.co_code + repr((code.co_names, _constants(code))).encode())
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"the state_dict holds {name!r}, a {type(tensor).__name__}: only tensors have a digest")
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + flat.numpy().tobytes())
    return total.hexdigest()


def _constants(code: Any) -> list[Any]:
    """The constants of a function's code; those of functions inside it by their code."""

    def plain(constant: Any) -> Any:
        if hasattr(constant, "co_code"):
            return constant.co_code, constant.co_names, _constants(constant)
        return sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant)

    return [plain(constant) for constant in code.co_consts]
