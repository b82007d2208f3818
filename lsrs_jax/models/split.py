"""Classifiers that are split at a latent into an encoder and a head.

With the encoder ``identity`` the noise is on the image: input-space randomized smoothing (ISRS, Cohen et al. 2019).
``noise="input"`` is ISRS of a split model: the same encoder and head, with the noise in front of both.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax import layers
from lsrs_jax.config import TORCH
from lsrs_jax.layers.lipschitz import Materialized, materialize, project
from lsrs_jax.models import batch_norm, custom, torch_head
from lsrs_jax.models.custom import REGISTERED, is_code
from lsrs_jax.models.encoders import BLOCKS, ENCODERS, Chain, Pair, blocks
from lsrs_jax.models.first_layer import first_layer_flops, split_head
from lsrs_jax.models.flops import flops
from lsrs_jax.models.heads import HEADS, BlocksHead, Head, Images, Latents, Logits
from lsrs_jax.models.linear_head import project_linear_head
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.types import Config
from lsrs_jax.runtime.validate import choice

Params = dict[str, Any]  # {"encoder": …, "head": …}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"maxmin": layers.MaxMin, "householder": layers.Householder}


@dataclasses.dataclass(frozen=True)
class Model:
    """A split classifier as pure functions of its parameters.

    The normalisation is part of the encoder and counts in its Lipschitz constant; under ISRS it follows the noise.
    """

    encoder: nn.Module  # a chain of orthogonal layers (`layers.Encoder`, empty for ISRS), or a caller's network of them
    head: nn.Module  # any Linen module (B, *latent_shape) -> (B, num_classes) with independent rows
    normalize: layers.Normalize | None  # per channel
    noise: str  # "latent" or "input"
    input_shape: tuple[int, ...]  # (H, W, C)
    training_head: nn.Module | None = None  # with batch normalisation, which `head` has folded into its layers
    head_dtype: str = "float32"  # or "bfloat16": the dtype in which `classify` computes the head; logits are float32

    @property
    def smooths_input(self) -> bool:
        return self.noise == "input" or not self._has_encoder

    @property
    def _has_encoder(self) -> bool:
        return not isinstance(self.encoder, layers.Encoder) or bool(self.encoder.layers)

    @property
    def in_training(self) -> "Model":
        """The model whose parameters are trained; batch normalisation in its head makes rows depend on each other."""
        if self.training_head is None:
            return self
        return dataclasses.replace(self, head=self.training_head, training_head=None)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters, float32."""
        encoder_key, head_key = jax.random.split(key)
        x = jnp.zeros((1, *self.input_shape), jnp.float32)
        # jit, because the many small operations that build a kernel take seconds to compile one by one.
        encoder = jax.jit(self.encoder.init)(encoder_key, x).get("params", {})
        latent = _traced(self)[1]
        head = jax.jit(self.head.init)(head_key, jnp.zeros(latent.shape, latent.dtype))
        return {"encoder": encoder, "head": head["params"]}

    def shapes(self, batch: int = 1) -> tuple[Params, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the parameters, and of a batch of the latents (under ISRS images) that get the noise."""
        params, latent = _traced(self)
        shape, dtype = (self.input_shape, jnp.float32) if self.smooths_input else (latent.shape[1:], latent.dtype)
        return params, jax.ShapeDtypeStruct((batch, *shape), dtype)

    def _normalized(self, x: Any) -> Any:
        return x if self.normalize is None else self.normalize.apply({}, x)

    def _encoded(self, params: Any, x: Any) -> Any:
        return self.encoder.apply({"params": params}, self._normalized(x))

    def _head_apply(self, params: Any, dtype: str, latents: jax.Array) -> Any:
        params = {"params": jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)}
        if batch_norm.is_training(self.head):
            return self.head.apply(params, latents, mutable=[batch_norm.STATISTICS])[0]
        return self.head.apply(params, latents)

    def encode(self, params: Params, images: Images) -> Latents:
        """Images in [0, 1] → the latents that get the noise (under ISRS the images themselves)."""
        return images if self.smooths_input else self._encoded(params["encoder"], images)

    def _latents_of_head(self, params: Params, noisy: Latents) -> Latents:
        return self._encoded(params["encoder"], noisy) if self.smooths_input else noisy

    def statistics(self, params: Params, noisy: Latents) -> Params:
        """Means and variances in the batch normalisation of a model `in_training`, for one batch."""
        latents, collection = self._latents_of_head(params, noisy), batch_norm.STATISTICS
        state: Any = self.head.apply({"params": params["head"]}, latents, mutable=[collection])[1]
        return state[collection]

    def classify(self, params: Params, noisy: Latents) -> Logits:
        """The base classifier on noisy latents (under ISRS on noisy images)."""
        base = self._latents_of_head(params, noisy)
        return _in_dtype(functools.partial(self._head_apply, params["head"], self.head_dtype), self.head_dtype)(base)

    def _materialized(self, params: Params) -> Materialized:
        """Normalisation and encoder as one chain of layers."""
        front, values = () if self.normalize is None else (self.normalize,), params["encoder"]
        if not isinstance(self.encoder, layers.Encoder):
            network = self.encoder if self.normalize is None else _Normalized(self.normalize, self.encoder)
            return layers.materialize_network(network, values if not front else {"encoder": values}, self.input_shape)
        named = {f"layers_{i + len(front)}": values.get(f"layers_{i}", {}) for i in range(len(self.encoder.layers))}
        return materialize(layers.Encoder((*front, *self.encoder.layers)), named, self.input_shape)

    def for_certification(self, params: Params, dtype: str = "float32") -> tuple[Materialized, Head]:
        """The encoder with its Lipschitz constant, and the classifier behind it as a pure function of latents.

        The classifier computes in `dtype`, ``"float32"`` or ``"bfloat16"``. Under ISRS the encoder is an empty chain
        with constant 1, and the kernels of a split model are built only once, here. In front of a linear head, the
        encoder ends with a projection onto the subspace of the head's weights (`linear_head.project_linear_head`).

        **Guarantee**: ``head(encoder.apply(·))`` without noise is the trained classifier up to float rounding; the
        certificate is about the functions returned here.
        """
        if batch_norm.is_training(self.head):
            raise UserError("batch normalisation makes rows depend on each other: certify the head with it folded in")
        whole = self._materialized(params)
        identity = materialize(layers.Encoder(), {}, self.input_shape)
        matrix = getattr(self.head, "matrix", None)
        if matrix and not (self.smooths_input and self._has_encoder):
            weights, bias = matrix(params["head"])
            if self.smooths_input and self.normalize is not None:
                fields = np.asarray(self.normalize.mean, np.float64), 1 / np.asarray(self.normalize.std, np.float64)
                mean, scale = (np.broadcast_to(values, self.input_shape).ravel() for values in fields)
                weights, bias = weights * scale[:, None], bias - (mean * scale) @ weights
            if len(weights) >= len(bias):
                small = project_linear_head(weights, bias)
                return project(identity if self.smooths_input else whole, small.basis), _in_dtype(small.head, dtype)
        head = functools.partial(self._head_apply, jax.tree.map(np.asarray, params["head"]), dtype)
        first = functools.partial(split_head, self.head, params["head"], whole.report.output_shape, dtype=dtype)
        if not self.smooths_input:
            return whole, first(_in_dtype(head, dtype), front=None)
        base = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), whole.params)
        behind = _in_dtype(lambda noisy: head(whole.apply(base, noisy)), dtype)
        return identity, behind if self._has_encoder else first(behind, front=self.normalize)

    def with_linear_head(self, params: Params) -> tuple[Materialized, np.ndarray, np.ndarray]:
        """Encoder (with normalisation), weights and bias of the head; raises UserError if the head is not linear."""
        matrix = getattr(self.head, "matrix", None)
        if not matrix:
            linear = ", ".join(name for name, head in HEADS.items() if hasattr(head, "matrix"))
            remedy = f"train with --config.model.head=NAME, one of {linear}"
            raise UserError(f"a deterministic certificate needs a linear head: {remedy}")
        return self._materialized(params), *matrix(params["head"])


@functools.lru_cache(32)  # a command asks for the shapes several times, and tracing takes tenths of a second
def _traced(model: Model) -> tuple[Params, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the parameters, and of the latent of one image."""

    def both(key: jax.Array, x: Images) -> Any:
        return model.encoder.init_with_output(key, model._normalized(x))

    key, image = jax.random.key(0), jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    latent, encoder = jax.eval_shape(both, key, image)
    head = jax.eval_shape(model.head.init, key, latent)
    return {"encoder": encoder.get("params", {}), "head": head["params"]}, latent


@functools.lru_cache(32)
def _check_shapes(model: Model, num_classes: int) -> None:
    """Shapes that do not fit raise here, before any computation."""
    logits = jax.eval_shape(model.classify, *model.shapes())
    if getattr(logits, "shape", None) != (1, num_classes):
        found = getattr(logits, "shape", type(logits).__name__)
        raise UserError(f"the head returns {found} for one image, and not {num_classes} logits, one per class")


class _Normalized(nn.Module):
    """A normalisation in front of a caller's network."""

    normalize: layers.Normalize
    encoder: nn.Module

    def __call__(self, x: Images) -> Latents:
        return self.encoder(self.normalize(x))


def _in_dtype(function: Head, dtype: str) -> Head:
    """The same function in `dtype`: it casts the noisy latents to `dtype`, and the logits back to float32."""
    return function if dtype == "float32" else lambda noisy: function(noisy.astype(dtype)).astype(jnp.float32)


def build(config: Config, input_shape: tuple[int, ...], num_classes: int) -> Model:
    """Makes the `Model` of the section ``model``; raises UserError for unknown names and shapes that do not fit."""
    encoders, heads = ENCODERS | BLOCKS, HEADS | {"blocks": BlocksHead} | REGISTERED
    if num_classes < 2:
        raise UserError(f"the data has {num_classes} class: a classifier needs at least two")
    choice("model.activation", config.activation, sorted(ACTIVATIONS))
    for part, known in (("encoder", encoders), ("head", heads)):
        of_torch = part == "head" and config[part].startswith(TORCH)
        if not is_code(config[part]) and not of_torch:
            choice(f"model.{part}", config[part], sorted(known))
    _check_blocks(config)
    choice("model.noise", config.noise, ("latent", "input"))
    widths, strides, split = tuple(config.widths), tuple(config.strides), config.split
    mean, std = tuple(map(float, config.mean)), tuple(map(float, config.std))
    normalize = None if (mean, std) == ((0.0,), (1.0,)) else layers.Normalize(mean, std)
    if is_code(config.encoder):
        encoder = custom.make(config, "encoder", input_shape=tuple(input_shape))
    else:
        encoder = layers.Encoder(_encoder_layers(config, input_shape[2]))
    latent_shape: tuple[int, ...] = ()
    if is_code(config.encoder) or config.head not in heads:  # code of others must return one array
        latent_shape = _latent_shape(encoder, input_shape, f"model.encoder={config.encoder}")
    if config.head in heads:
        sizes = {"blocks": (widths[split:], strides[split:]), "mlp": (config.head_widths,)}
        head = heads[config.head](num_classes, *sizes.get(config.head, ()))
    elif is_code(config.head):
        head = custom.make(config, "head", num_classes=num_classes, latent_shape=latent_shape)
    else:
        head = torch_head.of_architecture(config.head, num_classes, latent_shape)
    training_head = None
    if config.head_norm == "batch":
        head, training_head = batch_norm.variants(head, config.head)
    model = Model(encoder, head, normalize, config.noise, tuple(input_shape), training_head)
    with custom.errors_of(f"model.head={config.head}") if config.head not in heads else contextlib.nullcontext():
        _check_shapes(model, num_classes)
    return model


def _encoder_layers(config: Config, channels: int) -> Chain:
    """The layers of an encoder of this package, for images with so many channels."""

    def make(channels: int, kernel_size: Pair, strides: Pair) -> Chain:
        family = {"method": config.method, "initializer": config.initializer, "padding": config.padding}
        return layers.OrthogonalConv(channels, kernel_size, strides, **family), ACTIVATIONS[config.activation]()

    if config.encoder not in BLOCKS:
        return ENCODERS[config.encoder](make, channels)
    widths, strides, split = tuple(config.widths), tuple(config.strides), config.split
    return blocks(make, widths[:split], strides[:split], BLOCKS[config.encoder])


def _latent_shape(encoder: nn.Module, input_shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Shape of the latents; raises UserError if the encoder fails or returns something else."""
    images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    with custom.errors_of(name):
        found = jax.eval_shape(lambda x: encoder.init_with_output(jax.random.key(0), x)[0], images)
    if not isinstance(found, jax.ShapeDtypeStruct) or found.shape[:1] != (1,):
        what = found.shape if isinstance(found, jax.ShapeDtypeStruct) else f"a {type(found).__name__}"
        raise UserError(f"{name} returns {what} for one image: it must return one array, images first")
    return tuple(found.shape[1:])


def _check_blocks(config: Config) -> None:
    """Raises UserError unless widths, strides and split describe a network, and encoder and head use all its blocks."""
    widths, strides, split, most = tuple(config.widths), tuple(config.strides), config.split, 2**20
    valid = all(0 <= width <= most for width in widths) and all(1 <= stride <= most for stride in strides)
    if len(widths) != len(strides) or not valid:
        raise UserError(
            f"model.widths {widths} and model.strides {strides} must be as many, widths from 0 and strides from 1 to "
            f"{most}: the channels of every block, and the space-to-depth in front of it"
        )
    if not 0 <= split <= len(widths):
        raise UserError(f"model.split must lie between 0 and the {len(widths)} blocks of model.widths, got {split}")
    in_encoder, in_head = config.encoder in BLOCKS, config.head == "blocks"
    left = len(widths) - split if in_encoder and not in_head else split if in_head and not in_encoder else 0
    if left:
        other, whole = ("head", len(widths)) if in_encoder else ("encoder", 0)
        raise UserError(
            f"model.split {split} leaves {left} of {len(widths)} blocks unused: give --config.model.{other}="
            f"blocks as well, or --config.model.split={whole}"
        )


class Cost(NamedTuple):
    """FLOPs of the convolutions and matrix products for one image, without the building of kernels."""

    encoder: float  # once per image; 0 under ISRS
    head: float  # once per sample; under ISRS the whole base classifier

    @property
    def speedup(self) -> float:
        """FLOPs per sample with the noise on the image, divided by the FLOPs per sample of this model."""
        return (self.encoder + self.head) / self.head


@functools.lru_cache(32)
def cost(model: Model) -> Cost:
    params, latent = model.shapes()

    def per_row(function: Callable[[Params, Any], jax.Array], shape: tuple[int, ...]) -> float:
        """Difference of two batch sizes, in which the FLOPs that build kernels cancel."""
        one, two = (flops(function, params, jax.ShapeDtypeStruct((n, *shape), jnp.float32)) for n in (1, 2))
        return float(two - one)

    encoder = 0.0 if model.smooths_input else per_row(model.encode, model.input_shape)
    return Cost(encoder, per_row(model.classify, latent.shape[1:]))


def effective_flops(model: Model, images: int) -> float:
    """FLOPs of the head per sample where its first layer runs in integers, once per noise vector for so many images.

    Without such a layer these are all FLOPs of the head.
    """
    params, latent = model.shapes()
    whole_head = not (model.smooths_input and model._has_encoder)
    first = first_layer_flops(model.head, params["head"], latent.shape[1:]) if whole_head else 0.0
    return cost(model).head - first * (1 - 1 / images)


def describe(model: Model, images: int = 0) -> str:
    """Two lines for the log: sizes of encoder, latent and head, and the FLOPs per sample.

    With `images`, the size of a batch, also the effective FLOPs, if the head begins with a linear layer.
    """
    (params, latent), found = model.shapes(), cost(model)
    encoder, head = (sum(leaf.size for leaf in jax.tree.leaves(params[part])) for part in ("encoder", "head"))
    price = f"{found.head / 1e6:.2f} MFLOP per sample"
    if images and (effective := effective_flops(model, images)) < found.head:
        price += f" (effective {effective / 1e6:.3f}: the first layer once for {images} images)"
    if not model.smooths_input:
        faster = f"{found.speedup:.1f}x as many samples per FLOP as with the noise on the image"
        price = f"{found.encoder / 1e6:.2f} MFLOP once per image, {price}: {faster}"
    shape = latent.shape[1:]
    noise = f"noise on {'x'.join(map(str, shape))} ({math.prod(shape):,} numbers)"
    return f"encoder {encoder:,} parameters, {noise}, head {head:,} parameters\n{price}"
