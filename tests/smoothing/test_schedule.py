"""How many samples an image gets: looks, stopping, bounds at looks; simulations that reject wrong procedures."""

import numpy as np
import pytest
from scipy import special, stats

from lsrs_jax.certification.table import read_table
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing import certified_radius, confidence, from_counts
from lsrs_jax.smoothing.confidence import partition
from lsrs_jax.smoothing.counts import Counts, Row
from lsrs_jax.smoothing.derivation import Derivation
from lsrs_jax.smoothing.schedule import Schedule, make_schedule

GRID = tuple(np.arange(0.25, 4.25, 0.25))


# --------------------------------------------------------------------------------------------------------------- looks


@pytest.mark.parametrize(("n", "samples"), [(100_000, 16), (10_000, 16), (100_000, 4096), (1000, 16), (7, 16)])
def test_looks_grow_by_whole_sample_blocks_to_n(n, samples):
    looks = make_schedule("staged", 100, n, samples).looks
    assert looks[-1] == n
    assert (np.diff(looks) > 0).all()
    assert all(look % samples == 0 for look in looks[:-1])
    if samples == 16 and n > 10_000:
        ratios = np.divide(looks[1:], looks[:-1])
        assert 1.1 < ratios.min() <= ratios.max() < 1.6
    assert make_schedule("fixed", 100, n, samples).looks == (n,)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("fixed", 0, 100, 16), "n0 must be a whole number"),
        (("staged", 100, 0, 16), "n must be a whole number"),
        (("staged", 100, 10.0, 16), "n must be a whole number"),
        (("stagged", 100, 100, 16), "unknown schedule"),
    ],
)
def test_bad_schedules_are_refused(arguments, why):
    with pytest.raises(UserError, match=why):
        make_schedule(*arguments)


@pytest.mark.parametrize("looks", [(), (32, 16), (16, 16), (17, 32)])
def test_looks_out_of_order_are_refused(looks):
    with pytest.raises(UserError, match="looks must grow"):
        Schedule(10, looks, 16)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"radii": (-1.0,)}, "radii"),
        ({"radii": (float("nan"),)}, "radii"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"bound": "ternary"}, "unknown bound"),
        ({"alpha": 1.5}, "alpha"),
        ({"sigma": 0.0}, "sigma"),
        ({"lipschitz": np.nan}, "Lipschitz"),
    ],
)
def test_bad_derivations_are_refused(fields, why):
    with pytest.raises(UserError, match=why):
        Derivation(**({"sigma": 0.5, "alpha": 0.001} | fields))


# -------------------------------------------------------------------------------------------------------- certificates

LOOKS = (100, 200, 400)


def test_staged_bounds_are_the_best_of_the_looks_at_their_share_of_alpha():
    selection = np.array([[9, 1], [9, 1], [9, 1]])
    reached = [np.array([[99, 1]]), np.array([[100, 0], [170, 30]]), np.array([[60, 40], [130, 70], [320, 80]])]
    got = from_counts(selection, reached, sigma=0.5, alpha=0.03, looks=LOOKS)
    np.testing.assert_array_equal(got.n, [100, 200, 400])
    np.testing.assert_array_equal(got.counts, [[99, 1], [170, 30], [320, 80]])
    share = 0.01
    expected = [stats.beta.ppf(share, 99, 2), share ** (1 / 100), stats.beta.ppf(share, 320, 81)]
    np.testing.assert_allclose(got.p_a_lower, expected, rtol=1e-9)
    np.testing.assert_allclose(got.radius, 0.5 * special.ndtri(expected), rtol=1e-7)
    # They are below the fixed-n bounds at the full alpha.
    assert (got.p_a_lower[:2] < [stats.beta.ppf(0.03, 99, 2), 0.03 ** (1 / 100)]).all()


@pytest.mark.parametrize(
    ("reached", "why"),
    [
        ([np.array([[100, 1]])], "cumulative counts"),
        ([np.array([[90, 10], [80, 120]])], "cumulative counts"),
        ([np.array([[90, 10], [190, 10], [390, 10], [400, 0]])], "cumulative counts"),
        ([np.zeros((0, 2), int)], "shape"),
        ([np.array([[99.0, 1.0]])], "integers"),
        ([], "same classes"),
        ([[[1, 2], [3]]], "one array of integers"),
    ],
)
def test_counts_that_are_not_those_of_the_looks_are_refused(reached, why):
    with pytest.raises(UserError, match=why):
        from_counts(np.array([[9, 1]]), reached, sigma=0.5, alpha=0.01, looks=LOOKS)


