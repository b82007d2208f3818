"""Feeds a training with batches: from the host, one step at a time, or many steps on data that the devices hold."""

import functools
import time
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float32, Int32, UInt8

from lsrs_jax.data import Arrays, Dataset, batch_indices, training_batches
from lsrs_jax.data.batches import Moves, moves
from lsrs_jax.runtime.mesh import AXIS, from_own_rows, own_rows, replicated, split
from lsrs_jax.runtime.rng import domain_key
from lsrs_jax.runtime.types import Config
from lsrs_jax.training.steps import State, Step, compiler_options, step_function

_BYTES = 2**31  # of the images that a device may hold
_MOST, _SECONDS = 64, 1.0  # steps of a launch, and how long one should take


class Feed(Protocol):
    """Takes the steps of a training."""

    def advance(self, state: State, done: int, limit: int) -> tuple[State, Any, int]:
        """Takes at least one step after the first `done`, and none after the first `limit`.

        Returns the new state, loss and accuracy of each step, and the number of steps that are done then.
        """
        ...

    def close(self) -> None: ...


def make_feed(step: Step, dataset: Dataset, config: Config, mesh: Mesh, shardings: State, first: int) -> Feed:
    """The feed of a training whose next step is number `first`."""
    if on_device(dataset, mesh):
        assert isinstance(dataset, Arrays)
        return DeviceFeed(step, dataset, config, mesh, shardings)
    return HostFeed(step, dataset, config, mesh, shardings, first)


def on_device(dataset: Dataset, mesh: Mesh) -> bool:
    """Whether the devices should hold the data.

    Not on CPUs: XLA computes the gradients of convolutions in a loop 4 to 9 times as slowly there (jax-ml/jax#12868).
    """
    return accelerator_bytes(dataset, mesh) > 0 and jax.default_backend() != "cpu"


def accelerator_bytes(dataset: Dataset, mesh: Mesh) -> int:
    """Bytes of the images and labels that a GPU or TPU holds during a training; 0 if the host makes the batches.

    The host makes them of photos, of more than 2 GiB, and with several processes, whose clocks would choose launches of
    different lengths.
    """
    if not isinstance(dataset, Arrays) or dataset.images.nbytes > _BYTES or mesh.is_multi_process:
        return 0
    return dataset.images.nbytes + 4 * len(dataset)


class HostFeed:
    """Makes each batch on the host while the devices work on the step before."""

    def __init__(self, step: Step, dataset: Dataset, config: Config, mesh: Mesh, shardings: State, first: int) -> None:
        self._step, self._mesh = step_function(step, (shardings, replicated(mesh))), mesh
        own = own_rows(mesh, config.data.batch_size)
        self._batches = training_batches(dataset, config.data, config.seed, first, config.train.steps, own)
        self._key = domain_key(config.seed, "train")

    def advance(self, state: State, done: int, limit: int) -> tuple[State, Any, int]:
        batch = from_own_rows(self._mesh, next(self._batches))
        return *self._step(state, *batch, self._key, np.uint32(done)), done + 1

    def close(self) -> None:
        self._batches.close()


class Views(NamedTuple):
    """Which images batches have, and how they are moved; the axes of all arrays are steps and batch."""

    index: Any
    moves: Moves


class DeviceFeed:
    """Runs many steps in one launch: the devices take the images from the data set, shift them and mirror them.

    The batches are those of `data.training_batches`. A launch takes about a second, so that a signal waits no longer.
    """

    def __init__(self, step: Step, dataset: Arrays, config: Config, mesh: Mesh, shardings: State) -> None:
        data, whole = config.data, replicated(mesh)
        self._images, self._seed, self._batch_size = len(dataset), config.seed, data.batch_size
        self._moved, self._mesh, self._length = {"crop": data.crop, "flip": data.flip, "seed": config.seed}, mesh, 1
        arrays = dataset.images, np.asarray(dataset.labels, np.int32), pixel_values(dataset)
        self._data, self._key, crop = jax.device_put(arrays, whole), domain_key(config.seed, "train"), data.crop

        @functools.partial(
            jax.jit, donate_argnums=0, out_shardings=(shardings, whole), compiler_options=compiler_options()
        )
        def steps(state: State, data: Any, views: Views, key: jax.Array, first: Any, count: Any) -> Any:
            def one(i: jax.Array, carried: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
                state, found = carried
                view = jax.tree.map(lambda each: each[i], views)
                images = jax.lax.with_sharding_constraint(batch_of(data[0], data[2], view, crop), split(mesh))
                state, metrics = step(state, images, data[1][view.index], key, first + i.astype(jnp.uint32))
                return jax.lax.with_sharding_constraint(state, shardings), found.at[i].set(jnp.stack(metrics))

            return jax.lax.fori_loop(0, count, one, (state, jnp.zeros((_MOST, 2), jnp.float32)))

        self._steps = steps

    def advance(self, state: State, done: int, limit: int) -> tuple[State, Any, int]:
        count, began = min(self._length, limit - done), time.monotonic()
        state, metrics = self._steps(
            state, self._data, self._views(done, count), self._key, np.uint32(done), np.int32(count)
        )
        jax.block_until_ready(metrics)
        seconds = time.monotonic() - began
        if count == self._length and seconds < _SECONDS / 2:
            self._length = min(2 * self._length, _MOST)
        elif seconds > 2 * _SECONDS:
            self._length = max(1, self._length // 2)
        return state, metrics[:count], done + count

    def _views(self, done: int, count: int) -> Views:
        """The views of the next steps; the axis of steps has its full length, for which the program is compiled."""
        found = [
            Views(
                batch_indices(self._images, self._batch_size, self._seed, step),
                moves(self._batch_size, step=step, **self._moved),
            )
            for step in range(done, done + count)
        ]
        found += [found[-1]] * (_MOST - count)
        views = jax.tree.map(lambda *each: np.stack(each), *found)
        return jax.device_put(views, NamedSharding(self._mesh, P(None, AXIS)))

    def close(self) -> None:
        """Nothing has to be closed."""


def pixel_values(dataset: Arrays) -> Float32[np.ndarray, " 256"] | None:
    """What each byte of an image stands for; None for images of floats, which stand for themselves.

    A table, because XLA replaces the division by a product that rounds otherwise.
    """
    if dataset.images.dtype != np.uint8:
        return None
    return np.arange(256, dtype=np.float32) / np.float32(dataset.max_value)


def batch_of(
    images: UInt8[jax.Array, "N H W C"] | Float32[jax.Array, "N H W C"],
    values: Float32[jax.Array, " 256"] | None,
    view: Views,
    crop: int,
) -> Float32[jax.Array, "B H W C"]:
    """The images of one batch, shifted and mirrored as `data.augment` does it; `values` are from `pixel_values`."""
    shape = images.shape[1:]

    def cut(index: Int32[jax.Array, ""], down: Any, right: Any, flipped: Any) -> jax.Array:
        padded = jnp.pad(images[index], ((crop, crop), (crop, crop), (0, 0)))
        found = jax.lax.dynamic_slice(padded, (down, right, 0), shape)
        return jnp.where(flipped, found[:, ::-1], found)

    found = jax.vmap(cut)(view.index, *view.moves)
    return found if values is None else values[found]
