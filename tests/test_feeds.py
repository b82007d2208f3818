"""Training on data that the devices hold gives what training on batches of the host gives."""

import time

import jax
import numpy as np
import pytest

from lsrs_jax import data, models
from lsrs_jax.config import default
from lsrs_jax.data import Arrays
from lsrs_jax.data.batches import moves
from lsrs_jax.runtime.rng import pinned
from lsrs_jax.training import checkpoint, feeds, loop

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (40, 8, 4, 2), np.uint8), RNG.integers(0, 3, 40)
SMALL = Arrays("x", "1", "train", IMAGES, LABELS, ("a", "b", "c"))


@pytest.mark.parametrize(("crop", "flip"), [(0, False), (2, False), (0, True), (2, True)])
@pytest.mark.parametrize("dataset", [SMALL, data.from_arrays(IMAGES / 255, LABELS, "abc")], ids=["bytes", "floats"])
def test_batches_on_the_device_are_those_of_the_host(dataset, crop, flip):
    config = default().data
    config.batch_size, config.crop, config.flip = 16, crop, flip
    for step, (images, labels) in enumerate(data.training_batches(dataset, config, 3, 0, 4)):
        view = feeds.Views(data.batch_indices(40, 16, 3, step), moves(16, crop=crop, flip=flip, seed=3, step=step))
        found = jax.jit(feeds.batch_of, static_argnums=3)(dataset.images, feeds.pixel_values(dataset), view, crop)
        np.testing.assert_array_equal(found, images)
        np.testing.assert_array_equal(dataset.labels[view.index], labels)


def trained(folder, on_the_device, monkeypatch, log=lambda *_: None, **fields):
    """Trains a small network for 9 steps, on 8 devices; returns its parameters."""
    config = default()
    config.data.update(batch_size=16, crop=1, flip=True)
    config.model.update(head="linear", widths=(8,), strides=(2,), split=1)
    config.train.update(steps=9, warmup_steps=2, log_every=4, evaluate_every=9, checkpoint_every=9, learning_rate=0.01)
    config.train.update(fields)
    model = models.build(config.model, SMALL.shape, 3)
    monkeypatch.setattr(feeds, "on_device", lambda *_: on_the_device)
    with checkpoint.Checkpoints(folder) as checkpoints, pinned():
        return jax.device_get(loop.train(loop.Job(model, config, SMALL, SMALL, checkpoints, {}), log))


@pytest.mark.parametrize("fields", [{"late_noises": 2}, {"shard_parameters": True, "ema": 0.5}])
def test_losses_and_parameters_are_those_of_the_host(fields, tmp_path, monkeypatch):
    rows = {True: [], False: []}
    found = {
        on: trained(tmp_path / str(on), on, monkeypatch, lambda row, *_, on=on: rows[on].append(row), **fields)
        for on in rows
    }
    losses = {on: [(row["step"], row["loss"]) for row in rows[on] if "loss" in row] for on in rows}
    assert [step for step, _ in losses[True]] == [4, 8, 9]
    np.testing.assert_allclose(losses[True], losses[False], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found[True], found[False])
    start = trained(tmp_path / "start", False, monkeypatch, steps=1, warmup_steps=0, **fields)
    assert np.abs(start["head"]["Dense_0"]["kernel"] - found[True]["head"]["Dense_0"]["kernel"]).max() > 0.01


def test_a_training_resumes_with_the_next_step(tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole", True, monkeypatch)

    def stop(row, *_):
        if row["step"] == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", True, monkeypatch, stop, checkpoint_every=3)
    rows = []
    again = trained(tmp_path / "parts", True, monkeypatch, lambda row, *_: rows.append(row["step"]), checkpoint_every=3)
    assert min(rows) > 6
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_launches_grow_to_a_second_and_end_at_the_limit(monkeypatch):
    config = default()
    config.data.batch_size = 8
    mesh, clock, counts = loop.global_mesh(), [0.0], []
    feed = feeds.DeviceFeed(lambda state, *_: (state, (0.0, 0.0)), SMALL, config, mesh, feeds.replicated(mesh))

    def steps(state, data, views, key, first, count):
        counts.append((int(first), int(count)))
        clock[0] += 0.05 * count
        return state, np.zeros((feeds._MOST, 2))

    feed._steps = steps
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    done = 0
    while done < 100:
        _, metrics, done = feed.advance(None, done, 100)
        assert len(metrics) == counts[-1][1]
    assert [count for _, count in counts] == [1, 2, 4, 8, 16, 16, 16, 16, 16, 5]
    assert all(first == sum(count for _, count in counts[:i]) for i, (first, _) in enumerate(counts))


def test_data_that_do_not_fit_stay_on_the_host(monkeypatch):
    mesh = loop.global_mesh()
    assert not feeds.on_device(SMALL, mesh)  # a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert feeds.on_device(SMALL, mesh)
    monkeypatch.setattr(feeds, "_BYTES", SMALL.images.nbytes - 1)
    assert not feeds.on_device(SMALL, mesh)
