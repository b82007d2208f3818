"""The free first layer: a head's linear first layer in integers, multiplied once per image and once per noise vector.

Latents and noise are whole multiples of the grid spacing q, so with whole weights W both W·v and W·δ are whole numbers,
and W·v + W·δ = W·(v + δ) exactly. All of them stay below 2⁵³, where float64 holds every integer, in whatever order a
device adds. In floating point the two sides differ, and their difference tells the latent from the noise.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Float64, Int

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.format import COLUMN_BITS
from lsrs_jax.runtime.mesh import replicated
from lsrs_jax.runtime.validate import choice, is_whole, numbers
from lsrs_jax.smoothing.arithmetic import Arithmetic, GridArithmetic
from lsrs_jax.smoothing.discrete_gaussian import MAX_LATENT

INTEGER = "integer"  # the name of such a layer; on-disk format
REACH = MAX_LATENT + 2**COLUMN_BITS  # of latent plus noise, in steps of q; no clip acts
_EXACT = 2**53
_TRIED = 3  # images, noise vectors and channels that the check of a device compares with NumPy


@dataclasses.dataclass(frozen=True, eq=False)
class FirstLayer:
    """A head's first layer: a matrix product on the flattened latent, or a convolution.

    Args:
      kernel: ``(inputs, outputs)``, or ``(height, width, channels, outputs)`` for latents ``(B, H, W, C)``.
      bias: ``(outputs,)``, or of the shape of all outputs of a convolution; 0 if None.
      strides, padding: of a convolution: ``"SAME"``, ``"VALID"`` or ``((top, bottom), (left, right))`` zeros.

    Called on latents it computes in their dtype. Raises UserError for arrays that do not fit together.
    """

    kernel: Float[np.ndarray, "*kernel outputs"]
    bias: Float[np.ndarray, "*places outputs"] | None = None
    strides: tuple[int, int] = (1, 1)
    padding: str | Sequence[tuple[int, int]] = "SAME"

    def __post_init__(self) -> None:
        kernel = numbers("kernel", self.kernel)
        bias = np.zeros(kernel.shape[-1:]) if self.bias is None else numbers("bias", self.bias)
        if kernel.ndim not in (2, 4) or not kernel.size or bias.shape[-1:] != kernel.shape[-1:]:
            shapes = f"got {kernel.shape} and {bias.shape}"
            raise UserError(f"a first layer has a kernel (d, m) or (h, w, c, m) and a bias (m,), {shapes}")
        named = isinstance(self.padding, str)
        if named:
            choice("padding", self.padding, ("SAME", "VALID"))
        if not _is_pair(self.strides, 1) or not (named or _is_pair_of_pairs(self.padding)):
            wanted = "strides are two whole numbers >= 1, and padding two pairs of whole numbers >= 0"
            raise UserError(f"of a first layer, {wanted}: got {self.strides!r} and {self.padding!r}")
        if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
            raise UserError("the weights of a first layer must be finite")
        object.__setattr__(self, "kernel", kernel)
        object.__setattr__(self, "bias", bias)

    def __call__(self, latents: Float[Array, "B *latent"]) -> Float[Array, "B *outputs"]:
        kernel, bias = (jnp.asarray(part, latents.dtype) for part in (self.kernel, self.bias))
        if self.kernel.ndim == 2:
            return latents.reshape(len(latents), -1) @ kernel + bias
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(latents, kernel, self.strides, self.padding, dimension_numbers=names) + bias

    @property
    def digest(self) -> str:
        """SHA-256 of the layer."""
        total = hashlib.sha256(f"{self.kernel.shape} {tuple(self.strides)} {self.padding}".encode())
        for part in (self.kernel, np.asarray(self.bias)):
            total.update(part.tobytes())
        return total.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class SplitHead:
    """A head as its first layer and the rest; called, it is the head in float32 (`whole`, if that is given)."""

    first: FirstLayer
    rest: Callable[[Any], Any]
    whole: Callable[[Any], Any] | None = None

    def __call__(self, latents: Float[Array, "B *latent"]) -> Float[Array, "B classes"]:
        return self.whole(latents) if self.whole else self.rest(self.first(latents))


def _is_pair(value: Any, least: int) -> bool:
    two = isinstance(value, tuple | list) and len(value) == 2
    return two and all(is_whole(size) and size >= least for size in value)


def _is_pair_of_pairs(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(_is_pair(each, 0) for each in value)


def as_head(head: Any) -> Any:
    """A caller's head: a pair ``(FirstLayer, function)`` becomes a `SplitHead`; all else stays as it is."""
    if type(head) is not tuple:
        return head
    if len(head) != 2 or not isinstance(head[0], FirstLayer) or not callable(head[1]):
        raise UserError("a head that is a pair must be (lsrs_jax.smoothing.FirstLayer(...), function of its outputs)")
    return SplitHead(*head)


