"""Encoders: chains of orthogonal layers in front of the noise. Presets by name."""

from collections.abc import Callable
from typing import NamedTuple

from lsrs_jax import layers
from lsrs_jax.errors import UserError


class Kit(NamedTuple):
    """What a chain is made of."""

    conv: Callable  # (features, kernel_size, strides) -> an orthogonal convolution
    activation: Callable  # () -> what follows it


def _space_to_depth(stride):
    return (layers.SpaceToDepth((stride, stride)),) if stride > 1 else ()


def _haar(stride):
    if stride > 2:
        raise UserError(f"blocks_haar takes model.strides of 1 and 2, got {stride}")
    return (layers.Haar(),) * (stride - 1)


# How a block of the encoder takes its stride.
BLOCKS = {"blocks": _space_to_depth, "blocks_haar": _haar}


def blocks(kit, widths, strides, downsample=_space_to_depth):
    """Blocks of a network in the encoder: the stride, a 3x3 orthogonal convolution, an activation.

    A width of 0 leaves the convolution and the activation out. `downsample` is a value of `BLOCKS`: a permutation of
    pixels into channels, or the Haar transform, coarse channels first, with which a narrower convolution starts by
    keeping the coarse image instead of every second pixel. `lsrs_jax.heads.BlocksHead` has the same blocks free.
    """
    chain = []
    for width, stride in zip(widths, strides, strict=True):
        chain += downsample(stride)
        if width:
            chain += [kit.conv(width, (3, 3)), kit.activation()]
    return tuple(chain)


def _stages(*stages):
    """Per stage ``(count, width)``: space-to-depth by 2, so many convolutions; width None: as wide as they come."""

    def encoder(kit, channels):
        widths, strides = [], []
        for count, width in stages:
            channels = width or 4 * channels
            widths += [channels] * count or [0]
            strides += [2] + [1] * (count - 1)
        return blocks(kit, widths, strides)

    return encoder


def _convolutions(*specs):
    """``(channels, kernel, stride)`` of each convolution, every one with an activation."""

    def encoder(kit, channels):
        chain = []
        for width, kernel, stride in specs:
            chain += [kit.conv(width, (kernel, kernel), (stride, stride)), kit.activation()]
        return tuple(chain)

    return encoder


# (kit, channels of the image) -> layers. `partial`, `latent` and `preprocessor` are the splits of the public code that
# came before LSRS (SC-Fac convolutions, Su, Byeon and Huang 2022).
ENCODERS = {
    "identity": lambda kit, channels: (),
    "space_to_depth": _stages((0, None)),
    "shallow": _stages((2, None)),
    "deep": _stages((4, None), (4, None)),
    "pyramid": _stages((3, 32), (3, 64), (3, 64)),
    "partial": _convolutions((64, 3, 1), (64, 3, 1), (128, 6, 2)),
    "latent": _convolutions((64, 6, 2), (64, 6, 2), (128, 6, 2), (256, 2, 2), (512, 2, 2)),
    "preprocessor": _convolutions((6, 3, 1), (16, 3, 1), (32, 3, 1), (64, 3, 1)),
}
