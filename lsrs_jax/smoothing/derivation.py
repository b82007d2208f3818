"""Derives certificates from counts, and decides when an image needs no more samples. NumPy only."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import special

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.format import FORMAT
from lsrs_jax.runtime.validate import array, choice, is_whole, numbers, real
from lsrs_jax.smoothing import anytime, confidence
from lsrs_jax.smoothing.counts import Counts, ImageCounts
from lsrs_jax.smoothing.schedule import Schedule

# Relative; covers the rounding of the quantile function and of the arithmetic here.
_MARGIN = 1e-12  # on-disk format: tables are compared digit by digit
_ABSOLUTE = 1e-14  # per unit of the quantiles; on-disk format
_ENTRIES = 2**21  # counts of the images that are derived at once
BLOCK_BYTES = 5 * 8 * _ENTRIES  # memory that this takes


def check_sigma(sigma: Any) -> None:
    """Raises UserError unless sigma is a positive number that float32 holds with full precision."""
    if not 2.0**-60 <= real(sigma) <= 2.0**60:
        raise UserError(f"sigma must be a positive number (between 1e-18 and 1e18), got {sigma!r}")


def check_lipschitz(lipschitz: Any) -> None:
    """Raises UserError unless the Lipschitz constant is a positive number by which a radius can be divided."""
    if not 2.0**-200 <= real(lipschitz) <= 2.0**200:
        raise UserError(f"the Lipschitz constant must be a positive number (between 1e-60 and 1e60), got {lipschitz!r}")


def certified_radius(
    p_a_lower: Any, p_b_upper: Any, sigma: float, lipschitz: float = 1.0, slack: Any = 0.0
) -> Float[np.ndarray, "..."]:
    """R = max(0, (σ/2 (Φ⁻¹(p_A) − Φ⁻¹(p_B)) − slack) / L)  (Cohen et al. 2019, Theorem 1, for L-Lipschitz encoders).

    Args:
      p_a_lower: lower bound on the probability of the class.
      p_b_upper: upper bound on the probability of every other class; 1 − p_a_lower gives the binary bound σΦ⁻¹(p_A).
      sigma: standard deviation of the sampled noise, in units of the latent (`sigma` of the arithmetic).
      lipschitz: Lipschitz constant of the encoder from images to latents.
      slack: ℓ2 distance in the latent that is subtracted for rounding, per image or one number.

    **Guarantee**: if both bounds hold and the encoder is ``lipschitz``-Lipschitz, the smoothed classifier keeps its
    class within this ℓ2 distance of the image. Numerical error is rounded towards 0. NaN bounds raise.
    """
    check_sigma(sigma)
    check_lipschitz(lipschitz)
    p_a, p_b, slack = numbers("p_a_lower", p_a_lower), numbers("p_b_upper", p_b_upper), numbers("slack", slack)
    try:
        np.broadcast_shapes(p_a.shape, p_b.shape, slack.shape)
    except ValueError as error:
        shapes = f"{p_a.shape}, {p_b.shape}, {slack.shape}"
        raise UserError(f"probabilities and slack do not fit: their shapes are {shapes}") from error
    each = ((p_a >= 0) & (p_a < 1), (p_b > 0) & (p_b <= 1), (slack >= 0) & np.isfinite(slack))
    if not all(map(np.all, each)):  # one by one: an empty array would hide the others
        allowed = "0 <= p_a_lower < 1, 0 < p_b_upper <= 1 (no count proves certainty), and a finite slack >= 0"
        raise UserError(f"a radius needs {allowed}")
    return trusted_radius(p_a, p_b, float(sigma), float(lipschitz), slack)


def trusted_radius(
    p_a: np.ndarray, p_b: np.ndarray, sigma: float, lipschitz: float, slack: np.ndarray, rule: int = FORMAT
) -> Float[np.ndarray, "..."]:
    """`certified_radius` for float64 arguments that were checked.

    The difference of the quantiles is lowered by a relative margin. Where p_B is next to p_A, the rounding of the
    quantiles exceeds it, and an absolute margin takes its place. It assumes that SciPy's quantiles err by no more than
    1e-14 of themselves; 1.1e-15 was seen. The `rule` of format 1 did not have it.
    """
    above, below = special.ndtri(p_a), special.ndtri(p_b)
    both_sides = np.where(p_b < p_a, above - below, -np.inf)
    lowered = both_sides * (1 - _MARGIN)
    if rule > 1:
        lowered = np.minimum(lowered, both_sides - _ABSOLUTE * (np.abs(above) + np.abs(below)))
    latent = sigma / 2 * lowered - slack
    return np.maximum(latent, 0.0) / lipschitz * (1 - _MARGIN)


@dataclasses.dataclass(frozen=True)
class Certificates:
    """Arrays over images. `samples` holds all counts behind certificates of `SmoothedClassifier.certify`."""

    predict: Int[np.ndarray, " images"]  # the class, or −1 on abstention
    radius: Float[np.ndarray, " images"]  # ℓ2, in units of the latent over the Lipschitz constant; 0 on abstention
    counts: Int[np.ndarray, "images classes"]  # estimation samples
    n: Int[np.ndarray, " images"]  # estimation samples
    p_a_lower: Float[np.ndarray, " images"]  # the bounds behind the radius, τ included
    p_b_upper: Float[np.ndarray, " images"]
    abstain: Bool[np.ndarray, " images"]
    samples: Counts | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.predict)


def _images_per_block(classes: int, looks: int) -> int:
    """How many images are derived at once, so that the memory does not grow with their number."""
    return max(1, _ENTRIES // (classes * looks))


def joined(parts: Iterable[Certificates], images: int) -> Certificates:
    """The certificates of so many images, without a second copy of their counts at any time."""
    joined, start = dict[str, Any](), 0
    for part in parts:
        for name, found in list(vars(part).items())[:-1]:  # not `samples`
            joined.setdefault(name, np.empty((images, *found.shape[1:]), found.dtype))[start : start + len(part)] = (
                found
            )
        start += len(part)
    return Certificates(**joined)


@dataclasses.dataclass(frozen=True)
class Derivation:
    """The settings that turn counts into certificates; `sigma`, `lipschitz` and `tau` as in `from_counts`."""

    sigma: float
    alpha: float  # per image; `Schedule.level` is the part of a look
    bound: str = "binary"
    lipschitz: float = 1.0
    tau: float = 0.0
    rule: int = FORMAT  # the format whose rule for radii holds; see `trusted_radius`
    radii: tuple[float, ...] | None = None  # the radii to decide, and always 0 (any certificate); None: the radius
    epsilon: float = 0.05  # without radii: how far the radius may stay below the best one, in units of σ/L

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        confidence.check_alpha(self.alpha)
        choice("bound", self.bound, confidence.BOUNDS)
        check_lipschitz(self.lipschitz)
        if not 0 <= real(self.tau) < 1:
            raise UserError(f"tau must lie in [0, 1), got {self.tau!r}")
        wanted = () if self.radii is None else self.radii
        if not isinstance(wanted, tuple) or not all(0 <= real(radius) <= 1e300 for radius in wanted):
            raise UserError(f"radii must be finite numbers >= 0, got {self.radii!r}")
        if not 0 < real(self.epsilon) <= 2.0**200:
            raise UserError(f"epsilon must be a positive number (at most 1e60), got {self.epsilon!r}")
        for name in ("sigma", "alpha", "lipschitz", "tau", "epsilon"):
            object.__setattr__(self, name, float(getattr(self, name)))

    def certificates(self, schedule: Schedule, images: Sequence[ImageCounts]) -> Certificates:
        """`Certificates` of images that have reached a look.

        **Guarantee**: the same as of `from_counts`, for any rule that decides at which look an image stops.
        """
        total, size = len(images), _images_per_block(images[0].classes, max(i.reached for i in images))
        if total > size:
            return joined((self.certificates(schedule, images[a : a + size]) for a in range(0, total, size)), total)
        return self._of_one_block(schedule, images)

    def _of_one_block(self, schedule: Schedule, images: Sequence[ImageCounts]) -> Certificates:
        looks = [schedule.bounded(image.looks) for image in images]
        selection, rows = np.stack([i.counts["selection"] for i in images]), np.concatenate(looks)
        lengths, slack = np.array([len(each) for each in looks]), np.array([i.slack for i in images])
        horizon, level = np.full(len(images), schedule.n), schedule.level(self.alpha)
        return self.derive(selection, rows, lengths, horizon, slack, level, schedule.limits)

    def derive(
        self,
        selection: Int[np.ndarray, "images classes"],
        rows: Int[np.ndarray, "rows classes"],
        lengths: Int[np.ndarray, " images"],
        horizon: Int[np.ndarray, " images"],
        slack: np.ndarray,
        level: float,
        limits: confidence.Limits,
    ) -> Certificates:
        """`from_counts` for arrays that were checked.

        `rows` are the cumulative estimation counts of all images, first the ``lengths[0]`` rows of image 0; `horizon`
        is the number of estimation samples at the last look; the bounds of a row, by `limits`, share the `level`.
        """
        images, size = len(lengths), _images_per_block(selection.shape[1], int(lengths.max()))
        if images > size:
            ends, slacks = [0, *np.cumsum(lengths).tolist()], np.broadcast_to(slack, images)

            def block(a: int, b: int) -> Certificates:
                own = selection[a:b], rows[ends[a] : ends[b]], lengths[a:b], horizon[a:b], slacks[a:b]
                return self.derive(*own, level, limits)

            return joined((block(a, min(a + size, images)) for a in range(0, images, size)), images)
        owner, starts = np.repeat(np.arange(images), lengths), np.cumsum(lengths) - lengths
        # On-disk format: tables are compared digit by digit. With the factor, no rounding removes τ.
        tau = self.tau * (1 + 1e-9)
        bucket, count = confidence.partition(selection, horizon, level, self.bound)
        p_a, p_b = confidence.bounds(rows, bucket[owner], count[owner], level, limits)
        p_a = np.maximum(np.maximum.reduceat(p_a, starts) - tau, 0.0)
        p_b = np.minimum(np.minimum.reduceat(p_b, starts) + tau, 1 - p_a)
        p_b = np.minimum(p_b + 1e-15, 1.0)
        radius = trusted_radius(p_a, p_b, self.sigma, self.lipschitz, slack, self.rule)
        abstain, last = ~(radius > 0), rows[starts + lengths - 1]
        predict = np.where(abstain, -1, selection.argmax(axis=1))
        return Certificates(predict, np.where(abstain, 0.0, radius), last, last.sum(axis=1), p_a, p_b, abstain)

    def decided(self, schedule: Schedule, images: Sequence[ImageCounts]) -> Bool[np.ndarray, " images"]:
        """Whether images at a look are decided: even in an optimistic future, more samples would not change the answer.

        In that future the candidate's share of the samples to come is the upper limit of its probability, at the level
        `Schedule.futility`.
        Stopping early can shrink a radius but never falsify one, so this rule needs no part of α.
        """
        size = _images_per_block(images[0].classes, len(schedule.looks)) if images else 1
        if len(images) > size:
            return np.concatenate([self.decided(schedule, images[a : a + size]) for a in range(0, len(images), size)])
        done = np.array([image.reached == len(schedule.looks) for image in images])
        rest = np.flatnonzero(~done)
        if len(rest):
            some = [images[int(i)] for i in rest]
            now = self.certificates(schedule, some)
            best = self._optimistic_radius(schedule, some, now)
            if self.radii is None:
                done[rest] = best <= now.radius + self.epsilon * self.sigma / self.lipschitz
            else:
                # The smallest positive number stands for "certified at all"; a radius of 0 is an abstention.
                wanted = np.unique(np.maximum([0.0, *self.radii], np.nextafter(0, 1)))
                following = np.searchsorted(wanted, now.radius, side="right")
                done[rest] = best < np.append(wanted, np.inf)[following]
        return done

    def _optimistic_radius(
        self, schedule: Schedule, images: Sequence[ImageCounts], now: Certificates
    ) -> Float[np.ndarray, " images"]:
        """The radius after the last look in the optimistic future of `decided`; at least the radius of `now`."""
        rows, n, level = np.arange(len(images)), schedule.n, schedule.futility(now.n)
        candidate = np.stack([image.counts["selection"] for image in images]).argmax(axis=1)
        left, share, (lower, upper) = n - now.n, schedule.level(self.alpha), schedule.limits
        leading = now.counts[rows, candidate]
        hoped = leading + np.ceil(left * confidence.trusted_upper(leading, now.n, level)).astype(np.int64)
        hoped = np.minimum(hoped, leading + left)
        p_a = np.maximum(now.p_a_lower, lower(hoped, n, share) - self.tau)
        p_b = 1 - p_a
        if self.bound == "multiclass":
            rivals = now.counts.copy()
            rivals[rows, candidate] = -1
            strongest = rivals.max(axis=1)
            feared = strongest + np.floor(left * confidence.trusted_lower(strongest, now.n, level)).astype(np.int64)
            p_b = np.minimum(p_b, upper(feared, n, share) + self.tau)
        slack, p_b = np.array([image.slack for image in images]), np.clip(p_b, 1e-15, 1.0)
        return np.maximum(now.radius, trusted_radius(p_a, p_b, self.sigma, self.lipschitz, slack))

    def largest_radius(self, schedule: Schedule, slack: float = 0.0) -> float:
        """The radius if all samples of the schedule agree."""
        n = schedule.n
        p_a = np.maximum(schedule.limits[0](n, n, schedule.level(self.alpha)) - self.tau, 0.0)
        return float(trusted_radius(p_a, 1 - p_a, self.sigma, self.lipschitz, np.array(slack)))


def from_counts(
    selection: Any,
    estimation: Any,
    *,
    sigma: float,
    alpha: float,
    bound: str = "binary",
    looks: Any = None,
    horizon: Any = None,
    lipschitz: float = 1.0,
    slack: Any = 0.0,
    tau: float = 0.0,
) -> Certificates:
    """Certificates from two independent sets of counts (Cohen et al. 2019, CERTIFY).

    Args:
      selection: integers ``(images, classes)``; they choose the candidate class (the lowest of equals) and, under
        ``"multiclass"``, the buckets; nothing else.
      estimation: integers ``(images, classes)`` from fresh noise; each row sums to at least 1 and at most 2**27. With
        `looks`: for each image the cumulative counts ``(looks reached, classes)``.
      sigma, lipschitz, slack: as in `certified_radius`.
      alpha: failure probability per image.
      bound: ``"binary"`` (p_B = 1 − p_A) or ``"multiclass"`` (class partitioning; Delattre et al. 2025): each bucket of
        rivals has an upper bound of its own.
      looks: all numbers of samples at which an image may have stopped, fixed beforehand; α is divided evenly over them,
        and each image keeps the best bounds of the looks it reached. None: the sum of each row was fixed beforehand, or
        there is a `horizon`.
      horizon: a number of samples, fixed beforehand, that no image exceeds; each may have stopped anywhere up to it.
        The bounds are those of the schedule ``"anytime"`` (`smoothing.anytime`).
      tau: total variation between the sampled noise and the Gaussian; it worsens both probabilities.

    **Guarantee**: for each image separately, with probability at least 1 − alpha over the estimation samples, the
    smoothed classifier returns ``predict`` everywhere within ``radius`` of the image, or the row abstains. Assumes
    that the samples of an image are independent draws of one distribution, within `tau` of the Gaussian's, and that
    selection and estimation samples are independent. With `looks` it holds for any rule of stopping at one of them,
    because all the bounds at all the looks hold together (union bound); with `horizon` for any rule of stopping.
    """
    derivation, slack = Derivation(sigma, alpha, bound, lipschitz, tau), numbers("slack", slack)
    selection, level, limits = _counts("selection", selection), derivation.alpha, confidence.CLOPPER_PEARSON
    if looks is None:
        rows = _counts("estimation", estimation)
        lengths, last = np.ones(len(rows), int), rows.sum(axis=1)
        if horizon is not None:
            if not is_whole(horizon) or not last.max() <= horizon <= confidence.MAX_SAMPLES:
                most = f"{last.max()} samples of an image, and at most 2**27"
                raise UserError(f"horizon must be a whole number, at least the {most}, got {horizon!r}")
            last, limits = np.full(len(rows), horizon), anytime.limits(horizon)
    elif horizon is not None:
        raise UserError("from_counts takes looks or a horizon, not both")
    else:
        found = array("looks", looks)
        if found.ndim != 1 or not found.size or found.dtype.kind not in "iu" or not (found[1:] > found[:-1]).all():
            raise UserError(f"from_counts takes looks that grow, whole numbers of samples, got {looks!r}")
        if found[-1] > confidence.MAX_SAMPLES:
            raise UserError(f"looks must not be above 2**27 samples, got {found[-1]}")
        rows, lengths = _rows_at_looks(estimation, found)
        level, last = derivation.alpha / len(found), np.full(len(selection), found[-1])
    shape = len(lengths), rows.shape[1]
    if selection.shape != shape:
        raise UserError(f"selection counts {selection.shape} and estimation counts {shape} differ in shape")
    if slack.shape not in ((), shape[:1]) or np.any(~((slack >= 0) & np.isfinite(slack))):
        raise UserError("slack must be finite and not negative, one number or one per image")
    return derivation.derive(selection, rows, lengths, last, slack, level, limits)


def _rows_at_looks(
    estimation: Any, looks: Int[np.ndarray, " looks"]
) -> tuple[Int[np.ndarray, "rows classes"], Int[np.ndarray, " images"]]:
    """All rows of all images, and the number of rows of each; raises UserError for rows that fit no looks."""
    try:
        parts = [_integers("estimation", part) for part in list(estimation)]
    except TypeError as error:
        raise UserError(f"with looks, estimation counts are cumulative counts for each image: {error}") from error
    if not parts or len({part.shape[1] for part in parts}) > 1:
        raise UserError("estimation counts need the same classes for every image")
    for part in parts:
        if part.sum(axis=1).tolist() != looks[: len(part)].tolist() or (np.diff(part, axis=0) < 0).any():
            expected, got = f"at the first of the looks {looks.tolist()}", part.sum(axis=1)
            raise UserError(f"estimation counts must be cumulative counts {expected}, got {got} samples")
    return _counts("estimation", np.concatenate(parts)), np.array([len(part) for part in parts])


def _integers(name: str, counts: Any) -> Int[np.ndarray, "images classes"]:
    counts = array(f"{name} counts", counts, "integers")
    if counts.ndim != 2 or counts.shape[1] < 2 or not len(counts) or counts.dtype.kind not in "iu":
        got = f"{counts.dtype} {counts.shape}"
        raise UserError(f"{name} counts must be integers of shape (images, classes >= 2), got {got}")
    return counts.astype(np.int64)  # a count that does not fit becomes negative


def _counts(name: str, counts: Any) -> Int[np.ndarray, "images classes"]:
    counts = _integers(name, counts)
    total = counts.sum(axis=1)
    # Each entry is checked too: the sum of huge counts may wrap around.
    if counts.min() < 0 or max(counts.max(), total.max()) > confidence.MAX_SAMPLES or total.min() < 1:
        raise UserError(f"{name} counts must not be negative, and sum to at least one and at most 2**27 per image")
    return counts
