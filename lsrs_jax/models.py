"""A classifier split at its latent: the pair of an encoder and a head.

The split is a dial: encoder ``identity`` puts the noise on the image (ISRS, Cohen et al. 2019) through the very same
code. ``noise="input"`` is the other baseline, ISRS of a split model: the same encoder and head with the noise moved in
front of both.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax import layers
from lsrs_jax.encoders import BLOCKS, ENCODERS, Kit, blocks
from lsrs_jax.errors import UserError
from lsrs_jax.flops import flops
from lsrs_jax.heads import HEADS, BlocksHead
from lsrs_jax.materialize import materialize, project
from lsrs_jax.span import span_of

ACTIVATIONS = {"maxmin": layers.MaxMin, "householder": layers.Householder}


def _choose(kind, table, name):
    if name not in table:
        raise UserError(f"unknown model.{kind} {name!r}: choose one of {', '.join(sorted(table))}")
    return table[name]


@dataclasses.dataclass(frozen=True)
class Model:
    """A split classifier as pure functions of parameters ``{"encoder": …, "head": …}``.

    Attributes:
      encoder: chain of orthogonal layers (`lsrs_jax.layers.Encoder`); empty for ISRS.
      head: any Linen module ``(B, *latent_shape) → (B, num_classes)`` with independent rows.
      normalize: per-channel normalisation, or None. It belongs to the encoder (and to its Lipschitz constant) when
        the noise is on the latent of a real encoder, and to the base classifier, after the noise, under ISRS.
      noise: ``"latent"`` or ``"input"``.
      input_shape: ``(H, W, C)``.
      head_dtype: ``"float32"`` or ``"bfloat16"``: in what `classify` computes the head; logits are float32.
    """

    encoder: layers.Encoder
    head: nn.Module
    normalize: layers.Normalize | None
    noise: str
    input_shape: tuple[int, ...]
    head_dtype: str = "float32"

    @property
    def smooths_input(self):
        return self.noise == "input" or not self.encoder.layers

    def init(self, key):
        """Fresh parameters, float32."""
        encoder_key, head_key = jax.random.split(key)
        x = jnp.zeros((1, *self.input_shape), jnp.float32)
        # Compiled whole: one by one, the many small operations of a kernel's construction take seconds to compile. An
        # encoder without parameters (identity) has no collection at all.
        encoder = jax.jit(self.encoder.init)(encoder_key, x).get("params", {})
        latent = jax.eval_shape(self._encoder_apply, encoder, x)
        head = jax.jit(self.head.init)(head_key, jnp.zeros(latent.shape, latent.dtype))
        return {"encoder": encoder, "head": head["params"]}

    def _encoder_apply(self, params, x):
        return self.encoder.apply({"params": params}, x)

    def _normalized(self, x):
        return x if self.normalize is None else self.normalize.apply({}, x)

    def encode(self, params, images):
        """Images ``(B, H, W, C)`` in [0, 1] → what the noise is added to (the images themselves under ISRS)."""
        return images if self.smooths_input else self._encoder_apply(params["encoder"], self._normalized(images))

    def classify(self, params, noisy):
        """The base classifier: noisy latents (or noisy images under ISRS) → logits ``(B, num_classes)``."""
        if self.smooths_input:
            noisy = self._encoder_apply(params["encoder"], self._normalized(noisy))
        return _in_dtype(functools.partial(self._head_apply, params["head"], self.head_dtype), self.head_dtype)(noisy)

    def _head_apply(self, params, dtype, latents):
        return self.head.apply({"params": jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)}, latents)

    def _materialized(self, params):
        """Normalisation and encoder as one `Materialized`."""
        chain = self.encoder.layers if self.normalize is None else (self.normalize, *self.encoder.layers)
        shift = len(chain) - len(self.encoder.layers)
        named = {
            f"layers_{index + shift}": params["encoder"].get(f"layers_{index}", {})
            for index in range(len(self.encoder.layers))
        }
        return materialize(layers.Encoder(chain), named, self.input_shape)

    def for_certification(self, params, dtype="float32"):
        """The same two functions on plain parameters.

        Args:
          dtype: ``"float32"`` or ``"bfloat16"``: in what the head (under ISRS the whole base classifier) computes.

        Returns:
          ``(encoder, head)``: a `Materialized` encoder, whose report carries the Lipschitz constant (an empty chain
          with constant 1 under ISRS), and a function latents → logits. Under ISRS of a split model the orthogonal
          kernels are built once here, not once per vote. Behind a linear head the encoder goes on to the span of its
          weights (`span.span_of`), where the noise has as many dimensions as there are classes.

        **Guarantee**: ``head(encoder.apply(·))`` without noise is the trained classifier up to float rounding; the
        certificate is about the functions returned here.
        """
        plain = self._materialized(params)
        identity = materialize(layers.Encoder(), {}, self.input_shape)
        linear = hasattr(self.head, "matrix") and not (self.smooths_input and self.encoder.layers)
        if linear:
            weights, bias = self.head.matrix(params["head"])
            if self.smooths_input and self.normalize is not None:
                mean, scale = (np.broadcast_to(v, self.input_shape).ravel() for v in self._mean_and_scale())
                weights, bias = weights * scale[:, None], bias - (mean * scale) @ weights
            if len(weights) >= len(bias):
                span = span_of(weights, bias)
                return project(identity if self.smooths_input else plain, span.basis), _in_dtype(span.head, dtype)
        head = functools.partial(self._head_apply, jax.tree.map(np.asarray, params["head"]), dtype)
        if not self.smooths_input:
            return plain, _in_dtype(head, dtype)
        base = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), plain.params)
        return identity, _in_dtype(lambda noisy: head(plain.apply(base, noisy)), dtype)

    def _mean_and_scale(self):
        return np.asarray(self.normalize.mean, np.float64), 1 / np.asarray(self.normalize.std, np.float64)

    def with_linear_head(self, params):
        """The noise-free classifier for its deterministic certificate.

        Returns:
          ``(encoder, weights, bias)``: normalisation and encoder as a `Materialized`, and the head on the flattened
          latent, float64 ``(d, K)`` and ``(K,)``.

        Raises:
          UserError: for a head that is not linear.
        """
        if not hasattr(self.head, "matrix"):
            linear = ", ".join(name for name, head in HEADS.items() if hasattr(head, "matrix"))
            raise UserError(f"a deterministic certificate needs a linear head (model.head one of {linear})")
        return self._materialized(params), *self.head.matrix(params["head"])


def _in_dtype(function, dtype):
    """The function computed in `dtype`: latents are cast after the noise was added, logits come back as float32."""
    return function if dtype == "float32" else lambda noisy: function(noisy.astype(dtype)).astype(jnp.float32)


def build(config, input_shape, num_classes):
    """The `Model` of a config's ``model`` section, for images ``(H, W, C)``.

    Raises:
      UserError: for an unknown name, or an encoder that does not fit the image.
    """
    conv = functools.partial(
        layers.OrthogonalConv, method=config.method, initializer=config.initializer, padding=config.padding
    )
    kit = Kit(conv, _choose("activation", ACTIVATIONS, config.activation))
    make_encoder = _choose("encoder", ENCODERS | dict.fromkeys(BLOCKS), config.encoder)
    make_head = _choose("head", HEADS | {"blocks": None}, config.head)
    _check_blocks(config)
    widths, strides, split = tuple(config.widths), tuple(config.strides), config.split
    encoder = (
        make_encoder(kit, input_shape[2])
        if make_encoder
        else blocks(kit, widths[:split], strides[:split], BLOCKS[config.encoder])
    )
    head = make_head(num_classes) if make_head else BlocksHead(num_classes, widths[split:], strides[split:])
    if config.noise not in ("latent", "input"):
        raise UserError(f"unknown model.noise {config.noise!r}: choose 'latent' or 'input'")
    mean, std = tuple(map(float, config.mean)), tuple(map(float, config.std))
    normalize = None if (mean, std) == ((0.0,), (1.0,)) else layers.Normalize(mean, std)
    model = Model(layers.Encoder(encoder), head, normalize, config.noise, tuple(input_shape))
    # Shapes that do not fit raise here, before any data is read or any hour is spent.
    params = jax.eval_shape(model.init, jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    jax.eval_shape(lambda params, x: model.classify(params, model.encode(params, x)), params, image)
    return model


_WIDEST = 2**20  # channels: beyond it a mistake


def _check_blocks(config):
    """Raises UserError for widths, strides and a split that describe no network, or one of which blocks are left."""
    widths, strides, split = tuple(config.widths), tuple(config.strides), config.split
    if (
        len(widths) != len(strides)
        or not all(0 <= width <= _WIDEST for width in widths)
        or not all(1 <= stride <= _WIDEST for stride in strides)
    ):
        raise UserError(
            f"model.widths {widths} and model.strides {strides} must be as many, widths from 0 and strides from 1 to "
            f"{_WIDEST}: channels of every block, and the space-to-depth in front of it"
        )
    if not 0 <= split <= len(widths):
        raise UserError(f"model.split must lie between 0 and the {len(widths)} blocks of model.widths, got {split}")
    in_encoder, in_head = config.encoder in BLOCKS, config.head == "blocks"
    left = len(widths) - split if in_encoder and not in_head else split if in_head and not in_encoder else 0
    if left:
        other, whole = ("head", len(widths)) if in_encoder else ("encoder", 0)
        raise UserError(
            f"model.split {split} leaves {left} of {len(widths)} blocks to nobody: choose 'blocks' for model.{other} "
            f"as well, or model.split={whole}"
        )


class Cost(NamedTuple):
    """FLOPs of one image: of convolutions and matrix products, `lsrs_jax.flops`; kernels count as built."""

    encoder: float  # once per image; 0 under ISRS
    head: float  # per vote; under ISRS the whole base classifier

    @property
    def speedup(self):
        """Of the votes, by FLOPs, over those of the same network under input noise."""
        return (self.encoder + self.head) / self.head


def cost(model):
    """The `Cost` of a model."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    latents = jax.eval_shape(model.encode, params, jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32))

    def per_row(function, shape):
        """From two batches: what does not grow with the batch, the building of kernels, drops out."""
        one, two = (flops(function, params, jax.ShapeDtypeStruct((n, *shape), jnp.float32)) for n in (1, 2))
        return float(two - one)

    head = per_row(model.classify, latents.shape[1:])
    encoder = 0.0 if model.smooths_input else per_row(model.encode, model.input_shape)
    return Cost(encoder, head)


def describe(model):
    """Two lines for the log: sizes of encoder, latent and head, and what a vote costs."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    noisy = jax.eval_shape(model.encode, params, image)

    def count(tree):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    found = cost(model)
    price = f"{found.head / 1e6:.2f} MFLOP per vote"
    if not model.smooths_input:
        price = (
            f"{found.encoder / 1e6:.2f} MFLOP once per image, {price}: {found.speedup:.1f}x as many votes per FLOP as "
            "with the noise on the image"
        )
    return (
        f"encoder {count(params['encoder']):,} parameters, noise on {'x'.join(map(str, noisy.shape[1:]))} "
        f"({math.prod(noisy.shape[1:]):,} numbers), head {count(params['head']):,} parameters\n{price}"
    )
