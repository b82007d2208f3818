"""The composition of two classifiers: the theorem on random classifiers, the counterexample, and its certificates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

import verify_certificates
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing import confidence
from lsrs_jax.smoothing.composition import Composed, answers, compose, composed_leaders, composed_scores
from lsrs_jax.smoothing.counts import Counts, Row
from lsrs_jax.smoothing.derivation import Derivation, certified_radius
from lsrs_jax.smoothing.schedule import Schedule

CLASSES = 4


# ------------------------------------------------------------------------------------------------------- the theorem
def margins(rng, d):
    """The exact distances of a nearest-neighbour classifier to its boundary: a deterministic classifier."""
    sites = rng.normal(0, 1, (3 * CLASSES, d))

    def scores(x):
        nearest = np.linalg.norm(x[:, None] - sites, axis=2).reshape(len(x), CLASSES, 3).min(axis=2)
        return -(nearest + strongest(-nearest)) / 2

    return scores


def strongest(scores):
    """For every class, the largest score of another class."""
    return np.stack([np.delete(scores, c, axis=1).max(axis=1) for c in range(scores.shape[1])], axis=1)


def votes(rng, d):
    """σΦ⁻¹(p_c), exactly, for a base classifier that picks a random half-space rule; some p exceed 1/2, others not."""
    rules, sigma = 8, rng.uniform(0.1, 0.6)
    normals = rng.normal(0, 1, (rules, d))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    offsets, weights = rng.normal(0, 0.7, rules), rng.dirichlet(np.full(rules, 0.5))
    sides = np.array([rng.choice(CLASSES, 2, replace=False) for _ in range(rules)])

    def scores(x):
        inside, p = special.ndtr((x @ normals.T + offsets) / sigma), np.zeros((len(x), CLASSES))
        for rule, (one, other) in enumerate(sides):
            p[:, one] += weights[rule] * inside[:, rule]
            p[:, other] += weights[rule] * (1 - inside[:, rule])
        return sigma * special.ndtri(np.clip(p, 1e-300, 1 - 1e-16))

    return scores


def decide(a, b, kappa):
    """The composed classifier, from its definition."""
    return np.where(b.max(axis=1) > kappa, b.argmax(axis=1), a.argmax(axis=1))


def violations(rng, points, certify, kappa=0.0):
    """Points inside the certified balls of random classifiers at which the class is another one; and all points."""
    wrong = total = 0
    while total < points:
        d = int(rng.integers(2, 4))
        a, b = margins(rng, d), votes(rng, d)
        x = rng.normal(0, 1, (200, d))
        predict, radius = certify(a(x), b(x), kappa)
        certified = np.flatnonzero((predict >= 0) & (radius > 0))
        x, predict, radius = (np.repeat(part[certified], 25, axis=0) for part in (x, predict, radius))
        step = rng.normal(0, 1, x.shape)
        share = np.where(rng.random(len(x)) < 0.5, 1 - 1e-9, rng.random(len(x)))
        near = x + (step.T / np.linalg.norm(step, axis=1) * share * radius).T
        wrong += int((decide(a(near), b(near), kappa) != predict).sum())
        total += len(x)
    return wrong, total


def composition(a, b, kappa):
    scores = compose(a, b, kappa=kappa)
    return answers(scores), scores.max(axis=1)


def larger_certificate(a, b, kappa):
    """A wrong procedure: the larger of the certificates of the votes and of the fallback."""
    predict, radius = np.where(a.max(axis=1) > b.max(axis=1), a.argmax(axis=1), b.argmax(axis=1)), np.maximum(a, b)
    return predict, radius.max(axis=1)


POINTS = [20_000, pytest.param(1_000_000, marks=pytest.mark.soak)]


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("kappa", [0.0, 0.3])
def test_no_point_inside_a_composed_certificate_has_another_class(points, kappa):
    wrong, total = violations(np.random.default_rng(7), points, composition, kappa)
    print(f"{wrong} violations in {total:,} points, kappa {kappa}")
    assert wrong == 0
    assert violations(np.random.default_rng(7), 20_000, larger_certificate, kappa)[0] > 100


def test_the_larger_of_two_certificates_is_no_certificate():
    """In one dimension D says A below 1 and S says A below .2: the larger one certifies A at 0 up to 1."""
    x = np.array([[0.0], [0.6]])
    d, s = (np.concatenate([edge - x, x - edge], axis=1) for edge in (1.0, 0.2))
    predict, radius = larger_certificate(d, s, 0.0)
    assert (predict[0], radius[0]) == (0, 1.0)
    assert decide(d, s, 0.0)[1] == 1  # at .6 the composition says B
    predict, radius = composition(d, s, 0.0)
    assert (predict[0], radius[0]) == (0, 0.2)


def test_a_chain_of_compositions_is_certified_too():
    """Scores of a composition are scores again: votes of two levels of noise, then a margin."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        a, b, c = margins(rng, 2), votes(rng, 2), votes(rng, 2)
        x = rng.normal(0, 1, (100, 2))

        def chain(x, a=a, b=b, c=c):
            return compose(compose(a(x), b(x), kappa=0.1), c(x))

        scores = chain(x)
        assert ((scores > 0).sum(axis=1) <= 1).all()
        step = rng.normal(0, 1, x.shape)
        near = x + (step.T / np.linalg.norm(step, axis=1) * scores.max(axis=1) * (1 - 1e-9)).T
        certified = scores.max(axis=1) > 0
        assert (answers(chain(near)) == answers(scores))[certified].all()
        # 1-Lipschitz in every class
        assert (np.abs(chain(near) - scores).max(axis=1) <= np.linalg.norm(near - x, axis=1) * (1 + 1e-9)).all()


