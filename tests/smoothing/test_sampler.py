import contextvars
import itertools
import threading
from concurrent import futures

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lsrs_jax import layers, models, smoothing
from lsrs_jax.config import default
from lsrs_jax.layers.lipschitz import Float64Encoder, materialize
from lsrs_jax.runtime import rng
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.format import KEY_DOMAINS, STREAMS
from lsrs_jax.smoothing.sampler import Sampler
from lsrs_jax.smoothing.schedule import block_count
from lsrs_jax.smoothing.settings import SPMD
from support import threefry
from support.heads import BIAS, DIM, LATENTS, W, certify, linear_head, network

N = 1_003


def count(head=None, devices=8, spmd="shard_map", n=N, tile=(3, 32), cuts=(), stream="estimation", sigma=0.5, seed=0):
    """Counts of all latents; the sample blocks are launched in the ranges between `cuts`."""
    loop = Sampler(
        head or network(),
        DIM,
        sigma=sigma,
        tile=tile,
        spmd=spmd,
        devices=jax.local_devices()[:devices],
    )
    key, edges = loop.keys(threefry(seed))[stream], [0, *cuts, block_count(n, tile[1])]
    total = []
    for start in range(0, len(LATENTS), tile[0]):
        part = LATENTS[start : start + tile[0]]
        on_device = loop.put(loop.quantize(part))
        pairs = itertools.pairwise(edges)
        parts = [loop.collect(loop.launch(on_device, key, *edge, n), len(part)) for edge in pairs]
        total.append(sum(parts))
    assert loop.traces == 1
    return np.concatenate(total)


@pytest.fixture(scope="module")
def baseline():
    counts = count(devices=1)
    assert (counts.sum(axis=1) == N).all()
    assert (np.count_nonzero(counts, axis=1) > 1).all()
    return counts


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("spmd", SPMD)
def test_counts_do_not_depend_on_devices_or_spmd(baseline, devices, spmd):
    np.testing.assert_array_equal(count(devices=devices, spmd=spmd), baseline)


@pytest.mark.parametrize("cuts", [(1,), (7, 8, 30)])
def test_counts_do_not_depend_on_how_sample_blocks_are_grouped(baseline, cuts):
    np.testing.assert_array_equal(count(devices=8, cuts=cuts), baseline)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("jax_enable_x64", True),
        ("jax_default_prng_impl", "rbg"),
        ("jax_threefry_partitionable", False),
        ("jax_debug_key_reuse", True),
        ("jax_numpy_rank_promotion", "raise"),
    ],
)
def test_counts_do_not_depend_on_flags(baseline, flag, value):
    before = getattr(jax.config, flag)
    jax.config.update(flag, value)
    try:
        np.testing.assert_array_equal(count(devices=2), baseline)
    finally:
        jax.config.update(flag, before)


def test_the_heads_products_run_at_the_highest_precision():
    """Otherwise a flag could change the base classifier between two sessions that write one ledger."""
    seen = []

    def head(z):
        seen.append(jax.config.jax_default_matmul_precision)
        return linear_head(z)

    with jax.default_matmul_precision("bfloat16"):
        count(head)
    assert set(seen) == {"highest"}


def test_counts_do_not_depend_on_the_other_images_of_a_batch(baseline):
    loop = Sampler(network(), DIM, sigma=0.5, tile=(3, 32))
    for row in (0, 4):
        others = [np.full(DIM, 9.0), LATENTS[row], -LATENTS[row]]
        counts = loop.one_batch(others, threefry(0), "estimation", N)
        np.testing.assert_array_equal(counts[1], baseline[row])


def test_the_loop_needs_no_transfer():
    loop = Sampler(network(), DIM, sigma=0.5, tile=(5, 32))
    latents, keys = loop.put(loop.quantize(LATENTS)), loop.keys(threefry(0))
    jax.config.update("jax_transfer_guard", "disallow")  # holds in every thread
    try:
        totals = {"selection": 100, "estimation": N}
        launches = [loop.launch(latents, keys[stream], 0, block_count(n, 32), n) for stream, n in totals.items()]
        futures.wait(launches)
    finally:
        jax.config.update("jax_transfer_guard", "allow")
    assert [loop.collect(launch, 5).sum() for launch in launches] == [500, 5 * N]
    assert loop.traces == 1


@pytest.mark.parametrize("spmd", ["shard_map", "pmap"])
def test_the_head_that_is_sampled_is_the_one_that_was_checked(spmd):
    """The head of this test uses batch statistics in every thread and context but the caller's."""
    here, method = threading.local(), contextvars.ContextVar("method", default=False)

    def head(z):
        evaluating = getattr(here, "evaluating", False) and method.get()
        return linear_head(z) if evaluating else linear_head(z - z.mean(axis=0))

    here.evaluating, token = True, method.set(True)
    try:
        found, plain = (certify(each, n=300, spmd=spmd).counts for each in (head, linear_head))
    finally:
        method.reset(token)
    np.testing.assert_array_equal(found, plain)
    here.evaluating = False
    with pytest.raises(UserError, match="rows depend"):
        certify(head, n=300)


