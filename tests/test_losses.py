import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lsrs_jax import models
from lsrs_jax.config import LOSSES, default
from lsrs_jax.runtime.mesh import local_mesh, replicated, split
from lsrs_jax.training import losses
from support import threefry

pytestmark = pytest.mark.usefixtures("fast_compilation")

IMAGES = np.random.default_rng(0).random((6, 4, 4, 1)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2])
ROWS = np.arange(6)
SIGMA = 0.7


def small_model(classes=3, **fields):
    config = default().model
    config.head = "linear"
    config.update(fields)
    return models.build(config, (4, 4, 1), classes)


@pytest.fixture(params=["latent", "input"])
def model(request):
    return small_model(noise=request.param, head="mlp")


def under_noise(loss, model, params, labels, noises, *settings, **attack):
    """The loss and the accuracy that `make_loss` computes."""
    logits = losses.sample(model, params, IMAGES, labels, threefry(4), SIGMA, noises, **attack)
    return loss(logits, labels, *settings), losses.accuracy(logits, labels)


def noisy_log_probabilities(model, params, noises):
    """Log-probabilities ``(B, noises, K)`` in float64, by the definition, one sample at a time."""
    points = np.asarray(IMAGES if model.smooths_input else model.encode(params, IMAGES))
    noise = SIGMA * jax.random.normal(threefry(4), (6 * noises, *points.shape[1:]))
    noise = np.asarray(noise).reshape(6, noises, *points.shape[1:])
    logits = [np.asarray(model.classify(params, points + noise[:, i]), np.float64) for i in range(noises)]
    logits = np.stack(logits, axis=1)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("noises", [1, 3])
def test_gaussian_is_cross_entropy_under_the_certification_noise(model, noises):
    params = model.init(threefry(0))
    loss, accuracy = under_noise(losses.cross_entropy, model, params, LABELS, noises)
    expected = noisy_log_probabilities(model, params, noises)
    assert float(loss) == pytest.approx(-expected[ROWS, :, LABELS].mean(), rel=1e-5)
    assert float(accuracy) == pytest.approx(np.mean(expected.argmax(-1) == LABELS[:, None]))


def test_consistency_adds_divergence_and_entropy(model):
    params = model.init(threefry(0))
    loss, _ = under_noise(losses.consistency, model, params, LABELS, 3, 10.0, 0.5)
    log_p = noisy_log_probabilities(model, params, 3)
    mean = np.exp(log_p).mean(axis=1)
    divergence = np.mean([[stats.entropy(mean[row], np.exp(log_p[row, i])) for i in range(3)] for row in ROWS])
    uncertainty = np.mean(stats.entropy(mean, axis=1))
    assert divergence > 1e-4
    expected = -log_p[ROWS, :, LABELS].mean() + 10 * divergence + 0.5 * uncertainty
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_macer_penalizes_small_radii_of_correct_answers_only(model):
    params = model.init(threefry(0))
    loss, _ = under_noise(losses.macer, model, params, LABELS, 5, SIGMA, 12.0, 1.0, 16.0)
    log_p = noisy_log_probabilities(model, params, 5)
    soft = np.exp(16 * log_p)
    soft = (soft / soft.sum(-1, keepdims=True)).mean(axis=1)
    own = soft[ROWS, LABELS]
    others = soft.copy()
    others[ROWS, LABELS] = 0
    gap = stats.norm.ppf(np.clip(own, 1e-6, 1 - 1e-6)) - stats.norm.ppf(np.clip(others.max(1), 1e-6, 1 - 1e-6))
    hinge = np.where(gap > 0, np.maximum(1.0 - gap, 0), 0)
    assert (gap < 0).any()
    natural = -np.log(np.exp(log_p).mean(axis=1)[ROWS, LABELS]).mean()
    assert float(loss) == pytest.approx(natural + 12 * SIGMA / 2 * hinge.mean(), rel=1e-4)