def test_the_votes_keep_their_radius_and_the_fallback_answers_the_rest():
    rng = np.random.default_rng(2)
    a, b = (make(rng, 3)(rng.normal(0, 1, (5000, 3))) for make in (margins, votes))
    predict, radius = composition(a, b, 0.0)
    of_votes = b.max(axis=1) > 0
    assert (predict == decide(a, b, 0.0)).all()
    assert (radius >= b.max(axis=1))[of_votes].all()
    assert (radius > b.max(axis=1) + 0.01)[of_votes].any()
    assert (radius[~of_votes] <= a.max(axis=1)[~of_votes]).all()
    assert (~of_votes).any()


def test_compositions_of_jax_are_those_of_numpy():
    rng = np.random.default_rng(3)
    a, b = (make(rng, 2)(rng.normal(0, 1, (50, 2))) for make in (margins, votes))
    found = jax.jit(composed_scores)(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    np.testing.assert_allclose(found, compose(a, b), atol=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "kappa", "words"),
    [
        ([[1.0, -1.0]], [[0.2, 0.1]], 0.0, "first: the scores of two classes"),
        ([[1.0, -0.5]], [[0.2, -0.2]], 0.0, "fallback: the scores of two classes"),
        ([[1.0, -1.0, -2.0]], [[0.2, -0.2]], 0.0, "equal shapes"),
        ([[1.0, -1.0]], [[0.2, -0.2]], -0.1, "kappa >= 0"),
        ([[np.nan, -1.0]], [[0.2, -0.2]], 0.0, "finite"),
        ([1.0, -1.0], [0.2, -0.2], 0.0, "shape"),
    ],
)
def test_scores_that_prove_nothing_are_refused(a, b, kappa, words):
    with pytest.raises(UserError, match=words):
        compose(a, b, kappa=kappa)


# -------------------------------------------------------------------------------------------------- from counts
N0, N, ALPHA = 50, 2000, 0.05
SCHEDULES = {"fixed": Schedule(N0, (N,), 16), "staged": Schedule(N0, (208, 496, 1008, N), 16)}
SCHEDULES["anytime"] = Schedule(N0, (208, 496, 1008, N), 16, anytime=True)


def sampled(rng, p, trials, schedule, decided=None):
    """Images of the class probabilities `p`, sampled until they are decided or to the end."""
    counts, pending, first, before = Counts(schedule, len(p)), np.arange(trials), 0, 0
    blocks = schedule.stops["selection"][0]
    counts.append(
        Row(i, 0, 0.0, "selection", 0, blocks, row, 0.0) for i, row in enumerate(rng.multinomial(N0, p, trials))
    )
    for look, stop in zip(schedule.looks, schedule.stops["estimation"], strict=True):
        drawn = zip(pending.tolist(), rng.multinomial(look - before, p, len(pending)), strict=True)
        counts.append(Row(i, 0, 0.0, "estimation", first, stop, row, 0.0) for i, row in drawn)
        first, before = stop, look
        if decided is not None:
            pending = pending[~decided(schedule, [counts.images[i] for i in pending.tolist()])]
    return [counts.images[i] for i in range(trials)]


