"""The engine over images and looks, whose counts depend on nothing but the schedule; and prediction."""

import types

import numpy as np
import pytest
from scipy import stats

from lsrs_jax import smoothing
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing import status as status_module
from lsrs_jax.smoothing.confidence import leaders
from lsrs_jax.smoothing.counts import Counts
from lsrs_jax.smoothing.derivation import Derivation
from lsrs_jax.smoothing.engine import Engine, Images
from lsrs_jax.smoothing.sampler import Sampler
from lsrs_jax.smoothing.schedule import make_schedule
from lsrs_jax.smoothing.status import Status
from support import threefry
from support.heads import BIAS, DIM, LATENTS, W, linear_head, network

N = 5_000
MANY = np.random.default_rng(5).random((23, *DIM))
COMMON = {"sigma": 0.5, "key": threefry(0), "n": N, "tile": (4, 16)}


def certify(**changes):
    return smoothing.certify(network(), MANY, **(COMMON | changes))


@pytest.fixture(scope="module")
def staged():
    return certify(schedule="staged", radii=(0.1, 0.2, 0.4))


def test_a_staged_image_has_the_first_samples_of_the_fixed_schedule(staged):
    looks = make_schedule("staged", 100, N, 16).looks
    assert len(set(staged.n)) > 2
    assert staged.n.mean() < N / 2
    for look in set(staged.n):
        assert look in looks
        fixed = certify(n=int(look))
        chosen = staged.n == look
        np.testing.assert_array_equal(staged.counts[chosen], fixed.counts[chosen])


@pytest.mark.parametrize("changes", [{"tile": (7, 16)}, {"spmd": "pmap"}, {"tile": (23, 16)}])
def test_staged_certificates_depend_on_no_grouping(staged, changes):
    got = certify(schedule="staged", radii=(0.1, 0.2, 0.4), **changes)
    np.testing.assert_array_equal(got.counts, staged.counts)
    np.testing.assert_array_equal(got.radius, staged.radius)


def test_independent_noise_gives_other_counts_of_the_same_distribution(staged):
    shared, independent = certify(), certify(noise="independent")
    assert (shared.counts != independent.counts).any(axis=1).mean() > 0.9
    for a, b in zip(shared.counts, independent.counts, strict=True):
        kept = (a + b) > 10
        assert stats.chi2_contingency(np.stack([a[kept], b[kept]])).pvalue > 1e-5 or kept.sum() < 2


class Counting(Sampler):
    """A sampler that logs its launches."""

    def launch(self, batch, key, first, stop, n):
        self.log.append((n, first, stop))
        return super().launch(batch, key, first, stop, n)


def sample(counts, sampler, latents, lines=None, stop_after=None):
    derivation = Derivation(0.5, 0.001, tau=sampler.tau, radii=(0.1, 0.2, 0.4))
    status = Status(counts.schedule, len(latents), (lines if lines is not None else []).append)
    calls = 0

    def decided(found):
        nonlocal calls
        calls += 1
        if stop_after is not None and calls > stop_after:
            raise KeyboardInterrupt
        return derivation.decided(counts.schedule, found)

    slack = sampler.arithmetic.slack(latents).tolist()
    images = Images(list(range(len(latents))), [0] * len(latents), slack, sampler.quantize(latents))
    Engine(sampler, threefry(0), counts, decided, status).run(images)
    status.show()


