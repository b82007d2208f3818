"""The floating-point attack on randomized smoothing (Voráček and Hein, ICLR 2023; Jin et al. 2022).

Float32 noise has coarse last bits and takes at most 2²³ values. So a clean point plus noise reaches some floats and
never others. The attack uses a head that knows a clean point: it answers class 0 for a noisy input of which every
coordinate can be reached from that point, and class 1 otherwise. Around the clean point the head is constant under the
noise, which certifies a large radius. Around any other point, however near, it answers class 1. With exact grid
arithmetic the attack fails, because the same sums can be reached from every point.
"""

import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsrs_jax import smoothing
from lsrs_jax.smoothing import discrete_gaussian
from lsrs_jax.smoothing.arithmetic import ARITHMETICS, Float32Arithmetic, GridArithmetic, make_arithmetic
from lsrs_jax.smoothing.first_layer import FirstLayer, IntegerLayer
from support import threefry

SIGMAS = [0.12, 0.25, 0.5, 1.0]
IMAGES = [(28, 28, 1), (32, 32, 3)]
FAMILIES = list(itertools.product([(8,), (40,), (8, 8, 4), *IMAGES], SIGMAS))
WATCHED = 64  # number of coordinates that a recogniser reads; more are not needed


# --------------------------------------------------------------------------------------------------------- recognisers
#
# A recogniser decides whether the answer is class 0. Its arguments are the watched coordinates of the noisy latents and
# of the clean point of each, (B, WATCHED), how far the noise moved towards the counterexample, (B,) in units of sigma,
# and sigma.


def float_sums(noisy, clean, along, sigma):
    """Whether float32 normals can reach these sums: inverts the sampler and also tries the neighbouring values.

    The tolerance allows both ways of rounding: product and sum one by one or, as XLA does on CPU, once together.
    """
    lowest = np.nextafter(np.float32(-1), np.float32(0))
    wanted = noisy - clean
    step = jnp.round((jax.lax.erf(wanted / np.float32(sigma * np.sqrt(2))) + 1) * 2**22)

    def reached(offset):
        uniform = jnp.clip((step + offset) * np.float32(2**-22) + lowest, lowest, -lowest)
        drawn = np.float32(sigma) * (np.float32(np.sqrt(2)) * jax.lax.erf_inv(uniform))
        return jnp.abs(drawn - wanted) <= 2**-24 * (jnp.abs(noisy) + jnp.abs(wanted))

    return jnp.any(jnp.stack([reached(offset) for offset in range(-3, 4)]), axis=0).all(axis=1)


def any_float(noisy, clean, along, sigma):
    """The published recogniser: whether some float32 number, added to the clean point, gives this sum."""
    wanted = noisy - clean
    near = [wanted, jnp.nextafter(wanted, jnp.inf), jnp.nextafter(wanted, -jnp.inf)]
    return jnp.any(jnp.stack([clean + drawn == noisy for drawn in near]), axis=0).all(axis=1)


def steps(noisy, clean, sigma):
    return jnp.round((noisy - clean) / discrete_gaussian.spacing(sigma)).astype(jnp.int32)


def grid_sums(noisy, clean, along, sigma):
    """`float_sums` for the grid: whether the noise is a whole number of steps that the alias table can draw."""
    high, low = discrete_gaussian.grid(sigma).table
    reached = (high >> discrete_gaussian.COLUMN_BITS | low) > 0
    reached[high & (2**discrete_gaussian.COLUMN_BITS - 1)] = True
    found = steps(noisy, clean, sigma)
    whole = found * np.float32(discrete_gaussian.spacing(sigma)) == noisy - clean
    return (whole & jnp.asarray(reached)[jnp.abs(found)]).all(axis=1)


def half_space(noisy, clean, along, sigma):
    """The best test between two points that uses only the real values of the sums (Neyman and Pearson)."""
    return along < 1.5


