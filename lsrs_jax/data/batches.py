"""Training batches: which images, and how they are shifted, cropped and mirrored, by seed and step alone."""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from lsrs_jax.data.decode import silence_pillow
from lsrs_jax.data.images import Dataset
from lsrs_jax.data.photos import Photos
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.types import Config

_ALL = slice(None)


def batch_indices(size: int, batch_size: int, seed: int, step: int) -> Int[np.ndarray, " batch_size"]:
    """Indices of training batch `step`, a function of (seed, step) alone: each epoch is a fresh permutation.

    The last ``size % batch_size`` examples of an epoch's permutation are left out.
    """
    if not 1 <= batch_size <= size:
        few = f"--config.data.batch_size={max(1, size // 2)}, for example"
        raise UserError(f"data.batch_size must lie between 1 and the {size} training images, got {batch_size}: {few}")
    epoch, position = divmod(step, size // batch_size)
    return _permutation(size, seed, epoch)[position * batch_size : (position + 1) * batch_size]


@functools.lru_cache(2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(size)


class Moves(NamedTuple):
    """How the images of a batch are shifted and mirrored, in order."""

    down: Int[np.ndarray, " B"]  # first row of the view in the padded image
    right: Int[np.ndarray, " B"]
    flipped: Bool[np.ndarray, " B"]


def moves(batch: int, *, crop: int, flip: bool, seed: int, step: int, rows: slice = _ALL) -> Moves:
    """The `Moves` of `rows` of a batch of `batch` images, a function of (seed, step) alone."""
    rng = np.random.default_rng([seed, 1, step])
    down, right = rng.integers(0, 2 * crop + 1, (2, batch)) if crop else np.zeros((2, batch), int)
    flipped = rng.random(batch) < 0.5 if flip else np.zeros(batch, bool)
    return Moves(down[rows], right[rows], flipped[rows])


def augment(
    images: np.ndarray, *, crop: int, flip: bool, seed: int, step: int, rows: slice = _ALL, batch_size: int = 0
) -> np.ndarray:
    """Random shifts by up to `crop` pixels (zero padding) and horizontal flips, deterministic in (seed, step).

    The images ``(B, H, W, C)`` are `rows` of a batch of `batch_size`, by default the whole batch. How an image is
    shifted and flipped does not depend on which other rows are given. Shape and dtype stay the same.
    """
    height, width = images.shape[1:3]
    move = moves(batch_size or len(images), crop=crop, flip=flip, seed=seed, step=step, rows=rows)
    images = np.pad(images, ((0, 0), (crop, crop), (crop, crop), (0, 0)))
    views = [image[y : y + height, x : x + width] for image, y, x in zip(images, move.down, move.right, strict=True)]
    return np.stack([view[:, ::-1] if mirrored else view for view, mirrored in zip(views, move.flipped, strict=True)])


class _Views:
    """Sequence of augmented photos for Grain: the rows `rows` of the batches from `first` on."""

    def __init__(self, photos: Photos, data: Config, seed: int, first: int, stop: int, rows: range) -> None:
        self._photos, self._seed, self._first, self._rows = photos, seed, first, rows
        self._batch_size, self._area, self._flip = data.batch_size, tuple(data.area), data.flip
        self._count = (stop - first) * len(rows)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        step, row = divmod(position, len(self._rows))
        step, row = self._first + step, self._rows[row]
        index = batch_indices(len(self._photos), self._batch_size, self._seed, step)[row]
        rng = np.random.default_rng([self._seed, 1, step, row])
        return self._photos.random_view(int(index), rng, self._area, self._flip)


def _start_worker(*_: int) -> None:
    """Makes a new worker ignore signals, and exit as soon as its parent, the training process, has ended."""
    silence_pillow()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def follow() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def training_batches(
    dataset: Dataset, data: Config, seed: int, first: int, stop: int, own: slice = _ALL
) -> Generator[tuple[Float32[np.ndarray, "B H W C"], Int32[np.ndarray, " B"]]]:
    """Batches ``first`` to ``stop`` of a training: images in [0, 1] and labels. The caller closes the generator.

    This process gets the rows `own` of each batch. Photos are decoded ahead of time by ``data.workers`` processes, or
    by threads of this process if that is 0 (Grain); the content of a batch does not depend on it. Raises UserError for
    a photo that cannot be decoded, or if a worker process was killed.
    """
    if not isinstance(dataset, Photos):
        options = {"crop": data.crop, "flip": data.flip, "seed": seed, "rows": own, "batch_size": data.batch_size}
        for step in range(first, stop):
            index = batch_indices(len(dataset), data.batch_size, seed, step)[own]
            images, labels = dataset.read(index, np.float32)
            yield augment(images, step=step, **options), np.asarray(labels, np.int32)
        return
    import grain
    from absl import flags

    silence_pillow()
    rows = range(data.batch_size)[own]
    views: Any = _Views(dataset, data, seed, first, stop, rows)
    threads = 1 if data.workers else os.cpu_count() or 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    batches = grain.MapDataset.source(views).batch(len(rows)).to_iter_dataset(options)
    if data.workers:
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags; their defaults are right
            flags.FLAGS.mark_as_parsed()
        # At the end Python's resource tracker frees the batches that workers decoded ahead, and warns about each.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
        workers = grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(workers, _start_worker)
    with contextlib.closing(iter(batches)) as prepared:
        try:
            for images, labels in prepared:
                yield np.asarray(images, np.float32) / np.float32(255), np.asarray(labels, np.int32)
        except UserError as error:  # Grain adds a paragraph about tracebacks
            raise UserError(str(error).partition("\n")[0]) from error
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            remedy = "choose a smaller --config.data.workers; the same command resumes"
            raise UserError(f"a process that decodes photos was killed (out of memory?): {remedy}") from error
