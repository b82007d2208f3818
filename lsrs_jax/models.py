"""Encoders, heads, and the pair of them: a classifier split at its latent. Presets by name.

The split is a dial: encoder ``identity`` puts the noise on the image (ISRS, Cohen et al. 2019) through the very same
code. ``noise="input"`` is the other baseline, ISRS of a split model: the same encoder and head with the noise moved in
front of both.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax import layers
from lsrs_jax.errors import UserError
from lsrs_jax.materialize import materialize


def _orthogonal_encoder(convolutions):
    """Per entry: space-to-depth by 2, then so many 3x3 orthogonal convolutions with MaxMin, at constant width."""

    def encoder(input_shape, method):
        height, width, channels = input_shape
        chain = []
        for count in convolutions:
            chain.append(layers.SpaceToDepth((2, 2)))
            height, width, channels = height // 2, width // 2, 4 * channels
            for _ in range(count):
                chain += [layers.OrthogonalConv(channels, (3, 3), method=method), layers.MaxMin()]
        return tuple(chain)

    return encoder


# (input_shape, method) -> layers; every latent has exactly as many entries as the image.
ENCODERS = {
    "identity": lambda input_shape, method: (),
    "space_to_depth": _orthogonal_encoder((0,)),
    "shallow": _orthogonal_encoder((2,)),
    "deep": _orthogonal_encoder((4, 4)),
}


class LinearHead(nn.Module):
    """One dense layer on the flattened latent."""

    num_classes: int

    @nn.compact
    def __call__(self, z):
        return nn.Dense(self.num_classes)(z.reshape(z.shape[0], -1))


class MLPHead(nn.Module):
    """Dense layers with ReLU on the flattened latent."""

    num_classes: int
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, z):
        z = z.reshape(z.shape[0], -1)
        for width in self.widths:
            z = nn.relu(nn.Dense(width)(z))
        return nn.Dense(self.num_classes)(z)


class ConvHead(nn.Module):
    """3x3 convolutions with ReLU, the mean over positions, a dense layer. No batch statistics: rows stay independent.

    Attributes:
      stages: ``(channels, stride)`` of each convolution.
    """

    num_classes: int
    stages: tuple[tuple[int, int], ...]

    @nn.compact
    def __call__(self, z):
        for channels, stride in self.stages:
            z = nn.relu(nn.Conv(channels, (3, 3), (stride, stride), kernel_init=nn.initializers.he_normal())(z))
        return nn.Dense(self.num_classes)(z.mean(axis=(1, 2)))


HEADS = {
    "linear": LinearHead,
    "mlp": lambda classes: MLPHead(classes, (256, 256)),
    "convnet": lambda classes: ConvHead(classes, ((32, 1), (64, 2), (64, 1))),
    "convnet_small": lambda classes: ConvHead(classes, ((16, 1), (32, 2), (32, 1))),
}


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
    """

    encoder: layers.Encoder
    head: nn.Module
    normalize: layers.Normalize | None
    noise: str
    input_shape: tuple[int, ...]

    @property
    def smooths_input(self):
        return self.noise == "input" or not self.encoder.layers

    def init(self, key):
        """Fresh parameters, float32."""
        encoder_key, head_key = jax.random.split(key)
        x = jnp.zeros((1, *self.input_shape), jnp.float32)
        # An encoder without parameters (identity) has no collection at all.
        encoder = self.encoder.init(encoder_key, x).get("params", {})
        latent = self._encoder_apply(encoder, x)
        return {"encoder": encoder, "head": self.head.init(head_key, latent)["params"]}

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
        return self.head.apply({"params": params["head"]}, noisy)

    def for_certification(self, params):
        """The same two functions on plain parameters.

        Returns:
          ``(encoder, head)``: a `Materialized` encoder, whose report carries the Lipschitz constant (an empty chain
          with constant 1 under ISRS), and a function latents → logits. Under ISRS of a split model the orthogonal
          kernels are built once here, not once per vote.

        **Guarantee**: ``head(encoder.apply(·))`` without noise is the trained classifier up to float rounding; the
        certificate is about the functions returned here.
        """
        chain = self.encoder.layers if self.normalize is None else (self.normalize, *self.encoder.layers)
        shift = len(chain) - len(self.encoder.layers)
        named = {
            f"layers_{index + shift}": params["encoder"].get(f"layers_{index}", {})
            for index in range(len(self.encoder.layers))
        }
        plain = materialize(layers.Encoder(chain), named, self.input_shape)
        head_params = {"params": jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params["head"])}

        def head(latents):
            return self.head.apply(head_params, latents)

        if not self.smooths_input:
            return plain, head
        base = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), plain.params)
        identity = materialize(layers.Encoder(), {}, self.input_shape)
        return identity, lambda noisy: head(plain.apply(base, noisy))


def build(config, input_shape, num_classes):
    """The `Model` of a config's ``model`` section, for images ``(H, W, C)``.

    Raises:
      UserError: for an unknown name, or an encoder that does not fit the image.
    """
    encoder = _choose("encoder", ENCODERS, config.encoder)(tuple(input_shape), config.method)
    head = _choose("head", HEADS, config.head)(num_classes)
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


def describe(model):
    """One line for the log: sizes of encoder, latent and head."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    noisy = jax.eval_shape(model.encode, params, image)

    def count(tree):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    return (
        f"encoder {count(params['encoder']):,} parameters, noise on {'x'.join(map(str, noisy.shape[1:]))} "
        f"({math.prod(noisy.shape[1:]):,} numbers), head {count(params['head']):,} parameters"
    )
