"""The progress of a sampling: images that are decided, samples, rate, and the time left."""

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool

from lsrs_jax.runtime.progress import SECONDS_PER_REPORT, Update, duration
from lsrs_jax.smoothing.counts import ImageCounts
from lsrs_jax.smoothing.schedule import Schedule, block_count

Decided = Callable[[Schedule, list[ImageCounts]], Bool[np.ndarray, " images"]]
_SOME, _CLASSES = 100, 10_000  # so many images are simulated, or fewer if they have more classes in all (10 at least)
_SCATTER = 0x9E3779B1  # an odd number; its multiples modulo 2**32 are in no order
_PRIOR = 0.1  # samples that the classes share before an image has any
_APART = 1.25  # the looks of a simulated future grow at least by this factor, but for the last two


class Status:
    """The progress of `total` images; gives an `Update` about it to `say`.

    `decided` says which images at a look are decided, as `Derivation.decided` does. Where images may stop early, the
    time that is left is estimated with it; without it, the time is an upper bound.
    """

    def __init__(
        self, schedule: Schedule, total: int, say: Callable[[Update], object], decided: Decided | None = None
    ) -> None:
        self._schedule, self._total, self._say, self._decides = schedule, total, say, decided
        self._decided = self._estimation = self._drawn = 0
        self._batch, self._portion = 1, 0  # slots of a batch, and images that were under way at once
        self._steps, self._until_packed = 0, (math.inf, 0.0)
        self._undecided = dict[int, ImageCounts]()  # the images that are under way
        self._stopped = np.zeros(len(schedule.looks), np.int64)  # decided images per look at which they stopped
        self._stops = dict[int, tuple[int, int]]()  # looks reached and simulated last look, by idx
        self._start, self._shown = None, time.monotonic()

    def count(
        self,
        images: Sequence[ImageCounts],
        samples: int,
        batch: int,
        blocks: int = 1,
        until_packed: tuple[float, float] = (math.inf, 0.0),
    ) -> None:
        """Counts `samples` new samples of each image, in a batch with room for `batch` images and `blocks` blocks each.

        `until_packed` is from the sampler. Says the line every two seconds.
        """
        self._batch, self._until_packed = batch, until_packed
        self._undecided |= {image.idx: image for image in images}
        self._portion = max(self._portion, len(self._undecided))
        now = time.monotonic()
        if self._start is None:  # rates are measured from the end of the first launch
            self._start = now
            return
        self._drawn += samples * len(images)
        self._steps += block_count(block_count(samples, self._schedule.samples), blocks)
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
            left, bound = self._seconds_left(seconds)
            words = duration(left) if self._steps else "unknown"
            parts.append(f"at most {words} left" if bound and self._schedule.staged else f"{words} left")
            share = seconds / (seconds + left)
        self._say(Update(parts, self._decided, self._total, share))

    def _seconds_left(self, seconds: float) -> tuple[float, bool]:
        """The time left, after so many seconds, and whether it is an upper bound; infinite if nothing is known."""
        plain, packed, bound = self._steps_left()
        if not self._steps:
            return math.inf, bound
        plain, packed = (steps / self._steps * seconds for steps in (plain, packed))
        waste, compilation = self._until_packed
        return plain if plain - packed <= waste else packed + waste + compilation, bound

    def _steps_left(self) -> tuple[float, float, bool]:
        """Steps of the loop that are left, plain and packed, and whether this is an upper bound.

        A step takes the same time however few images are in its batch.
        """
        schedule, begun = self._schedule, list(self._undecided.values())
        new = self._total - self._decided - len(begun)
        classes = len(next(iter(begun[0].counts.values()))) if begun else 1
        number = min(_SOME, max(10, _CLASSES // classes))
        some = sorted(begun, key=lambda image: image.idx * _SCATTER % 2**32)[:number]  # mostly the same every time
        stops, bound = self._futures(some)
        # A row per simulated image, with its samples up to each look.
        weights = np.full(len(some), len(begun) / max(1, len(some)))
        drawn = np.array([int(image.counts["estimation"].sum()) for image in some])
        looks = np.array(schedule.looks)
        before = np.concatenate([[0], looks[:-1]])
        ahead = np.clip(looks - np.maximum(before, drawn[:, None]), 0, None) * (np.arange(len(looks)) <= stops[:, None])
        reached = self._stopped + np.bincount(stops, weights, minlength=len(looks))
        # The share of images that take part in each look.
        lasting = np.ones(len(looks)) if bound else reached[::-1].cumsum()[::-1] / max(reached.sum(), 1)
        selected = np.array([int(image.counts["selection"].sum()) for image in some])
        # The selection and the looks: images that take part, and samples of all of them.
        images = np.append(weights @ (selected < schedule.n0), weights @ (ahead > 0))
        found = self._steps_of(images, np.append(weights @ (schedule.n0 - selected), weights @ ahead))
        # The others come in portions as large as the largest so far.
        portions, each = max(1.0, new / max(1, self._portion)), np.append(schedule.n0, looks - before)
        images = new / portions * np.append(1.0, lasting)
        plain, packed = (found + portions * self._steps_of(images, images * each)).tolist()
        return plain, packed, bound

    def _steps_of(self, images: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Plain and packed steps for numbers of images, and of samples of all of them, that are drawn one by one."""
        blocks = np.ceil(samples / np.maximum(images, 1e-9) / self._schedule.samples)
        full, rest = np.divmod(images, self._batch)
        together = self._batch // np.maximum(1, np.ceil(rest))
        last = np.stack([blocks, np.ceil(blocks / together)])  # of the last batch, which has free slots
        return (full * blocks + np.minimum(rest, 1) * last).sum(axis=1)

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
    """The look at which each image is decided in a random future that fits its samples so far."""
    rng, asked, before, undecided = np.random.default_rng(0), 0.0, -1, list(range(len(images)))
    stops, futures = [len(schedule.looks) - 1] * len(images), list(images)
    # Most classes of most images have hardly any samples: so the prior is light.
    seen = [np.sum(list(image.counts.values()), axis=0) for image in images]
    shares = [rng.dirichlet(counts + _PRIOR / len(counts)) for counts in seen]
    for number, look in enumerate(schedule.looks[:-1]):
        now = [i for i in undecided if images[i].reached <= number]
        if not now or (look < asked * _APART and number < len(schedule.looks) - 2):
            continue
        for i in now:
            futures[i] = _extend(futures[i], number, look, rng, shares[i])
        found = decided(schedule, [futures[i] for i in now])
        gone = {i for i, yes in zip(now, found, strict=True) if yes}
        for i in gone:  # somewhere after the look before
            stops[i] = max(images[i].reached, (before + 1 + number) // 2)
        undecided, asked, before = [i for i in undecided if i not in gone], look, number
    return stops


def _extend(image: ImageCounts, number: int, look: int, rng: np.random.Generator, shares: np.ndarray) -> ImageCounts:
    """An image with samples up to a look; looks in between, about which nobody asks, get the same counts."""
    counts = image.counts["estimation"]
    counts = counts + rng.multinomial(look - int(counts.sum()), shares)
    later = np.repeat(counts[None], number + 1 - image.reached, axis=0)
    return image.changed({"estimation": counts}, np.concatenate([image.looks, later]))