def test_a_loop_is_made_where_transfers_are_guarded():
    head = network()
    with jax.transfer_guard("disallow"):
        assert Sampler(head, DIM, sigma=0.5, tile=(3, 32)).num_classes == 4


def test_a_launch_returns_while_the_platform_is_busy(baseline):
    loop = Sampler(network(), DIM, sigma=0.5, tile=(5, 32))
    latents, call, goes_on = loop.put(loop.quantize(LATENTS)), loop._call, threading.Event()

    def waits(*arguments):
        assert goes_on.wait(60)
        return call(*arguments)

    loop._call, half, key = waits, block_count(N, 32) // 2, loop.keys(threefry(0))["estimation"]
    launches = [loop.launch(latents, key, *ends, N) for ends in ((0, half), (half, block_count(N, 32)))]
    assert not launches[0].done()
    goes_on.set()
    np.testing.assert_array_equal(sum(loop.collect(launch, 5) for launch in launches), baseline)


def test_certify_traces_the_loop_once():
    traced = chex.assert_max_traces(n=3)  # probe, batch of 1, loop
    smoothing.certify(traced(network()), LATENTS, sigma=0.5, key=threefry(0), n=N, tile=(2, 16))


def drawn(loop, stream, block, ids=(0,)):
    """The noise of one sample block, in units of sigma."""
    key, ids = loop.keys(threefry(0))[stream], jnp.asarray(ids, jnp.int32)
    noise = np.asarray(loop.blocks.noise(key, ids, block, loop._tables), np.float64)
    return noise * loop.arithmetic.identity.get("spacing", 1.0) / 0.5


@pytest.mark.parametrize("arithmetic", ["sound", "float32"])
def test_no_noise_vector_is_drawn_twice(arithmetic):
    loop = Sampler(network(), DIM, sigma=0.5, tile=(3, 32), arithmetic=arithmetic)
    parts = [drawn(loop, stream, block) for stream in STREAMS for block in range(48)]
    vectors = np.concatenate(parts).reshape(-1, np.prod(DIM))
    assert len(np.unique(vectors, axis=0)) == len(vectors) == 3 * 48 * 32
    assert stats.kstest(vectors.ravel(), "norm").pvalue > 1e-6
    # No two of the first 1,024 vectors, scaled to unit variance, are correlated more than chance allows.
    some = vectors[:1024] / np.sqrt(np.mean(vectors[:1024] ** 2))
    gram = (some @ some.T)[np.triu_indices(1024, 1)] / np.sqrt(some.shape[1])
    assert np.mean(gram**2) == pytest.approx(1, abs=0.01)
    assert np.abs(gram).max() < 7


def test_independent_noise_differs_between_images_and_from_shared_noise():
    shared, independent = (
        Sampler(network(), DIM, sigma=0.5, tile=(3, 32), noise=noise) for noise in ("shared", "independent")
    )
    vectors = [drawn(shared, "estimation", block) for block in range(8)]
    vectors += [drawn(independent, "estimation", block, range(8)).reshape(8 * 32, -1) for block in range(8)]
    vectors = np.concatenate(vectors)
    assert len(np.unique(vectors, axis=0)) == len(vectors) == 8 * 32 + 8 * 8 * 32
    three = LATENTS[[0, 0, 1]]
    counts = [independent.one_batch(three, threefry(0), "estimation", 256, ids) for ids in ((4, 5, 6), (5, 9, 4))]
    np.testing.assert_array_equal(counts[0][1], counts[1][0])  # equal image and id, another place in the batch
    assert (counts[0][0] != counts[0][1]).any()
    for ids in ((1, 1, 2), (-1, 1, 2), (2**31, 1, 2)):
        with pytest.raises(UserError, match="a different id"):
            independent.put(independent.quantize(three), ids)


def test_certification_shares_no_key_with_any_other_domain_of_the_seed():
    """The streams must not share a key with training even if a user certifies with the training's seed."""
    loop = Sampler(linear_head, DIM, sigma=0.5, tile=(3, 32))

    streams = loop.keys(rng.root_key(0))

    def data(key):
        return tuple(np.asarray(jax.random.key_data(key)).tolist())

    ours = {data(jax.random.fold_in(key, i)) for key in streams.values() for i in range(300)}
    ours |= {data(key) for key in streams.values()}
    others = [rng.domain_key(0, domain) for domain in KEY_DOMAINS if domain != "certify"]
    others += [jax.random.fold_in(key, i) for key in others for i in range(300)]
    others += [rng.root_key(0), *(jax.random.fold_in(rng.root_key(0), i) for i in range(300))]
    # Keys that another training program might use: splits of the root key, and epoch and step folded into it.
    others += list(jax.random.split(rng.root_key(0), 64))
    others += [jax.random.fold_in(key, i) for key in others[-364:-64] for i in range(4)]
    assert not ours & {data(key) for key in others}
    assert len(ours) == 903


