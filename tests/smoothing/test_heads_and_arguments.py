"""Heads and arguments that `certify` accepts, and those that it refuses before it draws the first sample."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing.sampler import Sampler
from support import threefry
from support.heads import DIM, LATENTS, certify, linear_head


def test_modules_of_any_library_certify_the_same():
    from flax import nnx

    kernel = np.random.default_rng(7).standard_normal((32, 3)).astype(np.float32)
    dense = nn.Dense(3, use_bias=False)
    stateful = nnx.Linear(32, 3, use_bias=False, rngs=nnx.Rngs(0))
    stateful.kernel[...] = jnp.asarray(kernel)
    heads = [
        lambda z: z.reshape(z.shape[0], -1) @ kernel,
        lambda z: dense.apply({"params": {"kernel": kernel}}, z.reshape(z.shape[0], -1)),
        lambda z: stateful(z.reshape(z.shape[0], -1)),
    ]
    counts = [certify(head, n=1000).counts for head in heads]
    np.testing.assert_array_equal(counts[0], counts[1])
    np.testing.assert_array_equal(counts[0], counts[2])


def batch_norm(z):
    z = z.reshape(z.shape[0], -1)
    return ((z - z.mean(axis=0)) / (z.std(axis=0) + 1e-3))[:, :4]


def ghost_norm(size):
    """A head that normalizes with the statistics of consecutive groups of rows."""

    def head(z):
        z = z.reshape(-1, size, np.prod(z.shape[1:]))
        z = (z - z.mean(axis=1, keepdims=True)) / (z.std(axis=1, keepdims=True) + 1e-3)
        return z.reshape(-1, z.shape[-1])[:, :4]

    return head


def nan_sometimes(z):
    logits = linear_head(z)
    return jnp.where(logits > 3.0, jnp.nan, logits)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": float("nan")}, "sigma"),
        ({"sigma": "0.5"}, "sigma"),
        ({"n": 0}, "n must be a whole number"),
        ({"n0": 0}, "n0 must be a whole number"),
        ({"n": 10.0}, "n must be a whole number"),
        ({"n": 2**31}, "2\\*\\*27"),
        ({"alpha": 0.0}, "alpha"),
        ({"lipschitz": 0.0}, "Lipschitz"),
        ({"tile": (0, 4)}, "tile"),
        ({"spmd": "xmap"}, "spmd"),
        ({"latents": np.zeros((0, 3))}, "N >= 1"),
        ({"latents": np.zeros(3)}, "shape"),
        ({"latents": np.zeros((2, 3), int)}, "floating point"),
        ({"latents": np.full((2, *DIM), np.nan)}, "finite"),
        ({"latents": np.ones((2, 3))}, "does not accept latents"),
        ({"head": lambda z: z}, "must return logits"),
        ({"head": lambda z: jnp.zeros((z.shape[0], 1))}, "must return logits"),
        ({"head": lambda z: linear_head(z).T}, "must return logits"),
        ({"head": lambda z: jnp.full((z.shape[0], 3), jnp.nan)}, "NaN"),
        ({"head": nan_sometimes}, "NaN"),
        ({"head": batch_norm}, "rows depend on each other"),
        ({"head": lambda z: linear_head(z) + jnp.array([1.0, 0.0]) * linear_head(z)[:, 0].mean()}, "rows depend"),
        ({"head": ghost_norm(2)}, "rows depend on each other"),
        ({"head": ghost_norm(64)}, "rows depend on each other"),
        ({"head": ghost_norm(128)}, "rows depend on each other"),
        ({"head": lambda z: batch_norm(z).at[:, 3].set(-1e9)}, "rows depend on each other"),
        ({"tile": 5}, "tile"),
        ({"tile": (2, 2.0)}, "tile"),
        ({"tile": (1, 1)}, "tile"),
        ({"tile": (100_000, 100_000)}, "GiB"),
        ({"alpha": "a"}, "alpha"),
        ({"n": True}, "n must be a whole number"),
        ({"sigma": 1e-40}, "sigma"),
        ({"sigma": 1e39}, "sigma"),
        ({"slack": -1.0}, "slack"),
        ({"slack": np.ones(3)}, "slack"),
        ({"head": nn.Dense(3)}, "for a Flax module"),
        ({"head": lambda z: linear_head(z[::-1])}, "rows depend on each other"),
        ({"head": lambda z: linear_head(z) + 1j}, "must return logits"),
        ({"radii": "abc"}, "radii must be numbers"),
        ({"radii": [0.1, -1.0]}, "radii must be finite"),
        ({"slack": "a"}, "slack must be numbers"),
        ({"epsilon": "x"}, "epsilon"),
        ({"arithmetic": ["x"]}, "unknown arithmetic"),
        ({"arithmetic": "exact"}, "unknown arithmetic"),
        ({"noise": ["x"]}, "unknown noise"),
        ({"bound": "ternary"}, "unknown bound"),
        ({"schedule": "quick"}, "unknown schedule"),
        ({"lipschitz": True}, "Lipschitz"),
        ({"lipschitz": 1e-320}, "Lipschitz"),
        ({"alpha": 5e-324}, "alpha must be at least"),
        ({"progress": 3}, "progress"),
        ({"latents": [[0.1], [0.2, 0.3]]}, "latents must be one array"),
        ({"latents": np.full((2, *DIM), 1e6)}, "range of the grid"),
    ],
)
def test_bad_input_never_certifies(changes, why):
    with pytest.raises(UserError, match=why) as caught:
        certify(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("later", [1, 2, 4, 5])
def test_a_head_that_changes_its_classes_is_refused(later):
    """It returns three classes when it is first called, and another number when the loop is compiled."""
    traces = itertools.count()

    def head(z):
        return z.reshape(z.shape[0], -1)[:, : 3 if next(traces) == 0 else later]

    with pytest.raises(UserError, match="always have the same classes"):
        certify(head)


def test_a_masked_class_is_no_coupling():
    got = certify(lambda z: linear_head(z).at[:, 1].set(-jnp.inf), n=200)
    np.testing.assert_array_equal(got.counts, [[200, 0]] * 5)


def test_keys_of_other_generators_are_refused():
    for key in (jax.random.key(0, impl="rbg"), jax.random.PRNGKey(0), 0, jax.random.split(threefry(0), 2)):
        with pytest.raises(UserError, match="threefry2x32"):
            certify(key=key)


def test_a_launch_outside_the_schedule_is_refused():
    loop = Sampler(linear_head, DIM, sigma=0.5, tile=(2, 16))
    latents = loop.put(loop.quantize(LATENTS[:2]))
    key = loop.keys(threefry(0))["estimation"]
    for first, stop in ((0, 8), (3, 3), (-1, 2)):
        with pytest.raises(UserError, match="are not among"):
            loop.launch(latents, key, first, stop, 100)
    with pytest.raises(UserError, match="1 to 2 latents"):
        loop.put(loop.quantize(LATENTS[:3]))


@pytest.mark.parametrize(
    "head",
    [
        lambda z: z @ np.eye(5, 3) if len(z) > 32 else z @ -np.eye(5, 3),
        lambda z: (lambda a, b: a if len(z) > 32 else b)(z @ np.eye(5, 3), jnp.tanh(z) @ np.eye(5, 3)),
        lambda z: (lambda a, b: a - b if len(z) > 32 else b - a)(z @ np.eye(5, 3), jnp.tanh(z) @ np.eye(5, 3)),
    ],
    ids=["constants", "results", "operands"],
)
def test_a_head_that_branches_on_the_size_of_its_batch_is_refused(head):
    with pytest.raises(UserError, match="another function when JAX traces it for a batch of 1 instead of 64"):
        Sampler(head, (5,), sigma=0.5, tile=(4, 16))
