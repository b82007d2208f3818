"""Bounds by betting: the wealth is a martingale, coverage at every number of samples, and what stops too early."""

import numpy as np
import pytest
from scipy import stats

from lsrs_jax import SmoothedClassifier
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing import anytime, confidence, from_counts
from lsrs_jax.smoothing.derivation import Derivation
from lsrs_jax.smoothing.schedule import make_schedule
from support import threefry
from support.heads import DIM, network

HORIZON, ALPHA = 100, 0.05
TRIALS = [2000, pytest.param(100_000, marks=pytest.mark.soak)]


def exceeds(wrong, trials, alpha):
    """Whether so many errors contradict a probability of at most alpha."""
    return stats.binom.sf(wrong - 1, trials, alpha) < 1e-6


def bets(alpha, horizon):
    """Stake and turn of each bet, from the text of docs/format.md."""
    goal = np.log(1 / (anytime_share() * alpha))
    horizons = [horizon / 2**j for j in range(16)]
    stakes = [m**0.5 for m in horizons]
    turns = [min(np.sqrt((goal + 3) / (2 * m)), np.pi / 2) for m in horizons]
    return [(stake / sum(stakes), turn) for stake, turn in zip(stakes, turns, strict=True)]


def anytime_share():
    return 0.75  # of α; the bound at the horizon has the rest


def wealth(p, samples, alpha, horizon):
    """The wealth after samples, one bet and one sample after the other."""
    total = 0.0
    for stake, turn in bets(alpha, horizon):
        q = np.sin(min(np.arcsin(np.sqrt(p)) + turn, np.pi / 2)) ** 2
        for success in samples:
            stake *= q / p if success else (1 - q) / (1 - p)
        total += stake
    return total


@pytest.mark.parametrize(
    ("k", "n", "alpha"), [(1, 1, 0.05), (70, 70, 0.05), (66, 70, 0.05), (40, 60, 1e-5), (3, 90, 0.3)]
)
def test_the_bound_is_where_the_wealth_of_all_bets_reaches_its_goal(k, n, alpha):
    samples = np.random.default_rng(0).permutation(n) < k
    bound, goal = anytime.lower(k, n, alpha, HORIZON), 1 / (anytime_share() * alpha)
    assert wealth(bound, samples, alpha, HORIZON) >= goal
    assert wealth(bound * (1 + 1e-8), samples, alpha, HORIZON) < goal


def test_the_wealth_is_a_fair_game_that_starts_at_one():
    rng, need = np.random.default_rng(1), np.array([5.0])

    def value(p, k, n):
        return np.exp(anytime._log_wealth(np.arcsin(np.sqrt([p])), np.array([k]), np.array([n]), need, 1000))[0]

    for p in rng.uniform(0.05, 0.999, 50):
        n = int(rng.integers(0, 300))
        k = int(rng.binomial(n, p))
        assert value(p, 0, 0) == pytest.approx(1, rel=1e-12)
        after = p * value(p, k + 1, n + 1) + (1 - p) * value(p, k, n + 1)
        assert after == pytest.approx(value(p, k, n), rel=1e-9)


def chance_of_an_error(p, bounds):
    """P[bounds[n - 1][k] > p after some number n of samples], exactly, from the chances of all counts before."""
    alive, failed = np.array([1.0]), 0.0
    for bound in bounds:
        alive = np.append(alive * (1 - p), 0) + np.append(0, alive * p)
        failed += alive[bound > p].sum()
        alive = np.where(bound > p, 0, alive)
    return failed


def test_the_chance_of_an_error_at_any_number_of_samples_is_at_most_alpha_and_a_wrong_bound_is_caught():
    sizes = range(1, HORIZON + 1)
    n, k = np.repeat(sizes, [size + 1 for size in sizes]), np.concatenate([np.arange(size + 1) for size in sizes])
    ends = np.cumsum([size + 1 for size in sizes])[:-1]
    everywhere = np.split(anytime.lower(k, n, ALPHA, HORIZON), ends)
    for p in (0.02, 0.3, 0.5, 0.8, 0.95, 0.99, 0.9999):
        assert chance_of_an_error(p, everywhere) <= ALPHA
    assert chance_of_an_error(0.8, np.split(confidence.lower(k, n, ALPHA), ends)) > 2 * ALPHA


@pytest.mark.parametrize("trials", TRIALS)
@pytest.mark.parametrize("p", [0.5, 0.9, 0.995])
def test_coverage_of_anytime_bounds_under_an_adversary_who_stops_where_he_likes(p, trials):
    n = np.unique(np.geomspace(1, 20_000, 60).astype(int))
    rng, wrong = np.random.default_rng(2), {"anytime": 0, "fixed": 0}
    limits = {"anytime": anytime.limits(20_000), "fixed": confidence.CLOPPER_PEARSON}
    for start in range(0, trials, 5000):
        size = (min(5000, trials - start), 1)
        k = np.cumsum(rng.binomial(np.diff(n, prepend=0), p, (size[0], len(n))), axis=1)
        for name, (lower, upper) in limits.items():
            wrong[name] += (lower(k, n, ALPHA / 2) > p).any(axis=1).sum() + (upper(k, n, ALPHA / 2) < p).any(
                axis=1
            ).sum()
    print(f"\nboth sides, p={p}, alpha {ALPHA}, {trials} trials, worst of {len(n)} numbers of samples: {wrong}")
    assert not exceeds(wrong["anytime"], trials, ALPHA)
    assert exceeds(wrong["fixed"], trials, ALPHA)


