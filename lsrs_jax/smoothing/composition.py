"""Composition of two certified classifiers: where the first one does not answer, a fallback does.

A classifier is given by scores of its classes, as `compose` describes them. The margins of a Lipschitz classifier are
such scores, and so is σΦ⁻¹(p_c)/L of a smoothed one. `Composed` derives certificates of such a composition from counts.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import special

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.validate import numbers, real
from lsrs_jax.smoothing import confidence
from lsrs_jax.smoothing.counts import ImageCounts
from lsrs_jax.smoothing.derivation import Certificates, Derivation, trusted_radius
from lsrs_jax.smoothing.schedule import Schedule

_ROUNDING = 1e-15  # covers 1 - p in float64; on-disk format
Answers = Mapping[int, tuple[int, float]]  # idx -> class of the fallback, and its certified radius


def compose(fallback: Any, first: Any, *, kappa: float = 0.0) -> Float[np.ndarray, "images classes"]:
    """Scores of the classifier that answers c where ``first_c > kappa``, and elsewhere as the fallback does.

    Scores are functions of the input x, one per class. They must be 1-Lipschitz in ℓ2, and the scores of two classes
    must not have a positive sum. They stand for the classifier that answers c where its score is positive; there the
    score is a certified radius. The new scores have both properties, so compositions can be chained.

    Args:
      fallback, first: the scores a and b of the two classifiers at the same inputs, finite, ``(N, K)`` with K >= 2.
      kappa: a score of ``first`` must exceed this number >= 0, or the fallback answers.

    Returns s_c = max(b_c − κ, min(a_c, κ − max_{j≠c} b_j)). At most one score of an input is positive. Raises UserError
    for other shapes, and for two classes whose sum is positive beyond rounding.

    **Guarantee**: if a and b have both properties, s has them, so the class with a positive s_c is kept at all x' with
    ‖x' − x‖ < s_c. Proof in docs/guarantee.md. The rounding of scores is the caller's: lower them by it.
    """
    a, b = numbers("fallback", fallback), numbers("first", first)
    check_scores("fallback", a)
    check_scores("first", b)
    if a.shape != b.shape or not 0 <= real(kappa) < np.inf:
        raise UserError(f"compose takes scores of equal shapes and kappa >= 0, got {a.shape}, {b.shape}, {kappa!r}")
    return composed_scores(a, b, float(kappa))


def check_scores(name: str, scores: Float[np.ndarray, "images classes"]) -> None:
    """Raises UserError unless the scores are finite, ``(N, K)``, and no two classes have a positive sum."""
    if scores.ndim != 2 or scores.shape[1] < 2 or not np.isfinite(scores).all():
        raise UserError(f"{name} must have finite scores of shape (inputs, classes >= 2), got {scores.shape}")
    second, largest = np.sort(scores, axis=1)[:, -2:].T
    if (wrong := np.flatnonzero(second + largest > 1e-6 * np.abs(largest))).size:
        pair = f"input {wrong[0]} has {largest[wrong[0]]} and {second[wrong[0]]}"
        raise UserError(f"{name}: the scores of two classes must not have a positive sum, and {pair}")


def composed_scores(fallback: Any, first: Any, kappa: float = 0.0) -> Any:
    """`compose` for arrays of NumPy or JAX that were checked; differentiable almost everywhere."""
    xp = first.__array_namespace__()
    order = xp.sort(first, axis=-1)
    rivals = xp.where(first == order[..., -1:], order[..., -2:-1], order[..., -1:])
    return xp.maximum(first - kappa, xp.minimum(fallback, kappa - rivals))


def answers(scores: Float[np.ndarray, "images classes"]) -> Int[np.ndarray, " images"]:
    """The class that scores stand for, or −1 where none is positive."""
    return np.where(scores.max(axis=1) > 0, scores.argmax(axis=1), -1)


def composed_leaders(
    counts: Int[np.ndarray, "images classes"], fallback: Int[np.ndarray, " images"], alpha: float, tau: float
) -> Int[np.ndarray, " images"]:
    """The class of the composition (κ = 0) at images with these counts, or −1 where they do not show it.

    `fallback` has the class of the fallback, or −1. The answer is a class that is shown to have more than half of the
    probability; the fallback's class where every other class is shown to have less than half; else −1. The level of
    each binomial test is α/2.

    **Guarantee**: a class that is not the composition's is returned with probability at most α per image (at most 1/2,
    if α is larger).
    """
    rows, n, level = np.arange(len(counts)), counts.sum(axis=1), min(alpha, 0.5) / 2
    leader, others = counts.argmax(axis=1), counts.copy()
    others[rows[fallback >= 0], fallback[fallback >= 0]] = -1
    above = _tail(counts[rows, leader], n, 0.5 + tau) <= level
    below = (fallback >= 0) & (_tail(n - others.max(axis=1), n, 0.5 + tau) <= level)
    return np.where(above, leader, np.where(below, fallback, -1))


def leaders_of(
    counts: Int[np.ndarray, "images classes"], fallback: Int[np.ndarray, " images"] | None, alpha: float, tau: float
) -> Int[np.ndarray, " images"]:
    """`composed_leaders`, or `confidence.leaders` without a fallback."""
    if fallback is None:
        return confidence.leaders(counts, alpha, tau)
    return composed_leaders(counts, fallback, alpha, tau)


def _tail(k: np.ndarray, n: np.ndarray, p: float) -> Float[np.ndarray, " images"]:
    """P[Binomial(n, p) >= k]."""
    return np.where(k > 0, special.betainc(np.maximum(k, 1), n - np.maximum(k, 1) + 1, min(p, 1.0)), 1.0)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is bounded, per image: it is fixed by the selection samples and the fallback alone."""

    leader: Int[np.ndarray, " images"]  # the class with the most selection samples
    fallback: Int[np.ndarray, " images"]  # class of the fallback
    margin: Float[np.ndarray, " images"]  # certified radius of the fallback
    agree: Bool[np.ndarray, " images"]  # leader and fallback are the same class
    bucket: Int[np.ndarray, "images classes"]  # of every rival of the fallback, each bounded from above; −1: itself
    level: Float[np.ndarray, " images"]  # of each bound


