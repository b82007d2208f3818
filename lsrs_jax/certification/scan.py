"""Compares recorded counts with counts drawn again among images of similar radius. NumPy and SciPy only.

Whoever raises the certified accuracy at one radius moves samples of the images just below it, and of no others; in the
sums of `comparison` over all images this is lost. `comparison` says what is assumed.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from lsrs_jax.certification.comparison import (
    LEVEL,
    PSEUDO,
    Gain,
    Rounding,
    at_look,
    selected_label,
    sizes_at_looks,
)
from lsrs_jax.smoothing.counts import ImageCounts
from lsrs_jax.smoothing.derivation import Derivation
from lsrs_jax.smoothing.schedule import Schedule

_FEWEST = 5  # images in a window: the spread of few images is not known well enough
_EVERY = 500  # windows of up to so many images are all tried; of longer ones, one length in each 5 %
_MOST = 4.0  # spreads that one image counts for at most, because the spread of a single image may be larger


def scan_gain(
    derivation: Derivation,
    schedule: Schedule,
    recorded: Sequence[ImageCounts],
    again: Sequence[ImageCounts],
    rounding: Rounding,
) -> Gain:
    """The gain of candidates, in spreads, in the window of consecutive radii and at the look at which it is largest.

    Over images that selected their label, in the order of their radius: that of the mean of both counts, so that the
    order favours neither. The gain of a window is the sum of its images' gains over the root of their number. Its limit
    is a normal quantile for all windows and looks together, or Student's, since the spread is measured on images too.
    """
    rows = np.flatnonzero(selected_label(recorded)).tolist()
    if len(rows) < _FEWEST:
        return Gain(0.0, math.inf)
    both = [[images[row] for row in rows] for images in (recorded, again)]
    radii = np.mean([derivation.certificates(schedule, images).radius for images in both], axis=0)
    shares = np.mean([_shares(images) for images in both], axis=0)  # they order the images that abstain
    order, sizes, found = np.lexsort((shares, radii)), sizes_at_looks(again), -math.inf
    per_flip, dof = _shift_per_flip(rounding)
    for look, n in enumerate(sizes):
        was, now = (np.array([at_look(image, look)[image.label] for image in images]) for images in both)
        gains = (was - now) / _spread(rounding, per_flip, n)[rows]
        found = max(found, _best_window(np.clip(gains[order], -_MOST, _MOST)))
    windows = len(rows) * (len(rows) + 1) / 2 * len(sizes)
    return Gain(found, float(stats.t.isf(LEVEL / windows, dof)))


def _shares(images: Sequence[ImageCounts]) -> Float[np.ndarray, " images"]:
    return np.array([image.looks[-1][image.label] / image.looks[-1].sum() for image in images])


def _shift_per_flip(rounding: Rounding) -> tuple[float, float]:
    """The root of the mean square of the shift of a whole image per flip, and how many images it was measured on."""
    flips = rounding.flips.astype(float)
    weight = np.sum(flips**2)
    if not weight:
        return 0.0, float(len(flips))
    common = np.sum(np.maximum(rounding.shift.astype(float) ** 2 - flips, 0))
    return math.sqrt(common / weight), float(weight**2 / np.sum(flips**4))


def _spread(rounding: Rounding, per_flip: float, n: Int[np.ndarray, " images"]) -> Float[np.ndarray, " images"]:
    """The standard deviation of what a candidate gains or loses, at most: at least one sample.

    From the flips of the image, of which `PSEUDO` may have been missed, and from what a flip means in all images; or
    from its own shift if that is larger.
    """
    flips = rounding.flips + PSEUDO
    pooled = rounding._replace(flips=flips).net_of(np.maximum((per_flip * flips) ** 2, rounding.common), n)
    return np.sqrt(np.maximum(pooled**2, np.maximum(rounding.moves(n, PSEUDO), 1)))


def _best_window(gains: Float[np.ndarray, " images"]) -> float:
    """The largest sum of consecutive gains over the root of their number; not every long window is tried."""
    sums, best, length = np.concatenate([[0.0], np.cumsum(gains)]), -math.inf, _FEWEST
    while length <= len(gains):
        best = max(best, float((sums[length:] - sums[:-length]).max()) / math.sqrt(length))
        length = length + 1 if length < _EVERY else math.ceil(length * 1.05)
    return best
