"""How often certificates are wrong: on simulated counts, and on heads whose smoothed probabilities are known exactly.

A certificate is wrong if its radius is larger than the one that follows from the true probabilities of the classes, or
if its class is not the likeliest.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from lsrs_jax import smoothing
from lsrs_jax.smoothing import certified_radius, confidence, from_counts
from lsrs_jax.smoothing.confidence import BOUNDS
from lsrs_jax.smoothing.counts import Counts, Row
from lsrs_jax.smoothing.derivation import Derivation
from lsrs_jax.smoothing.schedule import SCHEDULES, Schedule
from support import threefry

UNDERSTATED = 1 / 1.05  # a Lipschitz constant that is 5 % too small, where the true one is 1


def exceeds(wrong, trials, alpha, level=1e-6):
    """Whether this many wrong certificates reject, at this level, that at most a share `alpha` of them is wrong."""
    return stats.binom.sf(wrong - 1, trials, alpha) < level


def strongest_rival(p):
    """For every class, the largest probability of another class."""
    return np.where(np.eye(len(p), dtype=bool), -1, p).max(axis=1)


def wrong_ones(predict, radius, p, sigma=1.0):
    """Which certificates of images whose classes all have the probabilities `p` are wrong."""
    p = np.asarray(p)
    true = np.maximum(sigma / 2 * (special.ndtri(p) - special.ndtri(strongest_rival(p))), 0)
    return (predict >= 0) & (radius > true[predict] * (1 + 1e-9))


# --------------------------------------------------------------------------------------------------- simulated counts


N0, N = 50, 2000
LOOKS = (208, 352, 592, 1008, N)
BOUNDARY = 0.5  # staged sampling decides whether this radius is certified
LEADER = special.ndtr(BOUNDARY) - 1e-6  # the true radius is just below it
PROBABILITIES = {
    "even": (0.5, 0.5),
    "boundary": (LEADER, 1 - LEADER),
    "sure": (0.99, 0.01),
    "three close": (0.40, 0.28, 0.32),
    "ten": (0.3, 0.16, 0.22, *[0.32 / 7] * 7),
}


def draw(rng, p, trials):
    return rng.multinomial(N0, p, trials), rng.multinomial(N, p, trials)


def fixed(rng, p, trials, bound, alpha, lipschitz=1.0):
    """The fixed schedule of this project."""
    found = from_counts(*draw(rng, p, trials), sigma=1.0, alpha=alpha, bound=bound, lipschitz=lipschitz)
    return found.predict, found.radius


def sample(rng, p, trials, derivation, anytime=False):
    """Samples images until they are decided, look by look, as the engine does: ``(schedule, images)``."""
    schedule = Schedule(N0, LOOKS, 16, anytime)
    counts, pending, first, before = Counts(schedule, len(p)), np.arange(trials), 0, 0
    end = schedule.stops["selection"][0]
    rows = rng.multinomial(N0, p, trials)
    counts.append(Row(i, 0, 0.0, "selection", 0, end, row, 0.0) for i, row in enumerate(rows))
    for look, stop in zip(LOOKS, schedule.stops["estimation"], strict=True):
        rows = rng.multinomial(look - before, p, len(pending))
        drawn = zip(pending.tolist(), rows, strict=True)
        counts.append(Row(i, 0, 0.0, "estimation", first, stop, row, 0.0) for i, row in drawn)
        first, before = stop, look
        pending = pending[~derivation.decided(schedule, [counts.images[i] for i in pending.tolist()])]
        if not len(pending):
            break
    return schedule, [counts.images[i] for i in range(trials)]


def staged(rng, p, trials, bound, alpha, **fields):
    """The staged schedule of this project, which stops by its own rule."""
    derivation = Derivation(1.0, alpha, bound, **fields)
    found = derivation.certificates(*sample(rng, p, trials, derivation))
    return found.predict, found.radius


def staged_for_a_radius(rng, p, trials, bound, alpha):
    """The staged schedule of this project where one radius is to be decided."""
    return staged(rng, p, trials, bound, alpha, radii=(BOUNDARY,))


def anytime_for_a_radius(rng, p, trials, bound, alpha):
    """The anytime schedule of this project where one radius is to be decided."""
    derivation = Derivation(1.0, alpha, bound, radii=(BOUNDARY,))
    found = derivation.certificates(*sample(rng, p, trials, derivation, anytime=True))
    return found.predict, found.radius


def selection_again(rng, p, trials, bound, alpha):
    """A wrong procedure: the samples that chose the class also certify it."""
    counts = draw(rng, p, trials)[1]
    found = from_counts(counts, counts, sigma=1.0, alpha=alpha, bound=bound)
    return found.predict, found.radius


def runner_up_only(rng, p, trials, _, alpha):
    """A wrong procedure: of all rivals it bounds only the one with the most selection samples."""
    selection, estimation = draw(rng, p, trials)
    rows, order = np.arange(trials), np.argsort(-selection, axis=1, kind="stable")
    p_a = confidence.lower(estimation[rows, order[:, 0]], N, alpha / 2)
    p_b = confidence.upper(estimation[rows, order[:, 1]], N, alpha / 2)
    return order[:, 0], certified_radius(p_a, p_b, 1.0)


def whole_alpha_at_the_end(rng, p, trials, bound, alpha):
    """A wrong procedure: it stops at looks, and certifies the counts there as if their number had been fixed."""
    derivation = Derivation(1.0, alpha * len(LOOKS), bound, radii=(BOUNDARY,))  # at each look the whole of alpha
    images = sample(rng, p, trials, derivation)[1]
    counts = (np.stack([image.counts[stream] for image in images]) for stream in ("selection", "estimation"))
    found = from_counts(*counts, sigma=1.0, alpha=alpha, bound=bound)
    return found.predict, found.radius


fixed_understated = functools.partial(fixed, lipschitz=UNDERSTATED)
staged_understated = functools.partial(staged, lipschitz=UNDERSTATED)


def simulate(procedure, name, bound, alpha, trials):
    """The number of wrong certificates of a procedure, which runs on pieces of the images to save memory."""
    rng, wrong = np.random.default_rng(0), 0
    for start in range(0, trials, 10_000):
        found = procedure(rng, PROBABILITIES[name], min(10_000, trials - start), bound, alpha)
        wrong += int(wrong_ones(*found, PROBABILITIES[name]).sum())
    title = getattr(procedure, "__name__", "understated")
    print(f"\n{title}, {name}, {bound}, alpha {alpha}: {wrong} of {trials} certificates are wrong")
    return wrong


LENGTHS = [(2000, 0.05), *(pytest.param(100_000, alpha, marks=pytest.mark.soak) for alpha in (0.05, 0.001))]


@pytest.mark.parametrize(("trials", "alpha"), LENGTHS)
@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("even", "binary"),
        *(("boundary", bound) for bound in BOUNDS),
        ("sure", "binary"),
        ("three close", "multiclass"),
        pytest.param("ten", "multiclass", marks=pytest.mark.soak),
    ],
)
@pytest.mark.parametrize("procedure", [fixed, staged, staged_for_a_radius, anytime_for_a_radius])
def test_no_more_than_alpha_of_simulated_certificates_are_wrong(procedure, name, bound, trials, alpha):
    assert not exceeds(simulate(procedure, name, bound, alpha, trials), trials, alpha)


@pytest.mark.parametrize(("trials", "alpha"), LENGTHS)
@pytest.mark.parametrize(
    ("procedure", "name", "bound"),
    [
        (selection_again, "even", "binary"),
        (runner_up_only, "three close", "multiclass"),
        (whole_alpha_at_the_end, "boundary", "binary"),
        (fixed_understated, "sure", "binary"),
        (staged_understated, "boundary", "binary"),
    ],
    ids=["selection again", "runner-up only", "whole alpha at the end", "fixed understated", "staged understated"],
)
def test_wrong_procedures_are_caught(procedure, name, bound, trials, alpha):
    assert exceeds(simulate(procedure, name, bound, alpha, trials), trials, alpha)


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_share_of_wrong_certificates_comes_near_alpha(bound):
    """So a procedure that claimed a little more would exceed it: the simulation can see small errors."""
    assert stats.binom.cdf(simulate(fixed, "boundary", bound, 0.05, 10_000), 10_000, 0.035) > 1e-6


# ------------------------------------------------------------------------------- linear heads, from latents to radii


SIGMA, LIPSCHITZ, ALPHA = 0.5, 2.0, 0.05  # with this alpha, wrong certificates are common enough to be counted
PLACES = 32  # latents of one call; each has coordinates of its own, so that shared noise is independent noise, too
W = np.array([1.2, -0.7])
MANY = (*[0.175 / 580] * 580, 0.1, 0.45, 0.15, *[0.125 / 417] * 417)
HEADS = {  # the probabilities of the classes, in the order in which their regions lie along W
    "near one half": (0.52, 0.48),
    "sure": (0.9, 0.1),
    "majority of three": (0.25, 0.55, 0.2),
    "three close": (0.28, 0.40, 0.32),
    "a thousand": MANY,
}


def linear_head(p):
    """A head whose classes have the probabilities `p` at every one of `latents()`, and the noise of SIGMA.

    The first PLACES coordinates say which two of the others the logits are linear in. The logits are lines over W · z
    whose maximum changes from class k to k + 1 where the normal distribution of W · z reaches p₀ + … + p_k.
    """
    leader = int(np.argmax(p))
    slopes = np.arange(len(p)) - leader  # the rounding of a line is small where its slope is, around the leader
    ends = special.ndtri(np.cumsum(p)[:-1]) * SIGMA * np.linalg.norm(W)
    offsets = -np.concatenate([[0.0], np.cumsum(ends)])
    slopes, offsets = (jnp.asarray(values, jnp.float32) for values in (slopes, offsets - offsets[leader]))

    def head(z):
        place = jnp.argmax(z[:, :PLACES], axis=1)
        own = z[:, PLACES:].reshape(-1, PLACES, len(W))[jnp.arange(len(z)), place]
        along = own[:, 0] * np.float32(W[0]) + own[:, 1] * np.float32(W[1])
        return along[:, None] * slopes + offsets

    return head


def latents():
    """Latents in their places, a hundred times SIGMA apart; W · z is 0 at all of them."""
    across = np.random.default_rng(0).uniform(-1, 1, PLACES)[:, None] * np.array([W[1], -W[0]])
    others = np.random.default_rng(1).uniform(-1, 1, (PLACES, PLACES, len(W)))
    others[np.arange(PLACES), np.arange(PLACES)] = across
    return np.concatenate([100 * SIGMA * np.eye(PLACES), others.reshape(PLACES, -1)], axis=1)


@pytest.fixture(scope="module")
def classifier():
    """Makes a `SmoothedClassifier` of a linear head, once for equal settings: compiling takes most of the time."""

    @functools.cache
    def make(name, arithmetic, noise, lipschitz=LIPSCHITZ):
        settings = {"sigma": SIGMA, "lipschitz": lipschitz, "arithmetic": arithmetic, "noise": noise, "tile": (32, 16)}
        return smoothing.SmoothedClassifier(linear_head(HEADS[name]), **settings, devices=jax.local_devices()[:1])

    return make


def certify(classifier, name, bound, schedule, calls):
    """The number of wrong certificates of several calls, each with a key of its own, and the number of certificates.

    Here a certificate is also wrong if one of the two bounds behind it is: all of them hold with probability 1 − alpha.
    """
    p, wrong, certified = np.array(HEADS[name]), 0, 0
    rival = strongest_rival(p)
    for seed in range(calls):
        n = 1000 if schedule == "fixed" else 2000
        found = classifier.certify(latents(), key=threefry(seed), n=n, alpha=ALPHA, bound=bound, schedule=schedule)
        bounds = (found.p_a_lower > p[found.predict]) | (found.p_b_upper < rival[found.predict])
        radii = wrong_ones(found.predict, found.radius * LIPSCHITZ, p, SIGMA)
        wrong += int((~found.abstain & (bounds | radii)).sum())
        certified += int((~found.abstain).sum())
    return wrong, certified


def scenarios():
    for name, bounds in {
        "near one half": BOUNDS,
        "sure": BOUNDS,
        "majority of three": BOUNDS[:1],
        "three close": BOUNDS[1:],
        "a thousand": BOUNDS[1:],
    }.items():
        for arithmetic, noise in itertools.product(("sound", "float32"), ("shared", "independent")):
            for bound, schedule in itertools.product(bounds, SCHEDULES):
                yield name, arithmetic, noise, bound, schedule


@pytest.mark.parametrize(
    ("name", "arithmetic", "noise", "bound", "schedule", "calls"),
    [
        ("near one half", "float32", "shared", "binary", "fixed", 4),
        ("sure", "sound", "independent", "binary", "staged", 4),
        ("three close", "sound", "shared", "multiclass", "fixed", 4),
        *(pytest.param(*scenario, 16, marks=pytest.mark.soak) for scenario in scenarios()),
    ],
)
def test_no_more_than_alpha_of_the_certificates_of_a_linear_head_are_wrong(
    classifier, name, arithmetic, noise, bound, schedule, calls
):
    wrong, certified = certify(classifier(name, arithmetic, noise), name, bound, schedule, calls)
    print(
        f"\n{name}, {arithmetic}, {noise} noise, {bound}, {schedule}, alpha {ALPHA}: "
        f"{wrong} of {calls * PLACES} are wrong, {certified} certified"
    )
    assert certified > (0 if name == "near one half" else calls * PLACES / 4)
    assert not exceeds(wrong, calls * PLACES, ALPHA, level=1e-4)


@pytest.mark.parametrize("schedule", ["fixed", "staged"])  # anytime bounds leave more room at few samples
def test_a_lipschitz_constant_understated_by_5_percent_is_caught(classifier, schedule):
    wrong, _ = certify(
        classifier("sure", "sound", "independent", LIPSCHITZ * UNDERSTATED), "sure", "binary", schedule, 4
    )
    assert exceeds(wrong, 4 * PLACES, ALPHA, level=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_a_linear_head_has_the_probabilities_that_it_is_said_to_have(name):
    """Tried at three latents with the normals of NumPy; a χ² test compares the likeliest classes."""
    p, rng, z = np.array(HEADS[name]), np.random.default_rng(0), latents()
    assert p.sum() == pytest.approx(1)
    strongest = np.argsort(-p)[:3]
    for i in (0, 7, PLACES - 1):
        noisy = z[i] + SIGMA * rng.standard_normal((5_000, z.shape[1]))
        found = np.bincount(np.argmax(linear_head(p)(noisy.astype(np.float32)), axis=1), minlength=len(p))[strongest]
        expected = p[strongest]
        if len(p) > 3:
            found, expected = np.append(found, 5_000 - found.sum()), np.append(expected, 1 - expected.sum())
        assert stats.chisquare(found, 5_000 * expected).pvalue > 1e-6
