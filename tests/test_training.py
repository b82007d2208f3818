import jax
import numpy as np
import optax
import pytest
from conftest import threefry

from lsrs_jax import checkpoint, models
from lsrs_jax.config import default
from lsrs_jax.data import Dataset
from lsrs_jax.distributed import local_mesh, replicated
from lsrs_jax.errors import UserError
from lsrs_jax.training import losses, optimizer
from lsrs_jax.training.loop import Evaluator


def small_model(**fields):
    config = default().model
    config.head = "linear"
    config.update(fields)
    return models.build(config, (4, 4, 1), 3)


@pytest.mark.parametrize("noise", ["latent", "input"])
def test_the_loss_is_cross_entropy_under_the_certification_noise(noise):
    model = small_model(noise=noise)
    params = model.init(threefry(0))
    images = np.random.default_rng(0).random((6, 4, 4, 1)).astype(np.float32)
    labels = np.array([0, 1, 2, 0, 1, 2])
    loss, accuracy = losses.gaussian_cross_entropy(model, params, images, labels, 0.7, threefry(4))
    points = images if noise == "input" else model.encode(params, images)
    noisy = points + 0.7 * jax.random.normal(threefry(4), points.shape)
    logits = np.asarray(model.classify(params, noisy), np.float64)
    expected = -np.mean((logits - np.log(np.exp(logits).sum(1, keepdims=True)))[np.arange(6), labels])
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(accuracy) == pytest.approx(np.mean(logits.argmax(1) == labels))


def test_the_margin_loss_handicaps_the_true_class():
    model = small_model(head="orthogonal")
    params = model.init(threefry(0))
    images = np.random.default_rng(0).random((6, 4, 4, 1)).astype(np.float32)
    labels = np.array([0, 1, 2, 0, 1, 2])
    loss, accuracy = losses.margin_cross_entropy(model, params, images, labels, 0.3, 0.5)
    logits = np.asarray(model.classify(params, model.encode(params, images)), np.float64)
    rows = np.arange(6)
    handicapped = logits.copy()
    handicapped[rows, labels] -= np.sqrt(2) * 0.3
    scaled = handicapped / 0.5
    expected = -0.5 * np.mean((scaled - np.log(np.exp(scaled).sum(1, keepdims=True)))[rows, labels])
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(accuracy) == pytest.approx(np.mean(logits.argmax(1) == labels))
    assert float(losses.margin_cross_entropy(model, params, images, labels, 0.0, 0.5)[0]) < float(loss)


def test_weight_decay_touches_the_heads_kernels_only():
    model = small_model()
    params = model.init(threefry(0))
    settings = default().train
    settings.weight_decay, settings.schedule, settings.learning_rate = 0.1, "constant", 0.5
    transformation = optimizer.build(settings)
    zero = jax.tree.map(np.zeros_like, params)
    updates, _ = transformation.update(zero, transformation.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(
        moved["head"]["Dense_0"]["kernel"], 0.95 * np.asarray(params["head"]["Dense_0"]["kernel"]), rtol=1e-6
    )
    moved["head"]["Dense_0"]["kernel"] = params["head"]["Dense_0"]["kernel"]
    jax.tree.map(np.testing.assert_array_equal, moved, params)


def test_schedule_warms_up_and_falls_to_zero():
    settings = default().train
    settings.steps, settings.warmup_steps, settings.learning_rate = 100, 10, 1.0
    rate = optimizer.schedule(settings)
    values = [float(rate(step)) for step in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert max(values) == pytest.approx(values[10]) == pytest.approx(1.0)
    assert values[100] == pytest.approx(0, abs=1e-6)
    settings.schedule = "constant"
    assert float(optimizer.schedule(settings)(99)) == 1.0


def test_evaluation_counts_every_image_once():
    """37 images on 8 devices: the padding must not count."""
    model = small_model()
    params = model.init(threefry(0))
    images = np.random.default_rng(0).integers(0, 256, (37, 4, 4, 1), np.uint8)
    predicted = np.argmax(model.classify(params, model.encode(params, (images / 255).astype(np.float32))), axis=1)
    labels = np.array(predicted, np.int32)
    labels[::4] = (labels[::4] + 1) % 3
    dataset = Dataset("x", "1", "test", images, labels, 3)
    noisy, clean = Evaluator(model, 1e-6, dataset, local_mesh())(params, threefry(0))
    assert clean == pytest.approx(27 / 37)
    assert noisy == pytest.approx(clean)


def test_checkpoints_move_between_device_counts(tmp_path):
    params = {"a": np.arange(12, dtype=np.float32).reshape(3, 4)}
    on_eight = jax.device_put(params, replicated(local_mesh()))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, on_eight, {"m": on_eight["a"]})
        checkpoints.wait()
        target = {"a": jax.ShapeDtypeStruct((3, 4), np.float32)}
        restored, meta = checkpoint.restore_model(tmp_path, target)
    assert restored["a"].sharding.device_set == {jax.local_devices()[0]}
    np.testing.assert_array_equal(restored["a"], params["a"])
    assert meta == {"step": 3, "digest": checkpoint.digest(params)}


def test_the_digest_sees_names_shapes_types_and_values():
    base = {"a": np.zeros((2, 3), np.float32)}
    others = [
        {"b": base["a"]},
        {"a": base["a"].reshape(3, 2)},
        {"a": base["a"].astype(np.int32)},
        {"a": base["a"] + np.float32(1e-30)},
    ]
    assert len({checkpoint.digest(tree) for tree in [base, *others]}) == 5


def test_a_missing_or_foreign_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="train first"):
        checkpoint.restore_model(tmp_path, {})
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.restore_model(tmp_path, {})
