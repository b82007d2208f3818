"""Confidence bounds and radii: values, edge cases, and simulations that reject only the wrong procedures."""

import subprocess
import sys
import types

import numpy as np
import pytest
from scipy import special, stats

from lsrs_jax.certification.table import read_table
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing import anytime, certified_radius, confidence, derivation, from_counts
from lsrs_jax.smoothing.arithmetic import Float32Arithmetic
from lsrs_jax.smoothing.confidence import BOUNDS
from lsrs_jax.smoothing.derivation import Derivation
from lsrs_jax.smoothing.schedule import Schedule


@pytest.mark.parametrize("n", [1, 2, 7, 100, 1000, 100_000])
@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
def test_clopper_pearson_is_scipys_binomtest(n, alpha):
    ks = sorted({0, 1, n // 3, n // 2, n - 1, n})
    lower, upper = confidence.lower(np.array(ks), n, alpha), confidence.upper(np.array(ks), n, alpha)
    for k, low, high in zip(ks, lower, upper, strict=True):
        exact = stats.binomtest(k, n).proportion_ci(confidence_level=1 - 2 * alpha, method="exact")
        assert low == pytest.approx(exact.low, rel=1e-9, abs=1e-12)
        assert high == pytest.approx(exact.high, rel=1e-9, abs=2e-10)
    assert lower[0] == 0
    assert upper[-1] == 1


def test_bounds_err_on_the_safe_side():
    k, n, alpha = np.arange(1, 2000), 2000, 0.001
    low, high = confidence.lower(k, n, alpha), confidence.upper(k[:-1], n, alpha)
    assert (stats.binom.sf(k - 1, n, low) <= alpha * (1 + 1e-13)).all()
    assert (stats.binom.cdf(k[:-1], n, high) <= alpha * (1 + 1e-13)).all()


@pytest.mark.parametrize(("n", "alpha"), [(73_363, 0.001 / 9), (144_681, 0.001), (146_900, 1e-4), (9_056, 0.001 / 4)])
def test_bounds_do_not_follow_an_inverse_that_is_wrong(n, alpha):
    """SciPy's inverse beta function has large errors at these n, which a search over all n found."""
    ends = np.array([998, 999, 1000, 1001])
    k = np.concatenate([ends, n - ends[::-1]])
    low, high = confidence.lower(k, n, alpha), confidence.upper(k, n, alpha)
    assert (low <= k / n).all()
    assert (high >= k / n).all()
    assert (np.diff(low) > 0).all()
    assert (np.diff(high) > 0).all()
    for value, bound, tail in ((k, low, stats.binom.sf), (k, high, stats.binom.cdf)):
        found = tail(value - 1 if tail == stats.binom.sf else value, n, bound)
        assert (found <= alpha * (1 + 1e-13)).all()
        assert (found >= alpha * (1 - 1e-3)).all()  # and the bounds are tight


@pytest.mark.parametrize("alpha", [1e-6, 1e-10, 1e-16, 1e-30, 1e-90])
def test_bounds_hold_for_tiny_levels(alpha):
    k = np.array([0, 1, 50, 99])
    assert (stats.binom.logcdf(k, 100, confidence.upper(k, 100, alpha)) <= np.log(alpha) + 1e-9).all()
    assert (stats.binom.logsf(k, 100, confidence.lower(k + 1, 100, alpha)) <= np.log(alpha) + 1e-9).all()
    assert (confidence.upper(k, 100, alpha)[:3] < 1).all()


def test_where_no_upper_bound_can_be_found_it_is_1():
    assert confidence.upper(2, 5, 1e-108) == 1


@pytest.mark.parametrize(("n", "sigmas"), [(1_000, 2.463), (10_000, 3.199), (100_000, 3.811)])
def test_radius_when_all_samples_agree(n, sigmas):
    p = confidence.lower(n, n, 0.001)
    assert p == pytest.approx(0.001 ** (1 / n), rel=1e-9)
    radius = certified_radius(p, 1 - p, sigma=0.5)
    assert radius / 0.5 == pytest.approx(sigmas, abs=6e-4)


@pytest.mark.parametrize(
    ("k", "n", "alpha", "why"),
    [
        (5, 4, 0.1, "0 <= k <= n"),
        (-1, 4, 0.1, "0 <= k <= n"),
        (0, 0, 0.1, "n must lie between 1 and"),
        (1, 4, 0.0, "alpha"),
        (1, 4, 1.0, "alpha"),
        (1, 4, float("nan"), "alpha"),
        (1.0, 4, 0.1, "integers"),
        (float("nan"), 4, 0.1, "integers"),
        (1, 4.0, 0.1, "integers"),
    ],
)
def test_bad_counts_are_refused(k, n, alpha, why):
    for bound in (confidence.lower, confidence.upper):
        with pytest.raises(UserError, match=why):
            bound(k, n, alpha)


def test_radius_formula_with_lipschitz_constant_and_slack():
    p_a, p_b = 0.9, 0.05
    expected = 0.25 / 2 * (special.ndtri(p_a) - special.ndtri(p_b))
    radius = float(certified_radius(p_a, p_b, 0.25))
    assert radius <= expected
    assert radius == pytest.approx(expected, rel=1e-11)
    assert certified_radius(p_a, p_b, 0.25, lipschitz=4.0) == pytest.approx(expected / 4, rel=1e-11)
    assert certified_radius(p_a, p_b, 0.25, lipschitz=2.0, slack=0.1) == pytest.approx((expected - 0.1) / 2, rel=1e-11)
    assert certified_radius(0.5, 0.5, 1.0) == 0
    assert certified_radius(0.3, 0.7, 1.0) == 0
    assert certified_radius(0.5001, 0.4999, 1.0, slack=0.01) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"p_a_lower": np.nan},
        {"p_b_upper": np.nan},
        {"p_a_lower": 1.0},
        {"p_b_upper": 0.0},
        {"p_a_lower": -0.1},
        {"sigma": 0.0},
        {"sigma": -1.0},
        {"sigma": np.nan},
        {"sigma": np.inf},
        {"sigma": 1e-40},
        {"lipschitz": 0.0},
        {"lipschitz": np.nan},
        {"slack": -1e-3},
        {"slack": np.nan},
    ],
)
def test_bad_arguments_never_become_a_radius(arguments):
    with pytest.raises(UserError):
        certified_radius(**({"p_a_lower": 0.9, "p_b_upper": 0.1, "sigma": 0.5} | arguments))


