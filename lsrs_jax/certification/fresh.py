"""Compares recorded counts with counts under fresh noise, which nobody could know. NumPy and SciPy only.

These tests find a head that recognises the noise of its seed. `comparison` has those under the same noise, and says
what is assumed.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from scipy import stats

from lsrs_jax.certification.comparison import (
    LEVEL,
    PSEUDO,
    SINGLE,
    Gain,
    Rounding,
    at_look,
    limit,
    most_looks,
    selected_label,
)
from lsrs_jax.smoothing.confidence import trusted_lower, trusted_upper
from lsrs_jax.smoothing.counts import ImageCounts


class Fresh(NamedTuple):
    """Counts of the recorded candidates under fresh noise, in equal segments of `size` samples."""

    counts: Int[np.ndarray, "images segments"]
    size: int

    @property
    def total(self) -> int:
        """Samples of an image."""
        return self.counts.shape[1] * self.size


def first_unlikely(
    recorded: Sequence[ImageCounts], fresh: Fresh, rounding: Rounding
) -> tuple[int, float, float] | None:
    """The first image whose candidate is too frequent at a look: ``(row, recorded, fresh)``, two shares.

    Confidence intervals of all looks and images hold together, and each must overlap with that of the fresh samples,
    up to what rounding can move.
    """
    looks, found = most_looks(recorded), fresh.counts.sum(axis=1)
    level = np.full(len(found), LEVEL / 2 / len(found))
    most = trusted_upper(found, np.full(len(found), fresh.total), level)
    for look in range(looks):
        candidate, n = _candidates(recorded, look)
        least = trusted_lower(candidate, n, level / looks)
        for row in np.flatnonzero(least > most + SINGLE * rounding.moves(n, PSEUDO) / n)[:1]:
            return int(row), float(candidate[row] / n[row]), float(found[row] / fresh.total)
    return None


def fresh_gain(recorded: Sequence[ImageCounts], fresh: Fresh, rounding: Rounding, shared_noise: bool) -> Gain:
    """The gain in candidate samples of images that selected their label, against what fresh noise predicts.

    At the look at which it exceeds its limit, or else at the last one. The samples after a look are independent of
    those before, and the weight of an image does not depend on any estimation sample; so the sum is a martingale,
    whatever stopped the images. With shared noise, images are correlated: the variance comes from sums over all images,
    per segment.
    """
    chosen, segments, looks = selected_label(recorded), fresh.counts.shape[1], most_looks(recorded)
    share, drawn, before = fresh.counts.sum(axis=1) / fresh.total, 0.0, np.zeros(len(recorded), np.int64)
    smooth, level = (fresh.counts.sum(axis=1) + 1) / (fresh.total + 2), LEVEL / looks
    for look in range(looks):
        candidate, n = _candidates(recorded, look)
        reached, samples = chosen & (n > before), int((n - before).max())
        if shared_noise:
            drawn += samples * float(np.var(reached @ fresh.counts, ddof=1)) / fresh.size
        else:
            drawn += samples * float(np.sum(reached * smooth * (1 - smooth)))
        predicted = segments * float(np.var((chosen * n / fresh.total) @ fresh.counts, ddof=1))
        luck = float(stats.t.isf(level, segments - 1)) * math.sqrt(predicted + drawn)
        rounded = limit(rounding, n, lambda of, n=n: of(n) * chosen, looks)
        gain, before = Gain(float(np.sum((candidate - n * share) * chosen)), luck + rounded), n
        if gain.refused or look == looks - 1:
            return gain
    raise AssertionError("images of a table have reached a look")


def _candidates(images: Sequence[ImageCounts], look: int) -> tuple[np.ndarray, np.ndarray]:
    """Estimation samples of the candidate, and of all classes, at a look."""
    counts = [at_look(image, look) for image in images]
    candidates = [int(image.counts["selection"].argmax()) for image in images]
    found = [row[candidate] for row, candidate in zip(counts, candidates, strict=True)]
    return np.array(found), np.array([row.sum() for row in counts])
