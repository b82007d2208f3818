"""Batch normalisation in heads: folding it away, and trainings with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsrs_jax import models, smoothing
from lsrs_jax.config import default
from lsrs_jax.data import Arrays, training_batches
from lsrs_jax.models import batch_norm
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.mesh import global_mesh
from lsrs_jax.runtime.rng import domain_key, pinned
from lsrs_jax.training import checkpoint, loop, steps
from support import threefry

HEADS = {
    "mlp": {"head_widths": (8, 6)},
    "convnet_small": {},
    "resnet_latent": {},
    "resnet18_tail": {},
    "blocks": {"widths": (0, 6), "strides": (1, 2), "split": 0},
}


def network(head, encoder="identity", **fields):
    config = default().model
    config.encoder, config.head, config.head_norm = encoder, head, "batch"
    config.update(fields)
    return models.build(config, (4, 4, 4), 3)


def disturbed(params, key):
    """Parameters with scales, shifts and biases that are not those of the initialisation."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([leaf + 0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


@pytest.mark.parametrize("head", HEADS)
def test_a_folded_head_is_the_normalised_one_for_the_batch_of_its_statistics(head):
    model = network(head, **HEADS[head])
    trained, latents = model.in_training, jax.random.normal(threefry(1), (32, 4, 4, 4))
    params = disturbed(trained.init(threefry(0)), threefry(2))
    statistics = batch_norm.pooled([trained.statistics(params, latents)])
    assert statistics  # one per normalised layer
    folded = params | {"head": batch_norm.fold(params["head"], statistics)}
    jax.tree.map(lambda leaf, shape: None, folded, model.shapes()[0])  # the same tree
    before, after = trained.classify(params, latents), model.classify(folded, latents)
    np.testing.assert_allclose(after, before, rtol=2e-3, atol=2e-3 * float(jnp.abs(before).max()))
    alone = model.classify(folded, latents[:1])
    np.testing.assert_allclose(alone, after[:1], rtol=1e-4, atol=1e-4)
    assert not np.allclose(trained.classify(params, latents[:2])[:1], before[:1], rtol=1e-2, atol=1e-2)


def test_statistics_over_batches_are_those_of_all_rows_together():
    rows = np.random.default_rng(0).normal(2.0, 3.0, (5, 7, 4)) + np.arange(5)[:, None, None]
    batches = [{"layer": {"mean": batch.mean(axis=0), "var": batch.var(axis=0)}} for batch in rows]
    found = batch_norm.pooled(batches)["layer"]
    np.testing.assert_allclose(found["mean"], rows.reshape(-1, 4).mean(axis=0))
    np.testing.assert_allclose(found["var"], rows.reshape(-1, 4).var(axis=0))
    assert not np.allclose(found["var"], rows.var(axis=1).mean(axis=0))


def test_a_head_in_training_cannot_be_certified():
    model = network("mlp")
    trained = model.in_training
    params = trained.init(threefry(0))
    with pytest.raises(UserError, match="certify the head with it folded in"):
        trained.for_certification(params)
    with pytest.raises(UserError, match="rows depend on each other"):
        smoothing.certify(
            lambda z: trained.classify(params, z), np.zeros((1, 4, 4, 4)), sigma=0.5, key=threefry(0), n=100
        )


def test_heads_without_batch_normalisation_refuse_it():
    for head in ("linear", "resnet50"):
        with pytest.raises(UserError, match=f"convnet.*, not {head}"):
            network(head)


def trained(folder, stop=None, **fields):
    """Trains a small network with batch normalisation for 8 steps; `stop` interrupts it after a step."""
    config = default()
    config.data.batch_size, config.train.steps, config.train.checkpoint_every = 8, 8, 4
    config.train.evaluate_every, config.model.head, config.model.head_widths = 100, "mlp", (6,)
    config.model.head_norm, config.model.encoder = "batch", "space_to_depth"
    config.train.update(fields)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (32, 4, 4, 1), np.uint8), rng.integers(0, 3, 32)
    dataset = Arrays("x", "1", "train", images, labels, ("a", "b", "c"))
    model = models.build(config.model, dataset.shape, 3)
    with checkpoint.Checkpoints(folder) as checkpoints:
        job = loop.Job(model, config, dataset, dataset, checkpoints, {})
        if stop is None:
            return model, loop.train(job, lambda *_: None), config, dataset

        def log(values, left=None):
            if values["step"] >= stop and "train_seconds" in values:
                checkpoints.wait()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            loop.train(job, log)
    return None


@pytest.mark.parametrize(
    "fields", [{}, {"ema": 0.9}, {"ema": 0.9, "shard_parameters": True}], ids=["plain", "ema", "sharded"]
)
def test_a_training_saves_folded_parameters_and_resumes_to_the_same_ones(tmp_path, fields):
    model, whole, _, dataset = trained(tmp_path / "whole", **fields)
    trained(tmp_path / "parts", stop=4, **fields)
    assert checkpoint.Checkpoints(tmp_path / "parts").latest() == 4
    _, resumed, _, _ = trained(tmp_path / "parts", **fields)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    stored, _ = checkpoint.restore(tmp_path / "parts", model)
    jax.tree.map(np.testing.assert_array_equal, stored, whole)
    encoder, head = model.for_certification(stored)
    images = dataset.read(np.arange(4), np.float32)[0]
    latents = np.asarray(encoder.apply(jax.tree.map(jnp.float32, encoder.params), images))
    np.testing.assert_allclose(head(latents), model.classify(stored, latents), rtol=1e-6)


def test_statistics_are_synchronised_over_devices(tmp_path):
    """Every device holds one row: statistics of a device's own rows would have no variance."""
    model, found, config, dataset = trained(tmp_path)
    assert jax.device_count() == 8 == config.data.batch_size
    step = steps.step_function(steps.make_step(model, config, steps.make_optimizer(config.train).update))
    params = model.in_training.init(domain_key(config.seed, "init"))
    state = steps.State(params, steps.make_optimizer(config.train).init(params), None)
    with pinned():
        for number, batch in enumerate(training_batches(dataset, config.data, config.seed, 0, 8)):
            state, _ = step(state, *batch, domain_key(config.seed, "train"), np.uint32(number))
        on_one = loop.Folding(model, config, dataset, global_mesh())(state.result)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), on_one, found)