@pytest.mark.parametrize("horizon", [1, 7, 1000, 2**27])
@pytest.mark.parametrize("alpha", [1e-100, 0.001, 0.5])
def test_bounds_of_extreme_counts_are_sound_and_ordered(horizon, alpha):
    k = np.unique(np.array([0, 1, horizon // 2, horizon - 1, horizon]).clip(0))
    low, high = (limit(k, horizon, alpha) for limit in anytime.limits(horizon))
    assert low[0] == 0
    assert high[-1] == 1
    assert (np.diff(low) >= 0).all()
    assert (np.diff(high) >= 0).all()
    assert (low <= k / horizon).all()
    assert (high >= k / horizon).all()
    if alpha > 1e-50:  # below, the other bound is not the best one either
        assert (low <= confidence.lower(k, horizon, alpha)).all()  # a part of alpha pays for other numbers of samples
        assert (low[1:] > 0).all()


def test_bounds_do_not_depend_on_their_neighbours():
    k, n = np.arange(0, 1001, 50), 1000
    together = anytime.lower(k, n, ALPHA, 5000)
    np.testing.assert_array_equal(together, [anytime.lower(int(each), n, ALPHA, 5000) for each in k])


# ------------------------------------------------------------------------------------------------ certificates


N, RADII = 2000, (0.1, 0.2, 0.4)
LATENTS = np.random.default_rng(5).random((12, *DIM))


@pytest.fixture(scope="module")
def classifier():
    return SmoothedClassifier(network(), sigma=0.5, tile=(4, 16))


def certify(classifier, **changes):
    return classifier.certify(LATENTS, **({"key": threefry(0), "n": N, "schedule": "anytime"} | changes))


@pytest.mark.parametrize("bound", confidence.BOUNDS)
def test_certificates_follow_from_the_counts_at_the_last_look(classifier, bound):
    found = certify(classifier, radii=RADII, bound=bound)
    assert set(found.n) <= set(make_schedule("anytime", 100, N, 16).looks)
    assert len(set(found.n)) > 2
    assert found.n.mean() < 0.7 * N
    assert (found.radius > 0.1).any()
    samples = [found.samples.images[i] for i in range(len(LATENTS))]
    selection = np.stack([image.counts["selection"] for image in samples])
    charges = {"slack": np.array([image.slack for image in samples]), "tau": classifier.sampler(DIM).tau}
    again = from_counts(selection, found.counts, sigma=0.5, alpha=0.001, bound=bound, horizon=N, **charges)
    np.testing.assert_array_equal(again.radius, found.radius)
    # An image has the first samples of the fixed schedule.
    look = int(np.sort(found.n)[len(LATENTS) // 3])
    chosen, fixed = found.n == look, certify(classifier, n=look, schedule="fixed")
    np.testing.assert_array_equal(found.counts[chosen], fixed.counts[chosen])


def test_counts_are_continued_to_another_precision(classifier):
    rough, whole = certify(classifier, radii=(0.1,)), certify(classifier, radii=RADII)
    fine = certify(classifier, radii=RADII, counts=rough.samples)
    np.testing.assert_array_equal(fine.counts, whole.counts)
    assert (fine.n >= rough.n).all()
    assert (fine.n > rough.n).any()
    with pytest.raises(UserError, match="schedule"):
        certify(classifier, schedule="staged", counts=rough.samples)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"horizon": 99}, "at least the 100 samples"),
        ({"horizon": 2**27 + 1}, "horizon must be"),
        ({"horizon": 1e3}, "horizon must be"),
        ({"horizon": 200, "looks": (100,)}, "not both"),
    ],
)
def test_a_senseless_horizon_is_refused(change, why):
    with pytest.raises(UserError, match=why):
        from_counts(np.array([[9, 1]]), np.array([[90, 10]]), sigma=0.5, alpha=0.01, **change)


def test_looks_are_many_and_share_no_alpha():
    schedule = make_schedule("anytime", 100, 100_000, 16)
    assert (schedule.looks[0], schedule.looks[-1]) == (112, 100_000)
    assert 70 < len(schedule.looks) < 80
    assert schedule.level(0.001) == 0.001
    kinds = [make_schedule(kind, 100, 100_000, 16) for kind in ("staged", "anytime", "fixed")]
    largest = [Derivation(0.5, 0.001).largest_radius(kind) for kind in kinds]
    assert largest[0] < largest[1] < largest[2]
