"""Counts of samples per image and class; each block of noise is counted exactly once. NumPy only."""

import copy
import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from lsrs_jax.smoothing.schedule import Schedule


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
    """Counts of one image: blocks [0, next) of each stream. Never changed in place: `Counts` replaces it.

    Attributes:
      counts: per stream, over the classes.
      looks: int64 ``(looks reached, classes)``: the estimation counts at each look, cumulative.
    """

    def __init__(self, row: Row, schedule: Schedule, num_classes: int) -> None:
        self.idx, self.label, self.slack, self.seconds = row.idx, row.label, row.slack, 0.0
        self.counts = {stream: np.zeros(num_classes, np.int64) for stream in schedule.totals}
        self.next = dict.fromkeys(schedule.totals, 0)
        self.looks = np.zeros((0, num_classes), np.int64)

    @property
    def done(self) -> tuple[int, ...]:
        """The next block of each stream."""
        return tuple(self.next.values())

    @property
    def total(self) -> int:
        """Number of samples, of all streams."""
        return sum(int(counts.sum()) for counts in self.counts.values())


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
        if row.first != image.next[row.stream]:
            raise ValueError(f"{name}: blocks from {row.first} where {image.next[row.stream]} come next")
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
        if row.counts.max() > expected or row.counts.sum() != expected:
            raise ValueError(f"{name}: {row.counts.sum()} samples where {expected} belong")
        if not (0 <= row.slack < math.inf and 0 <= row.seconds < 2.0**31):
            raise ValueError("slack or seconds out of range")
        if (row.label, row.slack) != (image.label, image.slack):
            raise ValueError(f"{name}: label or slack changes between rows")
        counted = copy.copy(image)
        counted.counts = image.counts | {row.stream: image.counts[row.stream] + row.counts}
        counted.next = image.next | {row.stream: row.stop}
        counted.seconds += row.seconds
        if stream == "estimation" and row.stop == stop:
            counted.looks = np.concatenate([image.looks, counted.counts["estimation"][None]])
        self.images[row.idx] = counted  # a single assignment: an interrupt never leaves a row half counted

    def at_a_look(self, idx: int) -> bool:
        """Whether the samples of an image end at a look, so that a certificate can be derived."""
        image = self.images.get(idx)
        return image is not None and image.next["estimation"] in self.schedule.stops["estimation"]