class Tables(NamedTuple):
    """The arrays of an `IntegerLayer` on the devices."""

    kernel: Any  # float64 (inputs of one output, outputs), whole numbers
    bias: Any  # float64, whole numbers
    scale: Any  # float32 (outputs,), powers of two


class IntegerLayer:
    """A `FirstLayer` with its weights rounded to integers, for latents on a grid of this spacing.

    Output o of a latent z is float32(2^−k·q·S) with S = Σ W·u + b and u = z/q, rounded to a whole number and clipped to
    ±(2²³ + 2¹⁸). W and b are the weights and the bias times 2^k and 2^k/q, rounded to integers, with the largest k (one
    per output) that keeps Σ|W|·(2²³ + 2¹⁸) + |b| below 2⁵³.

    **Guarantee**: `rows` returns this function of z = q·(v + δ), bit for bit, on devices that compute float64 as IEEE
    754 says (`agrees` tries it): each partial sum of S, in any order, is a whole number below 2⁵³, which float64 holds;
    so is the sum of W·v + b and W·δ. The one rounding is that of S to float32: the factor is a power of two.

    Raises UserError for latents that do not fit the layer, and for weights near the ends of the float32 range.
    """

    def __init__(self, layer: FirstLayer, spacing: float, latent_shape: tuple[int, ...]) -> None:
        kernel, bias = layer.kernel, np.asarray(layer.bias)
        self.digest, self._window, self._strides = layer.digest, kernel.shape[:-2], tuple(layer.strides)
        self._latent, outputs = latent_shape, kernel.shape[-1]
        fits = math.prod(latent_shape) == kernel.shape[0]
        if self._window:
            fits = len(latent_shape) == 3 and latent_shape[-1] == kernel.shape[2]
        if not fits:
            raise UserError(f"the first layer has a kernel {kernel.shape}, which does not fit latents {latent_shape}")
        places: tuple[int, ...] = ()
        self._padding: list[tuple[int, int]] = []
        if self._window:
            edges = layer.padding
            if isinstance(edges, str):
                edges = jax.lax.padtype_to_pads(latent_shape[:2], self._window, self._strides, edges)
            self._padding = [(int(low), int(high)) for low, high in edges]
            room = [size + sum(edge) for size, edge in zip(latent_shape[:2], self._padding, strict=True)]
            if any(size < window for size, window in zip(room, self._window, strict=True)):
                raise UserError(f"the window {self._window} of the first layer is larger than latents {latent_shape}")
            places = self._windows(np.zeros((1, *latent_shape), np.int32), np).shape[1:3]
        self.shape = (*places, outputs)
        if bias.shape not in ((outputs,), self.shape):
            raise UserError(f"the first layer has outputs {self.shape}, but a bias {bias.shape}")
        self.tables = _whole(kernel.reshape(-1, outputs), bias, spacing)

    def _windows(self, x: Any, library: Any) -> Any:
        """The inputs of every output, ``(images, *places, inputs)``; `library` is `jax.numpy` or `numpy`."""
        if not self._window:
            return x.reshape(len(x), -1)
        x = library.pad(x, ((0, 0), *self._padding, (0, 0)))
        (height, width), (down, right) = self._window, self._strides
        rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
        parts = [x[:, i : i + rows : down, j : j + columns : right] for i in range(height) for j in range(width)]
        return library.concatenate(parts, axis=-1)

    def product(self, steps: Int[Array, "B *latent"], tables: Tables) -> Float64[Array, "B *outputs"]:
        """W·steps, in whole numbers."""
        with jax.enable_x64(True):
            windows = self._windows(steps, jnp).astype(jnp.float64)
            axes = (((windows.ndim - 1,), (0,)), ((), ()))
            return jax.lax.dot_general(windows, tables.kernel, axes, precision=jax.lax.Precision.HIGHEST)

    def of_images(self, latents: Int[Array, "images *latent"], tables: Tables) -> Float64[Array, "images *outputs"]:
        """W·v + b for latents from `Sampler.quantize`."""
        with jax.enable_x64(True):
            return self.product(latents, tables) + tables.bias

    def rows(self, of_images: Any, of_noise: Any, tables: Tables) -> Float32[Array, "rows *outputs"]:
        """The outputs for image after image, one row per noise vector.

        They follow from `of_images` and from `product` of the noise, ``(1 or images, samples, *outputs)``.
        """
        with jax.enable_x64(True):
            sums = (of_images[:, None] + of_noise).astype(jnp.float32)
        return sums.reshape(-1, *self.shape) * tables.scale

    def agrees(self, tile: tuple[int, int], devices: Mesh) -> bool:
        """Whether all devices compute `rows` bit for bit as NumPy does in int64.

        Some images, noise vectors and outputs of a batch are compared: random ones, and those of the largest sums.
        """
        rng, kernel, reaches = np.random.default_rng(0), self.tables.kernel, (MAX_LATENT, REACH - MAX_LATENT)
        batch = [
            rng.integers(-reach, reach, (size, *self._latent), np.int32, endpoint=True)
            for size, reach in zip(tile, reaches, strict=True)
        ]
        signs = np.ones(self._latent) if self._window else np.sign(kernel[:, 0]).reshape(self._latent)
        for part, reach in zip(batch, reaches, strict=True):
            part[0] = reach * signs.astype(np.int32)
        images, samples, channels = (
            np.concatenate([[0], rng.permutation(np.arange(1, size))[: _TRIED - 1]]) for size in (*tile, self.shape[-1])
        )
        steps = (batch[0][images][:, None].astype(np.int64) + batch[1][samples][None]).reshape(-1, *self._latent)
        bias = self.tables.bias[..., channels].astype(np.int64)
        sums = self._windows(steps, np) @ kernel[:, channels].astype(np.int64) + bias
        expected = sums.astype(np.float32) * self.tables.scale[channels]

        def some(latents: Any, noise: Any, tables: Tables) -> Any:
            found = self.rows(self.of_images(latents, tables), self.product(noise, tables)[None], tables)
            found = found.reshape(*tile, *self.shape)[images][:, samples]
            return found.reshape(-1, *self.shape)[..., channels]

        everywhere = replicated(devices)
        found = jax.jit(some, out_shardings=everywhere)(*put((*batch, self.tables), everywhere))
        copies = (np.asarray(shard.data) for shard in found.addressable_shards)
        return all(np.array_equal(copy.view(np.int32), expected.view(np.int32)) for copy in copies)


