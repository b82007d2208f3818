"""Heads whose rows depend on each other, on their slots or on the moment are refused; honest ones are accepted."""

import functools
import itertools
import math
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing import coupling_check
from lsrs_jax.smoothing.coupling_check import CouplingCheck
from lsrs_jax.smoothing.head_check import CheckedHead
from lsrs_jax.smoothing.sampler import Sampler
from support import threefry
from support.heads import certify

WIDTH, CLASSES, TILE = 8, 3, (4, 16)
ROWS = TILE[0] * TILE[1]
RNG = np.random.default_rng(0)
W, ROUTES, EXPERTS = (RNG.standard_normal(size).astype(np.float32) for size in ((8, 3), (8, 4), (4, 8, 3)))
SIGNS = np.sign(RNG.standard_normal(WIDTH)).astype(np.float32)
LATENTS = RNG.standard_normal((4, WIDTH))
KEY = threefry(1)
MASK = (RNG.random(WIDTH) < 0.7).astype(np.float32)

pytestmark = pytest.mark.usefixtures("fast_compilation")


def plain(z):
    return z @ W


# ------------------------------------------------------------------------------------------------------ dishonest heads


def experts(capacity=None):
    """Top-1 routing to four experts. Rows beyond the capacity of an expert, in the order of the batch, get zeros."""

    def head(z):
        route = jax.nn.one_hot(jnp.argmax(z @ ROUTES, axis=1), 4)
        if capacity is not None:
            route *= jnp.cumsum(route, axis=0) <= capacity
        return jnp.einsum("be,bd,edk->bk", route, z, EXPERTS)

    return head


def quantised(z):
    """Latents in 8 bits, on a scale that the batch decides."""
    scale = jnp.abs(z).max() / 127
    return jnp.round(z / scale) * scale @ W


def quantised_in_bfloat16(z):
    return quantised(z.astype(jnp.bfloat16)).astype(jnp.float32)


def dropout(z):
    """A fixed key, but another mask for every slot."""
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.8, z.shape), z, 0) @ W


def positions(z):
    return plain(z) + 0.01 * jnp.arange(len(z))[:, None] * jnp.array([1.0, 0.0, 0.0])


def last_slot(z):
    return plain(z).at[-1].multiply(-1)


def even_slots(z):
    """Few latents depend on their slot, so that it takes a permutation of all of them to see it."""
    few = z[:, 0] > LATENTS[:, 0].max() + 0.25
    return jnp.where((few & (jnp.arange(len(z)) % 2 == 0))[:, None], -plain(z), plain(z))


def branches(z):
    return plain(z) if len(z) > 32 else -plain(z)


def scaled_by_the_batch_size(z):
    return plain(z) + jnp.array([1.0, 0.0, 0.0]) * len(z)


def statistics(z):
    return (z - z.mean(axis=0)) / z.std(axis=0) @ W


def duplicates(z):
    """Rows that resemble an earlier row get zeros."""
    close = jnp.linalg.norm(z[:, None] - z, axis=2) < 0.5
    return jnp.where(jnp.tril(close, -1).any(axis=1)[:, None], 0, plain(z))


def agreement(z):
    """The largest logits of the batch lose what most rows agree on."""
    votes = jax.nn.one_hot(jnp.argmax(plain(z), axis=1), CLASSES).sum(axis=0)
    return plain(z) - 0.5 * (votes > 0.9 * len(z))


def numpy_mask():
    """A head that draws another mask in every trace; its generator is made here, so that the test can be repeated."""
    generator = np.random.default_rng(0)
    return lambda z: z * (generator.random(WIDTH) < 0.7) @ W


def numpy_scalar():
    generator = np.random.default_rng(0)
    return lambda z: plain(z) + np.array([1, 0, 0], np.float32) * float(generator.random())


def numpy_roll():
    steps = itertools.cycle((1, 3))
    return lambda z: jnp.roll(z, next(steps), axis=1) @ W


def numpy_mask_for_one_batch_size():
    head = numpy_mask()
    return lambda z: head(z.reshape(ROWS, WIDTH))


def clock(z):
    return plain(z) + np.array([1, 0, 0], np.float32) * (time.perf_counter() % 1 * 1e3)


def callback(function):
    def head(z):
        logits = jax.ShapeDtypeStruct((len(z), CLASSES), jnp.float32)
        return jax.pure_callback(lambda z: np.asarray(function(np.asarray(z)), np.float32), logits, z)

    return head


def drawn(z):
    return z @ W + np.random.default_rng().standard_normal((len(z), 1)) * [1, 0, 0]


def counting():
    calls = itertools.count()
    return callback(lambda z: z @ W + np.float32(next(calls)) * np.array([1, 0, 0]))


