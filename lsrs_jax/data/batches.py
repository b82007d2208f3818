"""Batches of a training: which images, and how they are shifted, cut and mirrored, by seed and step alone."""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading

import grain
import numpy as np
from absl import flags

from lsrs_jax.data.photos import Photos
from lsrs_jax.errors import UserError


def batch_indices(size, batch_size, seed, step):
    """Indices of training batch `step`, a function of (seed, step) alone: each epoch is a fresh permutation.

    The last ``size % batch_size`` examples of an epoch's permutation are left out.
    """
    if not 1 <= batch_size <= size:
        raise UserError(f"data.batch_size must lie between 1 and the {size} training images, got {batch_size}")
    epoch, position = divmod(step, size // batch_size)
    return _permutation(size, seed, epoch)[position * batch_size : (position + 1) * batch_size]


@functools.lru_cache(2)
def _permutation(size, seed, epoch):
    return np.random.default_rng([seed, 0, epoch]).permutation(size)


def augment(images, *, crop, flip, seed, step, rows=slice(None), batch_size=None):
    """Random shifts by up to `crop` pixels (zero padding) and horizontal flips, deterministic in (seed, step).

    Args:
      images: ``(B, H, W, C)``, any dtype; returned with the same shape and dtype.
      rows: which of a batch of `batch_size` they are, all of it by default: an image is shifted and flipped alike,
        whether the others are here or not.
    """
    rng = np.random.default_rng([seed, 1, step])
    (batch, height, width), whole = images.shape[:3], batch_size or len(images)
    down, right = np.zeros((2, batch), int)
    flipped = np.zeros(batch, bool)
    if crop:
        down, right = rng.integers(0, 2 * crop + 1, (2, whole))[:, rows]
        images = np.pad(images, ((0, 0), (crop, crop), (crop, crop), (0, 0)))
    if flip:
        flipped = rng.random(whole)[rows] < 0.5
    views = np.empty((batch, height, width, *images.shape[3:]), images.dtype)
    for view, image, top, left, mirrored in zip(views, images, down, right, flipped, strict=True):
        part = image[top : top + height, left : left + width]
        view[:] = part[:, ::-1] if mirrored else part
    return views


class _Views:
    """Photos as a training sees them, one after the other: ``rows`` of each batch of ``batch_size``."""

    def __init__(self, photos, data, seed, first, stop, rows):
        self._photos, self._seed, self._first, self._rows = photos, seed, first, rows
        self._batch_size, self._area, self._flip = data.batch_size, tuple(data.area), data.flip
        self._count = (stop - first) * len(rows)

    def __len__(self):
        return self._count

    def __getitem__(self, position):
        step, row = divmod(position, len(self._rows))
        step, row = self._first + step, self._rows[row]
        index = batch_indices(len(self._photos), self._batch_size, self._seed, step)[row]
        rng = np.random.default_rng([self._seed, 1, step, row])
        return self._photos.random_view(int(index), rng, self._area, self._flip)


def _worker(*_):
    """In a new worker: it lives as long as its training, whatever ends that, and leaves signals to it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def training_batches(dataset, data, seed, first, stop, own=slice(None)):
    """Batches ``first`` to ``stop`` of a training: ``(float32 (B, H, W, C) in [0, 1], labels (B,))``; close it.

    Photos are decoded ahead by ``data.workers`` processes, or threads of this one where that is 0 (Grain). What a batch
    holds depends on neither.

    Args:
      dataset: `Dataset` or `Photos`.
      data: the ``data`` section of the configuration.
      own: the rows of each batch that this process needs.

    Raises:
      UserError: for a photo that cannot be decoded, and where a process that decodes was killed.
    """
    if not isinstance(dataset, Photos):
        for step in range(first, stop):
            index = batch_indices(len(dataset), data.batch_size, seed, step)[own]
            # Shifted as bytes, a quarter of the numbers.
            images = augment(
                dataset.images[index],
                crop=data.crop,
                flip=data.flip,
                seed=seed,
                step=step,
                rows=own,
                batch_size=data.batch_size,
            )
            yield dataset.scaled(images, np.float32), dataset.labels[index]
        return
    rows = range(data.batch_size)[own]
    views = grain.MapDataset.source(_Views(dataset, data, seed, first, stop, rows)).batch(len(rows))
    threads = 1 if data.workers else os.cpu_count()
    batches = views.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if data.workers:
        if not flags.FLAGS.is_parsed():  # Grain has some, and takes their defaults
            flags.FLAGS.mark_as_parsed()
        # What workers had decoded ahead at the end is given back by Python's tracker, which would say so on stderr.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
        options = grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(options, _worker)
    with contextlib.closing(iter(batches)) as prepared:
        try:
            for images, labels in prepared:
                yield np.asarray(images, np.float32) / np.float32(255), np.asarray(labels, np.int32)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise UserError(
                "a process that decodes photos was killed (out of memory?): take fewer data.workers; the same command "
                "resumes"
            ) from error
