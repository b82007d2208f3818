"""The compiled sampling loop: counts of a head's classes under Gaussian noise. Only integers leave the device."""

import contextlib
import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num

from lsrs_jax.runtime import mesh, rng
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.format import KEY_DOMAINS, NOISE_OFFSETS, STREAMS
from lsrs_jax.runtime.mesh import AXIS
from lsrs_jax.runtime.validate import array
from lsrs_jax.smoothing.arithmetic import make_arithmetic
from lsrs_jax.smoothing.composition import leaders_of
from lsrs_jax.smoothing.confidence import MAX_SAMPLES
from lsrs_jax.smoothing.coupling_check import CouplingCheck, Evaluated
from lsrs_jax.smoothing.first_layer import INTEGER, SplitHead, as_head, integer_layer, put
from lsrs_jax.smoothing.head_check import Head, check_head, check_logits, fingerprint
from lsrs_jax.smoothing.head_trace import TracedHead, calling
from lsrs_jax.smoothing.schedule import block_count
from lsrs_jax.smoothing.settings import FLAGS, check_settings

_MAX_ENTRIES = 2**31  # float32 numbers in one batch of noisy latents: 8 GiB


@contextlib.contextmanager
def pinned_flags() -> Iterator[None]:
    """A context in which random bits, dtypes and the precision of the head's products ignore the user's JAX flags.

    A head that asks for another precision itself keeps it. Checks that would stop the loop are off; the check for
    reused keys mistakes the loop, which derives a key per sample block, for reuse.
    """
    precision, reuse = jax.default_matmul_precision("highest"), jax.debug_key_reuse(False)
    finite = jax.debug_nans(False), jax.debug_infs(False)
    with rng.pinned(), precision, reuse, finite[0], finite[1], jax.transfer_guard("allow"):
        yield