@pytest.mark.parametrize("tau", [-0.1, 1.0, np.nan, "a"])
def test_a_senseless_tau_is_refused(tau):
    with pytest.raises(UserError, match="tau"):
        from_counts(np.array([[9, 1]]), np.array([[99, 1]]), sigma=0.5, alpha=0.01, tau=tau)


def test_looks_that_do_not_grow_and_slack_of_another_length_are_refused():
    arguments = {"sigma": 0.5, "alpha": 0.01}
    with pytest.raises(UserError, match="looks that grow"):
        from_counts(np.array([[9, 1]]), [np.array([[9, 1], [9, 1]])], looks=(10, 10), **arguments)
    with pytest.raises(UserError, match="slack must be"):
        from_counts(np.array([[9, 1]]), np.array([[9, 1]]), slack=np.zeros(2), **arguments)


@pytest.mark.parametrize("alpha", [1e-3, 1e-12])
def test_a_schedule_that_can_certify_nothing_has_the_radius_zero(alpha):
    assert Derivation(0.5, alpha, tau=1e-9).largest_radius(make_schedule("fixed", 100, 1, 16)) == 0


def test_tau_lowers_p_a_and_raises_p_b():
    arguments = {"sigma": 1.0, "alpha": 0.01, "bound": "multiclass"}
    selection, estimation = np.array([[50, 30, 20]]), np.array([[5000, 3000, 2000]])
    without, with_tau = (from_counts(selection, estimation, **arguments, tau=tau) for tau in (0.0, 0.01))
    assert with_tau.p_a_lower[0] <= without.p_a_lower[0] - 0.01
    assert with_tau.p_b_upper[0] >= without.p_b_upper[0] + 0.01


# ------------------------------------------------------------------------------------------------------------- buckets


def test_buckets_cover_all_rivals_and_the_candidate_is_alone():
    rng = np.random.default_rng(0)
    for classes in (2, 3, 10, 50):
        selection = rng.multinomial(100, rng.dirichlet(np.full(classes, 0.3)), 200)
        for bound in ("binary", "multiclass"):
            bucket, count = partition(selection, np.full(200, 10_000), 0.001, bound)
            candidate = selection.argmax(axis=1)
            assert ((bucket == 0).sum(axis=1) == 1).all()
            assert (bucket[np.arange(200), candidate] == 0).all()
            for found, number in zip(bucket, count, strict=True):
                assert set(found) == set(range(number + 1))
            if bound == "binary" or classes == 2:
                assert (count == 1).all()


def test_one_dominant_class_gets_the_binary_bound_and_a_close_race_several_buckets():
    selection = np.array([[100, 0, 0, 0], [40, 30, 28, 2]])
    count = partition(selection, np.full(2, 100_000), 0.001, "multiclass")[1]
    assert count[0] == 1
    assert count[1] >= 2


def test_multiclass_beats_binary_where_no_class_has_half_of_the_samples():
    selection, estimation = np.array([[42, 30, 28]]), np.array([[42_000, 30_000, 28_000]])
    binary, several = (
        from_counts(selection, estimation, sigma=1.0, alpha=0.001, bound=bound) for bound in ("binary", "multiclass")
    )
    assert binary.abstain[0]
    assert several.predict[0] == 0
    exact = (special.ndtri(0.42) - special.ndtri(0.30)) / 2
    assert 0.8 * exact < several.radius[0] < exact


def test_multiclass_bounds_are_those_of_the_buckets():
    selection, estimation = np.array([[45, 30, 20, 5]]), np.array([[4500, 3000, 2000, 500]])
    bucket, count = partition(selection, np.array([10_000]), 0.01, "multiclass")
    got = from_counts(selection, estimation, sigma=1.0, alpha=0.01, bound="multiclass")
    each = 0.01 / (1 + count[0])
    samples = [estimation[0][bucket[0] == b].sum() for b in range(1, count[0] + 1)]
    p_a = stats.beta.ppf(each, 4500, 5501)
    p_b = min(1 - p_a, max(stats.beta.ppf(1 - each, k + 1, 10_000 - k) for k in samples))
    assert got.p_a_lower[0] == pytest.approx(p_a, rel=1e-9)
    assert got.p_b_upper[0] == pytest.approx(p_b, rel=1e-8)


