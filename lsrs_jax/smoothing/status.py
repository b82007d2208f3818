"""The progress of a sampling: images that are decided, samples, rate, and the time left."""

import time
from collections.abc import Callable, Sequence

from lsrs_jax.runtime.progress import SECONDS_PER_REPORT, duration
from lsrs_jax.smoothing.counts import ImageCounts
from lsrs_jax.smoothing.schedule import Schedule


class Status:
    """The progress of `total` images; gives a line about it to `say`."""

    def __init__(self, schedule: Schedule, total: int, say: Callable[[str], object]) -> None:
        self._schedule, self._total, self._say = schedule, total, say
        self._decided = self._estimation = self._drawn = self._rows = self._batch = 0
        self._undecided = dict[int, int]()  # samples of the images that are under way
        self._start, self._shown = None, time.monotonic()

    def count(self, images: Sequence[ImageCounts], samples: int, batch: int) -> None:
        """Counts `samples` new samples of each image, in a batch with room for `batch` images.

        Says the line every two seconds.
        """
        self._undecided |= {image.idx: image.total for image in images}
        now = time.monotonic()
        if self._start is None:  # rates are measured from the end of the first launch
            self._start, self._batch = now, batch
            return
        self._drawn, self._rows = self._drawn + samples * len(images), self._rows + samples * batch
        if now - self._shown > SECONDS_PER_REPORT:
            self.show()

    def finish(self, images: Sequence[ImageCounts]) -> None:
        """Counts images that are decided, now or by an earlier session."""
        self._decided += len(images)
        self._estimation += sum(int(image.looks[-1].sum()) for image in images)
        for image in images:
            self._undecided.pop(image.idx, None)

    def show(self) -> None:
        """Says the line: images decided, their mean number of estimation samples, rate, and the time left.

        Where images may stop early, this is the time that is left at most. A batch takes the same time however few
        images are in it, so the time follows from the rows of the batches.
        """
        self._shown = now = time.monotonic()
        start, waiting = now if self._start is None else self._start, self._total - self._decided
        seconds = max(now - start, 1e-9)
        mean = f"  {self._estimation / self._decided:,.0f} samples per image" if self._decided else ""
        line = f"{self._decided:>6,} of {self._total:,} images decided{mean}  {self._drawn / seconds:,.0f} samples/s"
        if waiting:
            samples = waiting * (self._schedule.n0 + self._schedule.n) - sum(self._undecided.values())
            full = -(-waiting // self._batch) * self._batch if self._batch else waiting
            left = duration(samples * full / waiting / self._rows * seconds) if self._rows else "unknown"
            line += f"  at most {left} left" if self._schedule.staged else f"  {left} left"
        self._say(line)
