"""The compiled programs of the sampling loop: the counts of a head's classes over sample blocks."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from lsrs_jax.runtime import mesh
from lsrs_jax.runtime.mesh import AXIS
from lsrs_jax.smoothing.blocks import NoisyBlocks
from lsrs_jax.smoothing.coupling_check import Evaluated
from lsrs_jax.smoothing.head_check import CheckedHead, check_logits, fingerprint
from lsrs_jax.smoothing.head_trace import TracedHead
from lsrs_jax.smoothing.packing import Packing


class Batch(NamedTuple):
    """Up to a batch of images on the devices: latents and ids."""

    images: int
    plain: tuple[jax.Array, jax.Array]  # the other slots are 0
    packed: tuple[jax.Array, jax.Array] | None  # the other slots hold copies; None if they are too few, or not exact


class Launched(NamedTuple):
    """A launch that has been started."""

    counts: jax.Array
    evaluated: Evaluated | None
    packing: Packing | None  # of a packed launch
    unpacked: Packing | None  # how a plain one could have been packed
    began: float


class Loop:
    """Compiles the loop for one head and one batch size.

    `arguments` are what a program is compiled for: latents and ids of a batch, a key, and the tables of `blocks`.
    `traces` is the number of traces of the loop, and `seconds` how long the first program took to compile.
    """

    def __init__(
        self,
        head: TracedHead,
        checked: CheckedHead,
        blocks: NoisyBlocks,
        tile: tuple[int, int],
        devices: Mesh,
        spmd: str,
    ) -> None:
        self._traced, self._checked, self._blocks, self._tile = head, checked, blocks, tile
        self._mesh, self._spmd, self.traces, self.seconds = devices, spmd, 0, math.inf
        self._batch_shape = (math.prod(tile), *blocks.shape)

    def compile(self, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        """A program that returns `_counts` per device, given `arguments`, first, stop and n (all int32)."""
        began = time.monotonic()
        program = self._program(self._traced.for_loop(self._batch_shape), arguments, ())
        self.seconds = time.monotonic() - began
        return program

    def compile_packed(self, arguments: tuple[Any, ...]) -> Callable[..., Any] | None:
        """The same for packed launches, which also need `lanes` and `blocks` of a `packing.Packing`.

        None if the head, traced again, is not the one that was checked: a caller may have changed it since.
        """
        try:
            traced = self._traced.trace(self._batch_shape).jaxpr
        except Exception:  # whatever the caller's function raises
            return None
        if fingerprint(traced) != self._checked.fingerprint:
            return None
        head, one = jaxpr_as_fun(traced), Packing(self._tile[0], 1, 1)
        lanes = jax.device_put((one.lanes, np.int32(one.blocks)), mesh.replicated(self._mesh))
        return self._program(lambda z: head(z)[0], arguments, lanes)

    def compile_rows(self, arguments: tuple[Any, ...]) -> Any:
        """A program for the first device that puts the noisy latents of a block in any order."""

        def rows(latents: Any, ids: Any, key: Any, tables: Any, block: Any, source: Any) -> jax.Array:
            noise = self._blocks.noise(key, ids, block, tables)
            found = self._blocks.rows(self._blocks.prepared(latents, tables), noise, tables)
            return found.at[source].get(mode="promise_in_bounds")

        numbers = np.int32(0), np.zeros(math.prod(self._tile), np.int32)
        given = *arguments, *jax.device_put(numbers, mesh.replicated(self._mesh))
        return jax.jit(rows).lower(*mesh.on_the_first(given)).compile()

    def _program(self, head: Any, arguments: tuple[Any, ...], lanes: tuple[Any, ...]) -> Any:
        devices = self._mesh.devices.reshape(-1)
        others = len(arguments) + 3 + len(lanes)

        def device_counts(*arguments: Any) -> jax.Array:
            return self._counts(head, *arguments)

        if self._spmd == "pmap":
            axes = (0, *[None] * others)
            call: Any = jax.pmap(device_counts, AXIS, in_axes=axes, out_axes=0, devices=list(devices))
        else:
            specs = {"in_specs": (P(AXIS), *[P()] * others), "out_specs": P(AXIS)}
            # Without the check, the loops of a head need not say which of their numbers vary over the devices.
            call = jax.jit(jax.shard_map(device_counts, mesh=self._mesh, check_vma=False, **specs))
        index = jax.device_put(np.arange(len(devices), dtype=np.int32), mesh.split(self._mesh))
        numbers = jax.device_put([np.int32(number) for number in (0, 1, 1)], mesh.replicated(self._mesh))
        # Compile in the caller's thread and context, so that the compiled head is the one that was checked.
        return functools.partial(call.lower(index, *arguments, *numbers, *lanes).compile(), index)

    def _counts(
        self,
        head: Callable[[Any], Any],
        device: Any,
        latents: Any,
        ids: Any,
        key: Any,
        tables: Any,
        first: Any,
        stop: Any,
        n: Any,
        lanes: Any = None,
        together: Any = 1,
    ) -> Int[jax.Array, "1 images classes+1"]:
        """Counts of this device's share of the blocks [first, stop); the last column counts NaN rows.

        `device` is the index of this device, of shape (1,) under shard_map and () under pmap. With `lanes`, a step has
        `together` blocks, and the slots have the blocks that `packing.Packing` says.
        """
        self.traces += 1
        (images, samples), classes = self._tile, self._checked.num_classes
        stride = jax.lax.axis_size(AXIS) * together
        start, prepared = first + together * device.reshape(()), self._blocks.prepared(latents, tables)

        def block_counts(step: jax.Array, counts: jax.Array) -> jax.Array:
            block, number = start + step * stride, jnp.arange(samples, dtype=jnp.int32)
            if lanes is None:
                rows = self._blocks.rows(prepared, self._blocks.noise(key, ids, block, tables), tables)
                valid = block * samples + number < n
            else:
                rows = self._blocks.packed_rows(prepared, key, ids, block, lanes, together, tables)
                own = (block + lanes)[:, None]
                valid = (own < stop) & (own * samples + number < n)
            logits = head(rows)
            check_logits(logits.shape, (images * samples, classes))
            predicted = jnp.where(jnp.isnan(logits).any(axis=-1), classes, jnp.argmax(logits, axis=-1))
            hits = predicted.reshape(images, samples, 1) == jnp.arange(classes + 1, dtype=predicted.dtype)
            return counts + jnp.sum(hits & valid[..., None], axis=1, dtype=jnp.int32)

        steps = jnp.maximum(0, (stop - start + stride - 1) // stride)
        zeros = jnp.zeros((images, classes + 1), jnp.int32)
        counts = jax.lax.fori_loop(0, steps, block_counts, zeros)
        return counts[None]  # the host adds: without a collective, devices never wait for each other