# ---------------------------------------------------------------------------------------------------------- simulation


def exceeds(count, trials, alpha):
    """Whether this many failures reject, at level 1e-6, that the failure rate is at most alpha."""
    return stats.binom.sf(count - 1, trials, alpha) < 1e-6


def cumulative_counts(rng, p, looks, trials):
    """Cumulative counts at every look, ``(trials, looks, K)``."""
    steps = np.diff([0, *looks])
    return np.cumsum(np.stack([rng.multinomial(step, p, trials) for step in steps], axis=1), axis=1)


def true_radius(p, candidate):
    """The true radius of the smoothed classifier at sigma 1; 0 where the candidate is not the likeliest class."""
    p = np.asarray(p)
    others = np.where(np.eye(len(p), dtype=bool), -1, p[None, :]).max(axis=1)
    return np.maximum((special.ndtri(p) - special.ndtri(others)) / 2, 0)[candidate]


def simulate(p, looks, trials, alpha, bound, stop, seed=0, n0=50):
    """How often a certificate claims more than the true radius.

    `stop` maps the radii at all looks and the true radii to the index of the look at which each trial stops.
    """
    rng = np.random.default_rng(seed)
    selection, samples = rng.multinomial(n0, p, trials), cumulative_counts(rng, p, looks, trials)
    truth = true_radius(p, selection.argmax(axis=1))
    certificates = [
        from_counts(
            selection,
            [counts[: k + 1] for counts in samples],
            sigma=1.0,
            alpha=alpha,
            bound=bound,
            looks=looks,
        )
        for k in range(len(looks))
    ]
    radii = np.stack([c.radius for c in certificates])
    chosen = radii[stop(radii, truth), np.arange(trials)]
    return int((chosen > truth + 1e-12).sum())


def adversary(radii, truth):
    """Knows the true radius and stops at the first look that claims more; without one, at the last look."""
    wrong = radii > truth + 1e-12
    return np.where(wrong.any(axis=0), wrong.argmax(axis=0), len(radii) - 1)


def naive(p, looks, trials, alpha, seed=0, n0=50):
    """A wrong procedure: fixed-n Clopper-Pearson bounds at the full alpha, at a look that depends on the data."""
    rng = np.random.default_rng(seed)
    selection, samples = rng.multinomial(n0, p, trials), cumulative_counts(rng, p, looks, trials)
    truth = true_radius(p, selection.argmax(axis=1))
    radii = np.stack([from_counts(selection, samples[:, k], sigma=1.0, alpha=alpha).radius for k in range(len(looks))])
    return int((radii[adversary(radii, truth), np.arange(trials)] > truth + 1e-12).sum())


def runner_up_only(p, n, trials, alpha, seed=0, n0=50):
    """A wrong procedure: bounds only the rival with the most selection samples, and no other class."""
    rng = np.random.default_rng(seed)
    selection, samples = rng.multinomial(n0, p, trials), rng.multinomial(n, p, trials)
    order = np.argsort(-selection, axis=1, kind="stable")
    rows = np.arange(trials)
    p_a = confidence.lower(samples[rows, order[:, 0]], n, alpha / 2)
    p_b = confidence.upper(samples[rows, order[:, 1]], n, alpha / 2)
    radius = certified_radius(p_a, np.clip(p_b, 1e-15, 1), 1.0)
    return int((radius > true_radius(p, order[:, 0]) + 1e-12).sum())


LENGTHS = [3000, pytest.param(100_000, marks=pytest.mark.soak)]
SIM_LOOKS = (200, 260, 340, 440, 570, 740, 960, 1250, 1600, 2000)


