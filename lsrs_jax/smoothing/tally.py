"""The votes of images so far, each chunk of noise counted exactly once. NumPy only."""

import bisect
import copy
import dataclasses
import functools
import math

import numpy as np

from lsrs_jax.arguments import is_whole
from lsrs_jax.errors import UserError
from lsrs_jax.smoothing.confidence import MAX_VOTES


def chunks(n, samples):
    """Number of chunks of `samples` noise vectors that hold n votes; the last one may be partly masked."""
    return -(-n // samples)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which votes there can be.

    Attributes:
      n0: selection votes.
      looks: growing numbers of estimation votes at which certificates may be derived; all but the last are multiples of
        `samples`. One look is the fixed schedule.
      samples: votes per chunk.
    """

    n0: int
    looks: tuple[int, ...]
    samples: int

    def __post_init__(self):
        for name, votes in (("n0", self.n0), *(("n", look) for look in self.looks)):
            if not is_whole(votes) or not 1 <= votes <= MAX_VOTES:
                raise UserError(f"{name} must be a whole number from 1 to 2**27, got {votes!r}")
        if not is_whole(self.samples) or self.samples < 1:
            raise UserError(f"samples must be a whole number of at least 1, got {self.samples!r}")
        ordered = all(a < b for a, b in zip(self.looks, self.looks[1:], strict=False))
        if not self.looks or not ordered or any(look % self.samples for look in self.looks[:-1]):
            raise UserError(f"looks must grow, by whole chunks of {self.samples} votes, got {self.looks}")

    @property
    def n(self):
        """Estimation votes at the last look."""
        return self.looks[-1]

    @functools.cached_property
    def totals(self):
        """Votes per purpose, in the order in which they are cast."""
        return {"selection": self.n0, "estimation": self.n}

    @functools.cached_property
    def stops(self):
        """Chunk indices at which each purpose may pause: the end of the selection, the looks."""
        ends = {"selection": (self.n0,), "estimation": self.looks}
        return {purpose: tuple(chunks(votes, self.samples) for votes in some) for purpose, some in ends.items()}

    def votes(self, done):
        """How many votes lie in the chunks `done` (per purpose)."""
        return sum(min(stop * self.samples, n) for stop, n in zip(done, self.totals.values(), strict=True))

    def next_stop(self, done):
        """``(purpose, first, stop)`` that comes next after the chunks `done` (per purpose); None at the end."""
        for purpose, first in zip(self.totals, done, strict=True):
            stops = self.stops[purpose]
            if first < stops[-1]:
                return purpose, first, stops[bisect.bisect(stops, first)]
        return None


@dataclasses.dataclass(frozen=True)
class Row:
    """Votes of one image in the chunks [first, stop) of a purpose; `votes` are int64 counts over all classes.

    `slack` is the ℓ2 distance in the latent charged to the image, `seconds` the time charged to it for these chunks.
    """

    idx: int
    label: int
    slack: float
    purpose: str
    first: int
    stop: int
    votes: np.ndarray
    seconds: float


class Tally:
    """The votes of one image so far: chunks [0, next) of each purpose. Never changed: `Tallies` replaces it.

    `looks` holds the counts over the classes ``(looks reached, K)``, cumulative, as each look found them.
    """

    def __init__(self, row, plan, num_classes):
        self.idx, self.label, self.slack, self.seconds = row.idx, row.label, row.slack, 0.0
        self.counts = {purpose: np.zeros(num_classes, np.int64) for purpose in plan.totals}
        self.next = dict.fromkeys(plan.totals, 0)
        self.looks = np.zeros((0, num_classes), np.int64)

    @property
    def done(self):
        """The next chunk of each purpose."""
        return tuple(self.next.values())


class Tallies:
    """Tallies of images in memory, by idx.

    **Guarantee**: `tallies` holds each chunk of an image exactly once, whatever interrupts a call, the votes of a row
    add up to the number of samples in its chunks, no row reaches over a look, and the selection votes are complete
    before the first estimation vote: what a look has seen is the count at that look.
    """

    def __init__(self, plan, num_classes):
        self.plan, self.num_classes = plan, num_classes
        self.tallies = {}

    def done(self, idx):
        """The next chunk of each purpose for an image."""
        return self.tallies[idx].done if idx in self.tallies else (0,) * len(self.plan.totals)

    def append(self, rows):
        """Counts rows; raises ValueError for one that does not fit, before it or any after it is counted."""
        for row in rows:
            self.count(row)

    def count(self, row):
        """Counts one row; raises ValueError for one that does not fit."""
        plan, name = self.plan, f"image {row.idx}"
        known = self.tallies.get(row.idx)
        tally = known or Tally(row, plan, self.num_classes)
        total = plan.totals[row.purpose]
        if row.first != tally.next[row.purpose]:
            raise ValueError(f"{name}: chunks from {row.first} where {tally.next[row.purpose]} come next")
        if row.first >= row.stop or (row.stop - 1) * plan.samples >= total:
            raise ValueError(f"{name}: chunks [{row.first}, {row.stop}) are not among those of {total} votes")
        purpose, _, stop = plan.next_stop(tally.done)
        if purpose != row.purpose:
            raise ValueError(f"{name}: estimation before the selection is complete")
        if row.stop > stop:
            raise ValueError(f"{name}: chunks [{row.first}, {row.stop}) reach over the look at {stop}")
        expected = min(row.stop * plan.samples, total) - row.first * plan.samples
        # Of each class too: the sum of huge counts may wrap around to what belongs.
        if row.votes.max() > expected or row.votes.sum() != expected:
            raise ValueError(f"{name}: {row.votes.sum()} votes where {expected} belong")
        if not (0 <= row.slack < math.inf and 0 <= row.seconds < 2.0**31):
            raise ValueError("slack or seconds out of range")
        if (row.label, row.slack) != (tally.label, tally.slack):
            raise ValueError(f"{name}: label or slack changes between rows")
        counted = copy.copy(tally)
        counted.counts = tally.counts | {row.purpose: tally.counts[row.purpose] + row.votes}
        counted.next = tally.next | {row.purpose: row.stop}
        counted.seconds += row.seconds
        if purpose == "estimation" and row.stop == stop:
            counted.looks = np.concatenate([tally.looks, counted.counts["estimation"][None]])
        self.tallies[row.idx] = counted  # at once: whoever interrupts finds the row whole or not at all

    def at_a_look(self, idx):
        """Whether the last vote of an image was the last one before a look, so that a certificate can be derived."""
        tally = self.tallies.get(idx)
        return tally is not None and tally.next["estimation"] in self.plan.stops["estimation"]
