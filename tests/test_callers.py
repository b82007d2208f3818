"""Arguments of callers: any numbers give a valid result or an error of one line."""

import fractions
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from lsrs_jax.certification.margin import certified_margin
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.validate import real
from lsrs_jax.smoothing import certified_radius, certify, confidence, from_counts, predict
from lsrs_jax.smoothing.derivation import Derivation
from lsrs_jax.smoothing.schedule import make_schedule
from support import threefry
from support.hostile import answer, examples

# ------------------------------------------------------------------------------------------------- numbers from callers

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 10**400, 2**27, 2**27 + 1, 2**53, 2**63]),
    st.floats(),
    st.sampled_from([5e-324, 1e-320, 1e-100, 1e-111, 0.5, 1 - 2.0**-53, 1.0, 1e308, 2.0**60, 2.0**-200]),
    st.complex_numbers(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.sampled_from(["0.5", np.float16(0.5), np.longdouble(0.5), np.int8(3), np.complex64(0.5)]),
    st.fractions(),
    st.decimals(),
)
WRONG = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.lists(st.lists(SCALARS, max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=2), SCALARS, max_size=2),
    st.builds(object),
    st.builds(lambda: np.zeros((2, 0))),
    st.builds(lambda: np.array([["a", "b"]])),
    st.builds(lambda: np.array([1 + 1j, 2])),
    st.builds(lambda: np.array([1, 2], "m8[s]")),
    st.builds(lambda: threefry(0)),
    st.just(min),
)
PROBABILITIES = st.floats(0, 1) | SCALARS


@examples(300)
@given(st.integers(-2, 12) | WRONG, st.integers(-1, 12) | WRONG, PROBABILITIES | WRONG)
@example(2, 10, 1e-100)
@example(9, 10, 5e-324)
@example(1, 10, 1e-320)
@example(2**61, 2**62, 0.001)
@example(np.array([2**63], np.uint64), np.array([2**63], np.uint64), 0.1)
@example([1, 2], [3, 4, 5], 0.1)
def test_confidence_bounds_are_ordered_probabilities_or_one_line(k, n, alpha):
    low, high = (answer(bound, k, n, alpha) for bound in (confidence.lower, confidence.upper))
    assert (low is None) == (high is None)
    if low is not None:
        assert ((low >= 0) & (low <= 1) & (high >= 0) & (high <= 1)).all()
        share = np.asarray(k) / np.asarray(n)
        assert (low <= share).all() or np.any(np.asarray(alpha, float) > 0.5)
        assert (high >= share).all() or np.any(np.asarray(alpha, float) > 0.5)


@examples(300)
@given(st.integers(1, 2**27), st.floats(0, 1), st.integers(0, 20), st.floats(-110, -0.001), st.booleans())
@example(1000, 0.0, 3, -100.0, False)
@example(2**27, 0.0, 5, -90.0, False)
def test_confidence_bounds_hold_for_every_count_and_level(n, share, offset, exponent, from_above):
    """By SciPy's binomial distribution, the tail probability at each bound is at most alpha."""
    k = min(int(share * n) + offset, n)
    k = n - k if from_above else k
    alpha = 10.0**exponent
    low, high = float(confidence.lower(k, n, alpha)), float(confidence.upper(k, n, alpha))
    tolerance = 1e-7 + 1e-9 * n**0.5  # rounding of the logarithms in SciPy
    if k > 0:
        assert stats.binom.logsf(k - 1, n, low) <= np.log(alpha) + tolerance
    if k < n:
        assert high == 1 or stats.binom.logcdf(k, n, high) <= np.log(alpha) + tolerance
    assert confidence.lower(k, n, alpha) <= confidence.lower(k, n, math.sqrt(alpha)) * (1 + 1e-9)
    assert confidence.upper(k, n, alpha) >= confidence.upper(k, n, math.sqrt(alpha)) - 1e-9


RADIUS_ARGUMENTS = {
    "p_a_lower": st.floats(0, 1),
    "p_b_upper": st.floats(0, 1),
    "sigma": st.floats(2.0**-60, 2.0**60),
    "lipschitz": st.floats(2.0**-200, 2.0**200),
    "slack": st.floats(0, 1) | st.floats(0, 1.7e308),
}


