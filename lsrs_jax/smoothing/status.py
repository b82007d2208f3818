"""The progress of a sampling: images that are decided, samples, rate, and the time left."""

import time
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float

from lsrs_jax.runtime.progress import SECONDS_PER_REPORT, Update, duration
from lsrs_jax.smoothing.counts import ImageCounts
from lsrs_jax.smoothing.schedule import Schedule

Decided = Callable[[Schedule, list[ImageCounts]], Bool[np.ndarray, " images"]]
_SOME = 100  # images whose futures are simulated
_SCATTER = 0x9E3779B1  # an odd number; its multiples modulo 2**32 are in no order
_APART = 1.25  # the looks of a simulated future grow at least by this factor


class Status:
    """The progress of `total` images; gives an `Update` about it to `say`.

    `decided` says which images at a look are decided, as `Derivation.decided` does. Where images may stop early, the
    time that is left is estimated with it; without it, the time is an upper bound.
    """

    def __init__(
        self, schedule: Schedule, total: int, say: Callable[[Update], object], decided: Decided | None = None
    ) -> None:
        self._schedule, self._total, self._say, self._decides = schedule, total, say, decided
        self._decided = self._estimation = self._drawn = self._batch = 0
        self._rows, self._packs = 0.0, False  # rows of the batches, and whether free slots take later blocks
        self._undecided = dict[int, ImageCounts]()  # the images that are under way
        self._stopped = np.zeros(len(schedule.looks), np.int64)  # decided images per look at which they stopped
        self._stops = dict[int, tuple[int, int]]()  # looks reached and simulated last look, by idx
        self._start, self._shown = None, time.monotonic()

    def count(self, images: Sequence[ImageCounts], samples: int, batch: int, blocks: int = 1) -> None:
        """Counts `samples` new samples of each image, in a batch with room for `batch` images and `blocks` blocks each.

        Says the line every two seconds.
        """
        self._packs = self._packs or blocks > 1
        self._undecided |= {image.idx: image for image in images}
        now = time.monotonic()
        if self._start is None:  # rates are measured from the end of the first launch
            self._start, self._batch = now, batch
            return
        self._drawn, self._rows = self._drawn + samples * len(images), self._rows + samples * batch / blocks
        if now - self._shown > SECONDS_PER_REPORT:
            self.show()

    def finish(self, images: Sequence[ImageCounts]) -> None:
        """Counts images that are decided, now or by an earlier session."""
        self._decided += len(images)
        self._estimation += sum(int(image.looks[-1].sum()) for image in images)
        for image in images:
            self._stopped[image.reached - 1] += 1
            self._undecided.pop(image.idx, None)

    def show(self) -> None:
        """Says the line: images decided, their mean number of estimation samples, rate, and the time left."""
        self._shown = now = time.monotonic()
        seconds = max(now - (now if self._start is None else self._start), 1e-9)
        parts = [f"{self._decided:>6,} of {self._total:,} images decided"]
        if self._decided:
            parts.append(f"{self._estimation / self._decided:,.0f} samples per image")
        parts.append(f"{self._drawn / seconds:,.0f} samples/s")
        share = 1.0
        if self._decided < self._total:
            rows, bound = self._rows_left()
            left = duration(rows / self._rows * seconds) if self._rows else "unknown"
            parts.append(f"at most {left} left" if bound and self._schedule.staged else f"{left} left")
            share = self._rows / (self._rows + rows)
        self._say(Update(parts, self._decided, self._total, share))

    def _rows_left(self) -> tuple[float, bool]:
        """Rows of the batches that are left to sample, and whether this is an upper bound.

        A batch takes the same time however few images are in it, unless free slots take later blocks.
        """
        schedule, begun = self._schedule, list(self._undecided.values())
        new = self._total - self._decided - len(begun)
        some = sorted(begun, key=lambda image: image.idx * _SCATTER % 2**32)[:_SOME]  # mostly the same every time
        stops, bound = self._futures(some)
        # A row per simulated image, and one for the images that have not begun, with the samples up to each look.
        weights = np.full(len(some), len(begun) / max(1, len(some)))
        drawn = np.array([int(image.counts["estimation"].sum()) for image in some])
        looks = np.array(schedule.looks)
        before = np.concatenate([[0], looks[:-1]])
        ahead = np.clip(looks - np.maximum(before, drawn[:, None]), 0, None) * (np.arange(len(looks)) <= stops[:, None])
        reached = self._stopped + np.bincount(stops, weights, minlength=len(looks))
        # The share of images that take part in each look.
        lasting = np.ones(len(looks)) if bound else reached[::-1].cumsum()[::-1] / max(reached.sum(), 1)
        images = weights @ (ahead > 0) + new * lasting
        samples = weights @ ahead + new * lasting * (looks - before)
        selected = np.array([int(image.counts["selection"].sum()) for image in some])
        selection = weights @ (schedule.n0 - selected) + new * schedule.n0
        batch = max(1, self._batch)
        full = np.where(images < 1, images, np.ceil(images / batch)) * batch / np.maximum(images, 1e-9)
        if self._packs:
            full = np.where(images < batch, full / np.maximum(1, batch // np.maximum(images, 1)), full)
        return float(selection * max(1.0, full[0]) + samples @ full), bound

    def _futures(self, images: list[ImageCounts]) -> tuple[np.ndarray, bool]:
        """The look at which each image will be decided, and whether it is only known to be no later."""
        last = len(self._schedule.looks) - 1
        if self._decides is None or not self._schedule.staged or not (images or self._stopped.any()):
            return np.full(len(images), last), True
        # A future is simulated again when its image has reached another look.
        fresh = [image for image in images if self._stops.get(image.idx, (-1, 0))[0] != image.reached]
        stops = simulated_stops(self._schedule, fresh, self._decides)
        self._stops |= {image.idx: (image.reached, stop) for image, stop in zip(fresh, stops, strict=True)}
        return np.array([self._stops[image.idx][1] for image in images], np.int64), False


def simulated_stops(schedule: Schedule, images: list[ImageCounts], decided: Decided) -> list[int]:
    """The look at which each image is decided in a future with the same shares of the classes as so far."""
    rng, asked, before, undecided = np.random.default_rng(0), 0.0, -1, list(range(len(images)))
    stops, futures = [len(schedule.looks) - 1] * len(images), list(images)
    for number, look in enumerate(schedule.looks[:-1]):
        now = [i for i in undecided if images[i].reached <= number]
        if not now or look < asked * _APART:
            continue
        for i in now:
            futures[i] = _extend(futures[i], number, look, rng, _shares(images[i]))
        found = decided(schedule, [futures[i] for i in now])
        gone = {i for i, yes in zip(now, found, strict=True) if yes}
        for i in gone:  # somewhere after the look before
            stops[i] = max(images[i].reached, (before + 1 + number) // 2)
        undecided, asked, before = [i for i in undecided if i not in gone], look, number
    return stops


def _shares(image: ImageCounts) -> Float[np.ndarray, " classes"]:
    """The shares of the classes among all samples of an image, with one more sample that is divided evenly."""
    counts = np.sum(list(image.counts.values()), axis=0) + 1 / len(image.counts["selection"])
    return counts / counts.sum()


def _extend(image: ImageCounts, number: int, look: int, rng: np.random.Generator, shares: np.ndarray) -> ImageCounts:
    """An image with samples up to a look; looks in between, about which nobody asks, get the same counts."""
    counts = image.counts["estimation"]
    counts = counts + rng.multinomial(look - int(counts.sum()), shares)
    later = np.repeat(counts[None], number + 1 - image.reached, axis=0)
    return image.changed({"estimation": counts}, np.concatenate([image.looks, later]))
