"""The example in docs/separation.md: its bound holds for any base classifier, and LSRS certifies beyond it."""

import numpy as np
import pytest
from scipy import special

from studies import separation

DIMENSIONS, SIGMA, POINTS = 6, 0.6, 100_000
ERROR = 4 * 0.5 / np.sqrt(POINTS)  # four standard errors of a probability


@pytest.fixture(scope="module")
def noisy():
    """Noisy points of the sphere, with random directions, and as many of the origin."""
    rng = np.random.default_rng(0)
    noise, x = SIGMA * rng.standard_normal((2, POINTS, DIMENSIONS)), rng.standard_normal((POINTS, DIMENSIONS))
    return noise[0] + x / np.linalg.norm(x, axis=1, keepdims=True), noise[1]


def right(score, noisy):
    """Of all thresholds on a score: the largest of the smaller probability of the right class.

    That is on average over the sphere, and at the origin.
    """
    sphere, origin = (np.sort(score(z)) for z in noisy)
    thresholds = np.concatenate([sphere, origin])[::50]
    hits = 1 - np.searchsorted(sphere, thresholds) / POINTS, np.searchsorted(origin, thresholds) / POINTS
    return np.minimum(*hits).max()


def test_no_base_classifier_does_better_than_the_bound_and_the_best_threshold_reaches_it(noisy):
    best, rng = special.ndtr(separation.quantile_of_any(DIMENSIONS, SIGMA)), np.random.default_rng(1)
    assert right(lambda z: (z**2).sum(axis=1), noisy) == pytest.approx(best, abs=ERROR)
    for _ in range(8):  # half-spaces, shifted balls and random networks
        center, first, second = (rng.standard_normal(size) for size in (DIMENSIONS, (DIMENSIONS, 8), 8))
        assert right(lambda z, c=center: z @ c, noisy) < best - 5 * ERROR
        assert right(lambda z, c=center: ((z - 0.2 * c) ** 2).sum(axis=1), noisy) <= best + ERROR
        assert right(lambda z, a=first, b=second: np.maximum(z @ a, 0) @ b, noisy) <= best + ERROR
    assert right(lambda z: np.abs(z).max(axis=1), noisy) <= best + ERROR


@pytest.mark.parametrize("dimensions", [6, 192, 3072])
def test_no_noise_level_does_better_than_the_best_one(dimensions):
    best = separation.best_sigma(dimensions)
    assert separation.quantile_of_any(dimensions, best) == pytest.approx(separation.reach(), rel=1e-6)
    largest = separation.input_smoothing_of_any(dimensions)
    for sigma in best * np.geomspace(0.2, 5, 41):
        assert separation.input_smoothing_of_any(dimensions, sigma) <= largest * (1 + 1e-9)


def test_latent_smoothing_certifies_where_input_smoothing_cannot():
    assert separation.input_smoothing_of_any(3072) < 0.15
    assert separation.input_smoothing_of_any(3072, 0.25) < 0.03
    radii = separation.latent_smoothing((48, 64), 5)
    assert len(radii) == 6
    assert (radii > 0.48).all()
    assert (radii < 0.5).all()  # the true distance


def test_a_contraction_gains_within_a_class_and_costs_between_classes():
    """The formula of docs/separation.md against a difference quotient, with the ℓ8 norm for the maximum."""
    rng, q, step = np.random.default_rng(0), 8, 1e-4
    classes, weights = np.array([0, 0, 1, 1, 2]), rng.dirichlet(np.ones(5))
    grid = np.linspace(-9, 9, 241)
    z, area = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 1, 2), (grid[1] - grid[0]) ** 2
    y, velocity = 1.2 * rng.standard_normal((2, 5, 2))

    def densities(y):
        each = weights * np.exp(-((z - y) ** 2).sum(axis=-1) / 2) / (2 * np.pi)
        return each, np.stack([each[:, classes == c].sum(axis=1) for c in range(3)], axis=1)

    def best(y):
        return np.linalg.norm(densities(y)[1], ord=q, axis=1).sum() * area

    def distances(y):
        return ((y[:, None] - y) ** 2).sum(axis=-1)

    each, sums = densities(y)
    norm = np.linalg.norm(sums, ord=q, axis=1, keepdims=True)
    shares = (sums / norm)[:, classes]
    curvature = -(shares ** (q - 1))[:, :, None] * (shares ** (q - 1))[:, None]
    same = classes[:, None] == classes
    curvature += same * (shares ** (q - 2))[:, :, None]
    moment = ((q - 1) / norm[:, :, None] * curvature * each[:, :, None] * each[:, None]).sum(axis=0) * area
    change = [(f(y + step * velocity) - f(y - step * velocity)) / (2 * step) for f in (best, distances)]
    assert change[0] == pytest.approx(-(change[1] * moment).sum() / 4, rel=1e-6)
    assert (moment[same] > 0).all()
    assert (moment[~same] < 0).all()