def exact(p, fallback, margin):
    """Class and radius (σ = 1) of the composition if the probabilities are known; the radius is 0 at a boundary."""
    scores = np.full((1, len(p)), -margin)
    scores[0, fallback] = margin
    found = composed_scores(scores, special.ndtri(np.array([p])))
    return found[0].argmax(), max(found.max(), 0.0)


def wrong_share(found, p, fallback, margin):
    predict, radius = found
    true, limit = exact(p, fallback, margin)
    return int(((predict >= 0) & (radius > 0) & ((predict != true) | (radius > limit * (1 + 1e-9)))).sum())


def ours(rng, p, trials, schedule, fallback, margin, alpha):
    derivation = Composed(1.0, alpha, "multiclass", answers=dict.fromkeys(range(trials), (fallback, margin)))
    stop = derivation.decided if schedule.staged else None
    found = derivation.certificates(schedule, sampled(rng, p, trials, schedule, stop))
    return found.predict, found.radius


def whole_alpha_for_each_bound(rng, p, trials, schedule, fallback, margin, alpha):
    """A wrong procedure: every bound has the whole of α, and the counts that they bound choose what is answered."""
    images = sampled(rng, p, trials, schedule)
    last, rows = np.stack([image.looks[-1] for image in images]), np.arange(trials)
    leader = np.stack([image.counts["selection"] for image in images]).argmax(axis=1)
    others = last.copy()
    others[:, fallback] = -1
    p_a = confidence.lower(last[rows, leader], N, alpha)
    p_b = confidence.upper(others.max(axis=1), N, alpha)
    by_votes = certified_radius(p_a, 1 - p_a, 1.0)
    by_fallback = np.minimum(margin, certified_radius(1 - p_b, p_b, 1.0))
    return np.where(by_votes > 0, leader, fallback), np.where(by_votes > 0, by_votes, by_fallback)


CASES = {
    "one half": ((0.5, 0.5), 1, 9.0),
    "votes": ((0.6, 0.3, 0.1), 1, 9.0),
    "silent": ((0.4, 0.35, 0.15, 0.1), 1, 9.0),
    "near fallback": ((0.4, 0.35, 0.15, 0.1), 0, 0.1),
    "agree": ((0.55, 0.35, 0.1), 0, 9.0),
    "ten": ((0.3, 0.2, 0.15, *[0.05] * 7), 2, 0.4),
}


