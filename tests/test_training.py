import collections
import itertools
import types

import jax
import numpy as np
import optax
import pytest

from lsrs_jax import models
from lsrs_jax.config import default
from lsrs_jax.data import Arrays, batch_indices
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.mesh import local_mesh, replicated
from lsrs_jax.runtime.rng import domain_key, pinned
from lsrs_jax.training import checkpoint, loop, steps
from lsrs_jax.training.loop import Evaluator
from support import threefry


def small_model(**fields):
    config = default().model
    config.head = "linear"
    config.update(fields)
    return models.build(config, (4, 4, 1), 3)


def test_weight_decay_touches_the_heads_kernels_only():
    model = small_model()
    params = model.init(threefry(0))
    settings = default().train
    settings.weight_decay, settings.schedule, settings.learning_rate = 0.1, "constant", 0.5
    transformation = steps.make_optimizer(settings)
    zero = jax.tree.map(np.zeros_like, params)
    updates, _ = transformation.update(zero, transformation.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(
        moved["head"]["Dense_0"]["kernel"], 0.95 * np.asarray(params["head"]["Dense_0"]["kernel"]), rtol=1e-6
    )
    moved["head"]["Dense_0"]["kernel"] = params["head"]["Dense_0"]["kernel"]
    jax.tree.map(np.testing.assert_array_equal, moved, params)


def trained(tmp_path, log=lambda *_: None, **fields):
    """Trains for 6 steps and compares with the checkpoint; returns (config, model, data, parameters)."""
    config = default()
    config.data.batch_size, config.train.steps, config.train.evaluate_every = 8, 6, 6
    config.model.head, config.train.learning_rate = "linear", 0.1
    config.train.update(fields)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 4, 4, 1), np.uint8)
    dataset = Arrays("x", "1", "train", images, rng.integers(0, 3, 16), ("a", "b", "c"))
    model = models.build(config.model, dataset.shape, 3)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        result = loop.train(loop.Job(model, config, dataset, dataset, checkpoints, {}), log)
        params, _ = checkpoint.restore_model(tmp_path, result)
        jax.tree.map(np.testing.assert_array_equal, params, result)
    return config, model, dataset, result


def test_the_options_for_gpus_are_ones_that_xla_has():
    """If XLA dropped one of these names, every training on a GPU would fail, but none on a CPU."""
    assert jax.jit(lambda x: x + 1, compiler_options=steps._ON_GPU)(1.0) == 2.0
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: x + 1, compiler_options={f"{name}_": value for name, value in steps._ON_GPU.items()})(1.0)


def test_the_speed_of_training_is_that_of_steps_alone(tmp_path, monkeypatch):
    clock, logged = itertools.count(), []

    def slow(evaluator, params, key):
        collections.deque(itertools.islice(clock, 1000), 0)
        return 0.5, 0.5

    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(Evaluator, "__call__", slow)
    trained(tmp_path, lambda metrics, left=None: logged.append((metrics, left)), log_every=1, evaluate_every=2)
    rows = [row for row, _ in logged if "loss" in row]
    assert [row.get("images_per_second") for row in rows] == [None] + [8.0] * 5  # batches of 8, one clock tick for each
    # At step 1 the speed is unknown, and at step 6 nothing is left to do.
    assert all(left is None for row, left in logged if row["step"] in (1, 6))


def test_the_average_is_what_is_kept_and_the_parameters_train_on(tmp_path):
    *_, last = trained(tmp_path / "last")
    config, model, dataset, average = trained(tmp_path / "average", ema=0.3)
    transformation = steps.make_optimizer(config.train)
    with pinned():
        params = model.init(domain_key(config.seed, "init"))
        step_function = steps.step_function(steps.make_step(model, config, transformation.update))
        expected = jax.device_get(params)  # the step donates its state
        state = steps.State(params, transformation.init(params), None)
        for step in range(6):
            index = batch_indices(len(dataset), 8, config.seed, step)
            batch = dataset.read(index, np.float32)
            state, _ = step_function(state, *batch, domain_key(config.seed, "train"), np.uint32(step))
            kept = min(0.3, (1 + step) / (10 + step))
            expected = jax.tree.map(lambda a, b, k=kept: k * a + (1 - k) * b, expected, jax.device_get(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), last, jax.device_get(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), average, expected)
    assert checkpoint.digest(average) != checkpoint.digest(last)


