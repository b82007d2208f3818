"""How latents and noise are represented, drawn and added on the device: exact integers, or the classic float32."""

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Float, Int, Num

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.format import COLUMN_BITS, THRESHOLD_BITS
from lsrs_jax.runtime.validate import choice
from lsrs_jax.smoothing import discrete_gaussian
from lsrs_jax.smoothing.derivation import check_sigma

_LARGEST = 2.0**120  # limit of float32 latents: beyond it float32 or a norm might overflow


class Arithmetic(Protocol):
    """How the sampler represents latents and noise; `GridArithmetic` explains the methods."""

    dtype: Any  # of the latents on the device
    sigma: float  # that a radius may claim
    tables: Any  # what `draw` needs on every device
    identity: dict[str, Any]  # besides sigma, the facts that determine the distribution of the noise

    def quantize(self, latents: Float[np.ndarray, "images *latent"]) -> Num[np.ndarray, "images *latent"]: ...
    def slack(self, latents: Float[np.ndarray, "images *latent"]) -> Float[np.ndarray, " images"]: ...
    def tau(self, dimensions: int) -> float: ...
    def draw(self, key: jax.Array, size: tuple[int, ...], tables: Any) -> Num[Array, "*size"]: ...
    def add(self, latent: Num[Array, "*latent"], noise: Num[Array, "*shape"]) -> Float[Array, "*shape"]: ...


