"""Orthogonal convolution kernels from projectors and one rotation: BCOP ∘ RKO (Boissin et al. 2025).

A semi-orthogonal s×s kernel (RKO: Serrurier et al. 2021) makes the stride and the change of channels. Two-tap filters
of projectors (BCOP: Xiao et al. 2018; Li et al. 2019) lengthen it to k×k. The product is orthogonal for any stride and
any channels. Matrices act from the left on columns of channels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lsrs_jax.orthogonal.families.family import ConvFamily, Kernel, Raw, gaussian
from lsrs_jax.orthogonal.matrix import adjoint, bjorck, exponential, highest_precision
from lsrs_jax.orthogonal.shape import ConvShape, Pair, check_common, check_mode
from lsrs_jax.runtime.errors import UserError


def _extra(shape: ConvShape) -> Pair:
    """Number of two-tap filters that lengthen the kernel, per axis."""
    return shape.kernel_size[0] - shape.strides[0], shape.kernel_size[1] - shape.strides[1]


def _width(shape: ConvShape) -> int:
    """Channels m between the filters and the rotation: more than c_in only if the layer stays an isometry."""
    return max(shape.c_in, shape.c_out // (shape.strides[0] * shape.strides[1]))


def check(shape: ConvShape) -> None:
    """Raises UserError if the filters would have a single channel: they could only shift the image."""
    check_common(shape)
    if _width(shape) == 1 and max(_extra(shape)) > 0:
        raise UserError(
            f"adaptive: from 1 to {shape.c_out} channels a kernel of {shape.kernel_size} with strides {shape.strides} "
            "could only shift the image; use more output channels, kernel_size=strides, or method='cayley'"
        )


def init(key: PRNGKeyArray, shape: ConvShape, mode: str) -> Raw:
    """Raw parameters: a rotation ``(c_out, s·s·m)`` and projector factors ``(taps, m, m//2)`` per axis.

    ``mode="identity"`` sets the rotation to I and makes the projectors equal in pairs, so that a kernel with k − s even
    starts as space-to-depth (cropped or zero-padded in the channels).
    """
    check_mode(mode)
    width, (rows, columns) = _width(shape), _extra(shape)
    rotation_key, factor_key, *axis_keys = jax.random.split(key, 4)
    rotation = gaussian(rotation_key, shape.c_out, width * shape.strides[0] * shape.strides[1])
    if mode == "identity":
        pairs = jnp.repeat(gaussian(factor_key, -(-max(rows, columns) // 2), width, width // 2), 2, axis=0)
        # Copies, because JAX cannot donate two leaves that share a buffer.
        height, wide = (jnp.array(pairs[:count], copy=True) for count in (rows, columns))
        return {"rotation": 0 * rotation, "height": height, "width": wide}
    height, wide = (gaussian(axis_keys[i], count, width, width // 2) for i, count in enumerate((rows, columns)))
    return {"rotation": rotation, "height": height, "width": wide}


def _lengthen(kernel: Kernel, factor: Float[Array, "m m//2"], axis: int, flipped: bool) -> Kernel:
    """Composes a kernel ``(kh, kw, c_out, m)`` with the filter (P, I − P), flipped (I − P, P); P = UUᵀ for factor U."""
    projected = kernel @ factor @ adjoint(factor)
    first, second = (kernel - projected, projected) if flipped else (projected, kernel - projected)
    after, before = [[(0, 0)] * 4 for _ in range(2)]
    after[axis], before[axis] = (0, 1), (1, 0)
    return jnp.pad(first, after) + jnp.pad(second, before)


@highest_precision
def build(raw: Raw, shape: ConvShape) -> Kernel:
    """Builds the kernel from raw parameters, differentiable.

    **Guarantee**: as a circular convolution with these strides on any size they divide, the kernel has all singular
    values 1 up to rounding (isometry if c_out ≥ c_in·s·s, co-isometry otherwise), provided the Björck iteration of the
    projector factors has converged; if it has not, and under zero padding, none exceeds 1.
    """
    (sh, sw), (rows, columns) = shape.strides, _extra(shape)
    kernel = exponential(raw["rotation"]).reshape(shape.c_out, sh, sw, _width(shape)).transpose(1, 2, 0, 3)
    factors = bjorck(jnp.concatenate([raw["height"], raw["width"]]))
    for index in range(max(rows, columns)):
        for axis, count, start in ((0, rows, 0), (1, columns, rows)):
            if index < count:
                # Every second filter is flipped, so that equal pairs cancel for odd m as well.
                kernel = _lengthen(kernel, factors[start + index], axis, index % 2 == 1)
    return jnp.swapaxes(kernel[..., : shape.c_in], -1, -2)


def extend(raw: Raw, shape: ConvShape) -> tuple[Raw, ConvShape]:
    """Raw parameters and shape of the kernel that keeps all channels of its filters and its rotation."""
    width = _width(shape)
    c_out = max(shape.c_out, width * shape.strides[0] * shape.strides[1])
    rotation = jnp.pad(raw["rotation"], ((0, c_out - shape.c_out), (0, 0)))
    return raw | {"rotation": rotation}, shape._replace(c_in=width, c_out=c_out, input_hw=shape.strides)


FAMILY: ConvFamily = ConvFamily(check, init, build, extend=extend)
