"""How few samples any valid sampling plan can take near a threshold, at the certified accuracy of the staged schedule.

  python -m benchmarks.stopping [--alpha=0.001]

The plan has to decide whether the probability of an image lies above a threshold, and most samples go to images next to
it. There the counts are a Brownian motion W with a drift θ that is spread evenly over the images; time 1 stands for all
n samples. A plan looks at growing times, certifies (which may happen with probability α if θ = 0), gives up, or goes
on. It costs time, and loses every image with θ > 0 that it does not certify. The cheapest of all plans with the staged
schedule's loss follows by dynamic programming with Lagrange multipliers. All costs are beyond the first look, at 0.01.
"""

import argparse

import numpy as np
from scipy import special

from lsrs_jax import cli
from lsrs_jax.smoothing import anytime
from lsrs_jax.smoothing.schedule import make_schedule
from studies.accelerator import table

HORIZON = 2**24  # samples

Z = np.linspace(-8, 8, 641)  # W / √t at a look
STEP = Z[1] - Z[0]
WITHIN = special.ndtr(Z)  # P[θ > 0] given W


class Plans:
    """Sampling plans that look at times from 0.01 to 1, each `growth` times the one before (nearly)."""

    def __init__(self, growth):
        self.times = np.geomspace(0.01, 1, round(np.log(100) / np.log(growth)) + 1)
        ratio = self.times[1] / self.times[0]
        self.onward = _transitions(np.sqrt(ratio), np.sqrt(ratio - 1))  # if θ is spread evenly
        self.null = _transitions(1 / np.sqrt(ratio), np.sqrt(1 - 1 / ratio))  # if θ = 0

    def evaluate(self, certifies, gives_up):
        """(cost, loss, P[certified] if θ = 0) of a plan: two bool arrays over Z for each look."""
        images, null = np.full(len(Z), STEP / np.sqrt(self.times[0])), np.exp(-(Z**2) / 2) / np.sqrt(2 * np.pi) * STEP
        cost = loss = wrong = 0.0
        for i, (yes, no) in enumerate(zip(certifies, gives_up, strict=True)):
            last = i + 1 == len(self.times)
            wrong, on = wrong + null[yes].sum(), ~(yes | no | last)
            loss += (images * WITHIN)[~on & ~yes].sum()
            images, null = np.where(on, images, 0), np.where(on, null, 0)
            if not last:
                cost += (self.times[i + 1] - self.times[i]) * images.sum()
                images, null = images @ self.onward, null @ self.null
        return cost, loss, wrong

    def best(self, price, penalty, certifies=None):
        """The plan with the least cost + price · loss + penalty · P[certified] if θ = 0, by backward induction.

        With `certifies` only the rest of the plan is chosen.
        """
        plan, value = [], None
        for i in reversed(range(len(self.times))):
            yes = penalty * np.sqrt(self.times[i] / (2 * np.pi)) * np.exp(-(Z**2) / 2)
            yes = yes if certifies is None else np.where(certifies[i], 0.0, np.inf)
            on = np.inf if value is None else self.times[i + 1] - self.times[i] + self.onward @ value
            on = on if certifies is None else np.where(certifies[i], np.inf, on)
            no = price * WITHIN
            plan.append(((yes < no) & (yes <= on), ~((yes < no) & (yes <= on)) & (no <= on)))
            value = np.minimum(np.minimum(yes, no), on)
        return tuple(zip(*plan[::-1], strict=True))


def _transitions(factor, deviation):
    """Chances of Z at the next look, for every Z at this one."""
    edges = np.concatenate([[-np.inf], Z[:-1] + STEP / 2, [np.inf]])
    return np.diff(special.ndtr((edges - factor * Z[:, None]) / deviation), axis=1)


def _bisect(too_much, low, high, steps=18):
    """The least exponent at which `too_much` of its exponential is false."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if too_much(np.exp(middle)) else (low, middle)
    return np.exp(high)


def _gives_up(times, end, levels):
    """Where even an optimistic θ, the upper limit at the level, does not lead to `end` at time 1."""
    optimistic = (Z - special.ndtri(levels)[:, None]) / np.sqrt(times)[:, None]
    return Z * np.sqrt(times)[:, None] + (1 - times)[:, None] * optimistic < end


def staged(alpha):
    """The staged schedule: `Plans`, and its plan."""
    plans = Plans(1.3)
    end = -special.ndtri(alpha / len(plans.times))
    levels = np.full(len(plans.times), make_schedule("staged", 1, HORIZON, 1).futility(plans.times * HORIZON))
    return plans, ([end <= Z] * len(plans.times), _gives_up(plans.times, end, levels))


def betting(alpha, growth):
    """The anytime schedule with looks of this growth: `Plans`, and its plan."""
    plans = Plans(growth)
    certifies = []
    for time in plans.times:  # its bound for a probability next to ½, of which it is one of √n deviations
        n = round(time * HORIZON)
        k = np.clip(np.round(n / 2 + Z * np.sqrt(n) / 2), 0, n).astype(np.int64)
        certifies.append(anytime.lower(k, n, alpha, HORIZON) >= 0.5)
    end = Z[certifies[-1]].min()
    levels = make_schedule("anytime", 1, HORIZON, 1).futility(plans.times * HORIZON)
    return plans, (certifies, _gives_up(plans.times, end, levels))


def main(arguments):
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--alpha", type=float, default=0.001)
    alpha = parser.parse_args(arguments).alpha
    plans, plan = staged(alpha)
    cost, loss, wrong = plans.evaluate(*plan)
    rows = [("staged", cost, loss, wrong)]
    for growth in (1.3, 1.1, 1.05):
        plans = Plans(growth)

        def cheapest(price, plans=plans):
            penalty = _bisect(lambda penalty: plans.evaluate(*plans.best(price, penalty))[2] > alpha, 4, 10)
            return plans.evaluate(*plans.best(price, penalty))

        price = _bisect(lambda price, cheapest=cheapest: cheapest(price)[1] > loss, 0, 2, steps=12)
        rows.append((f"the best of all plans, looks growing by {growth}", *cheapest(price)))
    plans, plan = betting(alpha, 1.1)
    rows.append(("anytime", *plans.evaluate(*plan)))
    price = _bisect(lambda price: plans.evaluate(*plans.best(price, 0, plan[0]))[1] > loss, -3, 6)
    best = plans.evaluate(*plans.best(price, 0, plan[0]))
    rows.append(("anytime bounds, stopped by the best rule at the same loss", *best))
    cells = [[name, f"{own:.3f}", f"{cost / own:.2f}x", f"{lost:.3f}", f"{p:.5f}"] for name, own, lost, p in rows]
    print(table("plan|cost|fewer samples than staged|loss|P[certified] at the threshold", cells))


if __name__ == "__main__":
    cli.execute(main)
