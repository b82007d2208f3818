"""How much of the distances between inputs an encoder keeps."""

import numpy as np
import pytest
from scipy.stats import ortho_group

from lsrs_jax.layers import encoder_selectivity
from lsrs_jax.runtime.errors import UserError

RNG = np.random.default_rng(0)
X, LABELS = RNG.standard_normal((40, 3, 2)), RNG.integers(0, 3, 40)


def by_hand(x, z, nearest, same):
    """The median over pairs, one pair at a time."""
    distance = [[np.linalg.norm(a - b) for b in x] for a in x]
    kept = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i and (LABELS[i] == LABELS[j]) == same]
        if nearest:
            others = [min(others, key=lambda j: distance[i][j])]
        kept += [np.linalg.norm(z[i] - z[j]) / distance[i][j] for j in others]
    return np.median(kept)


def test_the_medians_are_those_of_the_definition():
    z = np.abs(X.reshape(40, -1)[:, :4])
    found = encoder_selectivity(X, z, LABELS)
    pairs = ((False, False), (False, True), (True, False), (True, True))
    assert found[:4] == pytest.approx([by_hand(X, z, nearest, same) for nearest, same in pairs], rel=1e-12)
    assert found.ratio == found.between / found.within
    assert found.nearest_ratio == found.nearest_between / found.nearest_within


def test_an_isometry_keeps_all_distances_and_its_scale_is_divided_out():
    rotated = 3 * X.reshape(40, -1) @ ortho_group.rvs(6, random_state=0)
    assert encoder_selectivity(X, rotated, LABELS, lipschitz=3.0)[:4] == pytest.approx([1, 1, 1, 1])


def test_an_encoder_that_folds_a_class_onto_itself_is_selective():
    """Class 1 lies at -3 and 3, class 0 at 0; the absolute value brings class 1 together."""
    x, labels = np.array([-3.1, -2.9, 2.9, 3.1, -0.1, 0.1])[:, None], np.array([1, 1, 1, 1, 0, 0])
    found = encoder_selectivity(x, np.abs(x), labels)
    assert found.within < 0.1 < 0.9 < found.between
    assert found.ratio > 10
    assert found.nearest_within == 1  # the nearest pairs of class 1 lie on one side


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((X, X, LABELS[:3]), "labels"),
        ((X, X.reshape(-1), LABELS), "latents"),
        ((X, X, np.zeros(40, int)), "pairs of two classes"),
        ((X, X, np.arange(40)), "pairs of one class"),
        ((np.zeros_like(X), X, LABELS), "give more inputs"),
    ],
)
def test_bad_input_is_refused(arguments, why):
    with pytest.raises(UserError, match=why):
        encoder_selectivity(*arguments)
