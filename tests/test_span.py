"""Linear heads after the subspace projection: samples have the same distribution, in fewer dimensions."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lsrs_jax import models, smoothing
from lsrs_jax.config import default
from lsrs_jax.layers.lipschitz import Float64Encoder
from lsrs_jax.models.linear_head import project_linear_head
from lsrs_jax.runtime.errors import UserError
from support import threefry

RNG = np.random.default_rng(0)
WEIGHTS, BIAS = RNG.standard_normal((96, 4)), RNG.standard_normal(4)
LATENTS = RNG.standard_normal((4, 96)) * 0.3


def whole(z):
    return z @ jnp.asarray(WEIGHTS, jnp.float32) + jnp.asarray(BIAS, jnp.float32)


def counts(head, latents, sigma, seed):
    return smoothing.certify(head, latents, sigma=sigma, key=threefry(seed), n=40_000, tile=(4, 64)).counts


def p_values(a, b):
    return [stats.chi2_contingency(np.stack([x, y])[:, (x + y) > 10]).pvalue for x, y in zip(a, b, strict=True)]


def test_samples_in_the_subspace_have_the_distribution_of_samples_in_the_latent():
    span = project_linear_head(WEIGHTS, BIAS)
    assert span.basis.shape == (96, 4)
    assert 1 <= span.lipschitz < 1 + 1e-10
    np.testing.assert_allclose(span.head(LATENTS @ span.basis), whole(LATENTS), atol=1e-4)
    full, small = counts(whole, LATENTS, 0.5, 1), counts(span.head, LATENTS @ span.basis, 0.5, 2)
    assert (np.count_nonzero(full > 100, axis=1) > 1).all()
    assert min(p_values(full, small)) > 1e-4
    assert min(p_values(full, counts(span.head, LATENTS @ span.basis, 0.55, 2))) < 1e-6


@pytest.mark.parametrize(
    ("weights", "bias"),
    [
        (np.ones((3, 4)), np.ones(4)),
        (np.ones((5, 4)), np.ones(3)),
        (np.full((5, 4), np.nan), np.ones(4)),
        (np.ones(4), np.ones(4)),
    ],
)
def test_other_shapes_and_numbers_are_refused(weights, bias):
    with pytest.raises(UserError, match="linear head"):
        project_linear_head(weights, bias)


def test_degenerate_weights_certify_nothing_wrong():
    """With equal weights for all classes, the logits do not depend on the latent, and one class wins every sample."""
    span = project_linear_head(np.ones((20, 3)), np.array([0.0, 1.0, 0.5]))
    got = smoothing.certify(span.head, np.zeros((1, 20)) @ span.basis, sigma=1.0, key=threefry(0), n=1000)
    assert got.predict[0] == 1
    assert got.counts[0, 1] == 1000
    # The projection can be pickled for another process.
    again = pickle.loads(pickle.dumps(span))
    np.testing.assert_array_equal(again.head(np.ones((2, 3))), span.head(np.ones((2, 3))))


@pytest.mark.parametrize("encoder", ["identity", "shallow"])
@pytest.mark.parametrize("head", ["linear", "normalized", "orthogonal"])
def test_linear_heads_are_certified_in_their_subspace(encoder, head):
    config = default().model
    config.update({"encoder": encoder, "head": head, "mean": (0.3,), "std": (0.5,)})
    model = models.build(config, (8, 8, 1), 10)
    params = model.init(threefry(0))
    x = np.random.default_rng(0).random((6, 8, 8, 1)).astype(np.float32)
    plain, small = model.for_certification(params)
    assert plain.report.output_shape == (10,)
    assert plain.report.layers[-1].layer.endswith("span of the weights")
    # Under input smoothing the normalisation follows the noise, so it is part of the head.
    assert plain.report.constant == pytest.approx(1.0 if encoder == "identity" else 2.0, rel=1e-9)
    latents = Float64Encoder(plain, 6)(x)
    np.testing.assert_allclose(small(latents), model.classify(params, model.encode(params, x)), atol=2e-4)


def test_a_linear_head_behind_input_noise_and_a_real_encoder_is_not_linear():
    config = default().model
    config.update({"encoder": "shallow", "head": "linear", "noise": "input"})
    model = models.build(config, (8, 8, 1), 10)
    plain, _ = model.for_certification(model.init(threefry(0)))
    assert plain.report.output_shape == (8, 8, 1)


def test_a_head_in_bfloat16_computes_in_bfloat16():
    config = default().model
    config.update({"encoder": "shallow", "head": "mlp"})
    model = models.build(config, (8, 8, 1), 10)
    params = model.init(threefry(0))
    heads = [model.for_certification(params, dtype)[1] for dtype in ("float32", "bfloat16")]
    z = jax.random.normal(threefry(1), (64, 4, 4, 4))
    exact, coarse = (np.asarray(head(z)) for head in heads)
    assert exact.dtype == coarse.dtype == np.float32
    assert 1e-4 < np.abs(exact - coarse).max() < 0.1 * np.abs(exact).max()
    assert "bf16" in str(jax.make_jaxpr(heads[1])(z))