@pytest.mark.parametrize("trials", [1000, pytest.param(20_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_coverage_holds(case, kind, trials):
    p, fallback, margin = CASES[case]
    found = ours(np.random.default_rng(5), p, trials, SCHEDULES[kind], fallback, margin, ALPHA)
    wrong = wrong_share(found, p, fallback, margin)
    print(f"{case}, {kind}: {wrong / trials:.4f} wrong at alpha {ALPHA}")
    assert stats.binom.sf(wrong - 1, trials, ALPHA) >= 1e-6
    assert case == "one half" or (found[0] >= 0).any()  # at one half every answer is wrong


def test_an_answer_that_is_chosen_after_the_samples_without_a_share_of_alpha_is_caught():
    trials = 5000
    p, fallback, margin = CASES["one half"]
    arguments = p, trials, SCHEDULES["fixed"], fallback, margin, ALPHA
    wrong, right = (
        wrong_share(procedure(np.random.default_rng(6), *arguments), p, fallback, margin)
        for procedure in (whole_alpha_for_each_bound, ours)
    )
    assert stats.binom.sf(wrong - 1, trials, ALPHA) < 1e-6
    assert stats.binom.sf(right - 1, trials, ALPHA) >= 1e-6


def many_images():
    """Images of random probabilities, and the answers of a fallback."""
    rng, images, given = np.random.default_rng(8), [], {}
    for idx in range(400):
        p = rng.dirichlet(np.full(6, 0.4))
        image = sampled(rng, p, 1, SCHEDULES["staged"])[0]
        image.idx, image.slack = idx, 1e-3
        images.append(image)
        given[idx] = int(rng.integers(6)) if rng.random() < 0.5 else int(p.argmax()), float(rng.choice([0.0, 0.1, 2.0]))
    return images, given


def test_the_radius_is_never_below_the_binary_one_from_the_same_bounds():
    images, given = many_images()
    settings, schedule = {"lipschitz": 1.5, "tau": 1e-9}, SCHEDULES["staged"]
    found = Composed(0.5, 0.001, "multiclass", answers=given, **settings).certificates(schedule, images)
    slack = np.array([image.slack for image in images])
    binary = certified_radius(found.p_a_lower, 1 - found.p_a_lower, 0.5, 1.5, slack)
    assert (found.radius >= binary * (1 - 1e-9)).all()
    leader = np.array([image.counts["selection"].argmax() for image in images])
    assert (found.predict == leader)[binary > 0].all()
    plain = Derivation(0.5, 0.001, **settings).certificates(schedule, images)
    more, less = (found.radius > plain.radius * 1.01).sum(), (found.radius < plain.radius * 0.99).sum()
    print(f"with the fallback {more} of {len(images)} radii are larger than without it, {less} smaller")
    assert more > less


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_program_that_stands_alone_derives_the_same(kind):
    images, given = many_images()
    schedule, settings = SCHEDULES[kind], {"lipschitz": 1.25, "tau": 1e-7}
    if kind == "fixed":
        images = [image.changed(looks=image.looks[-1:]) for image in images if image.looks[-1].sum() == N]
    found = Composed(0.5, 0.001, "multiclass", answers=given, **settings).certificates(schedule, images)
    rows = []
    for image in images:
        row = verify_certificates.Image(0, image.slack, 6)
        row.counts[0], row.looks, row.fallback = image.counts["selection"], list(image.looks), given[image.idx]
        rows.append(row)
    identity = {"stages": schedule.looks, "schedule": kind, "arithmetic": {"sigma": 0.5, "tau": 1e-7}}
    document = {"derivation": {"alpha": 0.001, "bound": "multiclass", "fallback": {}}, "identity": identity}
    columns = zip(*verify_certificates.derive(rows, document | {"format": 2}, 1.25), strict=True)
    predict, radius, p_a, p_b = map(np.array, columns)
    np.testing.assert_allclose(radius, found.radius, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(np.where(radius > 0, predict, -1), found.predict)
    np.testing.assert_allclose(p_a, found.p_a_lower, atol=1e-9)
    np.testing.assert_allclose(p_b, found.p_b_upper, atol=1e-9)
    assert len(set(found.predict.tolist())) > 3


def test_an_image_stops_when_more_samples_could_not_help_the_composition():
    images, given = many_images()
    derivation = Composed(0.5, 0.001, "multiclass", answers=given, radii=(0.25,))
    schedule = SCHEDULES["staged"]
    early = []
    for image in images:
        first = Counts(schedule, 6)
        looks = np.diff(image.looks, axis=0, prepend=0)
        first.append([Row(image.idx, 0, image.slack, "selection", 0, 4, image.counts["selection"], 0.0)])
        first.append([Row(image.idx, 0, image.slack, "estimation", 0, 13, looks[0], 0.0)])
        early.append(first.images[image.idx])
    decided = derivation.decided(schedule, early)
    now, later = (derivation.certificates(schedule, some).radius for some in (early, images))
    assert decided.mean() > 0.3
    reaches = [np.searchsorted([1e-300, 0.25], radius, side="right") for radius in (now, later)]
    assert (reaches[0] == reaches[1])[decided].mean() > 0.97


def test_binary_bounds_are_refused():
    with pytest.raises(UserError, match="multiclass"):
        Composed(0.5, 0.001, "binary")


# ------------------------------------------------------------------------------------------------------- predictions
@pytest.mark.parametrize("trials", [20_000, pytest.param(1_000_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    ("p", "fallback"),
    [((0.5, 0.5), 1), ((0.5, 0.5, 0.0), 2), ((0.51, 0.49), 1), ((0.49, 0.3, 0.21), 1), ((0.4, 0.3, 0.3), -1)],
)
def test_predictions_are_wrong_with_probability_alpha_at_most(p, fallback, trials):
    counts = np.random.default_rng(9).multinomial(500, p, trials)
    found = composed_leaders(counts, np.full(trials, fallback), ALPHA, 0.0)
    true = int(np.argmax(p)) if max(p) > 0.5 else fallback
    wrong = int(((found >= 0) & (found != true)).sum())
    assert stats.binom.sf(wrong - 1, trials, ALPHA) >= 1e-6


def test_predictions_are_clear_where_the_votes_are():
    counts = np.array([[990, 10, 0], [300, 400, 300], [500, 490, 10], [300, 400, 300]])
    assert composed_leaders(counts, np.array([1, 2, 2, -1]), 0.001, 1e-9).tolist() == [0, 2, -1, -1]
    assert composed_leaders(counts[:1], np.array([1]), 0.001, 0.6).tolist() == [-1]  # the noise explains it