def test_macers_hinge_is_the_certified_radius():
    """For two classes and a linear head the radius is known, and so is the hinge loss."""
    model = small_model(2, encoder="identity")
    params = model.init(threefry(0))
    params["head"]["Dense_0"]["kernel"] *= 5  # large logits, so that the softmax is almost one-hot
    labels = np.asarray(model.classify(params, IMAGES)).argmax(1)
    arguments = losses.macer, model, params, labels, 4000, SIGMA
    with_hinge, without = (under_noise(*arguments, weight, 8.0, 200.0)[0] for weight in (1.0, 0.0))
    difference = np.diff(np.asarray(params["head"]["Dense_0"]["kernel"]), axis=1).ravel()
    radius = np.abs(np.diff(np.asarray(model.classify(params, IMAGES)), axis=1)).ravel() / np.linalg.norm(difference)
    expected = np.maximum(SIGMA * 8 / 2 - radius, 0).mean()
    assert float(with_hinge - without) == pytest.approx(expected, abs=0.02)


def test_macer_has_finite_gradients_when_all_samples_agree():
    model = small_model()
    params = model.init(threefry(0))
    params["head"]["Dense_0"]["bias"] = jnp.asarray([1e3, 0.0, 0.0])
    gradient = jax.jit(jax.grad(lambda p: under_noise(losses.macer, model, p, LABELS, 4, SIGMA, 12.0, 8.0, 16.0)[0]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(params)))


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("noise", ["latent", "input"])
def test_smoothadv_finds_the_worst_point_of_a_linear_classifier(noise, steps):
    """With two classes, the worst shift is along w and changes every margin by radius · ‖w‖."""
    model = small_model(2, encoder="space_to_depth", noise=noise)
    params = model.init(threefry(0))
    labels = LABELS % 2
    loss, _ = under_noise(losses.cross_entropy, model, params, labels, 3, radius=0.4, steps=steps)
    log_p = noisy_log_probabilities(model, params, 3)
    margin = log_p[ROWS, :, labels] - log_p[ROWS, :, 1 - labels]
    length = np.linalg.norm(np.diff(np.asarray(params["head"]["Dense_0"]["kernel"]), axis=1))
    assert float(loss) == pytest.approx(np.log1p(np.exp(-(margin - 0.4 * length))).mean(), rel=1e-4)


@pytest.mark.parametrize("noise", ["latent", "input"])
def test_smoothadv_consistency_asks_for_agreement_at_the_worst_point(noise):
    model = small_model(2, encoder="space_to_depth", noise=noise)
    params = model.init(threefry(0))
    labels = LABELS % 2
    arguments = losses.consistency, model, params, labels, 3, 10.0, 0.5
    log_p = noisy_log_probabilities(model, params, 3)
    length = np.linalg.norm(np.diff(np.asarray(params["head"]["Dense_0"]["kernel"]), axis=1))
    own = 1 / (1 + np.exp(-(log_p[ROWS, :, labels] - log_p[ROWS, :, 1 - labels] - 0.4 * length)))
    p = np.stack([own, 1 - own], axis=-1)
    mean = p.mean(axis=1)
    divergence = np.mean([[stats.entropy(mean[row], p[row, i]) for i in range(3)] for row in ROWS])
    expected = -np.log(own).mean() + 10 * divergence + 0.5 * np.mean(stats.entropy(mean, axis=1))
    loss, accuracy = under_noise(*arguments, radius=0.4, steps=2)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(accuracy) == pytest.approx(np.mean(own > 0.5))
    still = under_noise(*arguments, radius=0.0, steps=2)[0]
    assert float(still) == pytest.approx(float(under_noise(*arguments)[0]), rel=1e-6)
    assert float(still) < float(loss)


def test_smoothadv_attacks_and_trains_under_the_same_noise(model):
    params = model.init(threefry(0))
    arguments = losses.cross_entropy, model, params, LABELS, 4
    plain = under_noise(*arguments)[0]
    assert float(under_noise(*arguments, radius=0.0, steps=2)[0]) == pytest.approx(float(plain), rel=1e-6)
    attacked = [float(under_noise(*arguments, radius=radius, steps=3)[0]) for radius in (0.1, 0.3, 0.9)]
    assert float(plain) < attacked[0] < attacked[1] < attacked[2]