@pytest.mark.parametrize("trials", LENGTHS)
@pytest.mark.parametrize("p", [(0.5, 0.5), (0.9, 0.1), (0.40, 0.28, 0.32), (0.34, 0.33, 0.33)], ids=str)
@pytest.mark.parametrize("bound", ["binary", "multiclass"])
def test_coverage_of_the_staged_schedule_under_an_adversary(p, bound, trials):
    failures = simulate(p, SIM_LOOKS, trials, 0.05, bound, adversary)
    print(f"\nstaged, {bound}, p={p}, alpha .05, {trials} trials, adversarial stopping: {failures / trials:.4f}")
    assert not exceeds(failures, trials, 0.05)


@pytest.mark.parametrize("trials", LENGTHS)
def test_fixed_bounds_on_counts_that_stopped_early_are_caught(trials):
    failures = naive((0.9, 0.1), SIM_LOOKS, trials, 0.05)
    print(f"\nfixed-n bounds after stopping early, alpha .05, {trials} trials: {failures / trials:.4f}")
    assert exceeds(failures, trials, 0.05)


@pytest.mark.parametrize("trials", LENGTHS)
def test_multiclass_is_sound_in_a_close_race_and_bounding_the_runner_up_is_caught(trials):
    p = (0.40, 0.28, 0.32)
    sound = simulate(p, (2000,), trials, 0.05, "multiclass", adversary)
    wrong = runner_up_only(p, 2000, trials, 0.05)
    print(f"\nmulticlass p={p}, alpha .05, {trials} trials: {sound / trials:.4f}, runner-up alone {wrong / trials:.4f}")
    assert not exceeds(sound, trials, 0.05)
    assert exceeds(wrong, trials, 0.05)


# One leading class, two rivals (the selection may choose the weaker one), and many classes that share the rest.
MANY = {10: (0.3, 0.16, 0.22, *[0.32 / 7] * 7), 50: (0.3, 0.14, 0.2, *[0.36 / 47] * 47)}


@pytest.mark.parametrize("trials", LENGTHS)
@pytest.mark.parametrize("classes", [10, pytest.param(50, marks=pytest.mark.soak)])
def test_coverage_with_many_classes_and_the_runner_up_alone_is_caught(classes, trials):
    sound = simulate(MANY[classes], SIM_LOOKS, trials, 0.05, "multiclass", adversary)
    wrong = runner_up_only(MANY[classes], 2000, trials, 0.05)
    print(
        f"\nstaged multiclass, {classes} classes, alpha .05, {trials} trials, adversarial stopping: "
        f"{sound / trials:.5f}, runner-up alone {wrong / trials:.4f}"
    )
    assert not exceeds(sound, trials, 0.05)
    assert exceeds(wrong, trials, 0.05)


# ------------------------------------------------------------------------------------------------------------ stopping


def image_with(schedule, hits, selection=(100, 0)):
    """An image of two classes; `hits` are the cumulative counts of the candidate at its looks."""
    counts, samples = Counts(schedule, 2), schedule.samples
    ends = schedule.stops["estimation"]
    rows = [Row(0, 0, 0.0, "selection", 0, schedule.stops["selection"][0], np.array(selection), 0.0)]
    before, total = 0, np.zeros(2, int)
    for stop, look, k in zip(ends, schedule.looks, hits, strict=False):
        found = np.array([k, look - k])
        rows.append(Row(0, 0, 0.0, "estimation", before, stop, found - total, 0.0))
        before, total = stop, found
    counts.append(rows)
    assert samples * before >= schedule.looks[len(hits) - 1]
    return counts.images[0]


STAGED = make_schedule("staged", 100, 100_000, 16)


def decided(hits, **fields):
    return bool(Derivation(0.25, 0.001, **fields).decided(STAGED, [image_with(STAGED, hits)])[0])


