"""Sample blocks as the head receives them: noise, added to the latents of a batch on the device."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Num

from lsrs_jax.smoothing.arithmetic import GridArithmetic, make_arithmetic
from lsrs_jax.smoothing.first_layer import integer_layer


class NoisyBlocks:
    """Makes the rows of a head batch from latents and noise, for latents of shape `latent_shape`.

    `head` is used only to find an integer first layer; None looks for none. `shape` is the shape of a row: that of the
    latents, or of the integer layer's outputs. The other arguments are those of `api.SmoothedClassifier`.
    """

    def __init__(
        self,
        head: Any,
        latent_shape: tuple[int, ...],
        *,
        sigma: float,
        arithmetic: str,
        noise: str,
        tile: tuple[int, int],
        devices: Mesh,
    ) -> None:
        self.arithmetic, self._tile, self._latent_shape = make_arithmetic(arithmetic, sigma), tile, latent_shape
        self._shared = noise == "shared"
        self.integer = integer_layer(head, self.arithmetic, noise, latent_shape, tile, devices)
        self.shape = self.integer.shape if self.integer else latent_shape
        self.tables = self.arithmetic.tables, self.integer and self.integer.tables

    @property
    def exact(self) -> bool:
        """Whether the sum of a latent and of noise has no rounding error, so that each program computes the same."""
        return isinstance(self.arithmetic, GridArithmetic)

    def noise(self, key: jax.Array, ids: Int[Array, " images"], block: Any, tables: Any) -> Num[Array, "..."]:
        """Noise of one block: ``(samples, numbers of a latent)``, or one such array per image of `ids`.

        Where images do not share the noise, `block` may be an array with one block per image. The arrays are flat,
        because XLA's loops on CPUs are slow where the last axis is short.
        """
        size = (self._tile[1], math.prod(self._latent_shape))
        if self._shared:
            return self.arithmetic.draw(jax.random.fold_in(key, block), size, tables[0])

        def draw(identifier: jax.Array, block: jax.Array) -> jax.Array:
            own = jax.random.fold_in(jax.random.fold_in(key, identifier), block)
            return self.arithmetic.draw(own, size, tables[0])

        return jax.vmap(draw, (0, 0 if jnp.ndim(block) else None))(ids, block)

    def prepared(self, latents: Any, tables: Any) -> Any:
        """What `rows` needs of a batch of latents; computed once per launch."""
        if self.integer:
            return self.integer.of_images(latents, tables[1])
        return latents.reshape(len(latents), math.prod(self._latent_shape))

    def rows(self, prepared: Any, noise: Any, tables: Any) -> Float[Array, "rows *shape"]:
        """Noisy latents, or the integer layer's outputs for them: for image after image, one row per sample."""
        if self.integer:
            return self.integer.rows(prepared, self._product(noise, tables)[None], tables[1])
        per_image = None if self._shared else 0
        noisy = jax.vmap(self.arithmetic.add, (0, per_image))(prepared, noise)
        return noisy.reshape(-1, *self._latent_shape)

    def noiseless(self, latents: Any, tables: Any) -> Float[Array, "images *shape"]:
        """What the head gets of latents without noise."""
        images = () if self._shared else (len(latents),)
        zeros = jnp.zeros((*images, 1, math.prod(self._latent_shape)), latents.dtype)
        return self.rows(self.prepared(latents, tables), zeros, tables)

    def _product(self, noise: Any, tables: Any) -> Any:
        assert self.integer is not None
        return self.integer.product(noise.reshape(-1, *self._latent_shape), tables[1])

    def packed_rows(
        self,
        prepared: Any,
        key: jax.Array,
        ids: Any,
        first: Any,
        lanes: Int[Array, " images"],
        blocks: Any,
        tables: Any,
    ) -> Float[Array, "rows *shape"]:
        """As `rows`, but the image in slot i gets the noise of block ``first + lanes[i]``.

        With shared noise, only the blocks from `first` to ``first + blocks`` are drawn.
        """
        if not self._shared:
            return self.rows(prepared, self.noise(key, ids, first + lanes, tables), tables)

        def of_block(block: jax.Array) -> jax.Array:
            with jax.enable_x64(False):
                noise = self.noise(key, ids, block, tables)
            return self._product(noise, tables) if self.integer else noise

        with jax.enable_x64(self.integer is not None):
            one = jax.eval_shape(of_block, first)
            empty = jnp.zeros((len(lanes), *one.shape), one.dtype)

            def draw(lane: jax.Array, drawn: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_index_in_dim(drawn, of_block(first + lane), lane, 0)

            drawn = jax.lax.fori_loop(np.int32(0), blocks, draw, empty)
            of_slot = drawn.at[jnp.minimum(lanes, blocks - 1)].get(mode="promise_in_bounds")
            if self.integer:
                return self.integer.rows(prepared, of_slot, tables[1])
        return jax.vmap(self.arithmetic.add)(prepared, of_slot).reshape(-1, *self._latent_shape)
