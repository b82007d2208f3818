"""Section precision of `benchmarks.accelerator`: how exactly this platform computes what certificates rely on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from lsrs_jax import orthogonal
from lsrs_jax.certification.platform_check import check_encoder, check_noise
from lsrs_jax.layers import Encoder, Haar, MaxMin, OrthogonalConv
from lsrs_jax.layers.lipschitz import Float64Encoder, materialize
from lsrs_jax.orthogonal import build_kernels
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.rng import domain_key, pinned
from lsrs_jax.smoothing import discrete_gaussian
from lsrs_jax.smoothing.arithmetic import make_arithmetic

FLAGS = ("default", "bfloat16", "highest")
WIDE = orthogonal.ConvShape((3, 3), (1, 1), 32, 32, (8, 8), "circular")
CHANNELS, PIXELS = 8, 8  # of a layer that is small enough for its matrix
BINS = 200


def kernels(flag):
    """``[σ_max − 1, 1 − σ_min]`` per family: of float32 kernels built under a flag, and of the matrix of a layer.

    The matrix is the image of the unit vectors on the device. ``trained`` layers run in float32 under the flag, as in
    training; ``certified`` layers run in float64 from float64 kernels, as `certify` runs them.
    """
    found = {}
    for method in orthogonal.FAMILIES:
        family = orthogonal.family(method)
        raws = [family.init(key, WIDE, "random") for key in jax.random.split(domain_key(0, "probe"), 2)]
        with jax.default_matmul_precision(flag):
            built = jax.jit(lambda raws, m=method: build_kernels([(m, WIDE, raw) for raw in raws]))(raws)
        spectra = [family.spectrum(jax.tree.map(np.asarray, kernel), WIDE) for kernel in built]
        net = Encoder((OrthogonalConv(CHANNELS, (3, 3), method=method, initializer="random"),))
        units = np.eye(CHANNELS * PIXELS**2).reshape(-1, PIXELS, PIXELS, CHANNELS)
        variables = net.init(domain_key(0, "init"), jnp.zeros((1, *units.shape[1:])))
        with jax.default_matmul_precision(flag):
            trained = np.asarray(jax.jit(net.apply)(variables, jnp.asarray(units, jnp.float32)))
            frozen = materialize(net, variables, units.shape[1:])
            certified = Float64Encoder(frozen, 64)(units)
        found[method] = {
            "built": [max(s.sigma_max for s in spectra) - 1, 1 - min(s.sigma_min for s in spectra)],
            "trained": _deviation(trained),
            "certified": _deviation(certified),
            "charged": frozen.report.constant - 1,
        }
    return found


def _deviation(outputs):
    singular = np.linalg.svd(np.asarray(outputs, np.float64).reshape(len(outputs), -1), compute_uv=False)
    return [float(singular.max()) - 1, 1 - float(singular.min())]


def encoder(flag):
    """The share of the encoder's rounding budget that this platform uses; whether a float32 encoder is refused."""
    found = {}
    shape = (16, 16, 3)
    for method in orthogonal.FAMILIES:
        conv = functools.partial(OrthogonalConv, kernel_size=(3, 3), method=method, initializer="random")
        net = Encoder((Haar(), conv(12), MaxMin(), conv(12), MaxMin()))
        frozen = materialize(net, jax.jit(net.init)(domain_key(0, "init"), jnp.zeros((1, *shape))), shape)
        weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), frozen.params)
        with jax.default_matmul_precision(flag):
            share = check_encoder(frozen, Float64Encoder(frozen, 4))
            apply = jax.jit(frozen.apply)
            try:
                check_encoder(frozen, lambda x, f=apply, w=weights: f(w, jnp.asarray(x, jnp.float32)))
            except UserError as error:
                refused = str(error)
            else:
                refused = ""
        found[method] = {"share_of_the_charge": share, "float32_refused": refused}
    return found


def noise(draws):
    """Compares the grid noise of the device with NumPy's, and tests its distribution with χ².

    ``wrong_p_value`` tests the same draws against σ · 1.001, to show that the test would notice a wrong σ.
    """
    sigma, size = 0.25, 2**20
    arithmetic = make_arithmetic("sound", sigma)
    check_noise(arithmetic)
    q = discrete_gaussian.spacing(sigma)
    edges = np.floor(np.linspace(-4, 4, BINS - 1) * sigma / q) + 0.5
    with pinned():
        tables, limits = jnp.asarray(arithmetic.tables), jnp.asarray(np.floor(edges).astype(np.int32))

        @jax.jit
        def histogram(key):
            drawn = arithmetic.draw(key, (size,), tables)
            return jnp.bincount(jnp.searchsorted(limits, drawn, side="left"), length=BINS)

        keys = jax.random.split(domain_key(1, "probe"), max(1, draws // size))
        counts = sum(np.asarray(histogram(key), np.int64) for key in keys)

    def p_value(assumed):
        cumulative = stats.norm.cdf(np.concatenate([[-np.inf], edges, [np.inf]]) * q / assumed)
        return float(stats.chisquare(counts, counts.sum() * np.diff(cumulative)).pvalue)

    return {"draws": int(counts.sum()), "p_value": p_value(sigma), "wrong_p_value": p_value(1.001 * sigma)}