@dataclasses.dataclass(frozen=True)
class Composed(Derivation):
    """The `Derivation` of certificates of a composition (κ = 0): votes first, then the fallback with these `answers`.

    **Guarantee**: for each image, with probability at least 1 − alpha over the estimation samples, the composition
    returns ``predict`` everywhere within ``radius``, or the row abstains. The assumptions are those of
    `derivation.from_counts`, and that the fallback keeps its class within its radius. The radius is never below the
    binary radius of the same lower bound p_A.

    ``p_a_lower`` bounds the probability of the leader of the selection from below, ``p_b_upper`` those of all classes
    but the fallback's from above.
    """

    answers: Answers = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bound != "multiclass":
            raise UserError("a fallback needs an upper bound of every rival: give bound multiclass")

    def _of_one_block(self, schedule: Schedule, images: Sequence[ImageCounts]) -> Certificates:
        looks = [schedule.bounded(image.looks) for image in images]
        rows, lengths = np.concatenate(looks), np.array([len(each) for each in looks])
        slack, starts = np.array([i.slack for i in images]), np.cumsum(lengths) - lengths
        # On-disk format, as in `Derivation.derive`: tables are compared digit by digit.
        tau = self.tau * (1 + 1e-9)
        plan, owner = self._plan(schedule, images), np.repeat(np.arange(len(images)), lengths)
        p_a, p_b = _bounds(rows, plan, owner, schedule.limits)
        p_a = np.maximum(np.maximum.reduceat(p_a, starts) - tau, 0.0)
        p_b = np.minimum.reduceat(p_b, starts) + tau
        p_b = np.minimum(np.where(plan.agree, np.minimum(p_b, 1 - p_a), p_b) + _ROUNDING, 1.0)
        predict, radius = self._answers(plan, p_a, p_b, slack, self.rule)
        last = rows[starts + lengths - 1]
        return Certificates(predict, radius, last, last.sum(axis=1), p_a, p_b, predict < 0)

    def _plan(self, schedule: Schedule, images: Sequence[ImageCounts]) -> _Plan:
        if unknown := [image.idx for image in images if image.idx not in self.answers]:
            raise UserError(f"there is no answer of the fallback at image {unknown[0]}")
        selection, rows = np.stack([i.counts["selection"] for i in images]), np.arange(len(images))
        fallback, margin = (np.array(column) for column in zip(*(self.answers[i.idx] for i in images), strict=True))
        leader, share = selection.argmax(axis=1), schedule.level(self.alpha)
        agree = leader == fallback
        bucket, count = confidence.partition(selection, np.full(len(rows), schedule.n), share, self.bound)
        bucket[rows, fallback] = -1
        # Where they differ, the leader is bounded from both sides.
        level = np.where(agree, confidence.share_of_alpha(share, count), share / (2 + count))
        return _Plan(leader, fallback, margin, agree, bucket, level)

    def _answers(
        self, plan: _Plan, p_a: np.ndarray, p_b: np.ndarray, slack: np.ndarray, rule: int
    ) -> tuple[Int[np.ndarray, " images"], Float[np.ndarray, " images"]]:
        """Classes and radii, from a lower bound of the leader and an upper bound of all rivals of the fallback."""
        scale = self.sigma, self.lipschitz, slack, rule
        votes = trusted_radius(p_a, np.minimum(1 - p_a + _ROUNDING, 1.0), *scale)
        silent = trusted_radius(np.maximum(1 - p_b - _ROUNDING, 0.0), p_b, *scale)
        silent = np.minimum(plan.margin, silent)
        radius = np.where(plan.agree | (votes <= 0), np.maximum(votes, silent), votes)
        predict = np.where(plan.agree | (votes > 0), plan.leader, plan.fallback)
        return np.where(radius > 0, predict, -1), radius

    def _optimistic_radius(
        self, schedule: Schedule, images: Sequence[ImageCounts], now: Certificates
    ) -> Float[np.ndarray, " images"]:
        plan, rows, share = self._plan(schedule, images), np.arange(len(images)), schedule.level(self.alpha)
        level, (lower, upper) = schedule.futility(now.n), schedule.limits
        slack, n, left = np.array([image.slack for image in images]), schedule.n, schedule.n - now.n
        leading, rivals = now.counts[rows, plan.leader], now.counts.copy()
        hoped = leading + np.ceil(left * confidence.trusted_upper(leading, now.n, level)).astype(np.int64)
        p_a = np.maximum(lower(np.minimum(hoped, leading + left), n, share) - self.tau, 0.0)
        rivals[rows, plan.fallback] = -1
        strongest = rivals.max(axis=1)
        feared = strongest + np.floor(left * confidence.trusted_lower(strongest, now.n, level)).astype(np.int64)
        p_b = np.clip(upper(feared, n, share) + self.tau, _ROUNDING, 1.0)
        return np.maximum(now.radius, self._answers(plan, np.maximum(p_a, now.p_a_lower), p_b, slack, self.rule)[1])


def _bounds(
    rows: np.ndarray, plan: _Plan, owner: np.ndarray, limits: confidence.Limits
) -> tuple[np.ndarray, np.ndarray]:
    """Lower bound of the leader and upper bound of the strongest rival of the fallback, per row of counts."""
    n, each, bucket = rows.sum(axis=1), plan.level[owner], plan.bucket[owner]
    p_a = limits[0](rows[np.arange(len(rows)), plan.leader[owner]], n, each)
    largest = np.zeros(len(rows))
    for number in range(bucket.max(initial=-1) + 1):
        some = np.flatnonzero((bucket == number).any(axis=1))
        samples = np.where(bucket[some] == number, rows[some], 0).sum(axis=1)
        largest[some] = np.maximum(largest[some], limits[1](samples, n[some], each[some]))
    return p_a, np.where(plan.agree[owner], np.minimum(1 - p_a, largest), largest)
