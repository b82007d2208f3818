"""Who gets how many votes: everybody the same, or each image until its answer is settled. NumPy only."""

import dataclasses

import numpy as np

from lsrs_jax.arguments import real
from lsrs_jax.errors import UserError
from lsrs_jax.smoothing import confidence
from lsrs_jax.smoothing.certificates import check_tau, from_counts
from lsrs_jax.smoothing.partition import check_bound
from lsrs_jax.smoothing.radius import certified_radius, check_lipschitz, check_sigma
from lsrs_jax.smoothing.tally import Plan

SCHEDULES = ("fixed", "staged")
_FIRST, _GROWTH = 1000, 1.3  # of the looks of a staged schedule
_FUTILITY = 0.01  # level of the optimistic limits; giving up early costs radius, never the guarantee


def plan(schedule, n0, n, samples):
    """The `Plan` of a schedule.

    Args:
      schedule: ``"fixed"`` (one look, at n votes) or ``"staged"`` (looks that grow by about 1.3 up to n).
      n0, n: selection votes; estimation votes at most.
      samples: votes per chunk.
    """
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        raise UserError(f"unknown schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
    fixed = Plan(n0, (n,), samples)
    if schedule == "fixed":
        return fixed
    looks, votes = [], float(_FIRST)
    while votes * _GROWTH**0.5 < n:
        look = -(-int(votes) // samples) * samples
        if look < n and look not in looks:
            looks.append(look)
        votes *= _GROWTH
    return Plan(n0, (*looks, n), samples)


@dataclasses.dataclass(frozen=True)
class Derivation:
    """How certificates follow from votes, and when an image needs no more of them.

    Attributes:
      sigma, lipschitz, tau: as in `certificates.from_counts`.
      alpha: failure probability per image, divided evenly over the looks of the plan.
      bound: ``"binary"`` or ``"multiclass"``.
      radii: the radii whose certification is wanted, in units of the certificate; beside them, whether the image is
        certified at all. None: the radius itself, to within `epsilon`.
      epsilon: in units of σ/L; read where `radii` is None.
    """

    sigma: float
    alpha: float
    bound: str = "binary"
    lipschitz: float = 1.0
    tau: float = 0.0
    radii: tuple[float, ...] | None = None
    epsilon: float = 0.05

    def __post_init__(self):
        check_sigma(self.sigma)
        confidence.check_alpha(self.alpha)
        check_bound(self.bound)
        check_lipschitz(self.lipschitz)
        check_tau(self.tau)
        wanted = () if self.radii is None else self.radii
        if not isinstance(wanted, tuple) or not all(0 <= real(radius) <= 1e300 for radius in wanted):
            raise UserError(f"radii must be finite numbers >= 0, got {self.radii!r}")
        if not 0 < real(self.epsilon) <= 2.0**200:
            raise UserError(f"epsilon must be a positive number (at most 1e60), got {self.epsilon!r}")

    def certificates(self, plan, tallies):
        """`Certificates` of tallies that have reached a look.

        **Guarantee**: that of `certificates.from_counts`, whatever rule decided at which look an image stopped.
        """
        staged = len(plan.looks) > 1
        return from_counts(
            np.stack([tally.counts["selection"] for tally in tallies]),
            [tally.looks for tally in tallies] if staged else np.stack([tally.looks[0] for tally in tallies]),
            sigma=self.sigma,
            alpha=self.alpha,
            bound=self.bound,
            looks=plan.looks if staged else None,
            lipschitz=self.lipschitz,
            slack=np.array([tally.slack for tally in tallies]),
            tau=self.tau,
        )

    def settled(self, plan, tallies):
        """Whether more votes could still decide anything that is wanted: bool per tally, all of them at a look.

        An optimistic future is imagined: all votes to come go to the candidate at the upper limit of its probability
        (level .01). Where even the radius after the last look would then decide nothing more, the image is settled.
        Stopping early can shrink a radius, never falsify one, so this judgement needs no share of α.
        """
        done = np.array([len(tally.looks) == len(plan.looks) for tally in tallies])
        rest = np.flatnonzero(~done)
        if len(rest):
            some = [tallies[i] for i in rest]
            now = self.certificates(plan, some)
            best = self._optimistic_radius(plan, some, now)
            if self.radii is None:
                spared = float(self.epsilon) * float(self.sigma) / float(self.lipschitz)
                done[rest] = best <= now.radius + spared
            else:
                # A radius of 0 counts as certified only if any is: hence the smallest positive number.
                wanted = np.unique(np.maximum([0.0, *self.radii], np.nextafter(0, 1)))
                following = np.searchsorted(wanted, now.radius, side="right")
                done[rest] = best < np.append(wanted, np.inf)[following]
        return done

    def _optimistic_radius(self, plan, tallies, now):
        """The radius after the last look if the rest goes well; never below that of `now`."""
        rows, candidate = np.arange(len(tallies)), _selection(tallies).argmax(axis=1)
        left, share = plan.n - now.n, float(self.alpha) / len(plan.looks)
        votes = now.counts[rows, candidate]
        hoped = votes + np.ceil(left * confidence.upper(votes, now.n, _FUTILITY)).astype(np.int64)
        hoped = np.minimum(hoped, votes + left)
        p_a = np.maximum(now.p_a_lower, confidence.lower(hoped, plan.n, share) - self.tau)
        p_b = 1 - p_a
        if self.bound == "multiclass":
            rivals = now.counts.copy()
            rivals[rows, candidate] = -1
            strongest = rivals.max(axis=1)
            feared = strongest + np.floor(left * confidence.lower(strongest, now.n, _FUTILITY)).astype(np.int64)
            p_b = np.minimum(p_b, confidence.upper(feared, plan.n, share) + self.tau)
        slack = np.array([tally.slack for tally in tallies])
        p_b = np.clip(p_b, 1e-15, 1.0)
        return np.maximum(now.radius, certified_radius(p_a, p_b, self.sigma, self.lipschitz, slack))

    def largest_radius(self, plan, slack=0.0):
        """The radius of a unanimous vote of the whole plan."""
        p_a = np.maximum(confidence.lower(plan.n, plan.n, float(self.alpha) / len(plan.looks)) - self.tau, 0.0)
        return float(certified_radius(p_a, 1 - p_a, self.sigma, self.lipschitz, slack))


def _selection(tallies):
    return np.stack([tally.counts["selection"] for tally in tallies])
