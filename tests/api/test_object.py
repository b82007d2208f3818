"""`SmoothedClassifier` in memory: encoders, labels, results, predictions, soft logits and attacks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsrs_jax
from lsrs_jax import SmoothedClassifier, layers, smoothing
from lsrs_jax.layers.lipschitz import materialize
from lsrs_jax.runtime.errors import UserError
from support import threefry

DIM = (4, 4, 1)
RNG = np.random.default_rng(0)
X = RNG.random((6, *DIM))
W = RNG.normal(size=(16, 3)).astype(np.float32)
LABELS = (X.reshape(6, -1) @ W).argmax(axis=1)
SETTINGS = {"sigma": 0.25, "tile": (4, 16)}
SAMPLES = {"key": threefry(0), "n": 500}


def head(z):
    return z.reshape(len(z), -1) @ W


def made(**changes):
    return SmoothedClassifier(head, **SETTINGS | changes)


def test_without_an_encoder_it_is_certify_of_latents():
    found, alone = made().certify(X, LABELS, **SAMPLES), smoothing.certify(head, X, **SETTINGS, **SAMPLES)
    np.testing.assert_array_equal(found.counts, alone.counts)
    np.testing.assert_array_equal(found.radius, alone.radius)
    assert smoothing.SmoothedClassifier is lsrs_jax.SmoothedClassifier


def test_an_encoder_runs_in_float64_and_its_constant_divides_the_radii():
    double = made(encoder=lambda x: 2 * x, lipschitz=2.0).certify(X, **SAMPLES)
    alone = smoothing.certify(head, 2 * X, **SETTINGS, **SAMPLES, lipschitz=2.0)
    np.testing.assert_array_equal(double.counts, alone.counts)
    certified = double.radius > 0
    assert certified.any()
    assert (double.radius[certified] < alone.radius[certified]).all()  # the rounding of the encoder is subtracted
    np.testing.assert_allclose(double.radius, alone.radius, atol=1e-8)


def test_a_proven_encoder_brings_its_constant():
    encoder = layers.Encoder((layers.Normalize((0.5,), (0.25,)), layers.SpaceToDepth((2, 2)), layers.MaxMin()))
    proven = materialize(encoder, encoder.init(threefry(0), jnp.zeros((1, *DIM))), DIM)
    classifier = made(encoder=proven)
    assert classifier.lipschitz == proven.report.constant
    assert 4 <= classifier.lipschitz < 4.0001
    found = classifier.certify(X, **SAMPLES)
    latents = np.asarray(proven.apply(proven.params, jnp.asarray(X)), np.float64)
    alone = smoothing.certify(head, latents, **SETTINGS, **SAMPLES, lipschitz=classifier.lipschitz)
    np.testing.assert_allclose(found.radius, alone.radius, atol=1e-3)
    with pytest.raises(UserError, match="leave lipschitz out"):
        made(encoder=proven, lipschitz=3.0)
    with pytest.raises(UserError, match="takes inputs of shape"):
        classifier.certify(X[:, :2], **SAMPLES)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (lambda x: x.astype(jnp.float32), "computes in float32"),
        (lambda x: x.astype(jnp.bfloat16).astype(x.dtype), "computes in bfloat16"),
        (lambda x: jax.jit(lambda y: y.astype(jnp.float32).astype(y.dtype))(x), "computes in float32"),
        (lambda x: np.asarray(x) * 2, "failed on a batch"),
        (lambda x: x.sum(), "must return a batch"),
        (lambda x: x / 0.0 * 0.0, "NaN or infinite"),
        ("text", "must be a function"),
    ],
)
def test_encoders_whose_rounding_is_not_covered_or_that_fail_are_refused(encoder, message):
    with pytest.raises(UserError, match=message):
        made(encoder=encoder, lipschitz=1.0).certify(X, **SAMPLES)


def test_an_encoder_below_float64_is_taken_with_its_error_as_slack():
    low = made(encoder=lambda x: x.astype(jnp.float32), lipschitz=1.0)
    found, exact = low.certify(X, slack=0.01, **SAMPLES), made().certify(X.astype(np.float32), **SAMPLES)
    certified = found.radius > 0
    np.testing.assert_allclose(exact.radius[certified] - found.radius[certified], 0.01, rtol=1e-6)
    with pytest.raises(UserError, match="computes in float32"):
        low.certify(X, slack=np.array([0.1, 0, 0.1, 0.1, 0.1, 0.1]), **SAMPLES)


def test_results_know_accuracy_and_print_a_table():
    found = made(class_names=["a", "b", "c"]).certify(X, LABELS, **SAMPLES)
    right = found.predict == LABELS
    assert found.accuracy() == right.mean() > 0
    assert found.accuracy(0.1) == (right & (found.radius >= 0.1)).mean()
    assert found.average_certified_radius == np.where(right, found.radius, 0).mean()
    text = str(found)
    assert repr(found) == text
    assert text.splitlines()[0] == (
        f"6 inputs, sigma 0.25: average certified radius {found.average_certified_radius:.4f}, "
        f"abstained {found.abstain.mean():.3f}"
    )
    assert text.splitlines()[2].split()[:2] == ["accuracy", f"{found.accuracy():.3f}"]
    table = found.to_pandas()
    assert len(table) == 6
    assert table.loc[right, "name"].tolist() == [("a", "b", "c")[label] for label in LABELS[right]]
    assert (table["radius"] == found.radius).all()


def test_without_labels_there_are_radii_but_no_accuracy():
    found = made().certify(X, **SAMPLES)
    assert "certified" in str(found)
    for use in (found.accuracy, lambda: found.average_certified_radius):
        with pytest.raises(UserError, match="needs labels"):
            use()
    assert "label" not in found.to_pandas()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": LABELS[:3]}, "one per input"),
        ({"labels": LABELS + 0.5}, "whole numbers"),
        ({"labels": np.array([0, 1, 2, 3, 0, 0])}, "input 3 has the label 3"),
        ({"x": (X * 255).astype(np.uint8)}, "divide pixels by 255"),
        ({"x": X[0, 0, 0]}, r"x must have shape \(N"),
        ({"progress": 3}, "progress must be"),
        ({"out": "/nowhere"}, "out needs labels"),
    ],
)
def test_wrong_arguments_give_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        made().certify(**{"x": X, **SAMPLES} | changes)
    with pytest.raises(UserError, match="class_names has 2"):
        made(class_names=["a", "b"]).certify(X, LABELS, **SAMPLES)


def test_without_a_key_the_seed_follows_from_parameters_and_inputs():
    first, again = made().certify(X, LABELS, n=500), made().certify(X, LABELS, n=500)
    np.testing.assert_array_equal(first.counts, again.counts)
    other = made().certify(X + 1e-9, LABELS, n=500)
    assert (other.counts != first.counts).any()


def test_single_inputs_compile_once():
    traced = chex.assert_max_traces(n=3)  # probe, batch of 1, loop
    classifier = SmoothedClassifier(traced(lambda z: head(z)), **SETTINGS)
    whole = classifier.certify(X, LABELS, **SAMPLES)
    for row in range(3):
        one = classifier.certify(X[row : row + 1], LABELS[row : row + 1], **SAMPLES)
        np.testing.assert_array_equal(one.counts[0], whole.counts[row])


class Bar:
    def __init__(self):
        self.n, self.text = 0, ""

    def update(self, more):
        self.n += more

    def set_postfix_str(self, text):
        self.text = text


def test_progress_goes_to_a_function_or_a_bar():
    lines, bar = [], Bar()
    made().certify(X, LABELS, **SAMPLES, progress=lines.append)
    assert lines[0] == "compiling the head ..." or "accuracy on 6 images" in lines[0]
    assert any("under noise of sigma 0.25" in line for line in lines)
    made().certify(X, LABELS, **SAMPLES, progress=bar)
    assert bar.n == 6
    assert "samples" in bar.text


def test_a_classifier_that_noise_ruins_is_recognised_before_sampling():
    sharp = SmoothedClassifier(lambda z: head(z) * 0 + jnp.sin(400 * head(z)), sigma=1.0, tile=(4, 16))
    labels = np.asarray(jnp.sin(400 * head(jnp.asarray(X, jnp.float32)))).argmax(axis=1)
    lines = []
    sharp.certify(X, labels, **SAMPLES, progress=lines.append)
    note = next(line for line in lines if "without noise" in line)
    assert "fine-tune it under this noise" in note
    lines.clear()
    made().certify(X, LABELS, **SAMPLES, progress=lines.append)
    assert not any("fine-tune" in line for line in lines)


def test_predictions_explain_abstentions():
    near = SmoothedClassifier(lambda z: jnp.stack([z[:, 0, 0, 0], -z[:, 0, 0, 0]], axis=1), **SETTINGS)
    points = np.zeros((2, *DIM))
    points[1] = 0.5
    found = near.predict(points, key=threefry(1), n=200, details=True)
    np.testing.assert_array_equal(found.classes, near.predict(points, key=threefry(1), n=200))
    assert found.classes.tolist() == [-1, 0]
    assert found.counts.sum(axis=1).tolist() == [200, 200]
    assert "too close to tell apart" in found.reasons[0]
    assert found.reasons[1] == ""


def test_soft_logits_are_the_log_of_the_mean_softmax_and_differentiable():
    classifier = made(encoder=lambda x: 2 * x, lipschitz=2.0)
    x, key = jnp.asarray(X, jnp.float32), threefry(2)
    found = classifier.soft_logits(x, key, 64)
    noise = 0.25 * jax.random.normal(key, (64, 1, *DIM))
    every = jax.vmap(lambda z: jax.nn.softmax(head(z)))(2 * x + noise)
    np.testing.assert_allclose(found, jnp.log(every.mean(axis=0)), rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda x: classifier.soft_logits(x, key, 64)[0, 0])(x)
    step = jnp.zeros_like(x).at[0].set(1e-2 * jnp.sign(gradient[0]))
    assert classifier.soft_logits(x + step, key, 64)[0, 0] > found[0, 0]
    assert not gradient[1:].any()


def test_attacks_stay_outside_honest_radii_and_find_flips_inside_false_ones():
    classifier = made()
    certified = classifier.certify(X, LABELS, **SAMPLES)
    audit = classifier.audit(X, LABELS, certificates=certified, steps=5, votes=200)
    assert audit.flips.sum() == 0
    assert audit.pairs.sum() > 0
    assert (audit.distance[certified.radius > 0] > certified.radius[certified.radius > 0]).all()
    assert audit.robust_accuracy(0.05) >= certified.accuracy(0.05)
    false = made(lipschitz=0.05).certify(X, LABELS, **SAMPLES)
    assert made(lipschitz=0.05).audit(X, LABELS, certificates=false, steps=5, votes=200).flips.sum() > 0
    for wrong in (
        {"steps": 0},
        {"fractions": (2.0,)},
        {"votes": 2},
        {"certificates": made().certify(X[:1], **SAMPLES)},
    ):
        with pytest.raises(UserError):
            classifier.audit(X, LABELS, **wrong)


def test_the_summary_has_the_radii_that_were_to_be_decided(tmp_path):
    weights = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    x = np.random.default_rng(1).random((6, 9))
    labels = (x @ weights).argmax(axis=1)
    classifier = SmoothedClassifier(lambda z: z @ weights, sigma=0.25, tile=(4, 16))
    for out in (None, tmp_path):
        options = {"key": threefry(0), "n": 1000, "schedule": "staged", "radii": (0.125, 0.25)}
        found = classifier.certify(x, labels, out=out, **options)
        assert str(found).splitlines()[1].split() == ["radius", "0", "0.125", "0.25"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder": lambda x: 10 * x}, "needs its Lipschitz constant"),
        ({"encoder": lambda x: 10 * x, "lipschitz": 2.0}, "stretches a distance by 10"),
        ({"encoder": lambda x: x * jnp.where(x > 0.5, 3.0, 1.0), "lipschitz": 1.0}, "stretches a distance"),
    ],
)
def test_a_constant_that_is_missing_or_obviously_false_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        made(**arguments).certify(X, **SAMPLES)


def test_things_that_are_no_head_or_no_batch_are_named():
    with pytest.raises(UserError, match="head must be a function"):
        SmoothedClassifier(np.eye(3), sigma=0.5)
    for wrong, message in (
        (lambda z: np.dot(z.reshape(len(z), -1), W), "jax.numpy"),
        (lambda z: head(z).argmax(axis=1), "return the logits, not the class"),
    ):
        with pytest.raises(UserError, match=message):
            SmoothedClassifier(wrong, **SETTINGS).certify(X, **SAMPLES)
    classifier = lsrs_jax.load("digits")
    for images, message in (
        (np.full((2, 8, 8, 1), 16.0), r"takes pixels in \[0, 1\]"),
        (np.zeros((8, 8, 1)), "needs a batch axis"),
        (np.zeros((2, 1, 8, 8)), "NHWC"),
    ):
        with pytest.raises(UserError, match=message):
            classifier.certify(images, n=100)
    with pytest.raises(UserError, match="not its class"):
        made().certify(X, **SAMPLES, progress=Bar)


@pytest.mark.parametrize("encoder", [lambda x: x - x.mean(0), lambda x: x[::-1], lambda x: jnp.cumsum(x, 0)])
def test_an_encoder_that_mixes_its_batch_is_refused(encoder):
    with pytest.raises(UserError, match="rows depend on each other"):
        made(encoder=encoder, lipschitz=10.0).certify(X, **SAMPLES)
