"""Deterministic certificates under closed-form attacks and gradient attacks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from lsrs_jax import layers
from lsrs_jax.certification.margin import certified_margin, float64_slack
from lsrs_jax.layers.lipschitz import materialize
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing import certify
from support import threefry


def classifier(seed, dimensions=6, classes=4, normalized=False):
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((dimensions, classes)) * 10.0 ** rng.uniform(-1, 1, classes)
    if normalized:
        weights /= np.linalg.norm(weights, axis=0)
    return weights, rng.standard_normal(classes), rng.standard_normal((40, dimensions))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("normalized", [True, False])
def test_the_radius_of_a_linear_classifier_is_the_distance_to_its_boundary(seed, normalized):
    """The radius is tight: just within it no prediction changes, just beyond it the nearest rival wins."""
    weights, bias, x = classifier(seed, normalized=normalized)
    predict, radius = certified_margin(x @ weights + bias, weights)
    assert (radius > 0).all()
    for point, label, r in zip(x, predict, radius, strict=True):
        flips = {}
        for rival in set(range(4)) - {label}:
            direction = weights[:, rival] - weights[:, label]
            direction /= np.linalg.norm(direction)
            for scale in (1 - 1e-9, 1 + 1e-9):
                flips.setdefault(scale, []).append(np.argmax((point + scale * r * direction) @ weights + bias))
        assert all(found == label for found in flips[1 - 1e-9])
        assert any(found != label for found in flips[1 + 1e-9])


def test_an_orthogonal_head_needs_no_weights():
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((9, 5)))[0]
    logits = np.random.default_rng(1).standard_normal((30, 9)) @ q
    predict, radius = certified_margin(logits)
    top = np.sort(logits, axis=1)
    np.testing.assert_allclose(radius, (top[:, -1] - top[:, -2]) / np.sqrt(2), rtol=1e-9)
    with_weights = certified_margin(logits, q)
    np.testing.assert_array_equal(with_weights[0], predict)
    np.testing.assert_allclose(with_weights[1], radius, rtol=1e-9)


def test_a_lipschitz_network_is_not_flipped_within_the_radius_and_is_beyond_it():
    """A gradient attack never succeeds within the radius, but often at twice the radius. It would notice half of L."""
    chain = (layers.OrthogonalConv(4, (3, 3), initializer="random"), layers.MaxMin(), layers.Flatten())
    encoder = layers.Encoder(chain)
    params = encoder.init(threefry(0), jnp.zeros((1, 5, 5, 2)))["params"]
    plain = materialize(encoder, params, (5, 5, 2))
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((100, 3))
    with jax.enable_x64(True):

        @jax.jit
        def logits(x):
            return plain.apply(plain.params, x) @ weights

        x = jnp.asarray(rng.standard_normal((64, 5, 5, 2)))
        predict, radius = certified_margin(
            logits(x),
            weights,
            lipschitz=plain.report.constant,
            slack=float64_slack(
                plain.report.rounding(2 * np.linalg.norm(x.reshape(64, -1), axis=1)),
                plain.apply(plain.params, x).reshape(64, -1),
                weights,
                np.zeros(3),
                10.0,
            ),
        )
        assert radius.max() < 10
        target = np.argsort(np.asarray(logits(x)), axis=1)[:, -2]
        rows = jnp.arange(64)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(logits(x)[rows, target] - logits(x)[rows, predict])))

        def attack(scale):
            limit = (scale * radius)[:, None, None, None]
            moved = x
            for _ in range(30):
                step = gradient(moved)
                step = step / jnp.linalg.norm(step.reshape(64, -1), axis=1)[:, None, None, None]
                moved = moved + 0.3 * limit * step
                offset = moved - x
                length = jnp.linalg.norm(offset.reshape(64, -1), axis=1)[:, None, None, None]
                moved = x + offset * jnp.minimum(1, limit / jnp.maximum(length, 1e-300))
            return np.mean(np.argmax(np.asarray(logits(moved)), axis=1) != predict)

        assert attack(1.0) == 0
        assert attack(2.0) > 0.5


def test_lipschitz_constant_and_slack_shrink_the_radius():
    weights, bias, x = classifier(7)
    plain = certified_margin(x @ weights + bias, weights)[1]
    with_slack = certified_margin(x @ weights + bias, weights, lipschitz=2.0, slack=0.01)[1]
    np.testing.assert_allclose(with_slack, np.maximum(plain - 0.01, 0) / 2, rtol=1e-9)
    slack = float64_slack(1e-9, x, weights, bias, 0.0)
    assert (slack > 2e-9).all()
    assert slack.max() < 1e-6


def test_slack_covers_cancellation_in_the_weights():
    """Nearly equal weights need a larger slack."""
    rng = np.random.default_rng(0)
    close = 1e9 * rng.standard_normal((1000, 1)) + rng.standard_normal((1000, 2))
    z = rng.standard_normal((20, 1000))
    exact = np.array([math.fsum(row * (close[:, 0] - close[:, 1])) for row in z])
    computed = z @ close
    error = np.abs(computed[:, 0] - computed[:, 1] - exact) / np.linalg.norm(close[:, 0] - close[:, 1])
    assert (error <= float64_slack(0.0, z, close, np.zeros(2), 0.0)).all()
    assert error.max() > 2.0**-28 * np.linalg.norm(z, axis=1).min()  # a slack from the norm alone would not cover it


def test_slack_covers_the_logits_as_far_as_a_certificate_leads():
    """The bias moves the boundary far away from a latent of zeros; near the boundary large products cancel."""
    rng, flips = np.random.default_rng(0), {0.0: 0, 30.0: 0}
    for _ in range(50):
        direction, normal = (v / np.linalg.norm(v) for v in rng.standard_normal((2, 3072)))
        weights = np.stack([direction + 1e-7 * normal, direction], axis=1)
        difference = weights[:, 0] - weights[:, 1]
        distance = np.linalg.norm(difference)
        bias, z = np.array([30 * distance, 0.0]), np.zeros((1, 3072))
        for reach in flips:
            slack = float64_slack(0.0, z, weights, bias, reach)
            predict, radius = certified_margin(z @ weights + bias, weights, slack=slack)
            assert 29.999 < radius[0] <= 30
            for share in 1 - 10.0 ** -np.arange(8, 16):
                there = z - share * radius[0] * difference / distance
                flips[reach] += int((there @ weights + bias).argmax() != predict[0])
    assert flips[30.0] == 0
    assert flips[0.0] > 0


@pytest.mark.parametrize("scale", [1.0, 2.0**-500, 2.0**-560, 2.0**-900])
def test_slack_covers_weights_whose_squares_underflow(scale):
    """Relative rounding does not depend on the scale. If the squares in a norm underflowed, the slack would be 0."""
    rng = np.random.default_rng(0)
    weights, z = scale * rng.standard_normal((64, 2)), 1e3 * rng.standard_normal((20, 64))
    slack = float64_slack(0.0, z, weights, np.zeros(2), 0.0)
    np.testing.assert_allclose(slack, float64_slack(0.0, z, weights / scale, np.zeros(2), 0.0), rtol=1e-6)
    assert (slack > 0).all()


def probability_of_class_0(weights, bias, z, sigma):
    """P[class 0 wins at z + σN(0, I)] in two dimensions: the trapezoid rule along one, exact along the other."""
    first, second = difference = weights[:, :1] - weights[:, 1:]
    offset = bias[0] - bias[1:] + z @ difference
    x = np.linspace(-9, 9, 20_001)[:, None]
    bound = -(offset + sigma * first * x) / (sigma * second)  # of the other coordinate, from below or from above
    low, high = (np.where((second > 0) == below, bound, least) for below, least in ((True, -np.inf), (False, np.inf)))
    inside = np.maximum(special.ndtr(high.min(axis=1)) - special.ndtr(low.max(axis=1)), 0)
    return np.trapezoid(inside * np.exp(-(x[:, 0] ** 2) / 2) / np.sqrt(2 * np.pi), x[:, 0])


@pytest.mark.parametrize("seed", range(8))
def test_the_margin_of_a_linear_head_is_at_least_its_binary_smoothed_radius(seed):
    """From exact probabilities, at every point and noise level; for two classes the two are equal."""
    rng, compared = np.random.default_rng(seed), 0
    for classes in (2, 3, 5, 8):
        weights, bias = rng.standard_normal((2, classes)), 0.3 * rng.standard_normal(classes)
        for z in rng.standard_normal((12, 2)):
            sigma = 10 ** rng.uniform(-1, 0.5)
            order = np.argsort(-(z @ weights + bias))
            own, offset = weights[:, order], bias[order]
            margin = certified_margin((z @ own + offset)[None], own)[1][0]
            radius = sigma * special.ndtri(probability_of_class_0(own, offset, z, sigma))
            if radius < 5 * sigma:  # beyond it 1 - p is lost in rounding
                assert radius <= margin + 1e-6 * sigma
                assert classes > 2 or radius == pytest.approx(margin, abs=1e-6 * sigma)
                compared += radius > 0
    assert compared > 10


def test_a_head_that_is_not_linear_can_gain_from_smoothing():
    """A slab of another class is near but thin: the samples hardly see it, and the exact distance ends there.

    It shows that `test_the_margin_of_a_linear_head_is_at_least_its_binary_smoothed_radius` can fail.
    """
    sigma, key = 1.0, threefry(0)
    found = certify(
        lambda z: jnp.stack([jnp.abs(z[:, 0] - 1) - 0.05, jnp.zeros(len(z))], axis=1),
        np.zeros((1, 2), np.float32),
        sigma=sigma,
        key=key,
        n=10_000,
    )
    assert found.predict[0] == 0
    assert found.radius[0] > 1.5 > 0.95  # the distance to the slab


def test_ties_certify_nothing():
    predict, radius = certified_margin(np.array([[1.0, 1.0, 0.0]]))
    assert predict[0] == 0
    assert radius[0] == 0


@pytest.mark.parametrize(
    ("arguments", "settings", "why"),
    [
        ((np.zeros((3, 1)),), {}, "classes >= 2"),
        ((np.zeros(3),), {}, "finite numbers of shape"),
        ((np.full((3, 2), np.nan),), {}, "finite numbers"),
        ((np.zeros((3, 2)), np.zeros((4, 3))), {}, r"shape \(d, 2\)"),
        ((np.zeros((3, 2)), np.ones((4, 2))), {}, "equal weights"),
        ((np.zeros((3, 2)), np.full((4, 2), np.inf)), {}, "finite numbers"),
        ((np.zeros((3, 2)),), {"lipschitz": 0.0}, "Lipschitz constant must be"),
        ((np.zeros((3, 2)),), {"slack": -1.0}, "slack must be"),
        ((np.zeros((1, 2)),), {"slack": np.zeros(3)}, "one per image"),
    ],
)
def test_bad_input_is_refused(arguments, settings, why):
    with pytest.raises(UserError, match=why):
        certified_margin(*arguments, **settings)


def test_weights_far_from_1_do_not_underflow():
    radius = certified_margin(np.array([[3e-161, 0.0]]), np.array([[1e-161, 0.0], [1e-161, 0.0]]))[1]
    assert radius[0] == pytest.approx(3 / np.sqrt(2), rel=1e-9)
    assert radius[0] < 3 / np.sqrt(2)