def test_float32_rounding_stays_within_its_slack():
    z = np.random.default_rng(0).standard_normal((20, 3072)) * np.logspace(-3, 3, 20)[:, None]
    moved = np.linalg.norm(z.astype(np.float32).astype(np.float64) - z, axis=1)
    assert (moved > 0).all()
    assert (2 * moved <= Float32Arithmetic(0.25).slack(z)).all()


@pytest.mark.parametrize("sigma", [0.1, 0.25, 0.7, 1 / 3])
def test_no_more_sigma_is_claimed_than_float32_samples(sigma):
    claimed = Float32Arithmetic(sigma).sigma
    assert claimed <= min(sigma, np.float64(np.float32(sigma)))
    assert claimed == pytest.approx(sigma, rel=1e-7)


def test_statistics_work_without_jax():
    """The statistics can be audited, and reports can be written, on a machine without JAX."""
    modules = ["smoothing.confidence", "smoothing.derivation", "smoothing.counts"]
    modules += ["certification.ledger", "certification.table"]
    imports = "; ".join(f"import lsrs_jax.{name}" for name in modules)
    code = f"import sys; {imports}; import lsrs_jax.report; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_certificates_from_counts():
    selection = np.array([[9, 1, 0], [0, 5, 5], [2, 2, 2]])
    estimation = np.array([[990, 10, 0], [100, 450, 450], [1000, 0, 0]])
    got = from_counts(selection, estimation, sigma=0.5, alpha=0.001, lipschitz=2.0, slack=np.array([0.0, 0.0, 0.01]))
    np.testing.assert_array_equal(got.predict, [0, -1, 0])
    np.testing.assert_array_equal(got.abstain, [False, True, False])
    np.testing.assert_array_equal(got.n, [1000] * 3)
    p = confidence.lower(990, 1000, 0.001)
    assert got.radius[0] == pytest.approx(0.5 * special.ndtri(p) / 2, rel=1e-8)
    assert got.radius[1] == 0
    assert got.radius[2] == pytest.approx((0.5 * special.ndtri(0.001**0.001) - 0.01) / 2, rel=1e-8)