class GridArithmetic:
    """Latents and noise as whole multiples of a power of two: exact grid arithmetic (``arithmetic="sound"``).

    **Guarantee**: `add` feeds to the head one fixed function ρ (round to the grid, clip to ±2²⁴ steps, convert to
    float32, all exact) of latent + Gaussian noise, because ρ(v + δ) = v + ρ(δ) for v on the grid; the distribution of
    the drawn noise is that of ρ(δ), δ ~ N(0, σ²I), up to a total variation of `tau`. So the samples are those of the
    base classifier head∘ρ under true Gaussian noise, up to `tau`, and `slack` covers what rounding moves the certified
    latent and any other one.
    """

    dtype = np.int32

    def __init__(self, sigma: float) -> None:
        grid = discrete_gaussian.grid(float(sigma))
        self.sigma, self.tables, self._spacing = float(sigma), grid.table, grid.spacing
        self.identity: dict[str, Any] = {"name": "sound", "spacing": grid.spacing}

    def quantize(self, latents: Float[np.ndarray, "images *latent"]) -> Int[np.ndarray, "images *latent"]:
        """Latents in steps of q, rounded to nearest (ties to even); raises UserError if noise could leave the grid."""
        limit = discrete_gaussian.MAX_LATENT * self._spacing
        if np.abs(latents).max(initial=0) > limit:
            limits = f"{limit:g}, the range of the grid for sigma={self.sigma:g}"
            raise UserError(f"latents reach beyond {limits}: scale them, or use a larger sigma or arithmetic='float32'")
        return np.rint(latents / self._spacing).astype(np.int32)

    def slack(self, latents: Float[np.ndarray, "images *latent"]) -> Float[np.ndarray, " images"]:
        """ℓ2 distance in the latent that a certificate loses to rounding."""
        return np.full(len(latents), discrete_gaussian.rounding_slack(int(np.prod(latents.shape[1:])), self._spacing))

    def tau(self, dimensions: int) -> float:
        """Total variation between the drawn noise and a rounded Gaussian."""
        return discrete_gaussian.total_variation(dimensions)

    @staticmethod
    def draw(key: jax.Array, size: tuple[int, ...], tables: Any) -> Int[Array, "*size"]:
        """Draws int32 noise in steps of q."""
        columns, thresholds = _words(key, math.prod(size))
        column = (columns >> (32 - COLUMN_BITS)).astype(jnp.int32)
        packed = tables[0].at[column].get(mode="promise_in_bounds")
        low = tables[1].at[column].get(mode="promise_in_bounds")
        high, drawn = packed >> COLUMN_BITS, columns & (2 ** (THRESHOLD_BITS - 32) - 1)
        own = (drawn < high) | ((drawn == high) & (thresholds < low))
        alias = (packed & (2**COLUMN_BITS - 1)).astype(jnp.int32)
        magnitude = jnp.where(own, column, alias)
        sign = (columns >> (THRESHOLD_BITS - 32)) & 1
        return jnp.where(sign == 1, -magnitude, magnitude).reshape(size)

    def add(self, latent: Int[Array, "*latent"], noise: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Noisy latents as float32: the sum of integers is exact, and is never −0."""
        steps = jnp.clip(latent + noise, -discrete_gaussian.LIMIT, discrete_gaussian.LIMIT)
        return steps.astype(jnp.float32) * np.float32(self._spacing)


class Float32Arithmetic:
    """Float32 latents plus σ times float32 normals, as in every published implementation; for comparison with them.

    The theorem is about real-valued noise, which this program only approximates; `slack` says which errors are covered.
    `tau` is 0, because no bound is known for the effect of float32 normals on the probabilities. `sigma` is the smaller
    of σ and its float32 neighbour, because the noise is scaled in float32.
    """

    dtype = np.float32

    def __init__(self, sigma: float) -> None:
        check_sigma(sigma)
        self.tables, self.identity = np.float32(sigma), dict[str, Any](name="float32")
        self.sigma = min(float(sigma), float(self.tables))

    def quantize(self, latents: Float[np.ndarray, "images *latent"]) -> Float[np.ndarray, "images *latent"]:
        if np.abs(latents).max(initial=0) > _LARGEST:
            raise UserError(f"latents reach beyond {_LARGEST:g}, near the end of the float32 range: scale them")
        return latents.astype(np.float32)

    def slack(self, latents: Float[np.ndarray, "images *latent"]) -> Float[np.ndarray, " images"]:
        """ℓ2 bound on how far rounding to float32 moves latents.

        **Guarantee**: covers the rounding of the certified latent and of any other latent within the certified ball
        (each at most 2⁻²⁴ of its norm; no radius in the latent exceeds 10σ), twice over, which leaves room for the
        float64 encoder's own rounding (about 1e-10). It does not cover the rounding of latent + noise inside the
        sampling loop, nor the 23-bit distribution of float32 normals: with float32 arithmetic the theorem holds for
        real-valued noise, and the program approximates it.
        """
        norms = np.linalg.norm(np.asarray(latents, np.float64).reshape(len(latents), -1), axis=1)
        return 2.0**-22 * (norms + 10 * self.sigma) + 2.0**-140

    def tau(self, dimensions: int) -> float:
        return 0.0

    @staticmethod
    def draw(key: jax.Array, size: tuple[int, ...], tables: Any) -> Float[Array, "*size"]:
        return tables * jax.random.normal(key, size, jnp.float32)

    def add(self, latent: Float[Array, "*latent"], noise: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return latent + noise


ARITHMETICS = {"sound": GridArithmetic, "float32": Float32Arithmetic}


def make_arithmetic(name: str, sigma: float) -> Arithmetic:
    """The arithmetic ``"sound"`` or ``"float32"`` for a σ."""
    choice("arithmetic", name, ARITHMETICS)
    return ARITHMETICS[name](sigma)


def _words(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Two uint32 arrays of uniform bits: both words of one threefry block per entry, with counters of its own."""
    data, counters = jax.random.key_data(key), jnp.arange(2 * count, dtype=jnp.uint32)
    if jax.default_backend() != "cpu":
        words = threefry_2x32(data, counters)
        return words[:count], words[count:]
    # A loop of one step, of which XLA does not know that it has one, keeps the words in memory: otherwise they would be
    # computed wherever they are used, and such programs can take minutes to compile.
    once, empty = jnp.minimum(data[0] | np.uint32(1), np.uint32(1)).astype(jnp.int32), jnp.zeros(count, jnp.uint32)
    first, second = counters[:count], counters[count:]
    return jax.lax.fori_loop(0, once, lambda *_: unrolled_threefry(data, first, second), (empty, empty))


def unrolled_threefry(key: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two words of the threefry2x32 block (Salmon et al. 2011) of the counters x and y; key, x, y are uint32.

    The numbers are those of JAX's `threefry_2x32`, which is compiled as a loop on CPUs: its rounds go through memory.
    As one expression they stay in registers.
    """
    words = key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)
    x, y = x + words[0], y + words[1]
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = x ^ (y << np.uint32(rotation) | y >> np.uint32(32 - rotation))
        x = x + words[(group + 1) % 3]
        y = y + words[(group + 2) % 3] + np.uint32(group + 1)
    return x, y
