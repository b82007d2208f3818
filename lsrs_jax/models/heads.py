"""Heads: Linen modules that classify the latent, ``(B, …) → (B, num_classes)``, with independent rows.

A head that is linear in the latent also has a method ``matrix(params) -> Matrix``.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float64

from lsrs_jax.layers import OrthogonalDense
from lsrs_jax.orthogonal import resize

Latents = Float[jax.Array, "B ..."]
Images = Float[jax.Array, "B H W C"]  # latents with the layout of images
Logits = Float[jax.Array, "B K"]
Head = Callable[[Latents], Logits]  # a head with its parameters
NORM_SUFFIX, NORM_EPSILON = "_norm", 1e-5  # of the batch normalisation after a layer: of its name, and of its variance
Matrix = tuple[Float64[np.ndarray, "d K"], Float64[np.ndarray, " K"]]  # weights and bias on the flattened latent


class _Classifier(nn.Module):
    """Base class of the heads."""

    num_classes: int


class _Normalizable(_Classifier, kw_only=True):
    """Base class of heads that can have batch normalisation after every convolution and hidden dense layer.

    ``norm`` is ``"none"``, ``"batch"`` in training, or ``"folded"``: the same head with the normalisation folded into
    the layers before it (`batch_norm.fold`). Then every convolution has a bias.
    """

    norm: str = "none"

    def _normalized(self, layer: nn.Module, z: jax.Array) -> jax.Array:
        """The output of a layer, normalised over the rows of the batch in training."""
        z = layer(z)
        if self.norm != "batch":
            return z
        name = f"{layer.name}{NORM_SUFFIX}"
        return nn.BatchNorm(use_running_average=False, momentum=0.0, epsilon=NORM_EPSILON, name=name)(z)


class MLPHead(_Normalizable):
    """Dense layers with ReLU on the flattened latent."""

    widths: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, z: Latents) -> Logits:
        z = z.reshape(z.shape[0], -1)
        for width in self.widths:
            z = nn.relu(self._normalized(nn.Dense(width), z))
        return nn.Dense(self.num_classes)(z)


class LinearHead(_Classifier):
    """One dense layer on the flattened latent."""

    @nn.compact
    def __call__(self, z: Latents) -> Logits:
        return nn.Dense(self.num_classes)(z.reshape(z.shape[0], -1))

    def matrix(self, params: Any) -> Matrix:
        return np.asarray(params["Dense_0"]["kernel"], np.float64), np.asarray(params["Dense_0"]["bias"], np.float64)


class NormalizedHead(_Classifier):
    """A linear head with weight vectors of length 1 (last-layer normalisation, Singla, Singla and Feizi 2021)."""

    @nn.compact
    def __call__(self, z: Latents) -> Logits:
        z = z.reshape(z.shape[0], -1)
        weights = self.param("kernel", nn.initializers.orthogonal(), (z.shape[-1], self.num_classes))
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
        return z @ (weights / jnp.sqrt(jnp.sum(weights**2, axis=0) + 1e-12)) + bias

    def matrix(self, params: Any) -> Matrix:
        weights, bias = np.asarray(params["kernel"], np.float64), np.asarray(params["bias"], np.float64)
        return weights / np.sqrt(np.sum(weights**2, axis=0) + 1e-12), bias


class OrthogonalHead(_Classifier):
    """A linear head with orthonormal weight vectors (Cayley transform): the vector of logits is 1-Lipschitz."""

    @nn.compact
    def __call__(self, z: Latents) -> Logits:
        return OrthogonalDense(self.num_classes, method="cayley")(z.reshape(z.shape[0], -1))

    def matrix(self, params: Any) -> Matrix:
        raw = params["OrthogonalDense_0"]
        dense = OrthogonalDense(self.num_classes, method="cayley", parent=None)
        return dense.materialize(raw, raw["raw"].shape[:1]).params, np.zeros(self.num_classes)


def _conv(channels: int, size: int = 3, stride: int = 1, use_bias: bool = True) -> nn.Conv:
    kernel = nn.initializers.he_normal()
    return nn.Conv(channels, (size, size), (stride, stride), use_bias=use_bias, kernel_init=kernel)


def _pooled(z: Images, num_classes: int) -> Logits:
    """The mean over positions, then a dense layer."""
    return nn.Dense(num_classes)(z.mean(axis=(1, 2)))


class ConvHead(_Normalizable):
    """3x3 convolutions with ReLU, then the mean over positions and a dense layer."""

    stages: tuple[tuple[int, int], ...]  # (channels, stride) of each convolution

    @nn.compact
    def __call__(self, z: Images) -> Logits:
        for channels, stride in self.stages:
            z = nn.relu(self._normalized(_conv(channels, stride=stride), z))
        return _pooled(z, self.num_classes)


class ResNetHead(_Normalizable):
    """A 3x3 stem, residual blocks of two 3x3 convolutions with ReLU, then the mean over positions and a dense layer."""

    stages: tuple[tuple[int, int], ...]  # (channels, stride) of each block; the stem has the channels of the first
    stem: bool = True

    @nn.compact
    def __call__(self, z: Images) -> Logits:
        if self.stem:
            z = nn.relu(self._normalized(_conv(self.stages[0][0]), z))
        for channels, stride in self.stages:
            skip = z
            if (z.shape[-1], stride) != (channels, 1):
                skip = self._normalized(_conv(channels, 1, stride, use_bias=self.norm == "folded"), z)
            inner = nn.relu(self._normalized(_conv(channels, stride=stride), z))
            z = nn.relu(skip + self._normalized(_conv(channels), inner))
        return _pooled(z, self.num_classes)


class BottleneckHead(_Classifier):
    """Residual blocks of ResNet-50 with group normalisation (Wu and He 2018), so that rows stay independent.

    Then the mean over positions and a dense layer. The last scale of a block starts at zero.
    """

    stages: tuple[tuple[int, int, int], ...]  # (inner channels, blocks, stride of the first); output: 4 x the channels
    stem: bool = False  # start with a 7x7 convolution and a max pool, both of stride 2

    @nn.compact
    def __call__(self, z: Images) -> Logits:
        def conv(z: Images, channels: int, size: int, stride: int = 1, **scale: Any) -> Images:
            return nn.GroupNorm(32, **scale)(_conv(channels, size, stride, use_bias=False)(z))

        if self.stem:
            z = nn.max_pool(nn.relu(conv(z, 64, 7, 2)), (3, 3), (2, 2), "SAME")
        for inside, count, first in self.stages:
            for stride in (first, *[1] * (count - 1)):
                skip = z if (z.shape[-1], stride) == (4 * inside, 1) else conv(z, 4 * inside, 1, stride)
                inner = nn.relu(conv(nn.relu(conv(z, inside, 1)), inside, 3, stride))
                z = nn.relu(skip + conv(inner, 4 * inside, 1, scale_init=nn.initializers.zeros))
        return _pooled(z, self.num_classes)


class BlocksHead(_Normalizable):
    """Blocks as in `encoders.blocks` without constraints, with ReLU, then the mean over positions and a dense layer."""

    widths: tuple[int, ...]
    strides: tuple[int, ...]

    @nn.compact
    def __call__(self, z: Images) -> Logits:
        for width, stride in zip(self.widths, self.strides, strict=True):
            if stride > 1:
                z = resize.space_to_depth(z, (stride, stride))
            if width:
                z = nn.relu(self._normalized(_conv(width), z))
        return _pooled(z, self.num_classes)


_RESNET50 = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
_RESNET18 = ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1))

# Number of classes -> module; `mlp` also takes its widths. Without model.head_norm, `resnet` to `resnet18` have no
# normalisation. `resnet18_tail` is layers 3 and 4 of a ResNet-18, `resnet50_tail` layer 4 of a ResNet-50.
# `resnet_latent` is for a latent of few pixels and many channels, `resnet_fine` for one of 16x16 pixels.
HEADS: dict[str, Callable[[int], nn.Module]] = {
    "linear": LinearHead,
    "normalized": NormalizedHead,
    "orthogonal": OrthogonalHead,
    "mlp": lambda classes, widths=(256, 256): MLPHead(classes, tuple(widths)),
    "convnet": lambda classes: ConvHead(classes, ((32, 1), (64, 2), (64, 1))),
    "convnet_light": lambda classes: ConvHead(classes, ((64, 2), (64, 1))),
    "resnet": lambda classes: ResNetHead(classes, ((32, 1), (64, 2))),
    "resnet_latent": lambda classes: ResNetHead(classes, ((128, 1), (128, 1), (256, 2))),
    "resnet_fine": lambda classes: ResNetHead(classes, ((48, 1), (48, 1), (112, 2), (112, 1), (192, 2))),
    "resnet10": lambda classes: ResNetHead(classes, ((64, 1), (128, 2), (256, 2), (512, 2))),
    "resnet18": lambda classes: ResNetHead(classes, _RESNET18),
    "resnet18_tail": lambda classes: ResNetHead(classes, _RESNET18[4:], stem=False),
    "resnet50": lambda classes: BottleneckHead(classes, _RESNET50, stem=True),
    "resnet50_tail": lambda classes: BottleneckHead(classes, _RESNET50[3:]),
    "convnet_small": lambda classes: ConvHead(classes, ((16, 1), (32, 2), (32, 1))),
}
