"""Encoders by name: chains of orthogonal layers in front of the noise."""

from collections.abc import Callable, Sequence

import flax.linen as nn

from lsrs_jax import layers
from lsrs_jax.runtime.errors import UserError

Chain = tuple[nn.Module, ...]
Pair = tuple[int, int]
Make = Callable[[int, Pair, Pair], Chain]  # (channels, kernel size, strides) -> orthogonal convolution, activation


def _space_to_depth(stride: int) -> Chain:
    return (layers.SpaceToDepth((stride, stride)),) if stride > 1 else ()


def _haar(stride: int) -> Chain:
    if stride > 2:
        raise UserError(f"blocks_haar takes model.strides of 1 and 2, got {stride}")
    return (layers.Haar(),) * (stride - 1)


# Encoder -> the function (stride -> layers) that downsamples in its blocks.
BLOCKS: dict[str, Callable[[int], Chain]] = {"blocks": _space_to_depth, "blocks_haar": _haar}


def blocks(make: Make, widths: Sequence[int], strides: Sequence[int], downsample: Callable[[int], Chain]) -> Chain:
    """Blocks of a network: each downsamples by its stride, then has a 3x3 orthogonal convolution and an activation.

    A block of width 0 only downsamples. `downsample` is a value of `BLOCKS`. A convolution with fewer output channels
    starts by keeping the coarse image after a Haar transform, and every second pixel after space-to-depth.
    """
    chain = []
    for width, stride in zip(widths, strides, strict=True):
        chain += downsample(stride)
        if width:
            chain += make(width, (3, 3), (1, 1))
    return tuple(chain)


def _stages(make: Make, channels: int, *stages: tuple[int, int | None]) -> Chain:
    """Stages ``(count, width)``: space-to-depth by 2, then `count` convolutions; width None keeps all channels."""
    widths, strides = [], []
    for count, width in stages:
        channels = width or 4 * channels
        widths += [channels] * count or [0]
        strides += [2] + [1] * (count - 1)
    return blocks(make, widths, strides, _space_to_depth)


def _convolutions(make: Make, *specs: tuple[int, int, int]) -> Chain:
    """Convolutions ``(channels, kernel, stride)``, each followed by an activation."""
    return tuple(layer for width, size, stride in specs for layer in make(width, (size, size), (stride, stride)))


# (make, channels of the image) -> layers. `lowpass` keeps the coarse image after two Haar transforms, a quarter of the
# rows and columns; `lowpass_bands` keeps all bands of the second one. `partial`, `latent` and `preprocessor` are the
# splits in the public code that preceded LSRS (SC-Fac convolutions, Su, Byeon and Huang 2022).
ENCODERS: dict[str, Callable[[Make, int], Chain]] = {
    "identity": lambda make, channels: (),
    "space_to_depth": lambda make, channels: _stages(make, channels, (0, None)),
    "lowpass": lambda make, channels: (layers.Haar(), layers.Channels(channels)) * 2,
    "lowpass_bands": lambda make, channels: (layers.Haar(), layers.Channels(channels), layers.Haar()),
    "shallow": lambda make, channels: _stages(make, channels, (2, None)),
    "deep": lambda make, channels: _stages(make, channels, (4, None), (4, None)),
    "pyramid": lambda make, channels: _stages(make, channels, (3, 32), (3, 64), (3, 64)),
    "partial": lambda make, _: _convolutions(make, (64, 3, 1), (64, 3, 1), (128, 6, 2)),
    "latent": lambda make, _: _convolutions(make, (64, 6, 2), (64, 6, 2), (128, 6, 2), (256, 2, 2), (512, 2, 2)),
    "preprocessor": lambda make, _: _convolutions(make, (6, 3, 1), (16, 3, 1), (32, 3, 1), (64, 3, 1)),
}
