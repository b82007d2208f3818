"""Compares recorded counts with counts drawn again. NumPy and SciPy only.

The same noise gives the same counts, except where the head rounds differently on another machine. How much rounding
can do is measured by the person who checks, on the head at hand: samples are evaluated in bfloat16 and in float32, and
a *flip* is a sample whose class differs. Fresh noise gives other counts of the same distribution.

All tests together refuse an honest folder with probability below 1 in 1,000, if another machine moves samples at most
`_SHARE` times as often as the change of the dtype does (those of a single image `_SINGLE` times that), and shifts each
image to either side with equal probability.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from lsrs_jax.smoothing.confidence import trusted_lower, trusted_upper
from lsrs_jax.smoothing.counts import ImageCounts
from lsrs_jax.smoothing.derivation import Derivation
from lsrs_jax.smoothing.schedule import Schedule

# How often another machine moves a sample, relative to the change between bfloat16 and float32. Two machines round
# bfloat16 at other points, so that their errors differ by no more than twice the error of one. A float32 error is 2⁻¹⁶
# of a bfloat16 error; the factor 8 covers sums in another order.
_SHARE = {"float32": 8 * 2.0**-16, "bfloat16": 2.0}
_SINGLE = 3.0  # one image may be moved by this multiple: its own error may be large where the measured one is small
_LEVEL = 2e-4  # probability with which each of the five tests refuses an honest folder
_FEW = 30  # images, of which a sum is not yet nearly normal
_PSEUDO = 3  # flips that may have been missed: seeing none leaves a probability of 5 % for 3 expected ones


class Rounding(NamedTuple):
    """What a change of the dtype does to the classes of `tried` samples of each image."""

    flips: Int[np.ndarray, " images"]  # samples whose class changes
    shift: Int[np.ndarray, " images"]  # samples that the candidate gains or loses
    tried: int
    head_dtype: str

    def moves(self, n: Int[np.ndarray, " images"], missed: float = 0.0) -> Float[np.ndarray, " images"]:
        """The number of n samples that another machine is expected to move, at most."""
        return _SHARE[self.head_dtype] * (self.flips + missed) / self.tried * n

    def net(self, n: Int[np.ndarray, " images"]) -> Float[np.ndarray, " images"]:
        """The root of the mean square of what a candidate is expected to gain or lose among n samples, at most.

        What is seen is a shift of the whole image and flips in both directions; only the first grows with n itself.
        """
        ratio = n / self.tried
        common = np.maximum(self.shift.astype(float) ** 2 - self.flips, 0)
        return _SHARE[self.head_dtype] * np.sqrt(common * ratio**2 + self.flips * ratio)


def first_wrong(
    recorded: Sequence[ImageCounts], again: Sequence[ImageCounts], rounding: Rounding
) -> tuple[int, str, int, int] | None:
    """The first image in which more samples differ than rounding can move: ``(row, stream, moved, allowed)``.

    Under the same noise; both sequences are in the order of `rounding`.
    """
    for stream in ("selection", "estimation"):
        pairs = [(_last(a, stream, b), _last(b, stream, b)) for a, b in zip(recorded, again, strict=True)]
        moved = np.array([np.abs(old - new).sum() // 2 for old, new in pairs])
        n = np.array([new.sum() for _, new in pairs])
        allowed = _allowance(rounding, n)
        for row in np.flatnonzero(moved > allowed)[:1]:
            return int(row), stream, int(moved[row]), int(allowed[row])
    return None


def _allowance(rounding: Rounding, n: np.ndarray) -> Float[np.ndarray, " images"]:
    """The number of n samples that may have moved in each image."""
    return stats.poisson.isf(_LEVEL / 2 / len(n), _SINGLE * rounding.moves(n, _PSEUDO))


def _last(image: ImageCounts, stream: str, other: ImageCounts) -> np.ndarray:
    """The counts of a stream at the last look of another image."""
    return image.counts[stream] if stream == "selection" else image.looks[len(other.looks) - 1]


class Gain(NamedTuple):
    """By how much the recorded counts are better than the counts drawn again, and how much rounding can explain."""

    found: float
    limit: float

    @property
    def refused(self) -> bool:
        return self.found > self.limit


def lead_gain(recorded: Sequence[ImageCounts], again: Sequence[ImageCounts], rounding: Rounding) -> Gain:
    """The gain in the lead of the label over its strongest rival, in samples, of images that selected their label."""
    rows, found = [], []
    for row, (old, new) in enumerate(zip(recorded, again, strict=True)):
        if int(old.counts["selection"].argmax()) != old.label:
            continue
        before, now = _last(old, "estimation", new), new.looks[-1]
        rival = int(np.where(np.arange(len(now)) == old.label, -1, now).argmax())
        rows.append(row)
        found.append(int(before[old.label] - now[old.label]) - int(before[rival] - now[rival]))
    n = np.array([image.looks[-1].sum() for image in again])
    chosen = np.isin(np.arange(len(n)), rows)
    return Gain(float(sum(found)), _limit(rounding, n, lambda sizes: 2 * sizes * chosen))


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
    again = [copy.copy(image) for image in again]
    for new, old in zip(again, recorded, strict=True):
        new.counts = new.counts | {"selection": old.counts["selection"]}
    n = np.array([image.looks[-1].sum() for image in again])

    def radii(images: Sequence[ImageCounts]) -> Float[np.ndarray, " images"]:
        certificates = derivation.certificates(schedule, images)
        return np.where(certificates.predict == [image.label for image in images], certificates.radius, 0.0)

    now = radii(again)

    def effect(sizes: np.ndarray) -> np.ndarray:
        sizes = np.ceil(sizes)
        return np.maximum(*(np.abs(radii(_moved(again, sign * sizes)) - now) for sign in (1, -1)))

    return Gain(float((radii(recorded) - now).mean()), _limit(rounding, n, effect) / len(n))


def _moved(images: Sequence[ImageCounts], sizes: np.ndarray) -> list[ImageCounts]:
    """Images with some samples moved from the rivals to the label, or from the label to its strongest rival."""
    changed = []
    for image, size in zip(images, sizes, strict=True):
        looks, label = image.looks.copy(), image.label
        total, others = looks.sum(axis=1), np.arange(looks.shape[1]) != label
        share = np.ceil(np.abs(size) * total / total[-1]).astype(np.int64)
        if size > 0:
            rest = np.maximum(total - looks[:, label], 1)
            kept = np.maximum(rest - share, 0) / rest
            looks[:, others] = np.floor(looks[:, others] * kept[:, None]).astype(np.int64)
            looks[:, label] = total - looks[:, others].sum(axis=1)
        else:
            share = np.minimum(share, looks[:, label])
            looks[:, label] -= share
            looks[:, int(np.where(others, looks[-1], -1).argmax())] += share
        other = copy.copy(image)
        other.looks = looks
        changed.append(other)
    return changed


def _limit(rounding: Rounding, n: np.ndarray, effect: Callable[[np.ndarray], np.ndarray]) -> float:
    """The largest sum over images that rounding explains at the level `_LEVEL`.

    Images move to either side with equal probability. `effect` maps a number of moved samples per image to the change
    of each image's term. Where less than one sample is expected to move, moves are rare events: Bernstein's bound, or
    the number of events. Elsewhere a whole image shifts: Hoeffding's bound. `_PSEUDO` flips that were missed in the
    image in which they matter most are added.
    """
    log, moves = -math.log(_LEVEL), rounding.moves(n)
    rare, by_one = moves < 1, effect(np.ones(len(n)))
    # The shifts of few images say little about their size: the quantile of Student's distribution takes the place of
    # the normal one. And effects are not linear: for few images they are taken at that quantile, while the sum over
    # many images is nearly normal.
    far = math.sqrt(2 * log) * float(stats.t.isf(_LEVEL, len(n)) / stats.norm.isf(_LEVEL))
    size = far if len(n) < _FEW else 1.0
    shifts = far / size * math.sqrt(np.where(rare, 0, effect(size * rounding.net(n)) ** 2).sum())
    missed = _PSEUDO * (rounding.moves(n, 1) - moves)
    variance = np.sum((moves * by_one**2)[rare]) + np.max(missed * by_one**2)
    step, expected = by_one.max(), moves[rare].sum() + missed.max()
    bernstein = math.sqrt(2 * log * variance) + 2 / 3 * log * step
    rare_events = min(bernstein, float(stats.poisson.isf(_LEVEL, expected)) * step)
    # No limit is above what the images may move one by one.
    return min(shifts + rare_events, float(effect(_allowance(rounding, n)).sum()))


class Fresh(NamedTuple):
    """Counts of the recorded candidates under fresh noise, in equal segments of `size` samples."""

    counts: Int[np.ndarray, "images segments"]
    size: int

    @property
    def total(self) -> int:
        """Samples of an image."""
        return self.counts.shape[1] * self.size


def first_unlikely(
    recorded: Sequence[ImageCounts], fresh: Fresh, rounding: Rounding, looks: int
) -> tuple[int, float, float] | None:
    """The first image whose candidate is too frequent in the ledger: ``(row, recorded, fresh)``, two shares.

    Two confidence intervals that hold at all `looks` together must overlap, up to what rounding can move.
    """
    candidate, n = _candidates(recorded)
    level = _LEVEL / 2 / len(n)
    least = trusted_lower(candidate, n, np.full(len(n), level / looks))
    most = trusted_upper(fresh.counts.sum(axis=1), np.full(len(n), fresh.total), np.full(len(n), level))
    for row in np.flatnonzero(least > most + _SINGLE * rounding.moves(n, _PSEUDO) / n)[:1]:
        return int(row), float(candidate[row] / n[row]), float(fresh.counts[row].sum() / fresh.total)
    return None


def fresh_gain(recorded: Sequence[ImageCounts], fresh: Fresh, rounding: Rounding, shared_noise: bool) -> Gain:
    """The gain in candidate samples of images that selected their label, against what fresh noise predicts.

    The samples after a look are independent of those before, and the weight of an image does not depend on any
    estimation sample; so the sum is a martingale, whatever stopped the images. With shared noise, images are
    correlated: the variance comes from sums over all images, per segment.
    """
    chosen = np.array([int(image.counts["selection"].argmax()) == image.label for image in recorded])
    candidate, n = _candidates(recorded)
    share, segments = fresh.counts.sum(axis=1) / fresh.total, fresh.counts.shape[1]
    gain = float(np.sum((candidate - n * share) * chosen))
    weights = chosen * n / fresh.total
    variance = segments * float(np.var(weights @ fresh.counts, ddof=1))
    longest = max(recorded, key=lambda image: len(image.looks))
    ends = longest.looks.sum(axis=1)
    smooth = (fresh.counts.sum(axis=1) + 1) / (fresh.total + 2)
    for look, samples in enumerate(np.diff(ends, prepend=0)):
        reached = chosen & np.array([len(image.looks) > look for image in recorded])
        if shared_noise:
            variance += samples * float(np.var(reached @ fresh.counts, ddof=1)) / fresh.size
        else:
            variance += samples * float(np.sum(reached * smooth * (1 - smooth)))
    luck = float(stats.t.isf(_LEVEL, segments - 1)) * math.sqrt(variance)
    return Gain(gain, luck + _limit(rounding, n, lambda sizes: sizes * chosen))


def _candidates(images: Sequence[ImageCounts]) -> tuple[np.ndarray, np.ndarray]:
    """Estimation samples of the candidate, and of all classes, at the last look."""
    counts = [image.looks[-1] for image in images]
    candidates = [int(image.counts["selection"].argmax()) for image in images]
    found = [row[candidate] for row, candidate in zip(counts, candidates, strict=True)]
    return np.array(found), np.array([row.sum() for row in counts])