REFUSED_AT_ONCE = {
    "a scale over the batch": (quantised, "rows depend"),
    "a scale over the batch in bfloat16": (quantised_in_bfloat16, "rows depend"),
    "a mask per slot": (dropout, "rows depend"),
    "slots": (positions, "rows depend"),
    "batch statistics": (statistics, "rows depend"),
    "a branch on the batch size": (branches, "batch of 1 instead of 64"),
    "the batch size": (scaled_by_the_batch_size, "batch of 1 instead of 64"),
    "a mask by NumPy": (numpy_mask(), "numbers or clocks"),
    "a number by Python": (numpy_scalar(), "numbers or clocks"),
    "a size by NumPy": (numpy_roll(), "numbers or clocks"),
    "a mask by NumPy in a jitted head": (jax.jit(numpy_mask()), "numbers or clocks"),
    "a mask by NumPy for one batch size": (numpy_mask_for_one_batch_size(), "traces it again"),
    "a clock": (clock, "numbers or clocks"),
    "a callback that draws": (callback(drawn), "rows depend"),
    "a callback that counts": (counting(), "rows depend"),
}


def sampler(head, **changes):
    return Sampler(head, (WIDTH,), **{"sigma": 0.25, "tile": TILE, "devices": jax.devices()[:1]} | changes)


@pytest.mark.parametrize("name", REFUSED_AT_ONCE)
def test_heads_that_are_refused_before_the_first_sample(name):
    head, why = REFUSED_AT_ONCE[name]
    with pytest.raises(UserError, match=why) as caught:
        sampler(head)
    assert "\n" not in str(caught.value)


def varies(*heads):
    """A head that is another one of `heads` in every trace."""
    traces = itertools.count()
    return lambda z: heads[min(next(traces), len(heads) - 1)](z)


REFUSED_ON_NOISY_LATENTS = {
    "experts with much capacity": (lambda: experts(capacity=60), "rows depend"),
    "experts with little capacity": (lambda: experts(capacity=20), "rows depend"),
    "duplicates": (lambda: duplicates, "rows depend"),
    "agreement": (lambda: agreement, "rows depend"),
    "the last slot": (lambda: last_slot, "rows depend"),
    "even slots": (lambda: even_slots, "rows depend"),
    "a scale over the batch": (lambda: quantised, "rows depend"),
    "a mask per slot": (lambda: dropout, "rows depend"),
    "slots": (lambda: positions, "rows depend"),
    "batch statistics": (lambda: statistics, "rows depend"),
    "a callback that draws": (lambda: callback(drawn), "rows depend"),
    "another trace": (lambda: varies(plain, lambda z: z * MASK @ W), "loop gives .* other classes"),
    "a mask by NumPy": (numpy_mask, "loop gives .* other classes"),
}


def check_the_next_launch(made):
    made._check._blocks, made._check._checked = math.inf, -math.inf


def untried(head, shape):
    """`check_head` without a check."""
    return CheckedHead(CLASSES, "", head.trace(shape).lower().compile(), "", 1e-4)


@pytest.mark.parametrize("name", REFUSED_ON_NOISY_LATENTS)
def test_heads_that_are_refused_on_noisy_latents(name, monkeypatch):
    """The check on noisy latents alone finds them, whatever `check_head` would have found."""
    make, why = REFUSED_ON_NOISY_LATENTS[name]
    monkeypatch.setattr("lsrs_jax.smoothing.sampler.check_head", untried)
    made = sampler(make())
    with pytest.raises(UserError, match=why) as caught:
        made.one_batch(LATENTS, threefry(0), "estimation", 100)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=why):  # and does not accept them in the next call
        made.one_batch(LATENTS[::-1], threefry(1), "prediction", 100)


def test_experts_with_capacity_certify_no_copies():
    """Without the checks, copies of one latent get different classes."""
    with pytest.raises(UserError):
        certify(experts(capacity=20), np.tile(LATENTS[:1], (32, 1)), n=1000)


# --------------------------------------------------------------------------------------------------------- honest heads


class Normalized(nn.Module):
    """Normalisation over a row, reshapes, vmap and scan: all within a row."""

    @nn.compact
    def __call__(self, z):
        z = nn.LayerNorm()(nn.Dense(16)(z))
        z = nn.GroupNorm(4)(z.reshape(len(z), 2, 8)).reshape(len(z), 16)
        z = jax.vmap(lambda row: jax.lax.scan(lambda sum, x: (sum + x, sum * x), 0.0, row)[1])(z)
        return nn.Dense(CLASSES)(z)


def normalized():
    module = Normalized()
    return functools.partial(module.apply, module.init(threefry(0), jnp.zeros((1, WIDTH))))


def nearly_tied(z):
    logits = (z @ W).astype(jnp.bfloat16)
    return logits.at[:, 1].set(logits[:, 0] * jnp.bfloat16(1 + 2**-8))