def put(arrays: Any, sharding: Any) -> Any:
    """Puts arrays on devices, float64 ones as they are."""
    with jax.enable_x64(True):
        return jax.device_put(arrays, sharding)


def _whole(kernel: np.ndarray, bias: np.ndarray, spacing: float) -> Tables:
    """Weights and bias as integers on one scale per output, with as many bits as the sums allow."""
    with np.errstate(over="ignore"):
        sizes = np.abs(bias).reshape(-1, bias.shape[-1]).max(axis=0) / spacing + REACH * np.abs(kernel).sum(axis=0)
    if not np.isfinite(sizes).all():
        raise UserError("the weights of the first layer are too large for float32")
    least, most = (int(math.log2(spacing)) + limit for limit in (-74, 126))  # normal float32 factors, finite outputs
    bits = np.minimum(54 - np.frexp(sizes)[1], most)
    while True:
        weights, offsets = np.rint(np.ldexp(kernel, bits)), np.rint(np.ldexp(bias / spacing, bits))
        largest = np.abs(offsets).reshape(-1, bias.shape[-1]).max(axis=0)
        total = np.abs(weights).astype(np.int64).sum(axis=0) * REACH + largest.astype(np.int64)
        if not (over := total >= _EXACT).any():
            break
        bits = bits - over
    if (bits < least).any():
        raise UserError("the weights of the first layer are too large for float32")
    scale = np.ldexp(spacing, -bits).astype(np.float32)
    return Tables(weights, offsets, scale)


def integer_layer(
    head: Any, arithmetic: Arithmetic, noise: str, latent_shape: tuple[int, ...], tile: tuple[int, int], devices: Mesh
) -> IntegerLayer | None:
    """The integer layer of a head, or None where it does not begin with one, or where it would not be exact.

    It needs grid arithmetic, noise that images share, and devices whose float64 holds whole numbers (TPUs' does not).
    """
    if not isinstance(head, SplitHead) or not isinstance(arithmetic, GridArithmetic) or noise != "shared":
        return None
    layer = IntegerLayer(head.first, arithmetic.identity["spacing"], latent_shape)
    return layer if layer.agrees(tile, devices) else None