def test_an_image_stops_when_its_radii_are_decided_and_not_before():
    first = STAGED.looks[0]
    assert decided([first // 3], radii=(0.25,))  # no majority, so nothing can be certified
    assert not decided([first], radii=(0.25, 0.9))  # all samples agree, and .9 can still be reached
    assert decided([first], radii=(0.25, 0.5))  # all samples agree, and both radii are certified
    assert decided([first], radii=(0.25, 0.5, 5.0))  # 5 cannot be reached
    assert not decided([int(0.85 * first)], radii=(0.25,))  # close to the threshold of .25
    assert decided([int(0.7 * first)], radii=(0.25,))  # certified, but .25 cannot be reached


def test_without_radii_an_image_stops_when_more_samples_would_add_little():
    looks = STAGED.looks
    assert not decided([looks[0]], epsilon=0.05)
    share = [int(0.8 * look) for look in looks]
    assert not decided(share[:2], epsilon=0.02)
    assert decided(share[:12], epsilon=0.05)
    assert decided(share, epsilon=1e-9)  # the image has all n samples


def test_decided_never_asks_for_more_than_the_schedule_has():
    rng = np.random.default_rng(0)
    counts = [image_with(STAGED, np.cumsum(rng.binomial(np.diff([0, *STAGED.looks]), p))) for p in (0.5, 0.9, 0.99)]
    assert Derivation(0.25, 0.001, radii=GRID).decided(STAGED, counts).all()


def published(path, sigma):
    """The probabilities that a published log implies, and which rows are correct."""
    table = read_table(path)
    k = np.arange(50_000, 100_001)
    p = confidence.lower(k, 100_000, 0.001)
    radii = certified_radius(p, 1 - p + 1e-15, sigma)
    found = k[np.clip(np.searchsorted(radii, table.radius), 0, len(k) - 1)] / 100_000
    abstained = np.random.default_rng(0).uniform(0.3, 0.5, len(table))
    return np.where(table.predict >= 0, found, abstained), table.correct


def staged_on(p, derivation, seed):
    """Certificates of simulated images with these probabilities; samples are drawn look by look, as in the engine."""
    rng = np.random.default_rng(seed)
    counts, pending, before, first = Counts(STAGED, 2), np.arange(len(p)), 0, 0
    end = STAGED.stops["selection"][0]
    counts.append([Row(int(i), 0, 0.0, "selection", 0, end, np.array([100, 0]), 0.0) for i in pending])
    for look, stop in zip(STAGED.looks, STAGED.stops["estimation"], strict=True):
        k = rng.binomial(look - before, p[pending])
        counts.append(
            [
                Row(int(i), 0, 0.0, "estimation", first, stop, np.array([hits, look - before - hits]), 0.0)
                for i, hits in zip(pending, k, strict=True)
            ]
        )
        before, first = look, stop
        pending = pending[~derivation.decided(STAGED, [counts.images[int(i)] for i in pending])]
        if not len(pending):
            break
    return derivation.certificates(STAGED, [counts.images[i] for i in range(len(p))])


@pytest.mark.parametrize(
    ("sigma", "radii", "factor"),
    [(0.25, GRID, 7), (0.5, GRID, 4), (0.25, (0.25, 0.5, 0.75, 1.0), 11), (0.5, (0.25, 0.5, 0.75, 1.0), 11)],
)
def test_staged_saves_samples_on_published_classifiers_and_loses_little(reference, sigma, radii, factor):
    name = f"noise_{sigma:.2f}/test/sigma_{sigma:.2f}"
    p, correct = published(reference / "cohen_certify" / "cifar10" / "resnet110" / name, sigma)
    radii = tuple(radius for radius in radii if radius < 4 * sigma + 1e-9)
    derivation, losses, samples = Derivation(sigma, 0.001, radii=radii), [], []
    top = 0.85 * Derivation(sigma, 0.001).largest_radius(make_schedule("fixed", 100, 100_000, 16))
    for seed in range(5):
        staged = staged_on(p, derivation, seed)
        k = np.random.default_rng(1000 + seed).binomial(100_000, p)
        fixed = from_counts(
            np.tile([100, 0], (len(p), 1)), np.stack([k, 100_000 - k], axis=1), sigma=sigma, alpha=0.001
        )
        certified = [[np.mean(correct & (c.radius >= max(r, 1e-9))) for r in (0, *radii)] for c in (fixed, staged)]
        losses.append(np.subtract(*certified))
        samples.append(staged.n.mean())
    below = np.array([0, *radii]) < top
    print(
        f"\nsigma {sigma}: {1e5 / np.mean(samples):.1f}x fewer samples, "
        f"loss {100 * np.mean(losses, axis=0)[below].max():.2f}"
    )
    assert 1e5 / np.mean(samples) >= factor
    assert np.mean(losses, axis=0)[below].max() <= 0.005