def test_smoothadv_takes_the_perturbation_as_given():
    """Otherwise the training gradient of a linear head would depend on its weights twice."""
    model = small_model(2, encoder="identity")
    params = model.init(threefry(0))
    labels = LABELS % 2
    gradient = jax.grad(lambda p: under_noise(losses.cross_entropy, model, p, labels, 1, radius=0.4, steps=1)[0])(
        params
    )
    weights = np.asarray(params["head"]["Dense_0"]["kernel"])
    direction = weights[:, 1] - weights[:, 0]
    shift = 0.4 * np.where(labels, -1, 1)[:, None] * direction / np.linalg.norm(direction)
    noise = SIGMA * np.asarray(jax.random.normal(threefry(4), IMAGES.shape))
    points = (IMAGES + noise).reshape(6, -1) + shift

    def fixed(w):
        log_p = jax.nn.log_softmax(points @ w)
        return -log_p[ROWS, labels].mean()

    np.testing.assert_allclose(gradient["head"]["Dense_0"]["kernel"], jax.grad(fixed)(weights), atol=1e-5)


def test_the_margin_loss_handicaps_the_true_class():
    model = small_model(head="orthogonal")
    params = model.init(threefry(0))
    loss, accuracy = losses.margin_cross_entropy(model, params, IMAGES, LABELS, 0.3, 0.5)
    logits = np.asarray(model.classify(params, model.encode(params, IMAGES)), np.float64)
    handicapped = logits.copy()
    handicapped[ROWS, LABELS] -= np.sqrt(2) * 0.3
    scaled = handicapped / 0.5
    expected = -0.5 * np.mean((scaled - np.log(np.exp(scaled).sum(1, keepdims=True)))[ROWS, LABELS])
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(accuracy) == pytest.approx(np.mean(logits.argmax(1) == LABELS))
    assert float(losses.margin_cross_entropy(model, params, IMAGES, LABELS, 0.0, 0.5)[0]) < float(loss)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_selected_by_name_and_equal_on_eight_devices(name):
    config = default()
    config.train.loss, config.train.noises = name, 3
    model = small_model(head="mlp")
    params = model.init(threefry(0))
    images, labels = np.concatenate([IMAGES, IMAGES[:2]]), np.concatenate([LABELS, LABELS[:2]])
    function = jax.value_and_grad(losses.make_loss(config), argnums=1, has_aux=True)

    @jax.jit
    def evaluate(params, images, labels):
        return function(model, params, images, labels, threefry(4), 0)

    whole = evaluate(params, images, labels)
    mesh = local_mesh()
    parts = evaluate(jax.device_put(params, replicated(mesh)), *jax.device_put((images, labels), split(mesh)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), whole, parts)
    other = losses.make_loss(config)(model, params, images, labels, threefry(5), 0)
    assert (float(other[0]) == pytest.approx(float(whole[0][0]), rel=1e-6)) == (name == "margin")


def settled(step, **fields):
    """The loss at a step, of a configuration with these fields of the section ``train``, and of `sigma`."""
    config, sigma = default(), fields.pop("sigma", SIGMA)
    config.sigma, config.train.noises = sigma, 2
    config.train.update_from_flattened_dict(fields)
    model = small_model(head="mlp")
    return float(losses.make_loss(config)(model, model.init(threefry(0)), IMAGES, LABELS, threefry(4), step)[0])


def test_the_noise_of_training_grows_to_sigma():
    warm = {"sigma_start": 0.1, "sigma_steps": 10}
    for step, sigma in ((0, 0.1), (5, (0.1 + SIGMA) / 2), (10, SIGMA), (11, SIGMA)):
        assert settled(step, **warm) == pytest.approx(settled(0, sigma=sigma), rel=1e-6), step


def test_the_attack_of_training_grows_to_its_radius():
    attack = {"loss": "smoothadv", "smoothadv.radius": 0.8}
    for step, radius in ((0, 0.0), (5, 0.4), (10, 0.8), (11, 0.8)):
        expected = settled(0, **attack | {"smoothadv.radius": radius})
        assert settled(step, **attack, **{"smoothadv.warmup_steps": 10}) == pytest.approx(expected, rel=1e-6), step
    assert settled(0, loss="gaussian") < settled(0, **attack)
