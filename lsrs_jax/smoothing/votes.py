"""Monte-Carlo votes of a head under Gaussian noise: the compiled loop. Only integers leave the device."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from lsrs_jax.distributed import AXIS, local_mesh, replicated
from lsrs_jax.errors import UserError
from lsrs_jax.keys import DOMAINS, check_key, domain_key, pinned
from lsrs_jax.smoothing.radius import check_sigma

PURPOSES = {"selection": 1, "estimation": 2}
MAX_VOTES = 2**27  # int32 sample indices and counts stay exact, and so does the inverse beta function
_MAX_ENTRIES = 2**31  # of one tile of noisy latents, 8 GiB
SPMD = ("shard_map", "pmap")


@contextlib.contextmanager
def _pinned():
    """Neither bits, nor dtypes, nor the precision of the head's products follow the user's flags.

    A head that asks for another precision itself keeps it.
    """
    with pinned(), jax.default_matmul_precision("highest"):
        yield


def chunks(n, samples):
    """Number of chunks of `samples` noise vectors that hold n votes; the last one may be partly masked."""
    return -(-n // samples)


def chunk_noise(key, chunk, samples, latent_shape):
    """The standard normal vectors of one chunk, float32 ``(samples, *latent_shape)``: a function of (key, chunk)."""
    return jax.random.normal(jax.random.fold_in(key, chunk), (samples, *latent_shape), jnp.float32)


class Votes:
    """The compiled vote loop for one head, one latent shape and one tile.

    A *chunk* is `samples` noise vectors, drawn from the key of (purpose, global chunk index) alone and shared by
    every image of a tile. Devices take chunks in turn; a chunk is always evaluated as one head batch of
    ``images · samples`` rows, so the counts of an image depend on neither the number of devices, nor how the chunks
    are cut into calls, nor which other images fill the tile.

    Args:
      head: any function latents ``(B, *latent_shape)`` float32 → logits ``(B, K)`` whose rows are independent and
        deterministic.
      latent_shape: without the batch axis.
      sigma: standard deviation of the noise.
      key: one typed threefry key, such as that of the training's seed: certification draws from a domain of its own
        under it, selection and estimation from different children of that.
      tile: ``(images, samples)``, the constant batch.
      spmd: ``"shard_map"`` or ``"pmap"``; both run the same per-device function.
      devices: the local devices to use; all of them by default.

    Raises:
      UserError: for a bad argument, a head that returns anything but ``(B, K ≥ 2)`` logits, NaN logits, or a head
        whose rows are seen to depend on each other (`_probe` tries random companions; it finds batch statistics over
        the whole batch or over groups, not every imaginable coupling).

    **Guarantee**: the vote of sample i on image z is argmax head(z + σεᵢ), with εᵢ standard normal (float32 draws of
    threefry), different for every (purpose, i). The noise is shared across images: each image's votes are
    independent of each other, votes of different images are not.
    """

    def __init__(self, head, latent_shape, *, sigma, key, tile=(16, 16), spmd="shard_map", devices=None):
        check_sigma(sigma)
        whole = isinstance(tile, tuple | list) and all(type(size) is int and size >= 1 for size in tile)
        if not whole or len(tile) != 2 or tile[0] * tile[1] < 2:
            raise UserError(f"tile must be two whole numbers (images, samples) that hold at least 2 rows, got {tile!r}")
        images, samples = tile
        if spmd not in SPMD:
            raise UserError(f"unknown spmd {spmd!r}: choose one of {', '.join(SPMD)}")
        if np.prod(latent_shape) < 1:
            raise UserError(f"latents of shape {tuple(latent_shape)} are empty")
        entries = images * samples * np.prod(latent_shape, dtype=float)
        if entries > _MAX_ENTRIES:
            raise UserError(
                f"the tile {tuple(tile)} needs {entries / 2**28:,.0f} GiB for its noisy latents alone; make it smaller"
            )
        self.tile = (int(images), int(samples))
        self.latent_shape = tuple(latent_shape)
        self.traces = 0  # how often the loop was traced; tests hold it at one
        self._head = head
        self._mesh = local_mesh(devices)
        with _pinned():
            domain = jax.random.fold_in(check_key(key), DOMAINS["certify"])
            self._keys = {
                purpose: jax.device_put(jax.random.fold_in(domain, number), replicated(self._mesh))
                for purpose, number in PURPOSES.items()
            }
            self.num_classes = self._probe()
            self._sigma = jax.device_put(np.float32(sigma), replicated(self._mesh))
            self._call = self._compile(spmd)

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
        if not hasattr(out, "shape") or len(out.shape) != 2 or out.shape[0] != rows or out.shape[1] < 2:
            raise UserError(f"the head must return logits (B, K >= 2) for latents {spec.shape}, got {out}")
        head = jax.jit(self._head)
        key = domain_key(0, "probe")
        rng = np.random.default_rng(0)

        def logits(latents):
            return np.asarray(head(latents), np.float32)

        latents = np.asarray(jax.random.normal(key, spec.shape, jnp.float32))
        first = logits(latents)
        if np.isnan(first).any():
            raise UserError("the head returns NaN logits; a NaN never certifies")
        for scale in (0.01, 1.0, 100.0, 0.0, 1.0, 1.0):
            # One row moves to a random place among companions it has not seen before.
            row, place = rng.integers(rows, size=2)
            companions = (scale * rng.standard_normal(spec.shape)).astype(np.float32)
            companions[place] = latents[row]
            second = logits(companions)[place]
            if not (np.abs(second - first[row]) <= 1e-4 * (1 + np.abs(first[row]))).all():
                raise UserError(
                    "the head's rows depend on each other (batch statistics?): each row must be a function of its own "
                    "latent alone; evaluate normalisation with stored statistics"
                )
        return out.shape[1]

    def _device_votes(self, device, latents, key, sigma, first, stop, n):
        """Votes of this device's share of the chunks [first, stop): int32 ``(images, K + 1)``, NaN rows last.

        `device` is this device's index, shape (1,) under shard_map and () under pmap.
        """
        self.traces += 1
        images, samples = self.tile
        devices = jax.lax.axis_size(AXIS)
        start = first + device.reshape(())

        def chunk_votes(step, counts):
            chunk = start + step * devices
            noise = sigma * chunk_noise(key, chunk, samples, self.latent_shape)
            noisy = jax.vmap(lambda latent: latent + noise)(latents)
            logits = self._head(noisy.reshape(images * samples, *self.latent_shape))
            vote = jnp.where(jnp.isnan(logits).any(axis=-1), self.num_classes, jnp.argmax(logits, axis=-1))
            valid = chunk * samples + jnp.arange(samples, dtype=jnp.int32) < n

            def count(votes):
                hits = votes[:, None] == jnp.arange(self.num_classes + 1, dtype=votes.dtype)
                return jnp.sum(hits & valid[:, None], axis=0, dtype=jnp.int32)

            return counts + jax.vmap(count)(vote.reshape(images, samples))

        steps = jnp.maximum(0, (stop - start + devices - 1) // devices)
        zeros = jnp.zeros((images, self.num_classes + 1), jnp.int32)
        counts = jax.lax.fori_loop(0, steps, chunk_votes, jax.lax.pcast(zeros, AXIS, to="varying"))
        return jax.lax.psum(counts, AXIS)

    def _compile(self, spmd):
        devices = self._mesh.devices.reshape(-1)
        index = np.arange(len(devices), dtype=np.int32)
        if spmd == "pmap":
            axes = (0, *[None] * 6)
            call = jax.pmap(self._device_votes, AXIS, in_axes=axes, out_axes=None, devices=list(devices))
        else:
            specs = (P(AXIS), *[P()] * 6)
            call = jax.jit(jax.shard_map(self._device_votes, mesh=self._mesh, in_specs=specs, out_specs=P()))
        return functools.partial(call, jax.device_put(index, jax.NamedSharding(self._mesh, P(AXIS))))

    def put(self, latents):
        """Latents ``(m ≤ images, *latent_shape)`` on the devices, padded to the tile."""
        latents = np.asarray(latents, np.float32)
        if latents.shape[1:] != self.latent_shape or not 1 <= len(latents) <= self.tile[0]:
            raise UserError(
                f"this vote loop takes 1 to {self.tile[0]} latents of shape {self.latent_shape}, got {latents.shape}"
            )
        if not np.isfinite(latents).all():
            raise UserError("latents must be finite; a NaN never certifies")
        padding = np.zeros((self.tile[0] - len(latents), *self.latent_shape), np.float32)
        return jax.device_put(np.concatenate([latents, padding]), replicated(self._mesh))

    def launch(self, latents, purpose, first, stop, n):
        """Starts the chunks [first, stop) of n votes on a tile from `put`; returns without waiting.

        Returns:
          a device array for `collect`.
        """
        if not 1 <= n <= MAX_VOTES:
            raise UserError(f"the number of votes must lie between 1 and 2**27, got {n}")
        if not 0 <= first < stop <= chunks(n, self.tile[1]):
            raise UserError(f"chunks [{first}, {stop}) are not among the {chunks(n, self.tile[1])} of {n} votes")
        numbers = [jax.device_put(np.int32(value), replicated(self._mesh)) for value in (first, stop, n)]
        with _pinned():
            return self._call(latents, self._keys[purpose], self._sigma, *numbers)

    def collect(self, counts, images):
        """int64 counts ``(images, K)`` of a launch; raises UserError if any logit was NaN."""
        counts = np.asarray(jax.device_get(counts), np.int64)[:images]
        if counts[:, -1].any():
            raise UserError(
                f"the head returned NaN logits for {counts[:, -1].sum()} noisy samples; a NaN never certifies"
            )
        return counts[:, :-1]