def chunked(z):
    """Another program for every batch size, but the same function."""
    return jnp.concatenate([plain(part) for part in jnp.split(z, max(1, len(z) // 8))])


ACCEPTED = {
    "experts without capacity": experts(),
    "experts with enough capacity": experts(capacity=ROWS),
    "normalisation of a row": normalized(),
    "bfloat16 inside": lambda z: (z.astype(jnp.bfloat16) @ W.astype(jnp.bfloat16)).astype(jnp.float32),
    "bfloat16 logits that nearly tie": nearly_tied,
    "constant logits": lambda z: jnp.zeros((len(z), CLASSES)),
    "constant logits in bfloat16": lambda z: jnp.ones((len(z), CLASSES), jnp.bfloat16),
    "two equal logits": lambda z: plain(z)[:, jnp.array([0, 0, 1])],
    "a class without a chance": lambda z: plain(z).at[:, 1].set(-jnp.inf),
    "a class that is masked at times": lambda z: plain(z).at[:, 1].set(jnp.where(z[:, 0] > 0, -jnp.inf, 0)),
    "infinite logits": lambda z: jnp.where(plain(z) > 0, jnp.inf, -jnp.inf),
    "a class at -1e9": lambda z: plain(z).at[:, 2].set(-1e9),
    "a mask that is drawn when the head is made": lambda z: z * MASK @ W,
    "a key that is closed over": lambda z: z * jax.random.bernoulli(KEY, 0.7, (WIDTH,)) @ W,
    "large logits": lambda z: 1e4 * plain(z),
    "large logits that cancel": lambda z: (plain(z) + 1e4) - 1e4,
    "small logits": lambda z: 1e-6 * plain(z),
    "chunks": chunked,
    "one batch size": lambda z: plain(z.reshape(ROWS, WIDTH)),
    "a batch of 1 without its axis": lambda z: jnp.squeeze(plain(z)[:, None]),
    "a callback": callback(lambda z: z @ W),
    "a jitted head": jax.jit(plain),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_honest_heads_are_accepted(name):
    made = sampler(ACCEPTED[name])
    for stream in ("selection", "estimation"):
        counts = made.one_batch(LATENTS, threefry(0), stream, 100)
        assert (counts.sum(axis=1) == 100).all()
        check_the_next_launch(made)


@pytest.mark.parametrize("changes", [{"arithmetic": "float32"}, {"noise": "independent"}, {"spmd": "pmap"}, {}])
def test_the_check_runs_wherever_the_loop_does(changes, monkeypatch):
    devices = jax.devices()[5:2:-1]
    assert sampler(plain, devices=devices, **changes).one_batch(LATENTS, threefry(0), "estimation", 100, range(4)).any()
    monkeypatch.setattr("lsrs_jax.smoothing.sampler.check_head", untried)
    made = sampler(experts(capacity=20), devices=devices, **changes)
    with pytest.raises(UserError, match="rows depend"):
        made.one_batch(LATENTS, threefry(0), "estimation", 100, range(4))


def test_the_check_takes_one_percent_of_the_samples(monkeypatch):
    """Every head batch counts: of the loop, and the four of a check."""
    monkeypatch.setattr(coupling_check, "_SECONDS_PER_CHECK", 0)
    for devices, blocks in ((1, 7), (1, 400), (8, 50), (8, 5000)):
        check, launches = CouplingCheck(TILE, CLASSES, 1e-4, devices), 100_000 // blocks
        checks = [check.due(blocks) for _ in range(launches)]
        assert checks[0]
        assert sum(checks[1:]) == (launches - 1) // -(-400 * devices // blocks)
        assert 4 * sum(checks[1:]) <= 0.01 * blocks * launches / devices
    monkeypatch.undo()
    check = CouplingCheck(TILE, CLASSES, 1e-4, 1)
    assert [check.due(1000) for _ in range(5)] == [True] + 4 * [False]  # at most four per second
    for _ in range(5):
        order, permuted, crowded = check.sources()
        np.testing.assert_array_equal(np.sort(permuted), order)
        assert np.bincount(crowded).max() >= ROWS - 2
        assert len(np.unique(crowded)) >= 2


def test_counts_are_those_of_the_plain_program():
    """The sampling program is the same with and without a check."""
    made, unchecked = sampler(plain), sampler(plain)
    unchecked._check._blocks = 0
    counts = [each.one_batch(LATENTS, threefry(0), "estimation", 1000) for each in (made, unchecked)]
    np.testing.assert_array_equal(counts[0], counts[1])


def test_checking_costs_no_further_trace():
    traces = itertools.count()

    def head(z):
        next(traces)
        return plain(z)

    made = sampler(head)
    assert next(traces) == 3  # the head, for a batch of 1, in the loop
    for stream in ("selection", "estimation"):
        made.one_batch(LATENTS, threefry(0), stream, 100)
        check_the_next_launch(made)
    assert next(traces) == 4
    assert made.traces == 1