def test_late_steps_have_more_noise_samples():
    config, model = default(), small_model(encoder="identity")
    config.train.update(steps=6, noises=1, late_noises=3)
    batch = np.random.default_rng(0).random((8, 4, 4, 1), np.float32), np.arange(8) % 3
    transformation, params = steps.make_optimizer(config.train), jax.device_get(model.init(threefry(0)))

    def after(step, **fields):
        other = config.copy_and_resolve_references()
        other.train.update(fields)
        state = steps.State(jax.tree.map(np.copy, params), transformation.init(params), None)
        return steps.step_function(steps.make_step(model, other, transformation.update))(
            state, *batch, threefry(1), np.uint32(step)
        )[1]

    for step, noises in ((3, 1), (4, 3)):
        expected = [float(value) for value in after(step, noises=noises, late_noises=0)]
        assert [float(value) for value in after(step)] == pytest.approx(expected, rel=1e-6)
    assert float(after(3)[0]) != float(after(3, noises=3, late_noises=0)[0])


def test_a_bfloat16_head_trains_float32_parameters(tmp_path):
    *_, exact = trained(tmp_path / "float32")
    *_, rounded = trained(tmp_path / "bfloat16", head_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {np.dtype(np.float32)}
    difference = max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (exact, rounded)), strict=True))
    assert 1e-6 < difference < 0.2


def test_schedule_warms_up_and_falls_to_zero():
    settings = default().train
    settings.steps, settings.warmup_steps, settings.learning_rate = 100, 10, 1.0
    rate = steps.schedule(settings)
    values = [float(rate(step)) for step in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert max(values) == pytest.approx(values[10]) == pytest.approx(1.0)
    assert values[100] == pytest.approx(0, abs=1e-6)
    settings.schedule = "constant"
    assert float(steps.schedule(settings)(99)) == 1.0


def test_evaluation_counts_every_image_once():
    """With 37 images on 8 devices, the padding must not be counted."""
    model = small_model()
    params = model.init(threefry(0))
    images = np.random.default_rng(0).integers(0, 256, (37, 4, 4, 1), np.uint8)
    predicted = np.argmax(model.classify(params, model.encode(params, (images / 255).astype(np.float32))), axis=1)
    labels = np.array(predicted, np.int32)
    labels[::4] = (labels[::4] + 1) % 3
    dataset = Arrays("x", "1", "test", images, labels, ("a", "b", "c"))
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
    optimizer_digest = checkpoint.digest({"m": params["a"]})
    assert meta == {"step": 3, "digest": checkpoint.digest(params), "optimizer": optimizer_digest}


def test_a_damaged_state_of_the_optimizer_is_refused(tmp_path):
    """Otherwise training would continue from it and reach other parameters."""
    params = {"a": np.arange(12, dtype=np.float32)}
    state = {"m": np.random.default_rng(0).normal(size=20_000).astype(np.float32)}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, params, state)
        checkpoints.wait()
    files = [path for path in (tmp_path / "checkpoints" / "3" / "train").rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    assert len(content) > 40_000
    damaged = 0
    for place in (30_000, 50_000, 70_000):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with checkpoint.Checkpoints(tmp_path) as checkpoints:
            with pytest.raises(UserError, match="damaged") as refusal:
                checkpoints.restore(3, params, state)
            damaged += "the digest of its optimizer differs" in str(refusal.value)
    assert damaged
    path.write_bytes(content)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(3, params, state)[1]["m"], state["m"])


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
