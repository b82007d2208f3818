"""The compiled sampling loop: counts of a head's classes under Gaussian noise. Only integers leave the device."""

import contextlib
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, Num

from lsrs_jax.runtime import mesh, rng
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.format import KEY_DOMAINS, NOISE_OFFSETS, STREAMS
from lsrs_jax.runtime.validate import array
from lsrs_jax.smoothing.blocks import NoisyBlocks
from lsrs_jax.smoothing.composition import leaders_of
from lsrs_jax.smoothing.confidence import MAX_SAMPLES
from lsrs_jax.smoothing.coupling_check import CouplingCheck, Evaluated
from lsrs_jax.smoothing.first_layer import INTEGER, SplitHead, as_head, put
from lsrs_jax.smoothing.head_check import Head, check_head, fingerprint
from lsrs_jax.smoothing.head_trace import TracedHead, calling
from lsrs_jax.smoothing.loop import Batch, Launched, Loop
from lsrs_jax.smoothing.packing import Packing, Waste
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
    (``"independent"``). Devices take blocks in turn. Every head batch has ``images · samples`` rows: one block of all
    images, or, where few images leave slots free, several blocks of them (`packing.Packing`). So the counts of an image
    depend neither on the number of devices, nor on the division of the blocks into calls, nor on the other images of
    the batch.

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
        self._noise, self._mesh = noise, mesh.local_mesh(devices)
        self._channels_last = channels_last and self._mesh.devices.flat[0].platform == "cpu"
        self._launcher, self._devices = ThreadPoolExecutor(1, "launch"), devices
        asked, settings = (
            head if integer_first_layer else None,
            {"sigma": sigma, "arithmetic": arithmetic, "noise": noise},
        )
        with pinned_flags():
            self.blocks = NoisyBlocks(asked, self.latent_shape, **settings, tile=self.tile, devices=self._mesh)
        self.arithmetic, self.first_layer = self.blocks.arithmetic, INTEGER if self.blocks.integer else None
        self._batch_shape = (math.prod(self.tile), *self.blocks.shape)  # of what the head, or its rest, receives
        traced = TracedHead(self.behind(head), self._channels_last)  # keeps the caller's mesh, which pinned flags drop
        with pinned_flags():
            with jax.default_device(self._mesh.devices.flat[0]):
                self._checked = check_head(traced, self._batch_shape)
            self.num_classes, self.head_digest = self._checked.num_classes, self._checked.digest
            if self.blocks.integer:
                self.head_digest = hashlib.sha256((self.head_digest + self.blocks.integer.digest).encode()).hexdigest()
            self._tables = self._put(self.blocks.tables)
            self._loop = Loop(traced, self._checked, self.blocks, self.tile, self._mesh, spmd)
            with calling("in its last call, when the sampling loop was compiled"):
                try:
                    self._call = self._loop.compile(self._example())
                except ValueError as error:
                    if isinstance(error, UserError) or traced.depends_on_mesh:
                        raise
                    # Flax applies rules for logical axes as soon as there is a mesh, and that of the loop does not have
                    # the axes that they name. Without a mesh, the head can be traced.
                    traced.depends_on_mesh = True
                    self._call = self._loop.compile(self._example())
            self._rows = self._loop.compile_rows(self._example())
        self._packed: Any = None  # compiled when it pays; False if there is none
        self._agreed = False  # whether it counted as the plain program does
        self._waste, self._collected = Waste(), -math.inf
        self.program = traced.program
        self._check = CouplingCheck(self.tile, self.num_classes, self._checked.tolerance, self._mesh.size)

    def is_current(self, head: Head) -> bool:
        """Whether `head` still is the function that was compiled, and the devices are the same."""
        head = as_head(head)
        if self.blocks.integer and not (
            isinstance(head, SplitHead) and head.first.digest == self.blocks.integer.digest
        ):
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
        return head.rest if self.blocks.integer else head

    @property
    def tau(self) -> float:
        """Total variation between the drawn and the Gaussian noise; it lowers p_A and raises p_B."""
        return self.arithmetic.tau(int(np.prod(self.latent_shape)))

    def keys(self, key: jax.Array) -> dict[str, jax.Array]:
        """The key of every stream, in the domain that certification has under a typed threefry key."""
        with pinned_flags():
            domain, offset = jax.random.fold_in(rng.check_key(key), KEY_DOMAINS["certify"]), NOISE_OFFSETS[self._noise]
            return self._put({name: jax.random.fold_in(domain, number + offset) for name, number in STREAMS.items()})

    def _example(self) -> tuple[Any, ...]:
        """What the programs are compiled for."""
        plain = self.put(self.quantize(np.zeros((1, *self.latent_shape)))).plain
        return *plain, self._put(rng.domain_key(0, "probe")), self._tables

    @property
    def traces(self) -> int:
        """Number of traces of the loop."""
        return self._loop.traces

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

    def put(self, quantized: Num[np.ndarray, "images *latent"], ids: Any = None) -> Batch:
        """Pads latents from `quantize` to a batch and puts them on the devices.

        With independent noise, `ids` are the indices of the images, all different.
        """
        size, images = self.tile[0], len(quantized)
        if not 1 <= images <= size or quantized.dtype != self.arithmetic.dtype:
            raise UserError(f"this sampler takes 1 to {size} latents as `quantize` returned them")
        ids = np.zeros(images) if ids is None else np.asarray(ids)
        distinct = len(np.unique(ids)) == images
        if self._noise == "independent" and (not distinct or ids.min() < 0 or ids.max() >= 2**31):
            raise UserError("independent noise needs a different id, a whole number below 2**31, for every image")
        ids, padding = ids.astype(np.int32), ((0, size - images), *[(0, 0)] * len(self.latent_shape))
        plain = self._put((np.pad(quantized, padding), np.pad(ids, padding[0])))
        copies = np.arange(size) % images
        packed = (quantized[copies], ids[copies]) if self.blocks.exact and 2 * images <= size else None
        return Batch(images, plain, packed and self._put(packed))

    def launch(self, batch: Batch, key: jax.Array, first: int, stop: int, n: int) -> Future:
        """Starts the blocks [first, stop) of n samples for a batch from `put`; returns a future for `collect`.

        `key` is the key of a stream, from `keys`. A thread starts the launches, because a GPU asks its host before
        every round of such a loop; meanwhile the caller counts the samples of the launch before. Batches with free
        slots are packed, as soon as compiling the program for that costs less than the free slots did. It must
        then count as the plain one does in one step; else it is not used.
        """
        blocks = block_count(n, self.tile[1])
        if not 1 <= n <= MAX_SAMPLES:
            raise UserError(f"the number of samples must lie between 1 and 2**27, got {n}")
        if not 0 <= first < stop <= blocks:
            raise UserError(f"blocks [{first}, {stop}) are not among the {blocks} of {n} samples")
        packing = Packing(self.tile[0], batch.images, -(-(stop - first) // self._mesh.size)) if batch.packed else None
        packing = packing if packing and packing.blocks > 1 else None
        if packing and self._packed is None and self._waste.left(self._loop.seconds) <= 0:
            self.pack()
        if packing and self._packed and not self._agreed:
            self._agreed = self._agree(batch, packing, key, first, n)
            self._packed = self._packed if self._agreed else False
        start = pinned_flags()(self._start)
        return self._launcher.submit(start, batch, packing, bool(self._packed), key, (first, stop, n))

    def pack(self) -> bool:
        """Compiles the program for packed launches; returns whether there is one."""
        if self._packed is None:
            with pinned_flags():
                self._packed = self._loop.compile_packed(self._example()) or False
        return bool(self._packed)

    def _agree(self, batch: Batch, packing: Packing, key: jax.Array, first: int, n: int) -> bool:
        """Whether both programs count the same in the first step of a packed launch."""
        numbers = first, min(first + packing.blocks * self._mesh.size, block_count(n, self.tile[1])), n
        with pinned_flags():
            plain, packed = (
                self._per_image(jax.device_get(self._counting(batch, own, key, numbers)), own, batch.images)
                for own in (None, packing)
            )
        return np.array_equal(plain, packed)

    def _counting(self, batch: Batch, packing: Packing | None, key: jax.Array, numbers: tuple[int, ...]) -> Any:
        """Starts the plain program, or the packed one; returns the counts per device and slot."""
        if packing is None or batch.packed is None:
            return self._call(*batch.plain, key, self._tables, *self._numbers(*numbers))
        lanes = self._put((packing.lanes, np.int32(packing.blocks)))
        return self._packed(*batch.packed, key, self._tables, *self._numbers(*numbers), *lanes)

    def _per_image(self, per_device: Any, packing: Packing | None, images: int) -> Int[np.ndarray, "images columns"]:
        slots = np.asarray(per_device, np.int64).reshape(-1, self.tile[0], self.num_classes + 1).sum(axis=0)
        return packing.summed(slots) if packing else slots[:images]

    def _start(
        self, batch: Batch, packing: Packing | None, packed: bool, key: jax.Array, numbers: tuple[int, ...]
    ) -> Launched:
        """Starts a launch, and the check of its first block if one is due."""
        began, (first, stop, _), evaluated = time.monotonic(), numbers, None
        if self._check.due(stop - first):
            plain, block, sources = (*batch.plain, key, self._tables), self._put(np.int32(first)), self._check.sources()
            inputs = [mesh.on_the_first((*plain, block, self._put(source))) for source in sources]
            logits = [self._checked.logits(self._rows(*each)) for each in inputs]
            whole = self._numbers(first, first + 1, (first + 1) * self.tile[1])
            evaluated = Evaluated(sources, logits, self._call(*plain, *whole))
        used, unused = (packing, None) if packed else (None, packing)
        return Launched(self._counting(batch, used, key, numbers), evaluated, used, unused, began)

    def collect(self, launched: Future, images: int) -> Int[np.ndarray, "images classes"]:
        """Waits for a launch and returns its counts.

        Raises UserError if any logit was NaN, or if the check of the launch refuses the head.
        """
        with calling("on noisy latents, while samples were drawn"):
            found: Launched = launched.result()
            per_device, evaluated = jax.device_get((found.counts, found.evaluated))
        counts, now = self._per_image(per_device, found.packing, images), time.monotonic()
        if found.unpacked:
            self._waste.add(now - max(found.began, self._collected), found.unpacked)
        self._collected = now
        if counts[:, -1].any():
            number = counts[:, -1].sum()
            raise UserError(f"the head returned NaN logits for {number} noisy samples; a NaN never certifies")
        if evaluated is not None:
            self._check.verify(evaluated)
        return counts[:, :-1]

    def width(self, images: int) -> int:
        """How many sample blocks one step of a launch takes, for a batch of so many images."""
        return self.tile[0] // images * self._mesh.size if self._packed else 1

    @property
    def until_packed(self) -> tuple[float, float]:
        """Seconds that free slots may yet cost before launches are packed, and those to compile that program."""
        waiting, seconds = self._packed is None and self.blocks.exact, self._loop.seconds
        return (self._waste.left(seconds), seconds) if waiting else (0.0 if self._packed else math.inf, 0.0)

    def together(self, launched: Future) -> int:
        """How many blocks of each image a batch of this launch had room for."""
        packing = launched.result().packing
        return packing.blocks if packing else 1

    def without_noise(self, quantized: Num[np.ndarray, "images *latent"]) -> Int[np.ndarray, " images"]:
        """The classes that the head gives latents from `quantize` without noise."""
        found, rows = [], self._batch_shape[0]
        noiseless = jax.jit(self.blocks.noiseless)
        with pinned_flags(), jax.default_device(self._mesh.devices.flat[0]):
            for start in range(0, len(quantized), rows):
                part = quantized[start : start + rows]
                padded = np.pad(part, ((0, rows - len(part)), *[(0, 0)] * len(self.latent_shape)))
                latents = noiseless(padded, mesh.on_the_first(self._tables))
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
