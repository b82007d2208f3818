"""Exact grid arithmetic: the noise has the right distribution on the grid, and adding it is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from scipy import stats

from lsrs_jax import smoothing
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing import discrete_gaussian
from lsrs_jax.smoothing.arithmetic import Float32Arithmetic, GridArithmetic, unrolled_threefry
from support import threefry

SIGMAS = [0.12, 0.25, 1 / 3, 0.999999, 1.0]


def gaussian_masses(sigma, cells):
    """The probabilities P[|round(δ/q)| = j] by quadrature, accurate to a few units in the last place."""
    h = discrete_gaussian.spacing(sigma) / sigma
    nodes, weights = np.polynomial.legendre.leggauss(6)
    x = h * (np.arange(cells)[:, None] + nodes / 2)
    masses = h * np.exp(-(x**2) / 2) @ (weights / 2) / np.sqrt(2 * np.pi)
    return masses * np.where(np.arange(cells) == 0, 1, 2)


def table_masses(sigma):
    """The probabilities of the alias table as exact integers; the denominator is 2**63."""
    high, low = (words.astype(np.int64) for words in discrete_gaussian.grid(sigma).table)
    alias, threshold = (
        high & (2**discrete_gaussian.COLUMN_BITS - 1),
        (high >> discrete_gaussian.COLUMN_BITS) << 32 | low,
    )
    own = alias == np.arange(len(alias))
    threshold = np.where(own, 2**discrete_gaussian.THRESHOLD_BITS, threshold)
    masses = threshold.astype(object)
    np.add.at(masses, alias, (2**discrete_gaussian.THRESHOLD_BITS - threshold).astype(object))
    return masses


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_table_has_the_distribution_of_a_rounded_gaussian(sigma):
    masses = table_masses(sigma)
    assert sum(masses) == 2**63
    probabilities = np.array([float(mass) for mass in masses]) / 2**63
    exact = gaussian_masses(sigma, len(probabilities))
    distance = np.abs(probabilities - exact).sum() / 2
    assert distance < discrete_gaussian.TAU + 1e-15  # 1e-15: the error of the quadrature
    # The comparison is sharp: it would detect a relative error of 1e-9 in σ.
    assert np.abs(probabilities - gaussian_masses(sigma * (1 + 1e-9), len(probabilities))).sum() / 2 > 1e-10


@pytest.mark.parametrize("sigma", [*SIGMAS, 1e-9, 77.0, 2.0**-40])
def test_the_spacing_is_a_power_of_two_and_fine_enough(sigma):
    q = discrete_gaussian.spacing(sigma)
    assert np.frexp(q)[0] == 0.5
    assert 2**14 <= sigma / q < 2**15
    assert 8 * sigma / q <= 2**discrete_gaussian.COLUMN_BITS
    assert discrete_gaussian.rounding_slack(3072, q) <= 0.0035 * sigma
    assert discrete_gaussian.rounding_slack(3072, q) >= np.sqrt(3072) * q


def draws(sigma, count, seed=0):
    arithmetic = GridArithmetic(sigma)
    return np.asarray(arithmetic.draw(threefry(seed), (count,), jnp.asarray(arithmetic.tables)))


def tail_duplicates(steps, cut):
    """The share of the draws beyond `cut` that repeat an earlier value."""
    tail = steps[np.abs(steps) > cut]
    assert len(tail) > 300
    return 1 - len(np.unique(tail)) / len(tail)


def test_draws_follow_the_distribution_and_a_wrong_one_is_rejected():
    sigma, count = 0.3, 2**22
    steps = draws(sigma, count)
    edges = np.concatenate(
        [[-np.inf], np.linspace(-4, 4, 161) * sigma / discrete_gaussian.spacing(sigma) + 0.5, [np.inf]]
    )
    edges[1:-1] = np.floor(edges[1:-1]) + 0.5  # edges lie between two cells
    found = np.histogram(steps, edges)[0]

    def p_value(assumed):
        cumulative = stats.norm.cdf(edges * discrete_gaussian.spacing(sigma) / assumed)
        return stats.chisquare(found, count * np.diff(cumulative)).pvalue

    assert p_value(sigma) > 1e-5
    assert p_value(sigma * 1.003) < 1e-6
    # The lowest bits are uniformly distributed, and independent of the sign.
    low = np.histogram2d(steps & 31, steps < 0, (32, 2))[0]
    assert stats.chisquare(low.sum(axis=1)).pvalue > 1e-5
    assert stats.chi2_contingency(low).pvalue > 1e-5


def test_the_tail_is_not_that_of_23_bit_uniforms():
    """Float32 normals take few different values in the tail; noise on the grid takes all of them."""
    sigma, count = 0.25, 2**23
    q = discrete_gaussian.spacing(sigma)
    coarse = np.rint(np.asarray(sigma * jax.random.normal(threefry(0), (count,), jnp.float32), np.float64) / q)
    cut = 3.9 * sigma / q
    assert tail_duplicates(draws(sigma, count), cut) < 0.1
    assert tail_duplicates(coarse, cut) > 0.3


def test_adding_is_exact_and_leaves_no_trace_of_the_latent():
    arithmetic, q = GridArithmetic(0.25), discrete_gaussian.spacing(0.25)
    rng = np.random.default_rng(0)
    latent = rng.integers(-(2**23), 2**23, 10_000).astype(np.int32)
    noise = rng.integers(-(2**18), 2**18, 10_000).astype(np.int32)
    sums = np.asarray(jax.jit(arithmetic.add)(latent, noise))
    assert sums.dtype == np.float32
    np.testing.assert_array_equal(sums.astype(np.float64) / q, latent.astype(np.int64) + noise)
    # Equal sums have equal bits, however they are split into latent and noise; there is no negative zero.
    moved = rng.integers(-(2**17), 2**17, 10_000).astype(np.int32)
    again = np.asarray(jax.jit(arithmetic.add)(latent + moved, noise - moved))
    np.testing.assert_array_equal(again.view(np.uint32), sums.view(np.uint32))
    assert not np.signbit(np.asarray(arithmetic.add(np.int32(-5), np.int32(5))))
    # Float32 arithmetic leaves a trace: the same real sum has other bits if it comes from another latent.
    z, shift, delta = rng.random(10_000), rng.random(10_000) / 8, 0.25 * rng.standard_normal(10_000)
    classic = [(a.astype(np.float32), b.astype(np.float32)) for a, b in ((z, delta), (z + shift, delta - shift))]
    first, second = (np.asarray(Float32Arithmetic(0.25).add(*parts)) for parts in classic)
    np.testing.assert_allclose(first, second, atol=1e-6)
    assert (first != second).mean() > 0.2


def test_sums_beyond_the_limit_are_clipped_not_rounded():
    arithmetic, q = GridArithmetic(0.25), discrete_gaussian.spacing(0.25)
    high = np.asarray(arithmetic.add(np.int32(2**24), np.int32(2**18)))
    assert high == 2**24 * q
    assert np.asarray(arithmetic.add(np.int32(-(2**24)), np.int32(-1))) == -(2**24) * q


def test_latents_go_to_the_nearest_step_and_too_large_ones_are_refused():
    arithmetic, q = GridArithmetic(0.25), discrete_gaussian.spacing(0.25)
    z = np.random.default_rng(0).standard_normal((20, 64))
    moved = np.linalg.norm(arithmetic.quantize(z) * q - z, axis=1)
    assert (moved <= arithmetic.slack(z) / 2).all()
    assert moved.max() > 0.4 * arithmetic.slack(z)[0] / 2  # the slack is not needlessly large
    with pytest.raises(UserError, match="beyond 128"):
        arithmetic.quantize(np.array([[129.0, 0.0]]))


@pytest.mark.parametrize("dimensions", [10, 3072])
def test_the_error_budget_is_small_beside_sigma(dimensions):
    arithmetic = GridArithmetic(0.25)
    assert arithmetic.tau(dimensions) < 1e-9
    assert arithmetic.slack(np.zeros((1, dimensions)))[0] < 0.0035 * 0.25


def test_the_error_budget_is_subtracted_from_the_radius():
    """Almost all samples agree. The radius follows from the counts, after τ and the slack √d·q are subtracted."""
    z = np.full((1, 50), 0.3)

    def head(z):
        return jnp.stack([jnp.sum(z, axis=1), jnp.zeros(z.shape[0])], axis=1)

    got = smoothing.certify(head, z, sigma=0.5, key=threefry(0), n=5000, slack=0.01, lipschitz=2.0)
    p = stats.beta.ppf(0.001, got.counts[0, 0], 5000 - got.counts[0, 0] + 1) - discrete_gaussian.total_variation(50)
    expected = (0.5 * stats.norm.ppf(p) - np.sqrt(50) * discrete_gaussian.spacing(0.5) - 0.01) / 2
    assert got.radius[0] <= expected
    assert got.radius[0] == pytest.approx(expected, rel=1e-6)


# Key and counter → block, from the known answers of Random123 (Salmon et al. 2011).
@pytest.mark.parametrize(
    ("key", "counter", "block"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 1), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_known_answers(key, counter, block):
    words = unrolled_threefry(jnp.asarray(key, jnp.uint32), *jnp.asarray(counter, jnp.uint32))
    assert tuple(int(word) for word in words) == block


def test_threefry_gives_the_numbers_of_jax():
    key, counters = jnp.asarray([3, 5], jnp.uint32), jnp.arange(2**16, dtype=jnp.uint32)
    found = jnp.concatenate(unrolled_threefry(key, *jnp.split(counters, 2)))
    np.testing.assert_array_equal(found, threefry_2x32(key, counters))
