"""`SmoothedClassifier` compiles once per shape, and continues from counts of an earlier call."""

from concurrent import futures

import chex
import numpy as np
import pytest

from lsrs_jax import smoothing
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing import SmoothedClassifier
from lsrs_jax.smoothing.engine import Engine
from support import threefry
from support.heads import LATENTS, linear_head, network

SETTINGS = {"sigma": 0.5, "tile": (2, 16)}


def test_two_calls_on_arrays_of_one_shape_compile_once():
    traced = chex.assert_max_traces(n=3)  # probe, batch of 1, loop
    classifier = SmoothedClassifier(traced(network()), **SETTINGS)
    first = classifier.certify(LATENTS, key=threefry(0), n=500)
    second = classifier.certify(LATENTS[::-1], key=threefry(1), n=700, schedule="staged", alpha=0.01)
    predicted = classifier.predict(LATENTS[:1], key=threefry(0), n=100)
    sampler = classifier.sampler(LATENTS.shape[1:])
    assert sampler.traces == 1
    for latents, key, options, found in (
        (LATENTS, threefry(0), {"n": 500}, first),
        (LATENTS[::-1], threefry(1), {"n": 700, "schedule": "staged", "alpha": 0.01}, second),
    ):
        alone = smoothing.certify(network(), latents, key=key, **SETTINGS, **options)
        np.testing.assert_array_equal(found.counts, alone.counts)
        np.testing.assert_array_equal(found.radius, alone.radius)
    np.testing.assert_array_equal(
        predicted, smoothing.predict(network(), LATENTS[:1], key=threefry(0), n=100, **SETTINGS)
    )
    flat = SmoothedClassifier(lambda z: z.reshape(len(z), -1)[:, :3], **SETTINGS)
    assert flat.sampler((4,)) is not flat.sampler((2, 2))


def test_counts_are_handed_back_and_sampling_goes_on_from_them(monkeypatch):
    classifier, staged = SmoothedClassifier(linear_head, **SETTINGS), {"n": 20_000, "schedule": "staged"}
    rough = classifier.certify(LATENTS, key=threefry(0), epsilon=0.5, **staged)
    whole = classifier.certify(LATENTS, key=threefry(0), epsilon=0.01, **staged)
    assert rough.n.sum() < whole.n.sum()
    further = classifier.certify(LATENTS, key=threefry(0), epsilon=0.01, counts=rough.samples, **staged)
    np.testing.assert_array_equal([rough.samples.images[i].looks[-1] for i in range(5)], rough.counts)  # unchanged
    np.testing.assert_array_equal(further.counts, whole.counts)
    np.testing.assert_array_equal(further.radius, whole.radius)
    launches = []
    monkeypatch.setattr(Engine, "_launches", lambda self, *_: launches.append(1) or iter(()))
    other = classifier.certify(
        LATENTS, key=threefry(0), epsilon=0.01, counts=whole.samples, bound="multiclass", **staged
    )
    assert not launches  # another bound needs no new samples
    np.testing.assert_array_equal(other.counts, whole.counts)


@pytest.mark.parametrize(
    "change",
    [
        {"x": LATENTS + 0.125},
        {"key": threefry(1)},
        {"n": 600},
        {"n0": 50},
        {"schedule": "staged", "n": 5000},
        {"slack": 0.01},
        {"slack": [0.0, 0.0, 0.0, 0.0, 1e-9]},
    ],
    ids=["latents", "key", "n", "n0", "schedule", "slack", "slacks"],
)
def test_counts_of_another_run_are_refused(change):
    classifier = SmoothedClassifier(linear_head, **SETTINGS)
    arguments = {"x": LATENTS, "key": threefry(0), "n": 500}
    counts = classifier.certify(**arguments).samples
    with pytest.raises(UserError, match="counts are of another head, latents"):
        classifier.certify(**arguments | change, counts=counts)
    for other in ({"sigma": 0.25}, {"noise": "independent"}, {"arithmetic": "float32"}, {"tile": (2, 8)}):
        with pytest.raises(UserError, match="counts are of another head, latents"):
            SmoothedClassifier(linear_head, **SETTINGS | other).certify(**arguments, counts=counts)


def test_counts_of_another_head_or_of_no_run_are_refused():
    arguments = {"key": threefry(0), "n": 300}
    counts = SmoothedClassifier(linear_head, **SETTINGS).certify(LATENTS, **arguments).samples
    for head in (lambda z: -linear_head(z), lambda z: linear_head(z) + 1e-3):
        with pytest.raises(UserError, match="counts are of another head"):
            SmoothedClassifier(head, **SETTINGS).certify(LATENTS, **arguments, counts=counts)
    again = SmoothedClassifier(lambda z: linear_head(z), **SETTINGS).certify(LATENTS, **arguments, counts=counts)
    assert again.n.tolist() == [300] * 5
    for wrong in ("counts", 3, again, counts.images):
        with pytest.raises(UserError, match="counts are `samples` of earlier certificates, got"):
            SmoothedClassifier(linear_head, **SETTINGS).certify(LATENTS, **arguments, counts=wrong)


def test_threads_that_share_a_classifier_compile_once():
    traced = chex.assert_max_traces(n=3)
    classifier = SmoothedClassifier(traced(network()), **SETTINGS)
    with futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: classifier.certify(LATENTS, key=threefry(seed), n=200), [0, 0, 1, 1]))
    np.testing.assert_array_equal(found[0].counts, found[1].counts)
    np.testing.assert_array_equal(found[2].counts, found[3].counts)


def test_wrong_settings_are_refused_before_anything_is_compiled():
    for wrong in (
        {"sigma": 0},
        {"tile": (1, 1)},
        {"noise": "pink"},
        {"arithmetic": "exact"},
        {"spmd": "xmap"},
        {"lipschitz": 0.0},
    ):
        with pytest.raises(UserError):
            SmoothedClassifier(None, **SETTINGS | wrong)
