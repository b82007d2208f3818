"""Compares recorded counts with counts drawn again. NumPy and SciPy only.

The same noise gives the same counts, except where the head rounds differently on another machine. How much rounding
can do is measured by the person who checks, on the head at hand: samples are evaluated in bfloat16 and in float32, and
a *flip* is a sample whose class differs. `fresh` has the tests under other noise.

A radius comes from the best look of its image, so every test looks at the counts of every look, and divides its level
over them.

All tests together refuse an honest folder with probability below 1 in 1,000, if another machine moves samples at most
`_SHARE` times as often as the change of the dtype does (those of a single image `SINGLE` times that), and shifts each
image to either side with equal probability.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from lsrs_jax.smoothing.counts import ImageCounts
from lsrs_jax.smoothing.derivation import Derivation
from lsrs_jax.smoothing.schedule import Schedule

# How often another machine moves a sample, relative to the change between bfloat16 and float32. Two machines round
# bfloat16 at other points, so that their errors differ by no more than twice the error of one. A float32 error is 2⁻¹⁶
# of a bfloat16 error; the factor 8 covers sums in another order.
_SHARE = {"float32": 8 * 2.0**-16, "bfloat16": 2.0}
SINGLE = 3.0  # one image may be moved by this multiple: its own error may be large where the measured one is small
LEVEL = 1.6e-4  # probability with which each of the six tests refuses an honest folder
_FEW = 30  # images, of which a sum is not yet nearly normal
PSEUDO = 3  # flips that may have been missed: seeing none leaves a probability of 5 % for 3 expected ones


class Rounding(NamedTuple):
    """What a change of the dtype does to the classes of `tried` samples of each image."""

    flips: Int[np.ndarray, " images"]  # samples whose class changes
    shift: Int[np.ndarray, " images"]  # samples that the candidate gains or loses
    tried: int
    head_dtype: str

    def moves(self, n: Int[np.ndarray, "*looks images"], missed: float = 0.0) -> Float[np.ndarray, "*looks images"]:
        """The number of n samples that another machine is expected to move, at most."""
        return _SHARE[self.head_dtype] * (self.flips + missed) / self.tried * n

    def net(self, n: Int[np.ndarray, "*looks images"]) -> Float[np.ndarray, "*looks images"]:
        """The root of the mean square of what a candidate is expected to gain or lose among n samples, at most.

        What is seen is a shift of the whole image and flips in both directions; only the first grows with n itself.
        """
        return self.net_of(self.common, n)

    def net_of(self, common: Float[np.ndarray, " images"], n: np.ndarray) -> Float[np.ndarray, "*looks images"]:
        """`net`, if the squared shift of each whole image is `common` in the samples tried."""
        ratio = n / self.tried
        return _SHARE[self.head_dtype] * np.sqrt(common * ratio**2 + self.flips * ratio)

    @property
    def common(self) -> Float[np.ndarray, " images"]:
        """The squared shift of each whole image, without what its flips contribute by chance."""
        return np.maximum(self.shift.astype(float) ** 2 - self.flips, 0)


class Wrong(NamedTuple):
    """An image with samples that rounding does not explain."""

    row: int
    stream: str
    moved: int  # samples of another class than now, at least, among the first `samples` of the stream
    allowed: int
    samples: int


def first_wrong(recorded: Sequence[ImageCounts], again: Sequence[ImageCounts], rounding: Rounding) -> Wrong | None:
    """The first image in which more samples differ at a look than rounding can move, in the order of `rounding`."""
    looks = most_looks(again)
    for stream in ("selection", "estimation"):
        parts = 1 if stream == "selection" else looks
        moved = np.zeros(len(again), np.int64)
        for part in range(parts):
            pairs = [
                (increment(a, stream, part), increment(b, stream, part)) for a, b in zip(recorded, again, strict=True)
            ]
            moved += [np.abs(old - new).sum() // 2 for old, new in pairs]
            n = np.array([_cumulative(image, stream, part).sum() for image in again])
            allowed = allowance(rounding, n, parts)
            for row in np.flatnonzero(moved > allowed)[:1]:
                return Wrong(int(row), stream, int(moved[row]), int(allowed[row]), int(n[row]))
    return None


def samples_moved(recorded: Sequence[ImageCounts], again: Sequence[ImageCounts]) -> int:
    """The number of samples that have another class now, at least."""
    parts = [("selection", 0), *(("estimation", look) for look in range(most_looks(again)))]
    return sum(
        int(np.abs(increment(old, *part) - increment(new, *part)).sum()) // 2
        for old, new in zip(recorded, again, strict=True)
        for part in parts
    )


def allowance(rounding: Rounding, n: np.ndarray, looks: int) -> Float[np.ndarray, "*looks images"]:
    """The number of n samples that may have moved in each image, if it is compared at this many looks."""
    return stats.poisson.isf(LEVEL / 2 / looks / n.shape[-1], SINGLE * rounding.moves(n, PSEUDO))


def most_looks(images: Sequence[ImageCounts]) -> int:
    """The number of looks that the image with most samples has reached."""
    return max(image.reached for image in images)


def at_look(image: ImageCounts, look: int) -> Int[np.ndarray, " classes"]:
    """The estimation counts of an image at a look, or at its last look if it stopped before."""
    return image.looks[min(look, image.reached - 1)]


def sizes_at_looks(images: Sequence[ImageCounts]) -> Int[np.ndarray, "looks images"]:
    """The number of estimation samples at every look; see `at_look`."""
    return np.array([[at_look(image, look).sum() for image in images] for look in range(most_looks(images))])


def _cumulative(image: ImageCounts, stream: str, look: int) -> np.ndarray:
    return image.counts[stream] if stream == "selection" else at_look(image, look)


def increment(image: ImageCounts, stream: str, look: int) -> Int[np.ndarray, " classes"]:
    """The counts between a look and the one before; zeros if the image stopped before."""
    found = _cumulative(image, stream, look)
    return found - _cumulative(image, stream, look - 1) if look else found


class Gain(NamedTuple):
    """By how much the recorded counts are better than the counts drawn again, and how much rounding can explain."""

    found: float
    limit: float

    @property
    def refused(self) -> bool:
        return self.found > self.limit


def lead_gain(recorded: Sequence[ImageCounts], again: Sequence[ImageCounts], rounding: Rounding) -> Gain:
    """The gain in the lead of the label over its strongest rival, in samples, of images that selected their label.

    At the look at which it exceeds its limit, or else at the last one.
    """
    chosen, sizes = selected_label(recorded), sizes_at_looks(again)
    for look, n in enumerate(sizes):
        found = 0
        for row in np.flatnonzero(chosen).tolist():
            before, now, label = at_look(recorded[row], look), at_look(again[row], look), again[row].label
            rival = int(np.where(np.arange(len(now)) == label, -1, now).argmax())
            found += int(before[label] - now[label]) - int(before[rival] - now[rival])
        gain = Gain(float(found), limit(rounding, n, lambda of, n=n: 2 * of(n) * chosen, len(sizes)))
        if gain.refused or look == len(sizes) - 1:
            return gain
    raise AssertionError("images of a table have reached a look")


def selected_label(images: Sequence[ImageCounts]) -> Bool[np.ndarray, " images"]:
    """Whether the candidate of each image is its label."""
    return np.array([int(image.counts["selection"].argmax()) == image.label for image in images])


def radius_gain(
    derivation: Derivation,
    schedule: Schedule,
    recorded: Sequence[ImageCounts],
    again: Sequence[ImageCounts],
    rounding: Rounding,
) -> Gain:
    """The gain in the average certified radius of these images (wrong and abstaining ones count as 0).

    Both sides have the recorded selection, of which `first_wrong` allows few samples to differ.
    """
    again = [new.changed({"selection": old.counts["selection"]}) for new, old in zip(again, recorded, strict=True)]
    n = sizes_at_looks(again)

    def radii(images: Sequence[ImageCounts]) -> Float[np.ndarray, " images"]:
        certificates = derivation.certificates(schedule, images)
        return np.where(certificates.predict == [image.label for image in images], certificates.radius, 0.0)

    now = radii(again)

    def effect(of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        sizes = np.ceil(of(n))
        return np.maximum(*(np.abs(radii(moved(again, sign * sizes)) - now) for sign in (1, -1)))

    most = limit(rounding, n[-1], effect, len(n), level=LEVEL)  # one number holds all looks
    return Gain(float((radii(recorded) - now).mean()), most / len(now))


def moved(images: Sequence[ImageCounts], sizes: Float[np.ndarray, "looks images"]) -> list[ImageCounts]:
    """Images with samples moved at every look from the rivals to the label, or from the label to its strongest rival.

    The sizes of an image have one sign.
    """
    changed = []
    for image, size in zip(images, sizes.T.astype(np.int64), strict=True):
        looks, label = image.looks.copy(), image.label
        total, others, share = looks.sum(axis=1), np.arange(looks.shape[1]) != label, np.abs(size[: len(looks)])
        if size.sum() > 0:
            rest = np.maximum(total - looks[:, label], 1)
            kept = np.maximum(rest - share, 0) / rest
            looks[:, others] = np.floor(looks[:, others] * kept[:, None]).astype(np.int64)
            looks[:, label] = total - looks[:, others].sum(axis=1)
        else:
            share = np.minimum(share, looks[:, label])
            looks[:, label] -= share
            looks[:, int(np.where(others, looks[-1], -1).argmax())] += share
        changed.append(image.changed(looks=looks))
    return changed


def limit(
    rounding: Rounding,
    n: Int[np.ndarray, " images"],
    effect: Callable[[Callable[[np.ndarray], np.ndarray]], np.ndarray],
    looks: int,
    level: float | None = None,
) -> float:
    """The largest sum over images that rounding explains at a level, by default `LEVEL` divided over the looks.

    Images move to either side with equal probability. `effect` takes a function from numbers of samples to numbers of
    moved ones, and returns the change of each image's term. Where less than one of n samples is expected to move, moves
    are rare events: Bernstein's bound, or the number of events. Elsewhere a whole image shifts: Hoeffding's bound.
    `PSEUDO` flips that were missed in the image in which they matter most are added.
    """
    level = LEVEL / looks if level is None else level
    log, moves = -math.log(level), rounding.moves(n)
    rare, by_one = moves < 1, effect(np.ones_like)
    # The shifts of few images say little about their size: the quantile of Student's distribution takes the place of
    # the normal one. And effects are not linear: for few images they are taken at that quantile, while the sum over
    # many images is nearly normal.
    far = math.sqrt(2 * log) * float(stats.t.isf(level, len(n)) / stats.norm.isf(level))
    size = far if len(n) < _FEW else 1.0
    shifts = far / size * math.sqrt(np.where(rare, 0, effect(lambda n: size * rounding.net(n)) ** 2).sum())
    missed = PSEUDO * (rounding.moves(n, 1) - moves)
    variance = np.sum((moves * by_one**2)[rare]) + np.max(missed * by_one**2)
    step, expected = by_one.max(), moves[rare].sum() + missed.max()
    bernstein = math.sqrt(2 * log * variance) + 2 / 3 * log * step
    rare_events = min(bernstein, float(stats.poisson.isf(level, expected)) * step)
    # No limit is above what the images may move one by one.
    return min(shifts + rare_events, float(effect(lambda n: allowance(rounding, n, looks)).sum()))