def test_batches_are_full_at_every_look_and_progress_is_reported():
    sampler = Counting(network(), DIM, sigma=0.5, tile=(4, 16))
    sampler.log, lines = [], []
    counts = Counts(make_schedule("staged", 100, N, 16), sampler.num_classes)
    sample(counts, sampler, MANY, lines)
    reached = np.array([len(image.looks) for image in counts.images.values()])
    before = 0
    for number, stop in enumerate(counts.schedule.stops["estimation"]):
        images = int((reached > number).sum())
        launches = [entry for entry in sampler.log if entry[0] == N and before <= entry[1] < stop]
        tiles = sum(first == before for _, first, _ in launches)
        assert tiles == -(-images // 4)
        before = stop
    assert "23 of 23 images decided" in lines[-1]
    assert "samples per image" in lines[-1]
    assert "samples/s" in lines[-1]


def test_the_time_left_is_that_of_whole_batches(monkeypatch):
    """Near the end few images are left in a batch, which takes as long as a full one."""
    clock, lines, schedule = [0.0], [], make_schedule("staged", 100, N, 16)
    monkeypatch.setattr(status_module, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    status = Status(schedule, 34, lines.append)

    def images(numbers, n):
        looks, counts = np.array([[n, 0]]), {"selection": np.array([100, 0]), "estimation": np.array([n, 0])}
        return [types.SimpleNamespace(idx=idx, counts=counts, looks=looks, reached=1) for idx in numbers]

    status.finish(images([0], 1000))  # by an earlier session
    status.count(images(range(1, 33), 0), 100, 32)  # rates are measured from the end of this launch
    clock[0] = 10.0
    status.count(images(range(1, 33), N), N, 32)
    status.finish(images(range(1, 33), N))
    status.show()
    mean, seconds = (1000 + 32 * N) / 33, 10 * (100 + N) / N
    assert lines[-1].startswith(f"    33 of 34 images decided  {mean:,.0f} samples per image  16,000 samples/s")
    assert lines[-1].endswith(f"  at most {seconds:.1f} s left")
    status.finish(images([33], N))
    status.show()
    assert lines[-1].startswith("    34 of 34 images decided")
    assert "left" not in lines[-1]


def test_progress_says_first_that_it_compiles():
    lines = []
    classifier = smoothing.SmoothedClassifier(linear_head, sigma=0.5, tile=(4, 16))
    for _ in range(2):
        classifier.certify(LATENTS, key=threefry(0), n=100, progress=lines.append)
    assert lines[0] == "compiling the head ..."
    assert lines.count(lines[0]) == 1


def test_an_interrupted_engine_resumes_to_the_same_counts(staged):
    sampler = Sampler(network(), DIM, sigma=0.5, tile=(4, 16))
    counts = Counts(make_schedule("staged", 100, N, 16), sampler.num_classes)
    for calls in (1, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            sample(counts, sampler, MANY, stop_after=calls)
    sample(counts, sampler, MANY)
    assert sampler.traces == 1
    np.testing.assert_array_equal([counts.images[i].looks[-1] for i in range(23)], staged.counts)


# ---------------------------------------------------------------------------------------------------------- prediction


def predict(latents=LATENTS, head=linear_head, **changes):
    return smoothing.predict(head, latents, **({"sigma": 0.5, "key": threefry(0), "n": 500, "tile": (5, 16)} | changes))


def test_prediction_is_the_side_of_a_linear_boundary_or_abstains_on_it():
    margin = (LATENTS.reshape(5, -1) @ W.ravel().astype(np.float64) + BIAS) / np.linalg.norm(W)
    np.testing.assert_array_equal(predict(n=20_000), np.where(margin > 0, 0, 1))
    direction = W.astype(np.float64) / np.linalg.norm(W) ** 2
    on_the_boundary = LATENTS - (margin * np.linalg.norm(W))[:, None, None, None] * direction
    assert (predict(on_the_boundary) == -1).all()


@pytest.mark.parametrize("tau", [0.0, 1e-9])
def test_prediction_is_the_two_sided_binomial_test_of_the_two_leaders(tau):
    rng = np.random.default_rng(0)
    counts = rng.multinomial(200, [0.4, 0.3, 0.2, 0.1], 300)
    got = leaders(counts, 0.01, tau)
    assert 0.2 < (got == -1).mean() < 0.95
    for row, answer in zip(counts, got, strict=True):
        first, second = np.sort(row)[::-1][:2]
        p = stats.binomtest(int(first), int(first + second), 0.5).pvalue
        if not 0.0099 < p < 0.0101:
            assert answer == (row.argmax() if p <= 0.01 else -1)


def wrong_answers(alpha, trials, test):
    """How often a test returns a class although two classes are equally likely; each such answer is an error."""
    counts = np.random.default_rng(0).multinomial(500, [0.5, 0.5], trials)
    return int((test(counts, alpha, 0.0) != -1).sum())


@pytest.mark.parametrize("trials", [5000, pytest.param(100_000, marks=pytest.mark.soak)])
def test_prediction_abstains_between_equals_and_a_one_sided_test_is_caught(trials):
    def one_sided(counts, alpha, tau):
        return leaders(counts, 2 * alpha, tau)

    found = wrong_answers(0.05, trials, leaders), wrong_answers(0.05, trials, one_sided)
    print(
        f"\nprediction between equals, alpha .05, {trials} trials: {found[0] / trials:.4f}, "
        f"one-sided {found[1] / trials:.4f}"
    )
    assert stats.binom.sf(found[0] - 1, trials, 0.05) > 1e-6
    assert stats.binom.sf(found[1] - 1, trials, 0.05) < 1e-6


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"n": 0}, "n must be a whole number"),
        ({"alpha": 0.0}, "alpha"),
        ({"sigma": 0.0}, "sigma"),
        ({"latents": np.zeros((0, 3))}, "N >= 1"),
        ({"arithmetic": "exact"}, "unknown arithmetic"),
    ],
)
def test_bad_input_to_predict_is_refused(changes, why):
    with pytest.raises(UserError, match=why):
        predict(**changes)
