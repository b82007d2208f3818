"""Rounding is not taken for a dependence of a head's rows on each other, and a small dependence not for rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsrs_jax.models.heads import HEADS
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing.coupling_check import CouplingCheck, Evaluated
from lsrs_jax.smoothing.head_check import allowance, check_head, differing
from lsrs_jax.smoothing.head_trace import TracedHead
from lsrs_jax.smoothing.sampler import pinned_flags
from support import threefry

pytestmark = pytest.mark.usefixtures("fast_compilation")


def evaluations(head, tile, classes):
    """A function of (parameters, noisy latents) that evaluates a check; each program is compiled once."""
    evaluate = jax.jit(head)

    @jax.jit
    def loop(parameters, latents, noise):
        z = (latents[:, None] + noise).reshape(-1, *latents.shape[1:])
        logits = head(parameters, z)
        best = jnp.argmax(logits, axis=1).reshape(tile)
        return jnp.sum(best[:, :, None] == jnp.arange(classes + 1), axis=1)

    def verify(parameters, latents, noise, tolerance, seed):
        check = CouplingCheck(tile, classes, tolerance, 1)
        check._rng = np.random.default_rng(seed)
        sources, rows = check.sources(), (latents[:, None] + noise).reshape(-1, *latents.shape[1:])
        logits = [evaluate(parameters, rows[source]) for source in sources]
        check.verify(Evaluated(sources, logits, loop(parameters, latents, noise)))

    return verify


@pytest.mark.parametrize(("tile", "dtype"), [((4, 16), "float32"), ((5, 7), "bfloat16"), ((3, 5), "float32")])
@pytest.mark.parametrize("name", ["mlp", "convnet_small"])
def test_random_networks_are_no_false_alarm(name, tile, dtype):
    """In 50 random networks of each kind, at latents and noise of very different sizes."""
    shape, module = (4, 4, 3), HEADS[name](10)

    def head(parameters, z):
        low = jax.tree.map(lambda leaf: leaf.astype(dtype), parameters)
        return jnp.asarray(module.apply(low, z.astype(dtype)), jnp.float32)

    with pinned_flags():
        init, verify = jax.jit(module.init), evaluations(head, tile, 10)
        for seed in range(50):
            rng = np.random.default_rng(seed)
            scale, parameters = 10 ** rng.uniform(-2, 2), init(threefry(seed), jnp.zeros((1, *shape)))
            latents, noise = (rng.standard_normal((size, *shape)).astype(np.float32) for size in tile)
            verify(parameters, scale * latents, 0.3 * scale * noise, 1e-4 if dtype == "float32" else 0.05, seed)


def test_a_coupled_network_is_found_in_every_block():
    """The control of the test above: a network whose rows meet in its last layer, by one thousandth of their logits."""
    module = HEADS["mlp"](10)

    def head(parameters, z):
        logits = jnp.asarray(module.apply(parameters, z))
        return logits + 1e-3 * logits.mean(axis=0)

    with pinned_flags():
        init, verify, found = jax.jit(module.init), evaluations(head, (4, 16), 10), 0
        for seed in range(20):
            rng = np.random.default_rng(seed)
            latents, noise = (rng.standard_normal((size, 8)).astype(np.float32) for size in (4, 16))
            try:
                verify(init(threefry(seed), jnp.zeros((1, 8))), latents, noise, 1e-4, seed)
            except UserError:
                found += 1
    assert found == 20


def test_rounding_may_move_small_logits_beside_large_ones_but_not_beside_masked_ones():
    moved = np.array([[1e4, 1e-3, -1e9], [1.0, 1e-3, -1e9], [1.0, 1e-3, -np.inf]], np.float32)
    allowed = allowance(moved, 1e-4)
    assert (allowed[0, :2] >= 1).all()
    assert (allowed[1:, :2] <= 3e-4).all()
    assert differing(moved, moved + np.array([0, 2e-4, 0]), allowed).tolist() == [False, False, False]
    assert differing(moved, moved + np.array([0, 4e-4, 0]), allowed).tolist() == [False, True, True]
    assert differing(moved, np.where(np.isinf(moved), 0, moved), allowed).tolist() == [False, False, True]
    assert differing(moved, np.full_like(moved, np.nan), allowed).all()


def test_the_loop_may_count_another_class_where_logits_nearly_tie():
    check, logits = CouplingCheck((2, 2), 2, 1e-4, 1), np.array([[1, 1 + 1e-4], [1, 2], [2, 1], [1, 2]], np.float32)
    same = {"sources": [np.arange(4)] * 3, "logits": [logits] * 3}
    for counts in ([[[0, 2, 0], [1, 1, 0]]], [[[1, 1, 0], [1, 1, 0]]]):
        check.verify(Evaluated(**same, counts=np.array(counts)))
    for counts in ([[[2, 0, 0], [1, 1, 0]]], [[[0, 2, 0], [0, 2, 0]]], [[[0, 1, 1], [0, 1, 1]]]):
        with pytest.raises(UserError, match="gives 1 of 4 noisy latents other classes"):
            check.verify(Evaluated(**same, counts=np.array(counts)))


def test_the_tolerance_is_that_of_the_least_precise_number_or_product():
    w = np.ones((8, 3), np.float32)
    heads = {
        lambda z: z @ w: 1e-4,
        lambda z: (z.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32): 0.05,
        lambda z: jax.lax.map(lambda row: (row @ w).astype(jnp.float16), z).astype(jnp.float32): 0.05,
        lambda z: (z @ w).astype(jnp.bfloat16): 0.05,
        lambda z: jnp.dot(z, w, precision="default"): 0.05,
    }
    with pinned_flags():
        for head, tolerance in heads.items():
            assert check_head(TracedHead(head), (64, 8)).tolerance == tolerance
