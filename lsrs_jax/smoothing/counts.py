"""Counts of samples per image and class; each block of noise is counted exactly once. NumPy only."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from lsrs_jax.smoothing.schedule import CERTIFYING, Schedule


@dataclasses.dataclass(frozen=True)
class Row:
    """Counts of one image in the sample blocks [first, stop) of a stream."""

    idx: int
    label: int
    slack: float  # ℓ2 distance in the latent that the certificate of the image loses to rounding
    stream: str
    first: int
    stop: int
    counts: Int[np.ndarray, " classes"]  # int64
    seconds: float  # time spent on this image in these blocks


class ImageCounts:
    """Counts of one image: blocks [0, done) of each stream. Never changed in place: `Counts` replaces it.

    The counts are kept in one text of bytes, without the classes that have no samples: there may be a million images,
    or a thousand classes. Every access to `counts` or `looks` makes new arrays, which cannot be written to.
    """

    __slots__ = ("_packed", "classes", "done", "idx", "label", "reached", "seconds", "slack")

    def __init__(self, row: Row, schedule: Schedule, num_classes: int) -> None:
        self.idx, self.label, self.slack, self.seconds = row.idx, row.label, row.slack, 0.0
        self.done = (0,) * len(schedule.totals)  # the next block of each stream
        self.reached, self.classes, self._packed = 0, num_classes, b""  # `reached` is the number of looks

    def _copy(self) -> "ImageCounts":
        new = object.__new__(ImageCounts)  # five times as fast as `copy.copy`
        for name in self.__slots__:
            setattr(new, name, getattr(self, name))
        return new

    def _rows(self) -> Int[np.ndarray, "rows classes"]:
        """The counts of the selection, of the estimation, and of the estimation at each look."""
        found = np.zeros((2 + self.reached, self.classes), np.int64)
        if self._packed:
            packed = np.frombuffer(self._packed, np.int32).reshape(3 + self.reached, -1)
            found[:, packed[0]] = packed[1:]
        found.flags.writeable = False
        return found

    def _take(self, rows: Int[np.ndarray, "rows classes"]) -> None:
        classes = np.flatnonzero(rows.any(axis=0))
        packed = np.empty((1 + len(rows), len(classes)), np.int32)  # no count is above 2**27
        packed[0], packed[1:] = classes, rows[:, classes]
        self.reached, self._packed = len(rows) - 2, packed.tobytes()

    @property
    def counts(self) -> dict[str, Int[np.ndarray, " classes"]]:
        """Per stream, over the classes; int64."""
        return dict(zip(CERTIFYING, self._rows(), strict=False))

    @property
    def looks(self) -> Int[np.ndarray, "looks classes"]:
        """The estimation counts at each look that was reached, cumulative; int64."""
        return self._rows()[2:]

    def changed(self, counts: Mapping[str, np.ndarray] | None = None, looks: Any = None) -> "ImageCounts":
        """A copy with other counts of streams, or at looks."""
        new = self._copy()
        streams = [(counts or {}).get(stream, own) for stream, own in self.counts.items()]
        new._take(np.concatenate([streams, self.looks if looks is None else looks]))
        return new

    def after(self, row: Row, look: bool) -> "ImageCounts":
        """A copy after the samples of a row, at whose end there may be a look."""
        new, rows, number = self._copy(), self._rows(), CERTIFYING.index(row.stream)
        rows = np.concatenate([rows, rows[1:2]]) if look else rows.copy()
        for part in (number, -1) if look else (number,):
            rows[part, : len(row.counts)] += row.counts
        new._take(rows)
        new.done = (*self.done[:number], row.stop, *self.done[number + 1 :])
        new.seconds = self.seconds + row.seconds
        return new

    @property
    def total(self) -> int:
        """Number of samples, of all streams."""
        return int(self._rows()[:2].sum())


class Counts:
    """`ImageCounts` of many images in memory, in `images` by idx.

    **Guarantee**: each block of an image is counted exactly once, even if a call is interrupted; the counts of a row
    add up to the number of samples in its blocks; no row reaches over a look; the selection is complete before the
    first estimation sample. So the counts that were seen at a look are the counts at that look.
    """

    def __init__(self, schedule: Schedule, num_classes: int, origin: str | None = None) -> None:
        self.schedule, self.num_classes = schedule, num_classes
        self.images: dict[int, ImageCounts] = {}
        self.origin = origin  # digest of head, latents and noise of the samples, in counts of `SmoothedClassifier`

    def done(self, idx: int) -> tuple[int, ...]:
        """The next block of each stream for an image."""
        return self.images[idx].done if idx in self.images else (0,) * len(self.schedule.totals)

    def append(self, rows: Iterable[Row]) -> None:
        """Counts rows; raises ValueError at the first one that does not fit."""
        for row in rows:
            self.count(row)

    def count(self, row: Row) -> None:
        """Counts one row; raises ValueError for one that does not fit."""
        schedule, name = self.schedule, f"image {row.idx}"
        image = self.images.get(row.idx) or ImageCounts(row, schedule, self.num_classes)
        total, blocks = schedule.totals[row.stream], f"blocks [{row.first}, {row.stop})"
        next_block = image.done[CERTIFYING.index(row.stream)]
        if row.first != next_block:
            raise ValueError(f"{name}: blocks from {row.first} where {next_block} come next")
        if row.first >= row.stop or (row.stop - 1) * schedule.samples >= total:
            raise ValueError(f"{name}: {blocks} are outside the blocks of {total} samples")
        # There is a next stop: the two checks above refuse a row of a complete stream.
        stream, _, stop = schedule.next_stop(image.done)  # pyright: ignore[reportGeneralTypeIssues]
        if stream != row.stream:
            raise ValueError(f"{name}: estimation before the selection is complete")
        if row.stop > stop:
            raise ValueError(f"{name}: {blocks} reach over the look at {stop}")
        expected = min(row.stop * schedule.samples, total) - row.first * schedule.samples
        # Each class is checked too: the sum of huge counts may wrap around to the expected number.
        if row.counts.min() < 0 or row.counts.max() > expected or row.counts.sum() != expected:
            raise ValueError(f"{name}: {row.counts.sum()} samples where {expected} belong")
        if not (0 <= row.slack < math.inf and 0 <= row.seconds < 2.0**31):
            raise ValueError("slack or seconds out of range")
        if (row.label, row.slack) != (image.label, image.slack):
            raise ValueError(f"{name}: label or slack changes between rows")
        counted = image.after(row, look=stream == "estimation" and row.stop == stop)
        self.images[row.idx] = counted  # a single assignment: an interrupt never leaves a row half counted

    def at_a_look(self, idx: int) -> bool:
        """Whether the samples of an image end at a look, so that a certificate can be derived."""
        image = self.images.get(idx)
        return image is not None and image.done[1] in self.schedule.stops["estimation"]
