"""Sampling schedules: how many samples an image gets at most, and where the sampling may pause. NumPy only."""

import bisect
import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Int

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.format import ANYTIME_FIRST_LOOK, ANYTIME_LOOK_GROWTH, FIRST_LOOK, LOOK_GROWTH
from lsrs_jax.runtime.validate import choice, is_whole
from lsrs_jax.smoothing import anytime, confidence
from lsrs_jax.smoothing.confidence import MAX_SAMPLES

SCHEDULES = ("fixed", "staged", "anytime")
CERTIFYING = ("selection", "estimation")  # of the samples of a certificate, in the order in which they are drawn


def block_count(n: int, samples: int) -> int:
    """Number of blocks of `samples` noise vectors that hold n samples; the last one may be partly masked."""
    return -(-n // samples)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The samples of an image: `n0` for the selection, then estimation samples with interim looks.

    Certificates may be derived at the looks, growing numbers of estimation samples. All but the last are multiples of
    `samples`, the noise vectors per sample block. The fixed schedule has one look. The looks share alpha, but not if
    the schedule is `anytime`: then the bounds of `smoothing.anytime` hold at all of them together.
    """

    n0: int
    looks: tuple[int, ...]
    samples: int
    anytime: bool = False

    def __post_init__(self) -> None:
        for name, count in (("n0", self.n0), *(("n", look) for look in self.looks)):
            if not is_whole(count) or not 1 <= count <= MAX_SAMPLES:
                raise UserError(f"{name} must be a whole number from 1 to 2**27, got {count!r}")
        if not is_whole(self.samples) or self.samples < 1:
            raise UserError(f"samples must be a whole number of at least 1, got {self.samples!r}")
        ordered = all(a < b for a, b in zip(self.looks, self.looks[1:], strict=False))
        if not self.looks or not ordered or any(look % self.samples for look in self.looks[:-1]):
            raise UserError(f"looks must grow, by whole blocks of {self.samples} samples, got {self.looks}")

    @property
    def n(self) -> int:
        """Estimation samples at the last look."""
        return self.looks[-1]

    @property
    def staged(self) -> bool:
        """Whether there are interim looks."""
        return len(self.looks) > 1

    def level(self, alpha: float) -> float:
        """The part of alpha that the bounds at one look get."""
        return alpha if self.anytime else alpha / len(self.looks)

    def futility(self, samples: Int[np.ndarray, " images"]) -> Any:
        """The level of the optimistic limits that say when more samples would not change an answer.

        `samples` are the estimation samples so far. Stopping too early costs radius, never the guarantee. With the
        anytime schedule it is cheap to go on at first, and expensive near the end.
        """
        return 0.15 * np.sqrt(samples / self.n) if self.anytime else 0.01

    def bounded(self, looks: Int[np.ndarray, "looks classes"]) -> Int[np.ndarray, "some classes"]:
        """The rows of the counts at the looks of an image from which its bounds are derived.

        Anytime bounds come from the last look alone: those of the looks before are hardly ever better, and cost time.
        """
        return looks[-1:] if self.anytime else looks

    @property
    def limits(self) -> confidence.Limits:
        """The lower and the upper bound of a probability at a look."""
        return anytime.limits(self.n) if self.anytime else confidence.CLOPPER_PEARSON

    @functools.cached_property
    def totals(self) -> dict[str, int]:
        """Number of samples of each stream; the streams are in the order in which they are drawn."""
        return dict(zip(CERTIFYING, (self.n0, self.n), strict=True))

    @functools.cached_property
    def stops(self) -> dict[str, tuple[int, ...]]:
        """Block indices at which each stream may pause: the end of the selection, and the looks."""
        looks = tuple(block_count(look, self.samples) for look in self.looks)
        return {"selection": (block_count(self.n0, self.samples),), "estimation": looks}

    def next_stop(self, done: tuple[int, ...]) -> tuple[str, int, int] | None:
        """``(stream, first, stop)``: the blocks that follow the blocks `done` (per stream); None at the end."""
        for (stream, stops), first in zip(self.stops.items(), done, strict=True):
            if first < stops[-1]:
                return stream, first, stops[bisect.bisect(stops, first)]
        return None


def make_schedule(kind: str, n0: int, n: int, samples: int) -> Schedule:
    """The `Schedule` ``"fixed"`` (one look, at n samples), ``"staged"`` or ``"anytime"`` (looks that grow up to n)."""
    choice("schedule", kind, SCHEDULES)
    fixed = Schedule(n0, (n,), samples)
    if kind == "fixed":
        return fixed
    first, growth = (FIRST_LOOK, LOOK_GROWTH) if kind == "staged" else (ANYTIME_FIRST_LOOK, ANYTIME_LOOK_GROWTH)
    looks, target = set[int](), float(first)
    while target * growth**0.5 < n:
        looks.add(block_count(int(target), samples) * samples)
        target *= growth
    return Schedule(n0, (*sorted(look for look in looks if look < n), n), samples, kind == "anytime")