def test_the_candidate_comes_from_the_selection_samples_only():
    selection, estimation = np.array([[6, 4]]), np.array([[1, 999]])
    assert from_counts(selection, estimation, sigma=1.0, alpha=0.001).predict[0] == -1


@pytest.mark.parametrize(
    ("selection", "estimation", "why"),
    [
        ([[1.0, 2.0]], [[1, 2]], "integers"),
        ([[1, 2]], [[0, 0]], "at least one"),
        ([[1, 2]], [[-1, 5]], "negative"),
        ([[1, 2]], [[1, 2, 3]], "differ in shape"),
        ([[1]], [[1]], "classes"),
        ([1, 2], [1, 2], "shape"),
    ],
)
def test_bad_arrays_of_counts_are_refused(selection, estimation, why):
    with pytest.raises(UserError, match=why):
        from_counts(np.array(selection), np.array(estimation), sigma=1.0, alpha=0.001)


# ---------------------------------------------------------------------------------------------------------- coverage


def fresh(rng, p, n0, n, trials, alpha):
    """The procedure of this project: selection and estimation have separate noise."""
    return from_counts(rng.multinomial(n0, p, trials), rng.multinomial(n, p, trials), sigma=1.0, alpha=alpha).p_a_lower


def reused_key(rng, p, n0, n, trials, alpha):
    """A wrong procedure: selection and estimation use the same samples, as if both came from one key."""
    counts = rng.multinomial(n, p, trials)
    return from_counts(counts, counts, sigma=1.0, alpha=alpha).p_a_lower


