"""Isometries that move or pad entries, and the convolution on a torus they serve. NHWC throughout."""

import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax.errors import UserError


def check_divisible(height, width, strides):
    """Raises where a stride does not divide the image: on a torus the layer would then not be 1-Lipschitz."""
    if height % strides[0] or width % strides[1]:
        raise UserError(
            f"strides {tuple(strides)} do not divide the input size {height}x{width}: with circular padding the "
            "layer would not be 1-Lipschitz; choose a size divisible by the strides, or other strides"
        )


def space_to_depth(x, strides):
    """``(B, H, W, C)`` → ``(B, H/s, W/s, s·s·C)``, channels ordered (row, column, C).

    **Guarantee**: a permutation of entries, hence an isometry.
    """
    batch, height, width, channels = x.shape
    sh, sw = strides
    check_divisible(height, width, strides)
    x = x.reshape(batch, height // sh, sh, width // sw, sw, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // sh, width // sw, sh * sw * channels)


def depth_to_space(x, strides):
    """The inverse of `space_to_depth`, an isometry as well."""
    batch, height, width, channels = x.shape
    sh, sw = strides
    if channels % (sh * sw):
        raise UserError(f"depth_to_space: {channels} channels are not divisible by {sh}x{sw}")
    x = x.reshape(batch, height, width, sh, sw, channels // (sh * sw))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * sh, width * sw, channels // (sh * sw))


def resize_channels(x, channels):
    """Pads the last axis with zeros (an isometry) or crops it (a co-isometry, 1-Lipschitz) to `channels`."""
    current = x.shape[-1]
    if current >= channels:
        return x[..., :channels]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, channels - current)])


def maxmin(x):
    """Sorts pairs (c, c + C//2) of the last axis: maxima first, minima second (Anil, Lucas and Grosse 2019).

    **Guarantee**: 1-Lipschitz, and an isometry wherever it is differentiable (its Jacobian is a permutation). The
    last channel of an odd number passes through.
    """
    half = x.shape[-1] // 2
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b), rest], axis=-1)


def circular_conv(x, kernel, strides=(1, 1), before=(0, 0)):
    """Cross-correlation on a torus: ``(B, H, W, C_in)`` with an HWIO kernel → ``(B, H/s, W/s, C_out)``.

    Output (i, j) reads inputs ``i·s + t − before``, t = 0 … k−1, modulo the size; k may exceed the size. Its exact
    singular values are `spectrum.conv_singular_values`.
    """
    height, width = x.shape[1:3]
    check_divisible(height, width, strides)
    wrap = [(b, max(k - s - b, 0)) for k, s, b in zip(kernel.shape[:2], strides, before, strict=True)]
    if np.any(wrap):
        x = jnp.pad(x, ((0, 0), *wrap, (0, 0)), mode="wrap")
    # XLA's CPU back end has no fast path for unpadded convolutions: one wasted row of output buys it.
    wasted = strides[0]
    y = jax.lax.conv_general_dilated(
        x, kernel, strides, ((0, wasted), (0, 0)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y[:, : height // strides[0], : width // strides[1]]
