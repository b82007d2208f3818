"""JAX flags of the user: the commands and the orthogonal families compute the same under all of them."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsrs_jax import layers, orthogonal
from support import threefry
from support.commands import run, without_time


@contextlib.contextmanager
def strict():
    """What JAX_NUMPY_DTYPE_PROMOTION=strict and JAX_NUMPY_RANK_PROMOTION=raise set."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


SMALL = ["--config=configs/digits.py", "--config.train.steps=2", "--config.train.log_every=2", "--config.certify.n=200"]
SMALL += ["--config.train.evaluate_every=2", "--config.train.checkpoint_every=2", "--config.certify.stop=4"]


def test_the_commands_compute_the_same_under_strict_rules_and_without_compilation(tmp_path):
    workdir = f"--workdir={tmp_path}"
    with strict(), jax.disable_jit():  # JAX_DISABLE_JIT=1
        run("train", *SMALL, workdir)
        run("certify", workdir)
        assert "certified balls" in run("audit", workdir, "--images=1", "--steps=1", "--restarts=1", "--samples=2")
    run("certify", workdir, "--config.certify.name=plain")
    tables = [without_time(tmp_path / "certify" / name / "certificates.tsv") for name in ("default", "plain")]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("method", orthogonal.FAMILIES)
def test_families_compute_the_same_under_strict_rules(method):
    x = jax.random.normal(threefry(1), (2, 4, 4, 4))
    layer = layers.OrthogonalConv(8, 2, 2, method=method, initializer="random")
    with strict():
        variables = jax.jit(layer.init)(threefry(0), x)
        found, plain = jax.jit(layer.apply)(variables, x), layer.materialize(variables["params"], (4, 4, 4))
    np.testing.assert_array_equal(found, jax.jit(layer.apply)(variables, x))
    assert plain[2:] == layer.materialize(variables["params"], (4, 4, 4))[2:]


def test_other_layers_work_under_strict_rules():
    x = jax.random.normal(threefry(1), (2, 4, 4, 4))
    for layer in (layers.OrthogonalDense(3, method="cayley"), layers.Householder(), layers.Normalize((0.5,), (0.5,))):
        with strict():
            found, _ = jax.jit(layer.init_with_output)(threefry(0), x)
        assert jnp.isfinite(found).all()