def unsplit_alpha(rng, p, n0, n, trials, alpha):
    """A wrong procedure: the best bound of five looks at growing counts, each at the full alpha."""
    selection = rng.multinomial(n0, p, trials)
    looks = np.cumsum(rng.multinomial(n // 5, p, (5, trials)), axis=0)
    return np.max([from_counts(selection, look, sigma=1.0, alpha=alpha).p_a_lower for look in looks], axis=0)


def split_alpha(rng, p, n0, n, trials, alpha):
    """The best bound of five looks, each at a fifth of alpha."""
    return unsplit_alpha(rng, p, n0, n, trials, alpha / 5)


def failures(procedure, p, *, trials, alpha=0.05, n0=20, n=1000, seed=0):
    """How often the lower bound exceeds the true probability, which is the same for every class."""
    return int((procedure(np.random.default_rng(seed), p, n0, n, trials, alpha) > p[0]).sum())


def exceeds(count, trials, alpha):
    """Whether this many failures reject, at level 1e-6, that the failure rate is at most alpha."""
    return stats.binom.sf(count - 1, trials, alpha) < 1e-6


EVEN = {2: [0.5, 0.5], 10: [0.1] * 10}


@pytest.mark.parametrize("classes", EVEN)
@pytest.mark.parametrize("trials", [4000, pytest.param(100_000, marks=pytest.mark.soak)])
def test_coverage_holds_and_wrong_procedures_are_caught(classes, trials):
    p = EVEN[classes]
    found = {f.__name__: failures(f, p, trials=trials) for f in (fresh, split_alpha, reused_key, unsplit_alpha)}
    print(
        f"\n{classes} even classes, alpha .05, {trials} trials: "
        + ", ".join(f"{k} {v / trials:.4f}" for k, v in found.items())
    )
    assert not exceeds(found["fresh"], trials, 0.05)
    assert not exceeds(found["split_alpha"], trials, 0.05)
    assert exceeds(found["reused_key"], trials, 0.05)
    assert exceeds(found["unsplit_alpha"], trials, 0.05)
    # Clopper-Pearson is conservative, but its failure rate is at least half of alpha.
    assert not stats.binom.cdf(found["fresh"], trials, 0.025) < 1e-6


def test_a_thousand_classes_are_bounded_where_none_has_half_of_the_samples():
    """The leader has 0.45, two rivals 0.25, 997 classes share 0.3. The binary bound abstains, the buckets certify."""
    trials, alpha, rng = 1500, 0.05, np.random.default_rng(0)
    p = np.r_[0.45, 0.15, 0.1, np.full(997, 0.3 / 997)]
    true = (stats.norm.ppf(p[0]) - stats.norm.ppf(p[1])) / 2
    counts = rng.multinomial(100, p, trials), rng.multinomial(10_000, p, trials)
    binary, multiclass = (from_counts(*counts, sigma=1.0, alpha=alpha, bound=bound) for bound in BOUNDS)
    assert (binary.predict == -1).all()
    assert (multiclass.predict == 0).all()
    assert not exceeds(int((multiclass.radius > true).sum()), trials, alpha)
    # The 997 classes are divided over several buckets; in a single bucket they would leave 0.37 of the radius.
    assert np.median(multiclass.radius) > 0.6 * true
    # With the frequency of the strongest rival instead of a bound, the radius would be larger than the true one.
    claimed = (stats.norm.ppf(multiclass.p_a_lower) - stats.norm.ppf(counts[1][:, 1] / 10_000)) / 2
    assert exceeds(int((claimed > true).sum()), trials, alpha)


# ------------------------------------------------------------------------------------------------------ published logs


def off_the_grid(path, sigma, alpha):
    """The number of published radii (three significant digits) that none of the 100,001 possible counts explains."""
    table = read_table(path)
    p = confidence.lower(np.arange(50_001, 100_001), 100_000, alpha)
    grid = certified_radius(p, 1 - p + 1e-15, sigma)
    published = table.radius[table.predict >= 0]
    assert len(published) > 300
    above = np.clip(np.searchsorted(grid, published), 1, len(grid) - 1)
    distance = np.minimum(np.abs(grid[above] - published), np.abs(grid[above - 1] - published))
    rounding = 0.5005 * 10.0 ** (np.floor(np.log10(np.maximum(published, 1e-9))) - 2)
    return int((distance > rounding).sum())


@pytest.mark.parametrize(
    "name", ["cifar10/noise_0.25", "cifar10/noise_0.50", "cifar10/noise_1.00", "imagenet/noise_0.50"]
)
def test_published_radii_lie_on_our_grid(reference, name):
    sigma = float(name.rsplit("_", 1)[1])
    path = reference / "consistency" / f"{name}.tsv"
    assert off_the_grid(path, sigma, 0.001) == 0
    assert off_the_grid(path, sigma, 0.002) > 0


def test_another_published_log_lies_on_the_grid_of_another_alpha(reference):
    """Cohen's CIFAR-10 log at sigma .25 was made at alpha = .01, not at the .001 of the paper's text."""
    path = reference / "cohen_certify" / "cifar10" / "resnet110" / "noise_0.25" / "test" / "sigma_0.25"
    assert off_the_grid(path, 0.25, 0.01) == 0
    assert off_the_grid(path, 0.25, 0.001) > 0


@pytest.mark.parametrize(("seed", "image"), [(6, 17), (38, 19)])
def test_the_buckets_of_an_image_do_not_depend_on_the_other_images(seed, image):
    """For these two images, sums of the shares in another order led to other buckets."""
    rng = np.random.default_rng(seed)
    selection = rng.multinomial(1000, rng.dirichlet(np.full(100, 0.3), 20))[[image, 0]]
    together, alone = (
        confidence.partition(rows, np.full(len(rows), 10_000), 1e-3, "multiclass")[0][0]
        for rows in (selection, selection[:1])
    )
    np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize("limits", [confidence.CLOPPER_PEARSON, anytime.limits(5000)], ids=["exact", "anytime"])
def test_the_bound_of_a_rival_is_that_of_its_largest_bucket(limits):
    """Bucket after bucket and row after row gives the digits of all at once."""
    rng = np.random.default_rng(3)
    shares = rng.dirichlet(np.full(30, 0.2), 12)
    selection, counts = (np.stack([rng.multinomial(n, row) for row in shares]) for n in (100, 5000))
    bucket, count = confidence.partition(selection, np.full(12, 5000), 1e-3, "multiclass")
    assert len(np.unique(count)) > 3
    p_a, p_b = confidence.bounds(counts, bucket, count, 1e-3, limits)
    for row in range(12):
        each = 1e-3 / (1 + count[row]) if count[row] > 1 else 1e-3
        sums = np.bincount(bucket[row], counts[row]).astype(np.int64)
        assert p_a[row] == limits[0](sums[:1], 5000, each)[0]
        rivals = [limits[1](sums[k : k + 1], 5000, each)[0] for k in range(1, count[row] + 1)] if count[row] > 1 else []
        assert p_b[row] == min(1 - p_a[row], max(rivals, default=1.0))


def test_buckets_follow_from_the_sums_of_all_classes():
    """The classes without a sample add nothing: with them or without, the strongest rivals have the same buckets."""
    rng = np.random.default_rng(4)
    selection = np.stack([rng.multinomial(100, row) for row in rng.dirichlet(np.full(40, 0.1), 20)])
    shares = -np.sort(-selection, axis=1) / 100
    n = np.full(20, 10_000)
    for singles, groups in ((1, 2), (3, 4), (16, 1)):
        option = confidence._dealt(40, singles, groups)
        found = confidence._promise(shares, option, n, 1e-3)
        for row in range(20):
            sums = [sum(shares[row, option == bucket].tolist()) for bucket in range(1, option.max() + 1)]
            each = 1e-3 / (1 + option.max())
            p_a = confidence.lower(int(np.floor(shares[row, 0] * 10_000)), 10_000, each)
            p_b = min(1 - p_a, confidence.upper(int(np.floor(max(sums) * 10_000)), 10_000, each))
            assert found[row] == special.ndtri(p_a) - special.ndtri(p_b)


@pytest.mark.parametrize("bound", ["binary", "multiclass"])
def test_certificates_derived_in_blocks_have_the_same_digits(bound, monkeypatch):
    """Blocks bound the memory: 50,000 images of 1,000 classes at 13 looks would take 37 GB at once."""
    rng, looks = np.random.default_rng(0), (100, 200, 400)
    steps = [rng.multinomial(100, rng.dirichlet(np.full(12, 0.3)), size=3) for _ in range(9)]
    cumulative = [np.cumsum(part * [[1], [1], [2]], axis=0)[: 1 + i % 3] for i, part in enumerate(steps)]
    selection = np.stack([part[0] for part in steps])
    arguments = {"sigma": 0.5, "alpha": 0.01, "bound": bound, "looks": looks, "slack": rng.random(9) / 100}
    whole = derivation.from_counts(selection, cumulative, **arguments)
    plan, settings = Schedule(100, looks, 10), Derivation(0.5, 0.01, bound)
    images = [
        types.SimpleNamespace(
            looks=rows,
            counts={"selection": own, "estimation": rows[-1]},
            slack=slack,
            classes=len(own),
            reached=len(rows),
        )
        for own, rows, slack in zip(selection, cumulative, arguments["slack"], strict=True)
    ]
    decided = settings.decided(plan, images)
    monkeypatch.setattr(derivation, "_ENTRIES", 2 * 12 * 3)  # two images at once
    sizes, own = [], confidence.partition
    monkeypatch.setattr(confidence, "partition", lambda *given: sizes.append(len(given[0])) or own(*given))
    for blocks in (
        derivation.from_counts(selection, cumulative, **arguments),
        settings.certificates(plan, images),
    ):
        for name in ("predict", "radius", "counts", "n", "p_a_lower", "p_b_upper", "abstain"):
            np.testing.assert_array_equal(getattr(blocks, name), getattr(whole, name))
    np.testing.assert_array_equal(settings.decided(plan, images), decided)
    assert max(sizes) == 2
