"""`SmoothedClassifier` with a fallback: certificates, predictions and audits of the composition."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from lsrs_jax import SmoothedClassifier
from lsrs_jax.certification.fallback import LinearClassifier
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing import certified_radius
from support import threefry

SIGMA = 0.5


def silent_right(z):
    """Left of 0 class 0; right of it one of the classes 1, 2 and 3 by the angle, so that none has half."""
    turn = jnp.floor(z[:, 1] * 37) % 3
    return jnp.stack([jnp.where(z[:, 0] < 0, 9.0, 0.0), *(jnp.where(turn == c, 1.0, 0.0) for c in range(3))], axis=1)


def margins(x):
    """A linear fallback: class 3 right of −1, else class 1."""
    edge = x[:, 0] + 1
    never = jnp.full_like(edge, -50.0) if isinstance(x, jnp.ndarray) else np.full_like(edge, -50.0)
    return (jnp if isinstance(x, jnp.ndarray) else np).stack([never, -edge, never, edge], axis=1)


INPUTS = np.array([[-1.5, 0.0], [-0.4, 0.3], [0.1, 0.2], [0.8, 0.5], [2.0, 1.0]])
CLASSES = np.array([0, 0, 3, 3, 3])


@pytest.fixture(scope="module")
def classifier():
    return SmoothedClassifier(silent_right, sigma=SIGMA, tile=(8, 32), fallback=margins)


@pytest.fixture(scope="module")
def certified(classifier):
    return classifier.certify(INPUTS, CLASSES, n=20_000, bound="multiclass")


def test_certificates_are_those_of_the_composition(classifier, certified):
    assert certified.predict.tolist() == [0, 0, 3, 3, 3]
    # Left of 0 by the votes; right of it by the fallback, until class 0 has half, or 1 or 2 more than about a third.
    assert (certified.radius <= np.abs(INPUTS[:, 0])).all()
    most = np.minimum(np.abs(INPUTS[:, 0]), [9, 9, *[-SIGMA * special.ndtri(1 / 3)] * 3])
    assert (certified.radius >= 0.8 * most).all()
    alone = SmoothedClassifier(silent_right, sigma=SIGMA, tile=(8, 32)).certify(INPUTS, n=20_000)
    assert alone.predict.tolist() == [0, 0, -1, -1, -1]
    binary = certified_radius(certified.p_a_lower, 1 - certified.p_a_lower, SIGMA)
    assert (certified.radius >= binary - 1e-4).all()  # less the slack of the grid


def test_predictions_are_those_of_the_composition(classifier):
    found = classifier.predict(INPUTS, key=threefry(1), n=200, details=True)
    assert found.classes.tolist() == [0, 0, -1, 3, 3]  # class 0 has .42 at the third input: too near
    assert "too close to one half" in found.reasons[2]
    assert classifier.predict(INPUTS, key=threefry(1), n=5000).tolist() == [0, 0, 3, 3, 3]


def test_an_audit_finds_no_flip_and_finds_those_of_the_larger_certificate(classifier, certified):
    sizes = {"steps": 8, "restarts": 1, "votes": 3000}
    assert classifier.audit(INPUTS, CLASSES, certificates=certified, **sizes).flips.sum() == 0
    larger = np.maximum(certified.radius, np.abs(INPUTS[:, 0] + 1))  # the fallback's own certificate
    unsound = type(certified)(**{**vars(certified), "radius": larger})
    audit = classifier.audit(INPUTS, CLASSES, certificates=unsound, **sizes)
    assert (audit.flips[2:] > 0).all()
    assert (audit.distance >= certified.radius).all()


def test_a_workdir_of_a_linear_network_is_a_fallback(trained, originals):
    linear = originals / "other"
    classifier = SmoothedClassifier(lambda z: z.reshape(len(z), -1)[:, :10], sigma=0.5, fallback=linear)
    assert isinstance(classifier.fallback, LinearClassifier)
    images = np.random.default_rng(0).uniform(0, 1, (6, 8, 8, 1))
    found = classifier.certify(images, n=1000, bound="multiclass")
    classes, radii = classifier.fallback.certified(images)
    scores = np.asarray(classifier.fallback.scores(jnp.asarray(images, jnp.float32)))
    np.testing.assert_array_equal(scores.argmax(axis=1), classes)
    np.testing.assert_allclose(scores.max(axis=1), radii, rtol=1e-3)
    assert (np.sort(scores, axis=1)[:, -2:].sum(axis=1) <= 1e-5).all()
    assert (found.predict >= 0).any()
    with pytest.raises(UserError, match="linear head"):
        SmoothedClassifier(silent_right, sigma=0.5, fallback=trained)


@pytest.mark.parametrize(
    ("fallback", "words"),
    [
        (lambda x: 2 * margins(x), "1-Lipschitz"),
        (lambda x: margins(x) + 1, "positive sum"),
        (lambda x: margins(x)[:, :, None], "shape"),
        (lambda x: margins(x)[:-1], "inputs"),
        (lambda x: np.concatenate([margins(x)[:, :3], -margins(x)[:, 2:], margins(x)[:, 1:2]], axis=1), "sum|class"),
        (lambda x: 1 / 0, "the fallback failed: division by zero"),
        ("no such workdir", "no training"),
        (3, "a function of inputs or a workdir"),
    ],
)
def test_a_fallback_that_proves_nothing_is_refused(fallback, words):
    def certify():
        made = SmoothedClassifier(silent_right, sigma=SIGMA, tile=(8, 32), fallback=fallback)
        made.certify(INPUTS, n=100, bound="multiclass")

    with pytest.raises(UserError, match=words):
        certify()


def test_binary_bounds_files_and_programs_take_no_fallback(classifier, tmp_path):
    with pytest.raises(UserError, match="multiclass"):
        classifier.certify(INPUTS, n=100)
    with pytest.raises(UserError, match="out takes no fallback"):
        classifier.certify(INPUTS, CLASSES, n=100, out=tmp_path)
    with pytest.raises(UserError, match="without fallback"):
        classifier.export(tmp_path / "program", (2,))


def test_a_fallback_of_other_classes_than_the_head_is_refused():
    """With fewer classes it would answer, and fail only in an audit."""
    two = SmoothedClassifier(silent_right, sigma=SIGMA, tile=(8, 32), fallback=lambda x: margins(x)[:, 2:])
    for call in (lambda: two.certify(INPUTS, bound="multiclass"), lambda: two.predict(INPUTS, key=threefry(1), n=100)):
        with pytest.raises(UserError, match="the fallback has 2 classes, and the head has 4"):
            call()
