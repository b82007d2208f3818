"""Monte-Carlo votes of a head under Gaussian noise: the compiled loop. Only integers leave the device."""

import concurrent.futures
import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from lsrs_jax.distributed import AXIS, local_mesh, replicated
from lsrs_jax.errors import UserError
from lsrs_jax.keys import DOMAINS, check_key, domain_key, pinned
from lsrs_jax.smoothing.confidence import MAX_VOTES
from lsrs_jax.smoothing.noise import arithmetic as arithmetics
from lsrs_jax.smoothing.radius import check_sigma
from lsrs_jax.smoothing.tally import chunks

PURPOSES = {"selection": 1, "estimation": 2, "prediction": 3}
NOISE = {"shared": 0, "independent": 16}  # added to the number of a purpose, so that no key serves both
_SCALES = (0.01, 1.0, 100.0, 0.0, 1.0, 1.0)  # of the companions that a row is tried with
_MAX_ENTRIES = 2**31  # of one tile of noisy latents, 8 GiB
SPMD = ("shard_map", "pmap")


@contextlib.contextmanager
def _pinned():
    """Neither bits, nor dtypes, nor the precision of the head's products follow the user's flags.

    A head that asks for another precision itself keeps it. Checks that would stop the loop itself are off: of its key a
    child is drawn per chunk, which looks like reuse.
    """
    with contextlib.ExitStack() as settings:
        settings.enter_context(pinned())
        settings.enter_context(jax.default_matmul_precision("highest"))
        settings.enter_context(jax.debug_key_reuse(False))
        settings.enter_context(jax.numpy_rank_promotion("allow"))
        settings.enter_context(jax.transfer_guard("allow"))
        yield


# A tile holds up to 8 GiB: those of the probe are drawn where they are used, one at a time.
@functools.partial(jax.jit, static_argnums=1)
def _normals(key, shape):
    return jax.random.normal(key, shape, jnp.float32)


@functools.partial(jax.jit, static_argnums=4)
def _around(row, place, key, scale, shape):
    """A batch with `row` at `place`, among normals of this scale."""
    return (scale * jax.random.normal(key, shape, jnp.float32)).at[place].set(row)