@examples(300)
@given(st.fixed_dictionaries(RADIUS_ARGUMENTS), st.sampled_from([None, *RADIUS_ARGUMENTS]), WRONG)
@example({"p_a_lower": 0.9, "p_b_upper": 0.1, "sigma": 0.5, "lipschitz": 2.0**-200, "slack": 1e308}, None, None)
@example({"p_a_lower": [0.9] * 3, "p_b_upper": [0.1] * 2, "sigma": 0.5}, None, None)
@example({"p_a_lower": 5e-324, "p_b_upper": 0.1, "sigma": 0.5}, None, None)
def test_a_radius_is_finite_and_shrinks_with_the_slack_or_is_refused(arguments, name, wrong):
    arguments = arguments if name is None else arguments | {name: wrong}
    radius = answer(certified_radius, **arguments)
    if radius is not None:
        assert (np.isfinite(radius) & (radius >= 0)).all()
        with_slack = certified_radius(**arguments | {"slack": np.asarray(arguments.get("slack", 0.0), float) + 0.125})
        assert (with_slack <= radius).all()
        assert (
            (with_slack < radius).all() or (radius == 0).any() or (radius * arguments.get("lipschitz", 1.0) > 1e9).any()
        )


@st.composite
def counts_arguments(draw):
    """Valid arguments of `from_counts`: small or large counts, with looks or without."""
    images, classes = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    sizes = st.integers(0, 30) | st.integers(0, 2**24)

    def counts(*shape):
        found = [draw(sizes) for _ in range(math.prod(shape))]
        return np.array(found).reshape(shape) + np.eye(classes, dtype=int)[0]

    arguments = {"selection": counts(images, classes), "estimation": counts(images, classes)}
    if draw(st.booleans()):
        looks = np.sort(draw(st.lists(st.integers(1, 1000), min_size=1, max_size=3, unique=True)))
        reached = [draw(st.integers(1, len(looks))) for _ in range(images)]
        steps = np.diff(looks, prepend=0)
        shares = [np.array([draw(st.integers(0, int(step))) for step in steps]) for _ in range(images)]
        parts = [
            np.cumsum(np.stack([share, steps - share, *[0 * share] * (classes - 2)], axis=1), axis=0)
            for share in shares
        ]
        parts = [part[:number] for part, number in zip(parts, reached, strict=True)]
        arguments |= {"estimation": parts, "looks": tuple(looks.tolist())}
    return arguments


COUNT_ARGUMENTS = {
    "sigma": st.floats(0.01, 4),
    "alpha": st.floats(1e-100, 0.999),
    "bound": st.sampled_from(["binary", "multiclass"]),
    "lipschitz": st.floats(0.1, 10),
    "slack": st.floats(0, 0.1),
    "tau": st.floats(0, 1e-6),
}


def check_certificates(found):
    assert (np.isfinite(found.radius) & (found.radius >= 0)).all()
    np.testing.assert_array_equal(found.abstain, found.radius == 0)
    np.testing.assert_array_equal(found.abstain, found.predict == -1)
    for bound in (found.p_a_lower, found.p_b_upper):
        assert ((bound >= 0) & (bound <= 1)).all()
    assert (found.p_a_lower > found.p_b_upper)[~found.abstain].all()
    np.testing.assert_array_equal(found.n, found.counts.sum(axis=1))


@examples(200)
@given(counts_arguments(), st.fixed_dictionaries(COUNT_ARGUMENTS))
def test_certificates_are_sound_and_grow_with_alpha(counts, settings):
    found = from_counts(**counts, **settings)
    check_certificates(found)
    if settings["bound"] == "binary":  # the buckets depend on alpha
        larger = from_counts(**counts, **settings | {"alpha": math.sqrt(settings["alpha"])})
        assert (larger.radius >= found.radius * (1 - 1e-6) - 1e-9).all()
    for name, change in (("sigma", 0.5), ("lipschitz", 2.0), ("slack", 1.5), ("tau", 2.0)):
        less = from_counts(**counts, **settings | {name: settings[name] * change})
        assert (less.radius <= found.radius).all(), name