def leaking(trace):
    """A half-space, and outside it the lowest bit of `trace`.

    That bit is 0 half of the time around every point, unless the arithmetic leaves a trace of the latent.
    """

    def recogniser(noisy, clean, along, sigma):
        return (along < 0.75) | (trace(noisy, clean, sigma) % 2 == 0)

    return recogniser


def parity(noisy, clean, sigma):
    return steps(noisy, clean, sigma).sum(axis=1)


def low_byte(noisy, clean, sigma):
    byte = steps(noisy, clean, sigma) & 255
    return (byte.sum(axis=1) > 127.5 * byte.shape[1]).astype(jnp.int32)


def float_bits(noisy, clean, sigma):
    """The number of bits in which the float32 numbers differ, with sign and exponent."""
    bits = [jax.lax.bitcast_convert_type(part, jnp.int32) for part in (noisy, clean)]
    return jax.lax.population_count(bits[0] ^ bits[1]).sum(axis=1)


def table_words(noisy, clean, sigma):
    """The lowest bit of the column of the alias table that drew the noise, if it did not draw its alias."""
    return jnp.asarray(discrete_gaussian.grid(sigma).table[1] & 1)[jnp.abs(steps(noisy, clean, sigma))].sum(axis=1)


AGAINST_SOUND = {
    "float_sums": float_sums,
    "grid_sums": grid_sums,
    "half_space": half_space,
    "parity": leaking(parity),
    "low_byte": leaking(low_byte),
    "float_bits": leaking(float_bits),
    "table_words": leaking(table_words),
}


def exact_outputs(noisy, clean, along, sigma, weights):
    """Whether some noise gives the outputs of a first layer whose sums are rounded once."""
    with jax.enable_x64(True):
        q, factor = discrete_gaussian.spacing(sigma), weights.astype(jnp.float64)
        total = jnp.round(noisy.astype(jnp.float64) / (factor * q))
        near = [(factor * (q * (total + offset))).astype(jnp.float32) == noisy for offset in range(-8, 9)]
        return jnp.any(jnp.stack(near), axis=0).all(axis=1)


def rounded_twice(noisy, clean, along, sigma, weights):
    """Whether some noise gives the outputs of one whose products with latent and noise are rounded before the sum."""
    with jax.enable_x64(True):
        q, factor, start = discrete_gaussian.spacing(sigma), weights.astype(jnp.float64), clean.astype(jnp.float64)
        steps = jnp.round((noisy.astype(jnp.float64) - start) / (factor * q))

        def reached(offset):
            product = (factor * (q * (steps + offset))).astype(jnp.float32)
            return (start + product.astype(jnp.float64)).astype(jnp.float32) == noisy

        return jnp.any(jnp.stack([reached(offset) for offset in range(-2, 3)]), axis=0).all(axis=1)


FIRST_LAYER = {"exact_outputs": exact_outputs, "rounded_twice": rounded_twice}


# ---------------------------------------------------------------------------------------------------------- the attack


def targets(shape, sigma, count):
    """Clean points: images with whole grey levels, or latents whose last coordinates are 9σ apart."""
    rng = np.random.default_rng(7)
    points = rng.random((count, *shape))
    if shape in IMAGES:
        return np.rint(255 * points) / 255
    points[..., -1] += 9 * sigma * (np.arange(count) - count / 2).reshape(-1, *[1] * (len(shape) - 1))
    return points


def head_of(recogniser, clean, directions, sigma):
    """One head for all targets. It assigns each row to the nearest target and applies the recogniser of that target."""
    clean, directions = jnp.asarray(clean, jnp.float32), jnp.asarray(directions, jnp.float32)

    def head(noisy):
        noisy = noisy.reshape(noisy.shape[0], -1)
        nearest = jnp.argmax(noisy @ clean.T - (clean**2).sum(axis=1) / 2, axis=1)
        own = clean[nearest]
        along = ((noisy - own) * directions[nearest]).sum(axis=1) / np.float32(sigma)
        zero = recogniser(noisy[:, :WATCHED], own[:, :WATCHED], along, sigma)
        return jnp.stack([zero, ~zero], axis=1).astype(jnp.float32)

    return head