class Votes:
    """The compiled vote loop for one head, one latent shape and one tile.

    A *chunk* is `samples` noise vectors, drawn from the key of (purpose, global chunk index) alone and shared by
    every image of a tile (``noise="shared"``), or from the key of (purpose, image id, chunk index)
    (``"independent"``). Devices take chunks in turn; a chunk is always evaluated as one head batch of
    ``images · samples`` rows, so the counts of an image depend on neither the number of devices, nor how the chunks
    are cut into calls, nor which other images fill the tile.

    Args:
      head: any function latents ``(B, *latent_shape)`` float32 → logits ``(B, K)`` whose rows are independent and
        deterministic.
      latent_shape: without the batch axis.
      sigma: standard deviation of the noise.
      key: one typed threefry key, such as that of the training's seed: certification draws from a domain of its own
        under it, every purpose from another child of that.
      arithmetic: ``"sound"`` or ``"float32"``, see `noise`.
      noise: ``"shared"`` or ``"independent"``.
      tile: ``(images, samples)``, the constant batch.
      spmd: ``"shard_map"`` or ``"pmap"``; both run the same per-device function.
      devices: the local devices to use; all of them by default.

    Raises:
      UserError: for a bad argument, a head that returns anything but ``(B, K ≥ 2)`` logits, NaN logits, or a head
        whose rows are seen to depend on each other (`_probe` tries random companions; it finds batch statistics over
        the whole batch or over groups, not every imaginable coupling).

    **Guarantee**: the vote of sample i on image z is argmax head(z + σεᵢ) in the arithmetic's sense, with the εᵢ of a
    (purpose, i) drawn from bits of their own. Each image's votes are independent of each other; votes of different
    images are not, where noise is shared.
    """

    def __init__(
        self,
        head,
        latent_shape,
        *,
        sigma,
        key,
        arithmetic="sound",
        noise="shared",
        tile=(32, 8),
        spmd="shard_map",
        devices=None,
    ):
        check_sigma(sigma)
        whole = isinstance(tile, tuple | list) and all(type(size) is int and size >= 1 for size in tile)
        if not whole or len(tile) != 2 or tile[0] * tile[1] < 2:
            raise UserError(f"tile must be two whole numbers (images, samples) that hold at least 2 rows, got {tile!r}")
        images, samples = tile
        if not isinstance(spmd, str) or spmd not in SPMD:
            raise UserError(f"unknown spmd {spmd!r}: choose one of {', '.join(SPMD)}")
        if not isinstance(noise, str) or noise not in NOISE:
            raise UserError(f"unknown noise {noise!r}: choose one of {', '.join(NOISE)}")
        if np.prod(latent_shape) < 1:
            raise UserError(f"latents of shape {tuple(latent_shape)} are empty")
        entries = math.prod((images, samples, *latent_shape))
        if entries > _MAX_ENTRIES:
            raise UserError(
                f"the tile {tuple(tile)} needs {entries // 2**28:,} GiB for its noisy latents alone; make it smaller"
            )
        self.tile = (int(images), int(samples))
        self.latent_shape = tuple(latent_shape)
        self.arithmetic = arithmetics(arithmetic, sigma)
        self.traces = 0  # how often the loop was traced; tests hold it at one
        self._head, self._noise = head, noise
        self._mesh = local_mesh(devices)
        self._launcher = concurrent.futures.ThreadPoolExecutor(1, "launch")
        with _pinned():
            domain = jax.random.fold_in(check_key(key), DOMAINS["certify"])
            self._keys = {
                purpose: jax.device_put(jax.random.fold_in(domain, number + NOISE[noise]), replicated(self._mesh))
                for purpose, number in PURPOSES.items()
            }
            self.num_classes = self._probe()
            self._tables = jax.device_put(self.arithmetic.tables, replicated(self._mesh))
            self._call = self._compile(spmd)

    @property
    def tau(self):
        """Total variation to charge to p_A and p_B."""
        return self.arithmetic.tau(int(np.prod(self.latent_shape)))

    def _probe(self):
        """Runs the head on random latents; refuses what no certificate could be built on. Returns K."""
        rows = self.tile[0] * self.tile[1]
        spec = jax.ShapeDtypeStruct((rows, *self.latent_shape), jnp.float32)
        try:
            out = jax.eval_shape(self._head, spec)
        except Exception as error:  # whatever the caller's function raises
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                "the head must be a function latents -> logits (for a Flax module: lambda z: net.apply(variables, z)) "
                f"and does not accept latents {spec.shape}: {line}"
            ) from error
        real = hasattr(out, "dtype") and not jnp.issubdtype(out.dtype, jnp.complexfloating)
        if not real or len(out.shape) != 2 or out.shape[0] != rows or out.shape[1] < 2:
            raise UserError(f"the head must return logits (B, K >= 2) for latents {spec.shape}, got {out}")
        head = jax.jit(lambda latents: self._head(latents))  # traced anew: JAX may remember what it was elsewhere
        key, rng = domain_key(0, "probe"), np.random.default_rng(0)
        tolerance = 0.05 if out.dtype in (jnp.bfloat16, jnp.float16) else 1e-4

        def logits(latents):
            found = head(latents)
            self._check_logits(found.shape, out.shape[1])
            return np.asarray(found, np.float32)

        latents, (chosen, places) = _normals(key, spec.shape), rng.integers(rows, size=(2, len(_SCALES)))
        found, moving = logits(latents), latents[chosen]
        del latents
        if np.isnan(found).any():
            raise UserError("the head returns NaN logits; a NaN never certifies")
        turns = zip(found[chosen], moving, places, _SCALES, strict=True)
        for number, (alone, row, place, scale) in enumerate(turns, start=1):
            # One row moves to a random place among companions it has not seen before.
            second = logits(_around(row, place, jax.random.fold_in(key, number), scale, spec.shape))[place]
            infinite = np.isinf(alone) & (second == alone)  # a masked class
            finite = np.where(infinite, 0, alone), np.where(infinite, 0, second)
            if not (np.abs(finite[1] - finite[0]) <= tolerance * (1 + np.abs(finite[0]))).all():
                raise UserError(
                    "the head's rows depend on each other (batch statistics?): each row must be a function of its own "
                    "latent alone; evaluate normalisation with stored statistics"
                )
        return out.shape[1]

    def _check_logits(self, shape, classes):
        """A head is traced several times; each time it must be the same function."""
        if shape != (self.tile[0] * self.tile[1], classes):
            raise UserError(
                f"the head returned logits of shape {shape} after {classes} classes before: it must always have the "
                "same classes"
            )

    def _chunk_noise(self, key, ids, chunk, tables):
        """Noise of one chunk: ``(samples, *latent_shape)``, or one such array per image of `ids`."""
        size = (self.tile[1], *self.latent_shape)
        if self._noise == "shared":
            return self.arithmetic.draw(jax.random.fold_in(key, chunk), size, tables)

        def of_image(identifier):
            own = jax.random.fold_in(jax.random.fold_in(key, identifier), chunk)
            return self.arithmetic.draw(own, size, tables)

        return jax.vmap(of_image)(ids)

    def _device_votes(self, device, latents, ids, key, tables, first, stop, n):
        """Votes of this device's share of the chunks [first, stop): int32 ``(1, images, K + 1)``, NaN rows last.

        `device` is this device's index, shape (1,) under shard_map and () under pmap.
        """
        self.traces += 1
        images, samples = self.tile
        devices = jax.lax.axis_size(AXIS)
        start = first + device.reshape(())

        def chunk_votes(step, counts):
            chunk = start + step * devices
            noise = self._chunk_noise(key, ids, chunk, tables)
            per_image = 0 if self._noise == "independent" else None
            noisy = jax.vmap(self.arithmetic.add, (0, per_image))(latents, noise)
            logits = self._head(noisy.reshape(images * samples, *self.latent_shape))
            self._check_logits(logits.shape, self.num_classes)
            vote = jnp.where(jnp.isnan(logits).any(axis=-1), self.num_classes, jnp.argmax(logits, axis=-1))
            valid = chunk * samples + jnp.arange(samples, dtype=jnp.int32) < n

            def count(votes):
                hits = votes[:, None] == jnp.arange(self.num_classes + 1, dtype=votes.dtype)
                return jnp.sum(hits & valid[:, None], axis=0, dtype=jnp.int32)

            return counts + jax.vmap(count)(vote.reshape(images, samples))

        steps = jnp.maximum(0, (stop - start + devices - 1) // devices)
        zeros = jnp.zeros((images, self.num_classes + 1), jnp.int32)
        counts = jax.lax.fori_loop(0, steps, chunk_votes, jax.lax.pcast(zeros, AXIS, to="varying"))
        # No collective: devices never wait for each other, and two launches may be in flight. The host adds.
        return counts[None]

    def _compile(self, spmd):
        devices = self._mesh.devices.reshape(-1)
        index = np.arange(len(devices), dtype=np.int32)
        if spmd == "pmap":
            axes = (0, *[None] * 7)
            call = jax.pmap(self._device_votes, AXIS, in_axes=axes, out_axes=0, devices=list(devices))
        else:
            specs = (P(AXIS), *[P()] * 7)
            call = jax.jit(jax.shard_map(self._device_votes, mesh=self._mesh, in_specs=specs, out_specs=P(AXIS)))
        index = jax.device_put(index, jax.NamedSharding(self._mesh, P(AXIS)))
        tile = self.put(self.place(np.zeros((1, *self.latent_shape))))
        # In the thread and the contexts of whoever hands in the head: what votes is what was probed.
        program = call.lower(index, *tile, self._keys["estimation"], self._tables, *self._numbers(0, 1, 1)).compile()
        return functools.partial(program, index)

    def _numbers(self, *numbers):
        return [jax.device_put(np.int32(number), replicated(self._mesh)) for number in numbers]

    def place(self, latents):
        """Latents ``(N, *latent_shape)`` as the loop holds them: NumPy of the arithmetic's dtype."""
        latents = np.asarray(latents, np.float64)
        if latents.shape[1:] != self.latent_shape:
            raise UserError(f"this vote loop takes latents of shape {self.latent_shape}, got {latents.shape[1:]}")
        if not np.isfinite(latents).all():
            raise UserError("latents must be finite; a NaN never certifies")
        return self.arithmetic.place(latents)

    def put(self, placed, ids=None):
        """Up to a tile of latents from `place`, padded, on the devices; `ids` (int) name them where noise is
        independent."""
        images = self.tile[0]
        if not 1 <= len(placed) <= images or placed.dtype != self.arithmetic.dtype:
            raise UserError(f"this vote loop takes 1 to {images} latents as `place` gave them")
        ids = np.zeros(len(placed)) if ids is None else np.asarray(ids)
        if self._noise == "independent" and (len(np.unique(ids)) != len(placed) or ids.min() < 0 or ids.max() >= 2**31):
            raise UserError("independent noise needs a different id, a whole number below 2**31, for every image")
        padding = ((0, images - len(placed)), *[(0, 0)] * len(self.latent_shape))
        arrays = (np.pad(placed, padding), np.pad(ids.astype(np.int32), padding[0]))
        return jax.device_put(arrays, replicated(self._mesh))

    def launch(self, on_device, purpose, first, stop, n):
        """Starts the chunks [first, stop) of n votes on a tile from `put`; returns without waiting.

        A GPU asks its host before every round of a loop whose length is not known when it is compiled. So a thread
        starts one launch after the other, and whoever called is free to count the votes of the last one meanwhile.

        Returns:
          a future for `collect`, which raises what went wrong.
        """
        if not 1 <= n <= MAX_VOTES:
            raise UserError(f"the number of votes must lie between 1 and 2**27, got {n}")
        if not 0 <= first < stop <= chunks(n, self.tile[1]):
            raise UserError(f"chunks [{first}, {stop}) are not among the {chunks(n, self.tile[1])} of {n} votes")
        numbers = self._numbers(first, stop, n)
        return self._launcher.submit(self._call, *on_device, self._keys[purpose], self._tables, *numbers)

    def collect(self, counts, images):
        """int64 counts ``(images, K)`` of a launch; raises UserError if any logit was NaN."""
        per_device = np.asarray(jax.device_get(counts.result()), np.int64)
        counts = per_device.reshape(-1, self.tile[0], self.num_classes + 1).sum(axis=0)[:images]
        if counts[:, -1].any():
            raise UserError(
                f"the head returned NaN logits for {counts[:, -1].sum()} noisy samples; a NaN never certifies"
            )
        return counts[:, :-1]
