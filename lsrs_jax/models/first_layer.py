"""The first layer of this package's heads, for `smoothing.first_layer`: split off without changing their modules."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax.layers import Normalize
from lsrs_jax.models.flops import flops
from lsrs_jax.models.heads import BlocksHead, BottleneckHead, ConvHead, Head, MLPHead, ResNetHead
from lsrs_jax.smoothing.first_layer import FirstLayer, SplitHead


def first_layer_name(head: nn.Module) -> str | None:
    """The name of the linear layer that alone reads the latent; None if the head does not begin with one."""
    if type(head) is MLPHead and head.widths:  # a subclass may do something else first
        return "Dense_0"
    if type(head) is BlocksHead:  # space-to-depth may come first
        begins = bool(head.widths) and head.strides[0] == 1 and head.widths[0] > 0
    else:
        begins = type(head) is ConvHead or (type(head) in (ResNetHead, BottleneckHead) and getattr(head, "stem", False))
    return "Conv_0" if begins else None


def first_layer_flops(head: nn.Module, params: Any, shape: tuple[int, ...]) -> float:
    """FLOPs of the first layer for one latent of this shape; 0 if the head does not begin with a linear layer.

    The parameters may be shapes.
    """
    name = first_layer_name(head)
    if name is None:
        return 0.0
    layer = FirstLayer(np.zeros(params[name]["kernel"].shape), None, **_given(head, name, params, shape))
    return float(flops(layer, jax.ShapeDtypeStruct((1, *shape), jnp.float32)))


def split_head(module: nn.Module, params: Any, shape: tuple[int, ...], whole: Head, dtype: str, front: Any) -> Head:
    """The head `whole` as a `SplitHead` if it begins with a linear layer; otherwise `whole` itself.

    `module` and `params` are those of the head, which computes in `dtype` on latents of this shape. `front` is the
    normalisation between the noise and the head, or None. It becomes part of the first layer: W·(x − m)/s + b is linear
    in x. (Where a convolution pads the normalised image with zeros, its bias differs at the border.)
    """
    name = first_layer_name(module)
    if name is None:
        return whole
    found, own = _given(module, name, params, shape), params[name]
    layer = FirstLayer(np.asarray(own["kernel"]), own.get("bias"), **found)
    if front is not None:
        layer = _folded(layer, front, shape)
    others = {part: values for part, values in params.items() if part != name}
    return SplitHead(layer, functools.partial(_rest, module, name, others, shape, dtype), whole)


def _rest(module: nn.Module, name: str, params: Any, shape: tuple[int, ...], dtype: str, outputs: jax.Array) -> Any:
    """The head behind its first layer, whose outputs replace those of the module of that name."""

    def replaced(function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        return outputs.astype(dtype) if context.module.path == (name,) else function(*args, **kwargs)

    with nn.intercept_methods(replaced):
        variables = {"params": jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)}
        logits: Any = module.apply(variables, jnp.zeros((len(outputs), *shape), dtype))
        return logits.astype(jnp.float32)


def _given(module: nn.Module, name: str, params: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """Strides and padding of the layer of this name; nothing for a dense one."""
    found: dict[str, Any] = {}

    def noted(function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.module.path == (name,) and isinstance(conv := context.module, nn.Conv):
            found.update(strides=conv.strides or (1, 1), padding=conv.padding)
        return function(*args, **kwargs)

    with nn.intercept_methods(noted):
        jax.eval_shape(module.apply, {"params": params}, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    return found


def _folded(layer: FirstLayer, front: Normalize, shape: tuple[int, ...]) -> FirstLayer:
    """The layer behind a normalisation of the last axis, as one layer."""
    mean, scale = np.asarray(front.mean, np.float64), 1 / np.asarray(front.std, np.float64)
    mean, scale = (np.broadcast_to(values, shape) for values in (mean, scale))
    dense = layer.kernel.ndim == 2
    kernel = layer.kernel * (scale.reshape(-1, 1) if dense else scale[0, 0][:, None])
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        constant = np.asarray(FirstLayer(kernel, None, layer.strides, layer.padding)(jnp.asarray(mean[None])))[0]
    # Rounded, so that the order in which a machine adds does not matter.
    return FirstLayer(kernel, (layer.bias - constant).astype(np.float32), layer.strides, layer.padding)
