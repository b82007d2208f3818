"""The platform check before the first sample passes within the error budget, and refuses larger errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsrs_jax import certify, layers
from lsrs_jax.certification import encode, linear, platform_check
from lsrs_jax.layers.lipschitz import Float64Encoder, materialize
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing.arithmetic import Float32Arithmetic, GridArithmetic
from support import threefry
from support.commands import QUICK, run

SHAPE = (8, 8, 3)
CONVOLUTIONS = {
    "adaptive": {"padding": "zero"},
    "paraunitary": {"strides": (2, 2), "kernel_size": (4, 4)},
    "exponential": {},
    "cayley": {},
}


def encoder(method):
    """An encoder with every kind of layer."""
    other = {"kernel_size": (3, 3), "method": method, "initializer": "random"} | CONVOLUTIONS[method]
    chain = (
        layers.Normalize((0.4, 0.5, 0.6), (0.2, 0.2, 0.3)),
        layers.Haar(),
        layers.OrthogonalConv(12, **other),
        layers.MaxMin(),
        layers.OrthogonalConv(8, (3, 3), method=method),
        layers.Householder(),
        layers.GroupSort(4),
        layers.L2Pool((2, 2)),
        layers.OrthogonalDense(10),
    )
    net = layers.Encoder(chain)
    return materialize(net, jax.jit(net.init)(threefry(0), jnp.zeros((1, *SHAPE))), SHAPE)


@pytest.fixture(scope="module", params=CONVOLUTIONS)
def materialized(request):
    return encoder(request.param)


def in_tf32(values):
    """The values rounded to TF32, as tensor cores round them: eight bits of exponent, ten of mantissa."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def in_float32(values):
    return np.asarray(values, np.float32).astype(np.float64)


def test_float64_keeps_the_bounds(materialized):
    platform_check.check_encoder(materialized, Float64Encoder(materialized, 4))


@pytest.mark.parametrize("rounded", [in_float32, in_tf32])
def test_kernels_in_reduced_precision_are_refused(materialized, rounded):
    built = materialized._replace(params=jax.tree.map(rounded, materialized.params))
    with pytest.raises(UserError, match="does not multiply in float64"):
        platform_check.check_encoder(materialized, Float64Encoder(built, 4))


def test_products_in_float32_are_refused(materialized):
    def rounded(images):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), materialized.params)
        return np.asarray(materialized.apply(params, np.asarray(images, np.float32)), np.float64)

    with pytest.raises(UserError, match="does not multiply in float64"):
        platform_check.check_encoder(materialized, rounded)


def test_a_nan_is_refused(materialized):
    with pytest.raises(UserError, match="error of nan"):
        platform_check.check_encoder(materialized, lambda images: np.full((len(images), 10), np.nan))


CONVOLUTION_OPTIONS = {
    "strided": {"window_strides": (2, 1), "padding": ((1, 2), (0, 3))},
    "dilated": {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 3)},
    "transposed": {"window_strides": (1, 1), "padding": ((2, 2), (1, 1)), "lhs_dilation": (2, 2)},
    "grouped": {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
    "cropping": {"window_strides": (1, 1), "padding": ((-1, 0), (0, -1))},
}


@pytest.mark.parametrize("options", CONVOLUTION_OPTIONS.values(), ids=CONVOLUTION_OPTIONS)
def test_a_custom_layer_may_convolve_in_any_way(options):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 2, 4 // options.get("feature_group_count", 1), 6))
    x = rng.standard_normal((2, 9, 8, 4))

    def apply(kernel, x):
        return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)

    with jax.enable_x64(True):
        program = jax.make_jaxpr(apply)(kernel, x)
        found = platform_check._evaluate(program.jaxpr, program.consts, [kernel, x])[0]
        np.testing.assert_allclose(found, apply(kernel, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.12, 1.0, 1 / 3])
def test_noise_has_its_distribution_and_exact_sums(sigma):
    platform_check.check_noise(GridArithmetic(sigma))
    platform_check.check_noise(Float32Arithmetic(sigma))  # float32 arithmetic claims no bound, so nothing is checked


class Biased(GridArithmetic):
    """A generator whose numbers are off by one step in 4,000."""

    @staticmethod
    def draw(key, size, table):
        drawn = GridArithmetic.draw(key, size, table)
        return drawn.at[..., -1].add(1)


class Rounding(GridArithmetic):
    """A platform that adds integers as float32 numbers."""

    def add(self, latent, added):
        steps = latent.astype(jnp.float32) / 3 + added.astype(jnp.float32) / 3
        return jnp.clip(3 * steps, -(2.0**24), 2.0**24) * np.float32(self.identity["spacing"])


class NegativeZero(GridArithmetic):
    """A platform whose sums can be -0.0."""

    def add(self, latent, added):
        noisy = super().add(latent, added)
        return jnp.where(noisy == 0, -0.0, noisy)


@pytest.mark.parametrize(("broken", "why"), [(Biased, "other noise"), (Rounding, "error"), (NegativeZero, "error")])
def test_broken_noise_is_refused(broken, why):
    with pytest.raises(UserError, match=why):
        platform_check.check_noise(broken(0.25))


@pytest.mark.parametrize("certificate", ["smoothed", "deterministic"])
def test_certification_refuses_such_a_platform_and_leaves_nothing_behind(tmp_path, monkeypatch, certificate):
    workdir = tmp_path / "run"
    run("train", *QUICK, "--config.model.head=linear", f"--workdir={workdir}")

    class Tensorcores(Float64Encoder):
        def __init__(self, encoder, batch):
            super().__init__(encoder._replace(params=jax.tree.map(in_tf32, encoder.params)), batch)

    for module in (encode, linear):
        monkeypatch.setattr(module, "Float64Encoder", Tensorcores)
    flags = [f"--workdir={workdir}", f"--config.certify.certificate={certificate}"]
    with pytest.raises(UserError, match="this platform computes the encoder with an error of"):
        certify.run(flags)
    assert not list(workdir.rglob("certificates.*"))
    assert not list(workdir.rglob("votes.*"))
    monkeypatch.undo()
    certify.run(flags)
    assert list(workdir.rglob("certificates.tsv"))
