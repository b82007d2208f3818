"""Maps that move, pad, crop or pool entries of images, each 1-Lipschitz in ℓ2."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from lsrs_jax.orthogonal.shape import Images, Pair, check_divisible, check_float
from lsrs_jax.runtime.errors import UserError


def _windows(x: Images, window: Pair, what: str = "windows") -> Float[Array, "batch height/h width/w h w channels"]:
    batch, height, width, channels = x.shape
    check_divisible((height, width), window, what)
    rows, columns = window
    x = x.reshape(batch, height // rows, rows, width // columns, columns, channels)
    return x.transpose(0, 1, 3, 2, 4, 5)


def space_to_depth(x: Images, strides: Pair) -> Float[Array, "batch height/sh width/sw sh*sw*channels"]:
    """Moves every window of pixels into the channels, ordered (row, column, channel). **Guarantee**: an isometry."""
    x = _windows(x, strides, "strides")
    return x.reshape(*x.shape[:3], -1)


def depth_to_space(x: Images, strides: Pair) -> Float[Array, "batch height*sh width*sw channels/(sh*sw)"]:
    """The inverse of `space_to_depth`. **Guarantee**: an isometry."""
    batch, height, width, channels = x.shape
    sh, sw = strides
    if channels % (sh * sw):
        raise UserError(f"depth_to_space: {channels} channels are not divisible by {sh}x{sw}")
    x = x.reshape(batch, height, width, sh, sw, channels // (sh * sw))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * sh, width * sw, channels // (sh * sw))


def haar(x: Images) -> Float[Array, "batch height/2 width/2 4*channels"]:
    """The orthonormal Haar transform of every 2x2 window. **Guarantee**: an isometry; its entries ±1/2 are exact.

    Channels are ordered (band, C): sums (the coarse image), differences of columns, of rows, of both.
    """
    x = _windows(x, (2, 2), "strides")
    rows = x[..., 0, :, :] + x[..., 1, :, :], x[..., 0, :, :] - x[..., 1, :, :]
    bands = [half[..., 0, :] + sign * half[..., 1, :] for half in rows for sign in (1, -1)]
    return jnp.concatenate(bands, axis=-1) / 2


def resize_channels(x: Shaped[Array, "*batch current"], channels: int) -> Shaped[Array, "*batch channels"]:
    """Pads the last axis with zeros (an isometry) or crops it (a co-isometry, 1-Lipschitz) to `channels`."""
    if x.shape[-1] >= channels:
        return x[..., :channels]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, channels - x.shape[-1])])


def average_pool(x: Images, window: Pair) -> Float[Array, "batch height/h width/w channels"]:
    """Sums over windows without overlap, over √(h·w). **Guarantee**: all singular values are 1 (a co-isometry)."""
    return _windows(x, window).sum(axis=(3, 4)) / math.sqrt(math.prod(window))


def l2_pool(x: Images, window: Pair, epsilon: float = 1e-6) -> Float[Array, "batch height/h width/w channels"]:
    """√(Σ x² + ε) over windows without overlap. **Guarantee**: 1-Lipschitz (its gradient is ‖x‖/√(‖x‖² + ε) < 1)."""
    check_float(x, "l2_pool")
    if not 0 <= epsilon < math.inf:
        raise UserError(f"l2_pool: epsilon must be at least 0, got {epsilon}; a negative one would stretch distances")
    return jnp.sqrt(jnp.square(_windows(x, window)).sum(axis=(3, 4)) + epsilon)
