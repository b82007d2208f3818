"""Paraunitary convolution kernels from matrix exponentials: separable complete factorisation, SC-Fac (Su et al. 2022).

Matrices act from the left on columns of C = max(c_out, c_in·s·s) channels; the kernel is cropped to those of the layer.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lsrs_jax.orthogonal.families.family import ConvFamily, Kernel, Raw, gaussian
from lsrs_jax.orthogonal.matrix import adjoint, exponential, highest_precision
from lsrs_jax.orthogonal.shape import ConvShape, check_common, check_mode
from lsrs_jax.runtime.errors import UserError


def check(shape: ConvShape) -> None:
    """Raises UserError if a stride does not divide the kernel size: the construction needs it."""
    check_common(shape)
    if shape.kernel_size[0] % shape.strides[0] or shape.kernel_size[1] % shape.strides[1]:
        raise UserError(
            f"paraunitary: kernel size {shape.kernel_size} must be a multiple of the strides {shape.strides}; "
            "choose such a kernel size or method='adaptive'"
        )


@highest_precision
def init(key: PRNGKeyArray, shape: ConvShape, mode: str) -> Raw:
    """Raw parameters: per axis a rotation ``(C, C)`` and, from the second tap on, a projector factor ``(C, C//2)``.

    ``mode="identity"`` sets the rotations to I and makes the projectors equal in pairs, so that an odd kernel starts as
    the identity (cropped or zero-padded in the channels).
    """
    check_mode(mode)
    width = max(shape.c_out, shape.phases)
    rotation_key, *axis_keys = jax.random.split(key, 3)

    def projectors(key: PRNGKeyArray, taps: int) -> Float[Array, "taps-1 C C//2"]:
        if mode == "identity":
            return jnp.repeat(gaussian(key, taps // 2, width, width // 2), 2, axis=0)[: taps - 1]
        return gaussian(key, taps - 1, width, width // 2)

    rotations = gaussian(rotation_key, 2, width, width)
    height, wide = (projectors(*pair) for pair in zip(axis_keys, shape.taps, strict=True))
    return {"rotations": rotations * (mode != "identity"), "height": height, "width": wide}


@highest_precision
def _filter(rotation: Float[Array, "C C"], projectors: Float[Array, "taps-1 C C"]) -> Float[Array, "taps C C"]:
    """One-dimensional paraunitary filter: a rotation, and one projector per further tap."""
    taps = rotation[None]
    for index, p in enumerate(projectors):
        shifted, kept = jnp.pad(taps, ((1, 0), (0, 0), (0, 0))), jnp.pad(taps, ((0, 1), (0, 0), (0, 0)))
        # Projectors act on alternating sides, so that equal projectors cancel around the middle tap.
        taps = shifted + (kept - shifted) @ p if index % 2 == 0 else kept + p @ (shifted - kept)
    return taps


@highest_precision
def build(raw: Raw, shape: ConvShape) -> Kernel:
    """Builds the kernel from raw parameters, differentiable.

    **Guarantee**: as a circular convolution with these strides on any size they divide, the kernel has all singular
    values 1 up to rounding (isometry if c_out ≥ c_in·s·s, co-isometry otherwise); under zero padding none exceeds 1.
    """
    width, rank = raw["rotations"].shape[-1], raw["height"].shape[-1]
    factors = jnp.pad(jnp.concatenate([raw["height"], raw["width"]]), ((0, 0), (0, 0), (0, width - rank)))
    orthogonal = exponential(jnp.concatenate([raw["rotations"], factors]))
    columns = orthogonal[2:, :, :rank]
    projectors = columns @ adjoint(columns)
    split = len(raw["height"])
    vertical, horizontal = _filter(orthogonal[0], projectors[:split]), _filter(orthogonal[1], projectors[split:])
    kernel = jnp.einsum("hij,wjk->hwik", vertical, horizontal)[:, :, : shape.c_out, : shape.phases]
    (th, tw), (sh, sw) = shape.taps, shape.strides
    kernel = kernel.reshape(th, tw, shape.c_out, sh, sw, shape.c_in).transpose(0, 3, 1, 4, 5, 2)
    return kernel.reshape(th * sh, tw * sw, shape.c_in, shape.c_out)


FAMILY: ConvFamily = ConvFamily(check, init, build)