def behind(weights, recogniser, clean, directions, sigma):
    """`head_of` for outputs of a first layer that multiplies by `weights`; the recogniser sees outputs and weights."""
    clean, watched = jnp.asarray(clean * weights, jnp.float32), jnp.asarray(weights[:WATCHED], jnp.float32)
    directions = jnp.asarray(directions / weights, jnp.float32)
    seen = functools.partial(recogniser, weights=watched) if recogniser in FIRST_LAYER.values() else recogniser
    return head_of(seen, clean, directions, sigma)


def attack(recogniser, arithmetic, shape, sigma, count, weights=None):
    """Certifies `count` targets and tries one counterexample for each, at 0.3 to 0.95 of its radius.

    With `weights`, one per coordinate, the head begins with a first layer that multiplies by them.

    Returns:
      ``(count, 3)``: radius, distance of the point that was tried (both in σ), and whether it is a counterexample.
    """
    made = make_arithmetic(arithmetic, sigma)

    def placed(points):
        """The points after the arithmetic has rounded them, flattened."""
        flat = made.quantize(points).reshape(count, -1).astype(np.float64)
        return flat * made.identity.get("spacing", 1.0)

    points = targets(shape, sigma, count)
    directions = np.random.default_rng(8).standard_normal((count, np.prod(shape)))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    head = head_of(recogniser, placed(points), directions, sigma)
    if weights is not None:
        head = FirstLayer(np.diag(weights)), behind(weights, recogniser, placed(points), directions, sigma)
    common = {"sigma": sigma, "key": threefry(0), "arithmetic": arithmetic, "tile": (count, 8)}
    found = smoothing.certify(head, points, n=400, **common)

    away = np.linspace(0.3, 0.95, count)[:, None] * found.radius[:, None] * directions
    others = points + away.reshape(points.shape)
    if shape in IMAGES:
        others = np.clip(np.rint(255 * others), 0, 255) / 255
    distance = np.linalg.norm(placed(others) - placed(points), axis=1)
    there = smoothing.predict(head, others, n=200, **common)
    certified = (found.predict >= 0) & (found.radius > 0)
    broken = certified & (distance < found.radius) & (there >= 0) & (there != found.predict)
    return np.stack([found.radius / sigma, distance / sigma, broken], axis=1)