def test_streams_see_different_noise(baseline):
    assert (count(devices=1, stream="selection") != baseline).any()


# -------------------------------------------------------------------------------------------- distribution of samples


def linear_p_values(sigma_sampled, sigma_claimed, n=20_000):
    """Two-sided binomial p-values of the samples of a linear head, whose distribution is known in closed form."""
    counts = count(linear_head, n=n, sigma=sigma_sampled, tile=(5, 64))
    margin = (LATENTS.reshape(5, -1) @ W.ravel().astype(np.float64) + BIAS) / np.linalg.norm(W)
    p = stats.norm.cdf(margin / sigma_claimed)
    return np.array([stats.binomtest(int(k), n, q).pvalue for k, q in zip(counts[:, 0], p, strict=True)])


def test_samples_have_the_right_distribution_and_a_wrong_sigma_is_rejected():
    assert linear_p_values(0.5, 0.5).min() > 1e-4
    assert linear_p_values(0.55, 0.5).min() < 1e-6


def test_linear_radius_is_approached_from_below():
    exact = np.abs(LATENTS.reshape(5, -1) @ W.ravel() + BIAS) / np.linalg.norm(W)
    radii = []
    for n in (1_000, 10_000, 200_000):
        got = smoothing.certify(linear_head, LATENTS, sigma=float(exact.max()), key=threefry(0), n=n, tile=(5, 128))
        assert (got.radius <= exact).all()
        radii.append(got.radius)
    assert (radii[-1] >= 0.97 * exact - 0.02 * exact.max()).all()
    assert (radii[-1] > radii[0]).all()
    with_slack = smoothing.certify(
        linear_head, LATENTS, sigma=float(exact.max()), key=threefry(0), n=200_000, tile=(5, 128), slack=0.05
    )
    np.testing.assert_allclose(with_slack.radius, np.maximum(radii[-1] - 0.05, 0), rtol=1e-9)
    halved = smoothing.certify(
        linear_head, LATENTS, sigma=float(exact.max()), key=threefry(0), n=200_000, tile=(5, 128), lipschitz=2.0
    )
    np.testing.assert_allclose(halved.radius, radii[-1] / 2, rtol=1e-9)


def chi_square_p(a, b):
    """p-value of the chi-square test that two histograms of samples come from one distribution."""
    kept = (a + b) > 10
    return stats.chi2_contingency(np.stack([a[kept], b[kept]])).pvalue


def test_a_linear_orthogonal_encoder_gives_the_distribution_of_input_smoothing():
    encoder = layers.Encoder((layers.SpaceToDepth((2, 2)), layers.OrthogonalConv(8, (3, 3), initializer="random")))
    plain = materialize(encoder, encoder.init(threefry(5), jnp.zeros((1, *DIM)))["params"], DIM)
    w = np.random.default_rng(3).standard_normal((32, 4)).astype(np.float32)

    def head(z):
        hidden = jnp.abs(z.reshape(z.shape[0], -1)) @ w
        return hidden - jnp.mean(hidden, axis=1, keepdims=True)

    base = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), plain.params)

    def whole(x):
        return head(plain.apply(base, x))

    latents = Float64Encoder(plain, 5)(LATENTS)

    def histograms(function, points, sigma, seed):
        got = smoothing.certify(function, points, sigma=sigma, key=threefry(seed), n=40_000, tile=(5, 64))
        return got.counts

    latent = histograms(head, latents, 0.5, 1)
    same = [chi_square_p(a, b) for a, b in zip(latent, histograms(whole, LATENTS, 0.5, 2), strict=True)]
    wrong = [chi_square_p(a, b) for a, b in zip(latent, histograms(whole, LATENTS, 0.55, 2), strict=True)]
    assert min(same) > 1e-4
    assert min(wrong) < 1e-6


def test_the_identity_encoder_is_input_smoothing():
    """The split model with the encoder `identity` and a plain call on the images give the same samples."""
    config = default().model
    config.encoder, config.head, config.mean = "identity", "mlp", (0.3,)
    model = models.build(config, DIM, 4)
    params = model.init(threefry(3))
    encoder, head = model.for_certification(params)
    latents = Float64Encoder(encoder, 5)(LATENTS)
    ours = smoothing.certify(head, latents, sigma=0.5, key=threefry(0), n=N, lipschitz=encoder.report.constant)
    cohen = smoothing.certify(lambda x: model.classify(params, x), LATENTS, sigma=0.5, key=threefry(0), n=N)
    np.testing.assert_array_equal(ours.counts, cohen.counts)
    np.testing.assert_array_equal(ours.radius, cohen.radius)
