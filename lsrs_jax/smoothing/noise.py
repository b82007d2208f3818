"""How latents and noise are held, drawn and added on the device: exact integers, or the classic float32."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

from lsrs_jax.errors import UserError
from lsrs_jax.smoothing import grid as grids
from lsrs_jax.smoothing.radius import float32_slack, sampled_sigma


class Sound:
    """Latents and noise as whole multiples of a power of two.

    Attributes:
      sigma: the σ that a radius may claim.
      tables: arrays the compiled loop needs on every device.
      identity: what the law of the noise depends on beside σ, for a ledger's identity.

    **Guarantee**: the function `add(latent, noise)` feeds to the head is one fixed function ρ (round to the grid, clip
    to ±2²⁴ steps, convert to float32, all exact) of latent + Gaussian noise, because ρ(v + δ) = v + ρ(δ) for v on the
    grid; the law of the drawn noise is that of ρ(δ), δ ~ N(0, σ²I), up to a total variation of `tau`. So the votes are
    those of the base classifier head∘ρ under true Gaussian noise, up to `tau`, and `slack` covers what rounding moves
    the certified latent and any other one.
    """

    dtype = np.int32

    def __init__(self, sigma):
        self._grid = grids.grid(float(sigma))
        self.sigma = float(sigma)
        self.tables = self._grid.table
        self.identity = {"name": "sound", "spacing": self._grid.spacing}

    def place(self, latents):
        """Finite float64 latents ``(N, …)`` → int32 multiples of q.

        Raises:
          UserError: for latents so large that noise could reach the limit of the grid.
        """
        limit = grids.MAX_LATENT * self._grid.spacing
        if np.abs(latents).max(initial=0) > limit:
            raise UserError(
                f"latents reach beyond {limit:g}, the range of the grid for sigma={self.sigma:g}: scale them, use a "
                "larger sigma, or arithmetic='float32'"
            )
        return grids.quantize(latents, self._grid.spacing)

    def slack(self, latents):
        """ℓ2 charge per latent, float64 ``(N,)``."""
        dimensions = int(np.prod(latents.shape[1:]))
        return np.full(len(latents), grids.rounding_slack(dimensions, self._grid.spacing))

    def tau(self, dimensions):
        """Total variation between the drawn noise and a rounded Gaussian."""
        return grids.total_variation(dimensions)

    @staticmethod
    def draw(key, size, table):
        """int32 noise, in steps of q, of shape `size`."""
        columns, thresholds = _words(key, size)
        column = (columns >> (32 - grids.COLUMN_BITS)).astype(jnp.int32)
        packed = table[0].at[column].get(mode="promise_in_bounds")
        low = table[1].at[column].get(mode="promise_in_bounds")
        high, drawn = packed >> grids.COLUMN_BITS, columns & (2 ** (grids.THRESHOLD_BITS - 32) - 1)
        own = (drawn < high) | ((drawn == high) & (thresholds < low))
        alias = (packed & (2**grids.COLUMN_BITS - 1)).astype(jnp.int32)
        magnitude = jnp.where(own, column, alias)
        sign = (columns >> (grids.THRESHOLD_BITS - 32)) & 1
        return jnp.where(sign == 1, -magnitude, magnitude)

    def add(self, latent, noise):
        """Noisy latent as float32. The sum of integers is exact, and has no −0."""
        steps = jnp.clip(latent + noise, -grids.LIMIT, grids.LIMIT)
        return steps.astype(jnp.float32) * np.float32(self._grid.spacing)


_LARGEST = 2.0**120  # of float32 latents


class Float32:
    """Float32 latents plus σ times float32 normals, as in every published implementation.

    The theorem speaks of real-valued noise; this approximates it (`radius.float32_slack` says what is charged). For
    comparison with the literature.
    """

    dtype = np.float32

    def __init__(self, sigma):
        self.sigma = sampled_sigma(sigma)
        self.tables = np.float32(sigma)
        self.identity = {"name": "float32"}

    def place(self, latents):
        """Finite float64 latents ``(N, …)`` → float32.

        Raises:
          UserError: for latents so large that float32 or their norm might overflow.
        """
        if np.abs(latents).max(initial=0) > _LARGEST:
            raise UserError(f"latents reach beyond {_LARGEST:g}, where float32 ends: scale them")
        return latents.astype(np.float32)

    def slack(self, latents):
        """ℓ2 charge per latent, float64 ``(N,)``."""
        return float32_slack(latents, self.sigma)

    def tau(self, dimensions):
        """Nothing is charged: what float32 normals do to the probabilities is not bounded."""
        return 0.0

    @staticmethod
    def draw(key, size, sigma):
        """float32 noise of shape `size`."""
        return sigma * jax.random.normal(key, size, jnp.float32)

    def add(self, latent, noise):
        """Noisy latent, rounded to float32."""
        return latent + noise


ARITHMETICS = {"sound": Sound, "float32": Float32}


def arithmetic(name, sigma):
    """The arithmetic of that name for a σ."""
    if not isinstance(name, str) or name not in ARITHMETICS:
        raise UserError(f"unknown arithmetic {name!r}: choose one of {', '.join(ARITHMETICS)}")
    return ARITHMETICS[name](sigma)


def _words(key, size):
    """Two uint32 arrays of uniform bits: both words of one threefry block per entry, with counters of its own."""
    count = int(np.prod(size))
    words = threefry_2x32(jax.random.key_data(key), jnp.arange(2 * count, dtype=jnp.uint32))
    return words[:count].reshape(size), words[count:].reshape(size)