def campaign(name, recogniser, arithmetic, trials):
    """Makes `trials` attacks, divided over families of targets, and prints a summary."""
    families = FAMILIES if trials == 1000 else [((40,), 0.5), ((28, 28, 1), 0.25)]
    start = time.time()
    per_family = [attack(recogniser, arithmetic, *family, trials // len(families)) for family in families]
    radius, distance, broken = np.concatenate(per_family).T
    assert len(broken) == trials
    broken = broken.astype(bool)
    far = distance[broken] / radius[broken]
    print(
        f"\n{name} against {arithmetic}: {(radius > 0).sum()} of {trials} certified, "
        f"{broken.sum()} with a counterexample"
        + (f", at {far.min():.2f} to {far.max():.2f} of the radius" if broken.any() else "")
        + f"; median radius {np.median(radius):.2f} sigma; {time.time() - start:.0f} s"
    )
    return radius, distance, broken


TRIALS = [100, pytest.param(1000, marks=pytest.mark.soak)]


@pytest.mark.parametrize("trials", TRIALS)
def test_float32_certificates_have_counterexamples_far_inside(trials):
    radius, distance, broken = campaign("float_sums", float_sums, "float32", trials)
    assert broken.sum() > 0.9 * trials
    assert (distance[broken] > 0.5 * radius[broken]).sum() > trials / 2


def test_the_published_recogniser_breaks_sums_that_round_the_noise_first(monkeypatch):
    """It finds nothing where product and sum are rounded once together, as XLA does on CPU; `float_sums` does."""

    def bits(number):
        return jax.lax.bitcast_convert_type(number, jnp.int32)

    class Unfused(Float32Arithmetic):
        @staticmethod
        def draw(key, size, sigma):
            # This adds the sign bit of sigma, which is 0. The compiler can neither remove the integer operation nor
            # fuse the product with the sum across it.
            drawn = bits(Float32Arithmetic.draw(key, size, sigma)) | (bits(sigma) >> 31)
            return jax.lax.bitcast_convert_type(drawn, jnp.float32)

    monkeypatch.setitem(ARITHMETICS, "float32", Unfused)
    broken = attack(any_float, "float32", (28, 28, 1), 0.5, 50)[:, 2]
    assert broken.sum() > 40


@pytest.mark.parametrize("trials", TRIALS)
@pytest.mark.parametrize("name", AGAINST_SOUND)
def test_sound_certificates_have_no_counterexamples(name, trials):
    radius, distance, broken = campaign(name, AGAINST_SOUND[name], "sound", trials)
    assert not broken.any()
    # Most attacks had a certificate and a point within its radius.
    assert (radius > 0).mean() > 0.9
    assert (distance < radius).mean() > 0.9


@pytest.mark.parametrize("name", ["exact_outputs", "rounded_twice", "float_sums", "parity", "float_bits"])
@pytest.mark.parametrize("trials", TRIALS)
def test_a_free_first_layer_has_no_counterexamples(name, trials):
    """The attacks read the outputs of the layer; those on latents see them through weights of 1."""
    recogniser = FIRST_LAYER.get(name) or AGAINST_SOUND[name]
    families = FAMILIES if trials == 1000 else [((40,), 0.25)]
    parts = []
    for shape, sigma in families:
        size = int(np.prod(shape))
        weights = np.random.default_rng(9).uniform(0.5, 2, size) if name in FIRST_LAYER else np.ones(size)
        parts.append(attack(recogniser, "sound", shape, sigma, -(-trials // len(families)), weights.astype(np.float32)))
    radius, distance, broken = np.concatenate(parts).T
    print(f"\n{name}: {(radius > 0).sum()} of {len(radius)} certified, {broken.sum():.0f} with a counterexample")
    assert not broken.any()
    assert (radius > 0).mean() > 0.9
    assert (distance < radius).mean() > 0.9


def test_a_first_layer_that_rounds_its_products_apart_is_broken(monkeypatch):
    """The control: W·v and W·δ in float32, and their sum in float32."""

    def product(self, steps, tables):
        windows = self._windows(steps, jnp).astype(jnp.float32)
        return jnp.dot(windows, jnp.asarray(tables.kernel, jnp.float32), precision="highest")

    monkeypatch.setattr(IntegerLayer, "product", product)
    monkeypatch.setattr(IntegerLayer, "agrees", lambda *_: True)
    weights = np.random.default_rng(9).uniform(0.5, 2, 40).astype(np.float32)
    broken = attack(rounded_twice, "sound", (40,), 0.25, 100, weights)[:, 2]
    print(f"\nrounded_twice against products in float32: {broken.sum():.0f} of 100 with a counterexample")
    assert broken.sum() > 50


def test_noise_on_a_coarser_grid_than_the_latents_is_caught(monkeypatch):
    """With such noise, the parity of the sums reveals the parity of the latent."""

    class Coarse(GridArithmetic):
        @staticmethod
        def draw(key, size, tables):
            return GridArithmetic.draw(key, size, tables) // 2 * 2

    monkeypatch.setitem(ARITHMETICS, "sound", Coarse)
    broken = attack(leaking(parity), "sound", (40,), 0.25, 50)[:, 2]
    assert broken.sum() > 10