class Sampler:
    """The compiled sampling loop for one head, one latent shape and one batch size; reusable with any key.

    A *sample block* is `samples` noise vectors. It is drawn from the key of (stream, block number) alone and shared by
    every image of a batch (``noise="shared"``), or from the key of (stream, image index, block number)
    (``"independent"``). Devices take blocks in turn; a block is always evaluated as one head batch of
    ``images · samples`` rows. So the counts of an image depend neither on the number of devices, nor on the division of
    the blocks into calls, nor on the other images of the batch.

    `latent_shape` has no batch axis; the other arguments are those of `api.SmoothedClassifier`. `head_digest` is a
    digest of the logits at some random latents, which tells heads apart; `traces` is the number of traces of the loop.
    `program` says which program of the head runs: ``"channels_last"`` if `channels_last.channels_last` replaced it,
    else ``"plain"``, also where `channels_last` is True but the device is no CPU or no convolution gains. The two
    round differently, so that counts may differ where logits nearly tie. `first_layer` is ``"integer"`` if the first
    layer of a `SplitHead` runs as a `first_layer.IntegerLayer`, else None; then the head is another function.
    Raises UserError for a bad argument, or a head that `head_check.check_head` refuses. `collect` raises one for a head
    that `coupling_check.CouplingCheck` refuses on noisy latents of its own launch; later launches are refused as well.

    **Guarantee**: sample i of image z is argmax head(z + σεᵢ) in the arithmetic's sense, where the εᵢ of a (key,
    stream, i) are drawn from bits of their own. The samples of an image are independent of each other; samples of
    different images are not, where they share the noise.
    """

    def __init__(
        self,
        head: Head,
        latent_shape: Sequence[int],
        *,
        sigma: float,
        arithmetic: str = "sound",
        noise: str = "shared",
        tile: Sequence[int] = (32, 8),
        spmd: str = "shard_map",
        devices: Sequence[Any] | None = None,
        channels_last: bool = True,
        integer_first_layer: bool = True,
    ) -> None:
        flags = dict(zip(FLAGS, (channels_last, integer_first_layer), strict=True))
        check_settings(sigma, arithmetic, noise, tile, spmd, **flags)
        head = as_head(head)
        self.tile, self.latent_shape = (int(tile[0]), int(tile[1])), tuple(latent_shape)
        if np.prod(latent_shape) < 1:
            raise UserError(f"latents of shape {self.latent_shape} are empty")
        entries = math.prod((*self.tile, *self.latent_shape))
        if entries > _MAX_ENTRIES:
            gigabytes = f"{entries // 2**28:,} GiB"
            raise UserError(f"the tile {self.tile} needs {gigabytes} for its noisy latents alone; make it smaller")
        self.arithmetic, self.traces = make_arithmetic(arithmetic, sigma), 0
        self._noise, self._mesh = noise, mesh.local_mesh(devices)
        self._channels_last = channels_last and self._mesh.devices.flat[0].platform == "cpu"
        self._launcher, self._devices = ThreadPoolExecutor(1, "launch"), devices
        with pinned_flags():
            asked = head if integer_first_layer else None
            self._integer = integer_layer(asked, self.arithmetic, noise, self.latent_shape, self.tile, self._mesh)
        self.first_layer = INTEGER if self._integer else None
        shape = self._integer.shape if self._integer else self.latent_shape
        self._batch_shape = (math.prod(self.tile), *shape)  # of what the head, or its rest, receives
        traced = TracedHead(self.behind(head), self._channels_last)  # keeps the caller's mesh, which pinned flags drop
        with pinned_flags():
            with jax.default_device(self._mesh.devices.flat[0]):
                self._checked = check_head(traced, self._batch_shape)
            self.num_classes, self.head_digest = self._checked.num_classes, self._checked.digest
            if self._integer:
                self.head_digest = hashlib.sha256((self.head_digest + self._integer.digest).encode()).hexdigest()
            self.tables = self.arithmetic.tables, self._integer and self._integer.tables
            self._tables = self._put(self.tables)
            with calling("in its last call, when the sampling loop was compiled"):
                try:
                    self._call, self._rows = self._compile(traced, spmd)
                except ValueError as error:
                    if isinstance(error, UserError) or traced.depends_on_mesh:
                        raise
                    # Flax applies rules for logical axes as soon as there is a mesh, and that of the loop does not have
                    # the axes that they name. Without a mesh, the head can be traced.
                    traced.depends_on_mesh = True
                    self._call, self._rows = self._compile(traced, spmd)
        self.program = traced.program
        self._check = CouplingCheck(self.tile, self.num_classes, self._checked.tolerance, self._mesh.size)

    def is_current(self, head: Head) -> bool:
        """Whether `head` still is the function that was compiled, and the devices are the same."""
        head = as_head(head)
        if self._integer and not (isinstance(head, SplitHead) and head.first.digest == self._integer.digest):
            return False
        traced = TracedHead(self.behind(head), self._channels_last)
        try:
            with pinned_flags():
                program = traced.trace(self._batch_shape).jaxpr
        except Exception:  # whatever the caller's function raises
            return False
        same = self._mesh == mesh.local_mesh(self._devices)
        return same and fingerprint(program) == self._checked.fingerprint

    def behind(self, head: Any) -> Any:
        """The part of the head that receives `rows`: all of it, or what follows its integer layer."""
        return head.rest if self._integer else head

    @property
    def tau(self) -> float:
        """Total variation between the drawn and the Gaussian noise; it lowers p_A and raises p_B."""
        return self.arithmetic.tau(int(np.prod(self.latent_shape)))

    def keys(self, key: jax.Array) -> dict[str, jax.Array]:
        """The key of every stream, in the domain that certification has under a typed threefry key."""
        with pinned_flags():
            domain, offset = jax.random.fold_in(rng.check_key(key), KEY_DOMAINS["certify"]), NOISE_OFFSETS[self._noise]
            return self._put({name: jax.random.fold_in(domain, number + offset) for name, number in STREAMS.items()})

    def _block_noise(self, key: jax.Array, ids: Int[Array, " images"], block: Any, tables: Any) -> Num[Array, "..."]:
        """Noise of one block: ``(samples, *latent_shape)``, or one such array per image of `ids`."""
        size = (self.tile[1], *self.latent_shape)
        if self._noise == "shared":
            return self.arithmetic.draw(jax.random.fold_in(key, block), size, tables[0])

        def draw(identifier: jax.Array) -> jax.Array:
            own = jax.random.fold_in(jax.random.fold_in(key, identifier), block)
            return self.arithmetic.draw(own, size, tables[0])

        return jax.vmap(draw)(ids)

    def prepared(self, latents: Any, tables: Any) -> Any:
        """What `rows` needs of a batch of latents; computed once per launch."""
        return self._integer.of_images(latents, tables[1]) if self._integer else latents

    def rows(self, prepared: Any, noise: Any, tables: Any) -> Float[Array, "rows *latent"]:
        """Noisy latents, or the integer layer's outputs for them: for image after image, one row per sample."""
        if self._integer:
            return self._integer.rows(prepared, self._integer.product(noise, tables[1]), tables[1])
        per_image = 0 if self._noise == "independent" else None
        noisy = jax.vmap(self.arithmetic.add, (0, per_image))(prepared, noise)
        return noisy.reshape(-1, *self.latent_shape)

    def _device_counts(
        self, device: Any, latents: Any, ids: Any, key: Any, tables: Any, first: Any, stop: Any, n: Any
    ) -> Int[Array, "1 images classes+1"]:
        """Counts of this device's share of the blocks [first, stop); the last column counts NaN rows.

        `device` is the index of this device, of shape (1,) under shard_map and () under pmap.
        """
        self.traces += 1
        (images, samples), devices = self.tile, jax.lax.axis_size(AXIS)
        start, prepared = first + device.reshape(()), self.prepared(latents, tables)

        def block_counts(step: jax.Array, counts: jax.Array) -> jax.Array:
            block = start + step * devices
            logits = self._head(self.rows(prepared, self._block_noise(key, ids, block, tables), tables))
            check_logits(logits.shape, (images * samples, self.num_classes))
            predicted = jnp.where(jnp.isnan(logits).any(axis=-1), self.num_classes, jnp.argmax(logits, axis=-1))
            valid = block * samples + jnp.arange(samples, dtype=jnp.int32) < n
            hits = predicted.reshape(images, samples, 1) == jnp.arange(self.num_classes + 1, dtype=predicted.dtype)
            return counts + jnp.sum(hits & valid[:, None], axis=1, dtype=jnp.int32)

        steps = jnp.maximum(0, (stop - start + devices - 1) // devices)
        zeros = jnp.zeros((images, self.num_classes + 1), jnp.int32)
        counts = jax.lax.fori_loop(0, steps, block_counts, jax.lax.pcast(zeros, AXIS, to="varying"))
        return counts[None]  # the host adds: without a collective, devices never wait for each other

    def _compile(self, traced: TracedHead, spmd: str) -> tuple[Any, Any]:
        """Compiles the loop, and a program for the first device that puts the noisy latents of a block in any order."""
        devices = self._mesh.devices.reshape(-1)
        self._head = traced.for_loop(self._batch_shape)
        if spmd == "pmap":
            axes = (0, *[None] * 7)
            call: Any = jax.pmap(self._device_counts, AXIS, in_axes=axes, out_axes=0, devices=list(devices))
        else:
            # A trace of a head that is run again does not know which numbers vary over the devices.
            specs = {"in_specs": (P(AXIS), *[P()] * 7), "out_specs": P(AXIS), "check_vma": not traced.is_replayed}
            call = jax.jit(jax.shard_map(self._device_counts, mesh=self._mesh, **specs))
        index = jax.device_put(np.arange(len(devices), dtype=np.int32), mesh.split(self._mesh))
        batch = self.put(self.quantize(np.zeros((1, *self.latent_shape))))
        key = self._put(rng.domain_key(0, "probe"))
        # Compile in the caller's thread and context, so that the compiled head is the one that was checked.
        program = call.lower(index, *batch, key, self._tables, *self._numbers(0, 1, 1)).compile()

        def rows(latents: Any, ids: Any, key: Any, tables: Any, block: Any, source: Any) -> jax.Array:
            noise = self._block_noise(key, ids, block, tables)
            return self.rows(self.prepared(latents, tables), noise, tables).at[source].get(mode="promise_in_bounds")

        arguments = (*batch, key, self._tables, *self._put([np.int32(0), np.zeros(math.prod(self.tile), np.int32)]))
        return functools.partial(program, index), jax.jit(rows).lower(*_on_the_first(arguments)).compile()

    def _put(self, arrays: Any) -> Any:
        return put(arrays, mesh.replicated(self._mesh))

    def _numbers(self, *numbers: int) -> list[jax.Array]:
        return self._put([np.int32(number) for number in numbers])

    def quantize(self, latents: Any) -> Num[np.ndarray, "images *latent"]:
        """Converts latents ``(images, *latent_shape)`` to the arithmetic's dtype, in NumPy."""
        latents = np.asarray(array("latents", latents), np.float64)
        if latents.shape[1:] != self.latent_shape:
            raise UserError(f"this sampler takes latents of shape {self.latent_shape}, got {latents.shape[1:]}")
        if not np.isfinite(latents).all():
            raise UserError("latents must be finite; a NaN never certifies")
        return self.arithmetic.quantize(latents)

    def put(self, quantized: Num[np.ndarray, "images *latent"], ids: Any = None) -> tuple[jax.Array, jax.Array]:
        """Pads latents from `quantize` to a batch and puts them on the devices.

        With independent noise, `ids` are the indices of the images, all different.
        """
        size = self.tile[0]
        if not 1 <= len(quantized) <= size or quantized.dtype != self.arithmetic.dtype:
            raise UserError(f"this sampler takes 1 to {size} latents as `quantize` returned them")
        ids = np.zeros(len(quantized)) if ids is None else np.asarray(ids)
        distinct = len(np.unique(ids)) == len(quantized)
        if self._noise == "independent" and (not distinct or ids.min() < 0 or ids.max() >= 2**31):
            raise UserError("independent noise needs a different id, a whole number below 2**31, for every image")
        padding = ((0, size - len(quantized)), *[(0, 0)] * len(self.latent_shape))
        return self._put((np.pad(quantized, padding), np.pad(ids.astype(np.int32), padding[0])))

    def launch(self, batch: tuple[jax.Array, jax.Array], key: jax.Array, first: int, stop: int, n: int) -> Future:
        """Starts the blocks [first, stop) of n samples for a batch from `put`; returns a future for `collect`.

        `key` is the key of a stream, from `keys`. A thread starts the launches, because a GPU asks its host before
        every round of such a loop; meanwhile the caller counts the samples of the launch before.
        """
        blocks = block_count(n, self.tile[1])
        if not 1 <= n <= MAX_SAMPLES:
            raise UserError(f"the number of samples must lie between 1 and 2**27, got {n}")
        if not 0 <= first < stop <= blocks:
            raise UserError(f"blocks [{first}, {stop}) are not among the {blocks} of {n} samples")
        return self._launcher.submit(pinned_flags()(self._start), batch, key, first, stop, n)

    def _start(
        self, batch: tuple[jax.Array, jax.Array], key: jax.Array, first: int, stop: int, n: int
    ) -> tuple[jax.Array, Evaluated | None]:
        """Starts the blocks [first, stop), and the check of the first of them if one is due."""
        evaluated, arguments = None, (*batch, key, self._tables)
        if self._check.due(stop - first):
            block, sources = self._put(np.int32(first)), self._check.sources()
            inputs = [_on_the_first((*arguments, block, self._put(source))) for source in sources]
            logits = [self._checked.logits(self._rows(*each)) for each in inputs]
            whole = self._numbers(first, first + 1, (first + 1) * self.tile[1])
            evaluated = Evaluated(sources, logits, self._call(*arguments, *whole))
        return self._call(*arguments, *self._numbers(first, stop, n)), evaluated

    def collect(self, launched: Future, images: int) -> Int[np.ndarray, "images classes"]:
        """Waits for a launch and returns its counts.

        Raises UserError if any logit was NaN, or if the check of the launch refuses the head.
        """
        with calling("on noisy latents, while samples were drawn"):
            found, evaluated = jax.device_get(launched.result())
        per_device = np.asarray(found, np.int64)
        counts = per_device.reshape(-1, self.tile[0], self.num_classes + 1).sum(axis=0)[:images]
        if counts[:, -1].any():
            number = counts[:, -1].sum()
            raise UserError(f"the head returned NaN logits for {number} noisy samples; a NaN never certifies")
        if evaluated is not None:
            self._check.verify(evaluated)
        return counts[:, :-1]

    def without_noise(self, quantized: Num[np.ndarray, "images *latent"]) -> Int[np.ndarray, " images"]:
        """The classes that the head gives latents from `quantize` without noise."""
        found, rows = [], self._batch_shape[0]
        with pinned_flags(), jax.default_device(self._mesh.devices.flat[0]):
            for start in range(0, len(quantized), rows):
                part = quantized[start : start + rows]
                padded = np.pad(part, ((0, rows - len(part)), *[(0, 0)] * len(self.latent_shape)))
                steps, tables = jnp.asarray(padded), _on_the_first(self._tables)
                zeros = jnp.zeros_like(steps[:, None] if self._noise == "independent" else steps[:1])
                latents = self.rows(self.prepared(steps, tables), zeros, tables)
                with calling("on latents without noise"):
                    found.append(np.asarray(self._checked.logits(latents), np.float32)[: len(part)].argmax(axis=-1))
        return np.concatenate(found)

    def one_batch(
        self, latents: Num[np.ndarray, "images *latent"], key: jax.Array, stream: str, n: int, ids: Any = None
    ) -> Int[np.ndarray, "images classes"]:
        """Counts of n samples for up to a batch of latents, in float64 or from `quantize`, in one launch."""
        latents = np.asarray(latents)
        quantized = latents if latents.dtype == self.arithmetic.dtype else self.quantize(latents)
        batch, blocks = self.put(quantized, ids), block_count(n, self.tile[1])
        return self.collect(self.launch(batch, self.keys(key)[stream], 0, blocks, n), len(latents))

    def prediction_counts(
        self, latents: Float[np.ndarray, "images *latent"], key: jax.Array, n: int
    ) -> Int[np.ndarray, "images classes"]:
        """Counts of n samples of the stream of predictions, for float64 latents."""
        size = self.tile[0]
        parts = [range(start, min(start + size, len(latents))) for start in range(0, len(latents), size)]
        return np.concatenate([self.one_batch(latents[part], key, "prediction", n, part) for part in parts])

    def predict(
        self,
        latents: Float[np.ndarray, "images *latent"],
        key: jax.Array,
        n: int,
        alpha: float,
        fallback: Int[np.ndarray, " images"] | None = None,
    ) -> Int[np.ndarray, " images"]:
        """`api.SmoothedClassifier.predict` for float64 latents, at which a fallback has these classes."""
        return leaders_of(self.prediction_counts(latents, key, n), fallback, alpha, self.tau)


def _on_the_first(arrays: Any) -> Any:
    """The copies of replicated arrays on the first device."""
    return jax.tree.map(lambda array: array.addressable_data(0), arrays)
