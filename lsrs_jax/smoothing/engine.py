"""THE sampling loop: a compiled sampler, a schedule and counts → images whose certificates are decided.

`SmoothedClassifier`, the commands and ``certify --recast`` all sample through `Engine`.
"""

import collections
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Bool, Int, Num

from lsrs_jax.smoothing.counts import Counts, ImageCounts, Row
from lsrs_jax.smoothing.status import Status

_SECONDS_PER_LAUNCH = 1.0  # how long the devices should work on one launch


class Images(NamedTuple):
    """Images whose latents are in memory; parallel sequences."""

    idx: Sequence[int]
    labels: Sequence[int]
    slack: Sequence[float]  # ℓ2 in the latent
    latents: Num[np.ndarray, "images *latent"]  # from `Sampler.quantize`


class Launch(NamedTuple):
    """Sample blocks [first, stop) of a stream that are under way for the images at the positions `members`."""

    members: list[int]
    stream: str
    first: int
    stop: int
    pending: Future


class BlockSampler(Protocol):
    """Counts the classes of a batch per sample block; `sampler.Sampler` explains the methods."""

    tile: tuple[int, int]

    @property
    def until_packed(self) -> tuple[float, float]: ...
    def keys(self, key: jax.Array) -> dict[str, jax.Array]: ...
    def put(self, quantized: Num[np.ndarray, "images *latent"], ids: Any = None) -> Any: ...
    def launch(self, batch: Any, key: jax.Array, first: int, stop: int, n: int) -> Future: ...
    def collect(self, launched: Future, images: int) -> Int[np.ndarray, "images classes"]: ...
    def width(self, images: int) -> int: ...
    def together(self, launched: Future) -> int: ...


class Engine:
    """Samples images until each is decided.

    All images advance to the next look together. At every look the undecided ones are repacked into full batches, and
    the sampler gives free slots of the last batch to later blocks of its images, up to the look, so that few rows are
    wasted. The counts do not depend on the repacking.

    `counts` receives the new rows; its schedule says where images may stop. `decided` maps images at a look to a bool
    per image. `begin` is called once, after the first samples are drawn and before they are counted.
    """

    def __init__(
        self,
        sampler: BlockSampler,
        key: jax.Array,
        counts: Counts,
        decided: Callable[[list[ImageCounts]], Bool[np.ndarray, " images"]],
        status: Status,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._sampler, self._keys, self._counts = sampler, sampler.keys(key), counts
        self._decided, self._status, self._begin, self._begun = decided, status, begin, False
        self._steps_per_launch = 1

    def run(self, images: Images) -> None:
        """Samples these images until all are decided."""
        everything = range(len(images.idx))
        finished = self._finished(images, [i for i in everything if self._counts.at_a_look(images.idx[i])])
        while pending := [i for i in everything if i not in finished]:
            finished |= self._advance(images, pending)

    def _finished(self, images: Images, members: list[int]) -> set[int]:
        """The members that are decided; all members are at a look."""
        if not members:
            return set()
        at_look = [self._counts.images[images.idx[i]] for i in members]
        found = np.flatnonzero(self._decided(at_look))
        self._status.finish([at_look[number] for number in found])
        return {members[number] for number in found}

    def _advance(self, images: Images, pending: list[int]) -> set[int]:
        """Brings every pending image to its next stop; returns those that are decided there.

        While the host counts one launch, the devices work on the next.
        """
        waiting, finished, clock = None, set[int](), time.monotonic()
        for launch in itertools.chain(self._launches(images, pending), [None]):
            if waiting is not None:
                clock = self._record(images, waiting, clock)
                if self._counts.at_a_look(images.idx[waiting.members[0]]):
                    finished |= self._finished(images, waiting.members)
            waiting = launch
        return finished

    def _launches(self, images: Images, pending: list[int]) -> Iterator[Launch]:
        schedule, groups = self._counts.schedule, collections.defaultdict(list)
        for i in pending:  # after a kill images stand at different blocks
            groups[self._counts.done(images.idx[i])].append(i)
        size = self._sampler.tile[0]
        for done in sorted(groups):
            next_stop = schedule.next_stop(done)
            assert next_stop is not None, "an image at the last look is decided"
            stream, begin, end = next_stop
            for start in range(0, len(groups[done]), size):
                members, first = groups[done][start : start + size], begin
                batch = self._sampler.put(images.latents[members], [images.idx[i] for i in members])
                width = self._sampler.width(len(members))
                while first < end:
                    stop = min(first + self._steps_per_launch * width, end)
                    launched = self._sampler.launch(batch, self._keys[stream], first, stop, schedule.totals[stream])
                    yield Launch(members, stream, first, stop, launched)
                    first = stop

    def _record(self, images: Images, launch: Launch, clock: float) -> float:
        """Waits for a launch and counts its samples; returns the time at its end."""
        members, stream, first, stop, _ = launch
        found = self._sampler.collect(launch.pending, len(members))
        now = time.monotonic()
        seconds = round((now - clock) / len(members), 6)
        if not self._begun:
            self._begin()
            self._begun = True
        self._counts.append(
            Row(images.idx[i], images.labels[i], images.slack[i], stream, first, stop, counts, seconds)
            for i, counts in zip(members, found, strict=True)
        )
        drawn = [self._counts.images[images.idx[i]] for i in members]
        together = self._sampler.together(launch.pending)
        self._status.count(drawn, int(found[0].sum()), self._sampler.tile[0], together, self._sampler.until_packed)
        # Adapt the length of the launches to `_SECONDS_PER_LAUNCH`; the counts do not depend on it.
        full = stop - first >= self._steps_per_launch * self._sampler.width(len(members))
        if now - clock < _SECONDS_PER_LAUNCH / 2 and full:
            self._steps_per_launch *= 2
        elif now - clock > 2 * _SECONDS_PER_LAUNCH:
            self._steps_per_launch = max(1, self._steps_per_launch // 2)
        return now