@examples(300)
@given(counts_arguments(), st.sampled_from(["selection", "estimation", "looks", *COUNT_ARGUMENTS]), WRONG)
@example({"selection": [[2**62] * 5], "estimation": [[2**62] * 5]}, "tau", 0.0)
@example({"selection": [[9, 1]], "estimation": [[[9, 1]]]}, "looks", [10.0])
@example({"selection": [[9, 1]], "estimation": [[[9, 1]]]}, "looks", 10)
@example({"selection": [[9, 1]], "looks": (10,)}, "estimation", 5)
@example({"selection": [[9, 1]], "estimation": [[9, 1]]}, "slack", [[1], [1, 2]])
@example({"selection": [[9, 1]], "estimation": [[9, 1]]}, "bound", np.zeros(2))
@example({"selection": [[9, 1]], "estimation": [[9, 1]]}, "sigma", np.float16(0.5))
@example({"selection": [[9, 1]], "estimation": [[9, 1]]}, "sigma", np.complex128(0.5))
def test_wrong_counts_certify_nothing_or_are_refused(counts, name, wrong):
    arguments = {"sigma": 0.5, "alpha": 0.01} | counts | {name: wrong}
    found = answer(from_counts, **arguments)
    if found is not None:
        check_certificates(found)


@examples(200)
@given(
    st.sampled_from(["fixed", "staged", "anytime"]) | WRONG,
    st.integers(1, 100) | WRONG,
    st.integers(1, 10**6) | WRONG,
    st.integers(1, 5000) | WRONG,
)
@example("staged", 1, 10_000, 0)
@example("fixed", 1, 1, 0)
@example("fixed", 1, 1, 1.5)
@example("staged", 1, 10**400, 7)
@example(np.array(["fixed"] * 2), 1, 1, 1)
def test_a_schedule_has_growing_looks_or_is_refused(kind, n0, n, samples):
    plan = answer(make_schedule, kind, n0, n, samples)
    if plan is not None:
        assert plan.n == n
        assert plan.n0 == n0
        assert all(a < b for a, b in zip(plan.looks, plan.looks[1:], strict=False))
        assert all(look % samples == 0 for look in plan.looks[:-1])
        assert plan.next_stop((0, 0)) == ("selection", 0, -(-n0 // samples))
        assert len(plan.looks) == 1 or kind != "fixed"


DERIVATION = {name: value for name, value in COUNT_ARGUMENTS.items() if name != "slack"} | {
    "radii": st.none() | st.lists(st.floats(0, 1e300), max_size=3).map(tuple),
    "epsilon": st.floats(1e-300, 1e60),
}


@examples(200)
@given(st.fixed_dictionaries(DERIVATION), st.sampled_from([None, *DERIVATION]), WRONG, st.integers(1, 10**5))
@example({"sigma": 0.5, "alpha": 0.1}, "radii", 5, 10)
@example({"sigma": 0.5, "alpha": 0.1}, "radii", (10**400,), 10)
@example({"sigma": 0.5, "alpha": 0.1, "lipschitz": np.float64(2.0**-199)}, "epsilon", np.float64(1e300), 2000)
@example({"sigma": 0.5, "alpha": 0.1}, "tau", "a", 10)
def test_a_derivation_decides_images_at_their_last_look_or_is_refused(arguments, name, wrong, n):
    arguments = arguments if name is None else arguments | {name: wrong}
    derivation = answer(Derivation, **arguments)
    if derivation is None:
        return
    plan = make_schedule("staged", 10, n, 8)
    assert 0 <= derivation.largest_radius(plan) < math.inf

    def image(looks):
        cumulative = np.array([[look - look // 4, look // 4] for look in looks])
        counts = {"selection": np.array([8, 2]), "estimation": cumulative[-1]}
        return types.SimpleNamespace(looks=cumulative, counts=counts, slack=1e-3, classes=2, reached=len(looks))

    first, last = image(plan.looks[:1]), image(plan.looks)
    decided = derivation.decided(plan, [first, last])
    assert decided[1]
    check_certificates(derivation.certificates(plan, [first, last]))


LOGITS = st.lists(st.lists(st.floats(-1e300, 1e300) | st.floats(-9, 9), min_size=3, max_size=3), max_size=3)


@examples(300)
@given(LOGITS | WRONG, LOGITS | WRONG, st.floats(2.0**-200, 2.0**200) | WRONG, st.floats(0, 1e308) | WRONG)
@example([[1e308, -1e308]], None, 1.0, 0.0)
@example([[1e300, 0.0]], None, 2.0**-200, 0.0)
@example([[1.0, 2.0]], [[1e308, -1e308]], 1.0, 0.0)
@example([[1.0, 2.0]], np.zeros((0, 2)), 1.0, 0.0)
@example([[1.0, 2.0]], None, 2.0**-200, 1e308)
@example([["1", "2"]], None, 1.0, 0.0)
@example([[1j, 2]], None, 1.0, 0.0)
def test_a_margin_is_finite_or_refused(logits, weights, lipschitz, slack):
    found = answer(certified_margin, logits, weights, lipschitz=lipschitz, slack=slack)
    if found is not None:
        predicted, radius = found
        assert (np.isfinite(radius) & (radius >= 0)).all()
        np.testing.assert_array_equal(predicted, np.argmax(np.asarray(logits, float), axis=1))


NUMBERS = (
    st.floats(-9, 9) | st.floats(-1e300, 1e300) | st.sampled_from([0.0, 5e-324, 1e-310, 1e-160, 1.0, 1 + 2.0**-52])
)


@examples(300)
@given(st.tuples(NUMBERS, NUMBERS), st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=3))
@example((1.0, 0.0), [(3.0, 3.0), (1.0, 1 + 2.0**-52)])
@example((1.0, 0.0), [(1.0, 1.0), (1e-160, 0.0)])
@example((1e-20, 0.0), [(1e300, -1e300)])
@example((5e-324, 0.0), [(1.0, -1.0)])
def test_a_margin_is_never_rounded_up(logits, weights):
    """Checks radius² · ‖w_y − w_j‖² ≤ (z_y − z_j)² in exact arithmetic."""
    found = answer(certified_margin, [logits], weights)
    if found is not None:
        exact = fractions.Fraction
        gap = exact(logits[0]) - exact(logits[1])
        distance = sum((exact(a) - exact(b)) ** 2 for a, b in weights)
        assert exact(float(found[1][0])) ** 2 * distance <= gap**2


# ---------------------------------------------------------------------------------------------- certify and predict

WEIGHTS = np.array([[1.0, -1.0, 0.5], [0.5, 1.0, -1.0]], np.float32)


def head(z):
    return z @ WEIGHTS


CALL = {"head": head, "latents": np.array([[1.0, 0.5], [-0.5, 1.0]]), "sigma": 0.5, "n": 20, "tile": (2, 4)}
OWN = {
    "head": st.sampled_from([None, 3, "head", print, lambda z: None, lambda z: z[:, :1], lambda z: (z, z), lambda: 0]),
    "latents": st.lists(st.floats(), max_size=3).map(lambda row: np.array([row]))
    | st.sampled_from([np.full((1, 2), np.nan), np.full((1, 2), 1e200), np.zeros((0, 2)), [[1.0], [1.0, 2.0]]])
    | st.sampled_from([np.zeros((1, 2), object), np.ones((1, 2), np.longdouble) * np.longdouble("1e4000")]),
    "tile": st.sampled_from([(1, 1), (0, 4), (2,), (2.0, 4), (10**400, 2), (2**40, 2**40), "ab", [2, 4], (True, 4)]),
    "key": st.sampled_from([jax.random.key(0, impl="rbg"), jax.random.PRNGKey(0), jax.random.split(threefry(0))]),
    "n": st.sampled_from([2**27 + 1, 2**63, 10**400, np.int64(12)]),
    "progress": st.just(min),
}
NAMES = ["sigma", "alpha", "arithmetic", "noise", "spmd", *OWN]
MORE = ["n0", "bound", "schedule", "radii", "epsilon", "lipschitz", "slack"]


@st.composite
def one_wrong(draw, names):
    name = draw(st.sampled_from(names))
    return {name: draw((OWN[name] | WRONG) if name in OWN else WRONG)}


@examples(100)
@given(one_wrong([*NAMES, *MORE]))
@example({"latents": np.full((1, 2), 1e200), "arithmetic": "float32"})
@example({"latents": np.full((1, 2), 1e30), "arithmetic": "float32"})
@example({"tile": (10**400, 1)})
@example({"tile": (2, 10**400)})
@example({"n": 10**400})
@example({"n": 2**27 + 1})
@example({"n0": 10**400})
@example({"latents": threefry(0)})
@example({"bound": np.zeros(2)})
@example({"slack": 1e308})
@example({"sigma": np.float16(0.5)})
@example({"lipschitz": np.float16(0.5)})
@example({"radii": 10**400})
def test_wrong_arguments_of_certify_are_one_line(changes):
    arguments = CALL | {"key": threefry(0), "n0": 5} | changes
    found = answer(certify, **arguments)
    if found is not None:
        check_certificates(found)
        assert len(found) == len(arguments["latents"])


@examples(30)
@given(one_wrong([name for name in NAMES if name != "progress"]))
@example({"n": 10**400})
@example({"alpha": np.float16(1e-7)})
def test_wrong_arguments_of_predict_are_one_line(changes):
    arguments = CALL | {"key": threefry(0)} | changes
    found = answer(predict, **arguments)
    if found is not None:
        assert found.shape == (len(arguments["latents"]),)
        assert set(found.tolist()) <= {-1, 0, 1, 2}


@examples(8)
@given(
    st.integers(1, 3),
    st.sampled_from([-1.0, 0.0, 1e-300, 3.0, 40.0]),
    st.fixed_dictionaries(
        {
            "n0": st.integers(1, 20),
            "n": st.integers(1, 2500),
            "alpha": st.floats(1e-100, 0.999),
            "bound": st.sampled_from(["binary", "multiclass"]),
            "schedule": st.sampled_from(["fixed", "staged", "anytime"]),
            "radii": st.none() | st.lists(st.floats(0, 2), max_size=2),
            "lipschitz": st.floats(2.0**-200, 2.0**200),
            "slack": st.floats(0, 1) | st.floats(0, 1e308),
            "arithmetic": st.sampled_from(["sound", "float32"]),
            "noise": st.sampled_from(["shared", "independent"]),
        }
    ),
)
def test_valid_arguments_of_certify_always_certify(images, scale, arguments):
    latents = scale * np.arange(1.0, 2 * images + 1).reshape(images, 2)
    found = certify(head, latents, sigma=0.5, key=threefry(0), tile=(2, 4), **arguments)
    check_certificates(found)
    assert len(found) == images
    assert (found.n <= arguments["n"]).all()


def test_an_array_of_no_dimensions_is_the_number_it_holds():
    for number, value in ((3, np.array(3)), (0.25, jnp.float32(0.25)), (-2, jnp.int32(-2)), (0.5, np.float32(0.5))):
        assert real(value) == number
    for value in (np.array([0.25]), jnp.ones(1), jnp.array(True), np.array(1j), np.array("1"), np.array(None)):
        assert math.isnan(real(value))
    jax.make_jaxpr(lambda value: jnp.float32(math.isnan(real(value))))(0.5)
    arrays = certify(**CALL | {"sigma": jnp.float32(0.5), "alpha": np.array(0.01)}, key=threefry(0))
    numbers = certify(**CALL | {"alpha": 0.01}, key=threefry(0))
    np.testing.assert_array_equal(arrays.radius, numbers.radius)


MASKED = np.ma.array([[0.3, 0.4], [0.1, 0.2]], mask=[[False, True], [False, False]])
MASKED_COUNTS = np.ma.array([[5, 5], [6, 4]], mask=MASKED.mask)
PLAIN = np.array([[5, 5], [6, 4]])
MASKED_CALLS = {
    "latents": lambda: certify(**CALL | {"latents": MASKED}, key=threefry(0)),
    "list of latents": lambda: certify(**CALL | {"latents": list(MASKED)}, key=threefry(0)),
    "predict": lambda: predict(**CALL | {"latents": MASKED}, key=threefry(0)),
    "slack": lambda: certify(**CALL, slack=MASKED[0], key=threefry(0)),
    "radii": lambda: certify(**CALL, radii=MASKED[0], schedule="staged", key=threefry(0)),
    "sigma": lambda: certify(**CALL | {"sigma": np.ma.masked}, key=threefry(0)),
    "selection": lambda: from_counts(MASKED_COUNTS, PLAIN, sigma=0.5, alpha=0.1),
    "estimation": lambda: from_counts(PLAIN, MASKED_COUNTS, sigma=0.5, alpha=0.1),
    "looks": lambda: from_counts(PLAIN, [MASKED_COUNTS[:1], PLAIN[:1]], looks=[10], sigma=0.5, alpha=0.1),
    "probability": lambda: certified_radius(MASKED, 0.1, 0.5),
    "count": lambda: confidence.lower(MASKED_COUNTS, 10, 0.1),
    "logits": lambda: certified_margin(MASKED),
    "weights": lambda: certified_margin(PLAIN, MASKED),
}


@pytest.mark.parametrize("name", MASKED_CALLS)
def test_masked_entries_are_refused(name):
    with pytest.raises(UserError, match="masked"):
        MASKED_CALLS[name]()


def test_masked_arrays_without_a_masked_entry_are_arrays():
    latents = np.ma.array(CALL["latents"])
    found, expected = (certify(**CALL | {"latents": z}, key=threefry(0)) for z in (latents, CALL["latents"]))
    np.testing.assert_array_equal(found.counts, expected.counts)
