"""`certified_radius` against exact arithmetic: no radius is above the one that the formula gives in real numbers."""

import math

import mpmath
import numpy as np
import pytest
from scipy import special

from lsrs_jax.smoothing import certified_radius
from lsrs_jax.smoothing.derivation import Derivation
from lsrs_jax.smoothing.schedule import make_schedule

REAL = mpmath.mp.clone()
REAL.prec = 160  # bits; the smallest differences of quantiles here are 2**-60 of the quantiles

# Two probabilities whose quantiles differ in the last digits only, at which an earlier version rounded up.
NEAR_TIE = (0.3167381665569643, 0.3167381665487772, 6.294477365911508, 0.3324276041168752)
BREAKPOINTS = (math.exp(-2), 1 - math.exp(-2), math.exp(-32), 0.5)  # where SciPy's quantile function changes formula


def quantile(p):
    """Φ⁻¹(p) to 35 digits or more: one step of Halley's method from the float64 value, whose error it cubes."""
    x = float(special.ndtri(p))
    if x == 0:
        return REAL.mpf(0)
    sign, tail = (1, REAL.mpf(p)) if x < 0 else (-1, 1 - REAL.mpf(p))
    start = REAL.mpf(sign * x)
    step = (REAL.erfc(-start / REAL.sqrt(2)) / 2 - tail) * REAL.sqrt(2 * REAL.pi) * REAL.exp(start * start / 2)
    return sign * (start - step / (1 + start * step / 2))


def exact_radius(p_a, p_b, sigma, lipschitz, slack):
    difference = quantile(p_a) - quantile(p_b)
    return (REAL.mpf(sigma) / 2 * difference - REAL.mpf(slack)) / REAL.mpf(lipschitz)


def probabilities(rng, number):
    """Floats in (0, 1) at which quantiles are hard: at 0, 1/2 and 1, denormals, and where the formula changes."""
    each = number // 8 + 1
    sign = rng.choice([-1, 1], each)
    near = rng.choice(BREAKPOINTS, each)
    found = [
        rng.uniform(0, 1, each),
        10 ** rng.uniform(-323, 0, each),
        1 - 10 ** rng.uniform(-16, -0.3, each),
        0.5 + sign * 10 ** rng.uniform(-16.5, -0.4, each),
        near + np.spacing(near) * rng.integers(-2000, 2000, each),
        near * (1 + sign * 10 ** rng.uniform(-14, -1, each)),
        rng.integers(1, 5000, each) * 5e-324,
        special.ndtr(rng.uniform(-38, 8.2, each)),
    ]
    found = rng.permutation(np.concatenate(found))[:number]
    return np.where((found > 0) & (found < 1), found, 0.3)


def pairs(rng, number):
    """Probabilities p_A > p_B: neighbouring floats, near ties, p_B = 1 − p_A, and unrelated ones."""
    p, other = probabilities(rng, number), probabilities(rng, number)
    steps = rng.choice([1, 1, 2, 3, 100, 10**4, 10**7, 10**10], number)
    below = np.maximum(p.view(np.int64) - steps, 1).view(np.float64)
    close, mirrored = p * (1 - 10 ** rng.uniform(-16, -1, number)), np.where(p > 2.0**-53, 1 - p, 0.3)
    q = np.choose(rng.integers(0, 4, number), [below, close, mirrored, other])
    p_a, p_b = np.maximum(p, q), np.minimum(p, q)
    some = (p_b < p_a) & (p_b > 0) & (p_a < 1)
    return p_a[some], p_b[some]


