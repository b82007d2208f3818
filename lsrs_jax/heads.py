"""Heads: what classifies the latent. Any Linen module ``(B, …) → (B, num_classes)`` with independent rows will do.

A head that is linear in the latent also has ``matrix(params)``, float64 ``(weights (d, K), bias (K,))`` on the flat
latent: with it the classifier has a deterministic certificate as well.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from lsrs_jax.layers import OrthogonalDense
from lsrs_jax.orthogonal import resize


def _float64(values):
    return np.asarray(values, np.float64)


class LinearHead(nn.Module):
    """One dense layer on the flattened latent."""

    num_classes: int

    @nn.compact
    def __call__(self, z):
        return nn.Dense(self.num_classes)(z.reshape(z.shape[0], -1))

    def matrix(self, params):
        return _float64(params["Dense_0"]["kernel"]), _float64(params["Dense_0"]["bias"])


class NormalizedHead(nn.Module):
    """A linear head whose K weight vectors have length 1 (last-layer normalisation, Singla, Singla and Feizi 2021)."""

    num_classes: int

    @nn.compact
    def __call__(self, z):
        z = z.reshape(z.shape[0], -1)
        weights = self.param("kernel", nn.initializers.orthogonal(), (z.shape[-1], self.num_classes))
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
        # The constant keeps the gradient finite at zero weights.
        return z @ (weights / jnp.sqrt(jnp.sum(weights**2, axis=0) + 1e-12)) + bias

    def matrix(self, params):
        weights = _float64(params["kernel"])
        return weights / np.sqrt(np.sum(weights**2, axis=0) + 1e-12), _float64(params["bias"])


class OrthogonalHead(nn.Module):
    """A linear head with orthonormal weight vectors (a Cayley transform), so that logits are 1-Lipschitz jointly."""

    num_classes: int

    @nn.compact
    def __call__(self, z):
        return OrthogonalDense(self.num_classes, method="cayley")(z.reshape(z.shape[0], -1))

    def matrix(self, params):
        raw = params["OrthogonalDense_0"]
        dense = OrthogonalDense(self.num_classes, method="cayley", parent=None)
        return dense.materialize(raw, raw["raw"].shape[:1]).params, np.zeros(self.num_classes)


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


class ResNetHead(nn.Module):
    """A 3x3 stem, residual blocks of two 3x3 convolutions with ReLU, the mean over positions, a dense layer.

    Attributes:
      stages: ``(channels, stride)`` of each block; the stem has the channels of the first.
      stem: False leaves the stem out.
    """

    num_classes: int
    stages: tuple[tuple[int, int], ...]
    stem: bool = True

    @nn.compact
    def __call__(self, z):
        def conv(channels, size, stride, **fields):
            return nn.Conv(channels, (size, size), (stride, stride), kernel_init=nn.initializers.he_normal(), **fields)

        if self.stem:
            z = nn.relu(conv(self.stages[0][0], 3, 1)(z))
        for channels, stride in self.stages:
            skip = z if (z.shape[-1], stride) == (channels, 1) else conv(channels, 1, stride, use_bias=False)(z)
            inner = nn.relu(conv(channels, 3, stride)(z))
            z = nn.relu(skip + conv(channels, 3, 1)(inner))
        return nn.Dense(self.num_classes)(z.mean(axis=(1, 2)))


class BottleneckHead(nn.Module):
    """Residual blocks of ResNet-50: 1x1, 3x3 and 1x1 convolutions; the mean over positions, a dense layer.

    Group normalisation takes the place of batch normalisation (Wu and He 2018), so that rows stay independent; the last
    scale of a block starts at zero. A stride lies on the 3x3 convolution.

    Attributes:
      stages: ``(channels inside, blocks, stride of the first)``; four times as many channels leave a block.
      stem: whether a 7x7 convolution of stride 2 and a max pool of stride 2 come first.
    """

    num_classes: int
    stages: tuple[tuple[int, int, int], ...]
    stem: bool = False

    @nn.compact
    def __call__(self, z):
        def conv(z, channels, size, stride=1, **scale):
            kernel = nn.initializers.he_normal()
            z = nn.Conv(channels, (size, size), (stride, stride), use_bias=False, kernel_init=kernel)(z)
            return nn.GroupNorm(_GROUPS, **scale)(z)

        if self.stem:
            z = nn.max_pool(nn.relu(conv(z, 64, 7, 2)), (3, 3), (2, 2), "SAME")
        for inside, count, first in self.stages:
            for stride in (first, *[1] * (count - 1)):
                skip = z if (z.shape[-1], stride) == (4 * inside, 1) else conv(z, 4 * inside, 1, stride)
                inner = nn.relu(conv(nn.relu(conv(z, inside, 1)), inside, 3, stride))
                z = nn.relu(skip + conv(inner, 4 * inside, 1, scale_init=nn.initializers.zeros))
        return nn.Dense(self.num_classes)(z.mean(axis=(1, 2)))


class BlocksHead(nn.Module):
    """The free twin of `lsrs_jax.encoders.blocks`: the same shapes and FLOPs, ReLU for the orthogonal activation.

    Per block space-to-depth by the stride, a 3x3 convolution and ReLU; then the mean over positions, a dense layer.

    Attributes:
      widths, strides: of the blocks.
    """

    num_classes: int
    widths: tuple[int, ...]
    strides: tuple[int, ...]

    @nn.compact
    def __call__(self, z):
        for width, stride in zip(self.widths, self.strides, strict=True):
            if stride > 1:
                z = resize.space_to_depth(z, (stride, stride))
            if width:
                z = nn.relu(nn.Conv(width, (3, 3), kernel_init=nn.initializers.he_normal())(z))
        return nn.Dense(self.num_classes)(z.mean(axis=(1, 2)))


_GROUPS = 32
_RESNET50 = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
_RESNET18 = ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1))
_RESNET10 = ((64, 1), (128, 2), (256, 2), (512, 2))
_LATENT = ((128, 1), (128, 1), (256, 2))

# classes -> module. The `resnet` below 50 have no normalisation; `resnet18_tail` is layers 3 and 4, `resnet50_tail`
# layer 4, `resnet_latent` is for the few pixels and many channels of a latent.
HEADS = {
    "linear": LinearHead,
    "normalized": NormalizedHead,
    "orthogonal": OrthogonalHead,
    "mlp": lambda classes: MLPHead(classes, (256, 256)),
    "convnet": lambda classes: ConvHead(classes, ((32, 1), (64, 2), (64, 1))),
    "convnet_light": lambda classes: ConvHead(classes, ((64, 2), (64, 1))),
    "resnet": lambda classes: ResNetHead(classes, ((32, 1), (64, 2))),
    "resnet_latent": lambda classes: ResNetHead(classes, _LATENT),
    "resnet10": lambda classes: ResNetHead(classes, _RESNET10),
    "resnet18": lambda classes: ResNetHead(classes, _RESNET18),
    "resnet18_tail": lambda classes: ResNetHead(classes, _RESNET18[4:], stem=False),
    "resnet50": lambda classes: BottleneckHead(classes, _RESNET50, stem=True),
    "resnet50_tail": lambda classes: BottleneckHead(classes, _RESNET50[3:]),
    "convnet_small": lambda classes: ConvHead(classes, ((16, 1), (32, 2), (32, 1))),
}
