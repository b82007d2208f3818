"""Maps that move, pad, crop or pool entries, each 1-Lipschitz in ℓ2. NHWC throughout."""

import math

import jax.numpy as jnp

from lsrs_jax.errors import UserError
from lsrs_jax.orthogonal.shape import check_divisible, check_float


def _windows(x, window):
    """``(B, H, W, C)`` → ``(B, H/h, W/w, h, w, C)``."""
    batch, height, width, channels = x.shape
    check_divisible(height, width, window, "windows")
    rows, columns = window
    x = x.reshape(batch, height // rows, rows, width // columns, columns, channels)
    return x.transpose(0, 1, 3, 2, 4, 5)


def space_to_depth(x, strides):
    """``(B, H, W, C)`` → ``(B, H/s, W/s, s·s·C)``, channels ordered (row, column, C).

    **Guarantee**: a permutation of entries, hence an isometry.
    """
    check_divisible(*x.shape[1:3], strides)
    x = _windows(x, strides)
    return x.reshape(*x.shape[:3], -1)


def depth_to_space(x, strides):
    """The inverse of `space_to_depth`, an isometry as well."""
    batch, height, width, channels = x.shape
    sh, sw = strides
    if channels % (sh * sw):
        raise UserError(f"depth_to_space: {channels} channels are not divisible by {sh}x{sw}")
    x = x.reshape(batch, height, width, sh, sw, channels // (sh * sw))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * sh, width * sw, channels // (sh * sw))


def haar(x):
    """``(B, H, W, C)`` → ``(B, H/2, W/2, 4·C)``: the orthonormal Haar transform of every 2x2 window.

    Channels are ordered (band, C): sums first, then differences between columns, between rows, and of both. The first C
    hold the coarse image, so that whatever keeps only the first channels keeps most of a natural image.

    **Guarantee**: an isometry; its entries ±1/2 are exact.
    """
    check_divisible(*x.shape[1:3], (2, 2))
    x = _windows(x, (2, 2))
    rows = x[..., 0, :, :] + x[..., 1, :, :], x[..., 0, :, :] - x[..., 1, :, :]
    bands = [half[..., 0, :] + sign * half[..., 1, :] for half in rows for sign in (1, -1)]
    return jnp.concatenate(bands, axis=-1) / 2


def resize_channels(x, channels):
    """Pads the last axis with zeros (an isometry) or crops it (a co-isometry, 1-Lipschitz) to `channels`."""
    current = x.shape[-1]
    if current == channels:
        return x
    if current > channels:
        return x[..., :channels]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, channels - current)])


def average_pool(x, window):
    """Sum over windows that do not overlap, divided by √(h·w): ``(B, H, W, C)`` → ``(B, H/h, W/w, C)``.

    **Guarantee**: all singular values are 1 (a co-isometry). The plain mean would divide by h·w and lose √(h·w).
    """
    return _windows(x, window).sum(axis=(3, 4)) / math.sqrt(math.prod(window))


def l2_pool(x, window, epsilon=1e-6):
    """√(Σ x² + ε) over windows that do not overlap: ``(B, H, W, C)`` → ``(B, H/h, W/w, C)``.

    **Guarantee**: 1-Lipschitz: ‖x‖/√(‖x‖² + ε) < 1 bounds its gradient. ε keeps the gradient finite at 0.
    """
    check_float(x, "l2_pool")
    if not 0 <= epsilon < math.inf:
        raise UserError(f"l2_pool: epsilon must be at least 0, got {epsilon}; a negative one would stretch")
    return jnp.sqrt(jnp.square(_windows(x, window)).sum(axis=(3, 4)) + epsilon)