def cases(number, groups=20):
    """Arguments of `certified_radius`, with settings from the whole range that it accepts."""
    rng = np.random.default_rng(0)
    yield tuple(np.array([value]) for value in NEAR_TIE[:2]), NEAR_TIE[2:], np.zeros(1)
    for group in range(groups):
        p_a, p_b = pairs(rng, number // groups)
        sigma, lipschitz = (
            (0.5, 1.0) if group % 4 == 0 else (2.0 ** rng.uniform(-60, 60), 2.0 ** rng.uniform(-200, 200))
        )
        radius = sigma / 2 * np.maximum(special.ndtri(p_a) - special.ndtri(p_b), 0)
        left = np.choose(
            rng.integers(0, 4, len(p_a)),
            [
                1,
                10 ** rng.uniform(-16, 0, len(p_a)),
                1 - 10 ** rng.uniform(-320, 0, len(p_a)),
                rng.uniform(-0.2, 1, len(p_a)),
            ],
        )
        slack = radius * (1 - left)
        slack = np.where(rng.random(len(p_a)) < 0.1, 5e-324 * rng.integers(0, 3, len(p_a)), np.maximum(slack, 0))
        yield (p_a, p_b), (sigma, lipschitz), slack


def compared(number, function):
    """Pairs of a radius that `function` gives and the exact one, with the arguments of both."""
    for (p_a, p_b), (sigma, lipschitz), slack in cases(number):
        radii = function(p_a, p_b, sigma, lipschitz, slack)
        for a, b, s, radius in zip(p_a, p_b, slack, radii, strict=True):
            arguments = (float(a), float(b), float(sigma), float(lipschitz), float(s))
            yield float(radius), exact_radius(*arguments), arguments


def relative_margin_only(p_a, p_b, sigma, lipschitz, slack):
    """A wrong formula: it lowers the difference of the quantiles by 1e-12 of itself, even where they almost cancel."""
    difference = special.ndtri(p_a) - special.ndtri(p_b)
    return np.maximum(sigma / 2 * difference * (1 - 1e-12) - slack, 0) / lipschitz * (1 - 1e-12)


NUMBERS = [2_000, pytest.param(100_000, marks=pytest.mark.soak)]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_radius_is_never_above_the_exact_one_and_not_far_below(number):
    above, below, tried = [], [], 0
    for radius, exact, arguments in compared(number, certified_radius):
        p_a, p_b, sigma, lipschitz, slack = arguments
        tried += 1
        if radius > max(exact, 0):
            above.append((arguments, radius))
        size = REAL.mpf(sigma) / 2 * (abs(special.ndtri(p_a)) + abs(special.ndtri(p_b))) / lipschitz
        given = 2e-14 * size + 3e-12 * (exact + REAL.mpf(slack) / lipschitz)
        if radius < exact - given:
            below.append((arguments, radius))
    assert tried > 0.9 * number
    assert not above, f"{len(above)} of {tried} radii are above the exact ones, the first at {above[0]}"
    assert not below, f"{len(below)} of {tried} radii are far below the exact ones, the first at {below[0]}"


def test_a_margin_that_is_only_relative_is_caught():
    above = [arguments for radius, exact, arguments in compared(500, relative_margin_only) if radius > max(exact, 0)]
    assert len(above) > 20
    assert (*NEAR_TIE, 0.0) in above


@pytest.mark.parametrize("number", NUMBERS)
def test_the_quantile_function_of_the_platform_is_as_exact_as_the_margins_assume(number):
    """Near ties lose 1e-14 of both quantiles. SciPy's errors are about 1e-15, largest at exp(−2) and 1 − exp(−2)."""
    p = probabilities(np.random.default_rng(1), number)
    errors = np.array([float(abs(1 - special.ndtri(q) / quantile(q))) for q in p if q != 0.5])
    print(f"\nlargest relative error of the quantile function at {number} probabilities: {errors.max():.2g}")
    assert 0 < errors.max() < 5e-15
    assert special.ndtri(0.5) == 0


@pytest.mark.parametrize(
    "p", [5e-324, 1e-300, 1e-20, *BREAKPOINTS[:3], 0.3, 0.5 - 2**-54, 0.5 + 2**-53, 0.9, 1 - 2**-53]
)
def test_the_reference_is_the_inverse_of_the_distribution_function(p):
    x = quantile(p)
    with mpmath.workprec(400):
        assert abs(mpmath.ncdf(x) - p) < mpmath.npdf(x) * abs(x) * mpmath.mpf(10) ** -30


def test_the_largest_radius_of_a_schedule_is_not_above_the_exact_one():
    derivation, schedule = Derivation(0.5, 0.001), make_schedule("fixed", 100, 100_000, 16)
    p_a = REAL.root(REAL.mpf(0.001), 100_000)
    exact = REAL.mpf(0.5) * REAL.sqrt(2) * REAL.erfinv(2 * p_a - 1)
    assert exact * (1 - REAL.mpf(10) ** -4) < derivation.largest_radius(schedule) <= exact
