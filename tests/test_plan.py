"""The estimates of `--plan`: FLOPs as counted by hand, memory as measured, and warnings where memory is too small."""

import json
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from lsrs_jax import models
from lsrs_jax.config import default
from lsrs_jax.data import from_arrays, load
from lsrs_jax.models.flops import flops, peak_memory, traffic
from lsrs_jax.runtime.mesh import global_mesh
from lsrs_jax.smoothing.schedule import make_schedule
from lsrs_jax.training import feeds, plan
from support import prepared
from support.commands import QUICK, ROOT, refused, run


def small(**model):
    config = default()
    config.model.update({"encoder": "identity", "head": "linear", **model})
    config.data.batch_size, config.train.noises = 16, 1
    return models.build(config.model, (8, 8, 1), 10), config


def test_the_flops_of_a_step_are_those_by_hand_divided_over_the_devices():
    model, config = small()
    need = plan.training_need(model, config)
    # Forward pass and gradient of the weights; the image needs no gradient. 2 FLOPs x 16 images x 64 x 10.
    assert need.flops * jax.device_count() == pytest.approx(2 * 2 * 16 * 640, rel=0.01)


def test_what_every_device_builds_for_itself_is_not_divided():
    for fields, built in (({}, False), ({"encoder": "blocks", "head": "blocks"}, True)):
        model, config = small(**fields)
        few = plan.training_need(model, config)
        config.data.batch_size = 32
        many = plan.training_need(model, config)
        # The difference is the cost per device that does not depend on the images.
        assert (2 * few.flops - many.flops > 0.01 * few.flops) == built
        assert (2 * few.moved - many.moved > 0.01 * few.moved) or not built


def test_the_zeros_of_a_dilated_input_cost_no_flops():
    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, w = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32), jax.ShapeDtypeStruct((3, 3, 3, 5), np.float32)
    assert flops(conv, x, w) == 2 * 16 * 5 * 27
    gradient = jax.grad(lambda x, w: conv(x, w).sum())
    # The gradient multiplies each weight and each output once more.
    assert flops(gradient, x, w) == 2 * flops(conv, x, w)


def test_memory_grows_with_the_batch_and_shrinks_with_shards():
    model, config = small(encoder="blocks", head="blocks")
    sizes = {}
    for config.data.batch_size in (16, 1024, 4096):
        sizes[config.data.batch_size] = plan.training_need(model, config).memory
    assert (sizes[4096] - sizes[1024]) / (sizes[1024] - sizes[16]) == pytest.approx(3072 / 1008, rel=0.25)
    config.data.batch_size = 16
    config.model.head = "mlp"
    config.model.encoder = "identity"
    model = models.build(config.model, (32, 32, 3), 10)
    whole = plan.training_need(model, config).memory
    config.train.shard_parameters = True
    assert plan.training_need(model, config).memory < 0.8 * whole


def test_sampling_cost_grows_with_the_tile():
    model, config = small(head="convnet")
    one = plan.sampling_need(model, config)
    config.certify.tile = (64, 64)
    two = plan.sampling_need(model, config)
    assert two.flops == pytest.approx(16 * one.flops)
    assert two.memory > 8 * one.memory


def test_independent_noise_needs_more_memory_than_shared():
    model, config = small()
    config.certify.tile = (32, 8)
    shared = plan.sampling_need(model, config)
    config.certify.noise = "independent"
    independent = plan.sampling_need(model, config)
    # 32 noises of 8 x 64 numbers instead of one.
    assert independent.memory - shared.memory == 31 * 8 * 64 * 4
    assert independent.flops == shared.flops


def test_bytes_alive_are_counted_as_they_come_and_go():
    x = jax.ShapeDtypeStruct((1000,), np.float32)
    assert peak_memory(lambda x: x + 1, x) == 8000
    assert peak_memory(lambda x: ((x + 1) * 2) - 3, x) == 12_000  # the argument stays alive, the sum does not
    assert peak_memory(jax.jit(lambda x: jax.jit(lambda y: (y + 1) * 2)(x) - 3), x) == 12_000
    assert peak_memory(lambda x: (x + 1, x * 2), x) == 12_000

    def dot(x):
        return x @ x

    rows = jax.ShapeDtypeStruct((20, 1000), np.float32)
    # The rows, their sum, and within one step a row times 2.
    total = peak_memory(lambda rows: jax.lax.scan(lambda c, row: (c + (row * 2).sum(), None), 0.0, rows)[0], rows)
    assert total == 80_000 + 4 + 4_000
    matrix = jax.ShapeDtypeStruct((10, 10), np.float32)
    assert traffic(dot, matrix) == 1200
    assert traffic(lambda x: jax.lax.scan(lambda c, _: (dot(c), None), x, length=5)[0], matrix) == 6000


def test_time_is_that_of_the_slower_of_arithmetic_and_memory():
    chip = plan.Chip(memory=16, bandwidth=1.0, bfloat16=100, float32=10, training=50)
    busy = plan.Need(memory=2**30, flops=30e12, moved=1e9)
    assert busy.seconds(chip, "bfloat16") == pytest.approx(1.0)
    assert busy.seconds(chip, "float32", times=2) == pytest.approx(20.0)
    assert plan.Need(2**30, 1e9, 2e12).seconds(chip, "training") == pytest.approx(2.0)
    assert busy.fits(chip)
    assert not plan.Need(15 * 2**30, 1.0, 1.0).fits(chip)


def test_the_memory_of_the_host_is_that_of_the_counts_and_of_one_block():
    _, config = small()
    config.certify.update({"schedule": "staged", "n": 100_000, "bound": "multiclass"})
    looks = len(make_schedule("staged", config.certify.n0, 100_000, config.certify.tile[1]).looks)
    sampled, derived = plan.host_memory(config, 50_000, 1000, (8, 8, 1))
    assert sampled == 50_000 * 1000 * (2 + looks) * 8 + 50_000 * 64 * 4
    assert derived < 50_000 * 1000 * 8 + 2**29
    assert plan.host_memory(config, 10, 10, (2**30,))[0] < 2**30 + 2**16


def test_the_images_that_an_accelerator_holds_count_for_chips_and_not_for_this_cpu(monkeypatch):
    model, config = small()
    needed = plan.training_need(model, config).memory
    rows = 3 * 2**20
    data = from_arrays(np.zeros((rows, 8, 8, 1), np.uint8), np.zeros(rows), list("0123456789"))
    chip = plan.CHIPS["H200"]._replace(memory=(needed + rows * 64) / plan.FREE / 2**30)  # the labels do not fit
    monkeypatch.setattr(plan, "CHIPS", {"full": chip})
    monkeypatch.setattr(plan, "_memory_here", lambda: (needed + rows * 64) / plan.FREE)
    out = plan.report(model, config, data, 10)
    assert "a GPU or TPU holds the images too, 0.20 GiB" in out
    assert "warning: training on 8 device(s) does not fit full" in out
    assert "this machine has" not in out
    out = plan.report(
        model, config, from_arrays(data.images[: -rows // 2], data.labels[: -rows // 2], data.class_names), 10
    )
    assert "warning: training" not in out
    # On an accelerator the images are in its memory, and a warning counts them.
    monkeypatch.setattr(plan, "on_device", lambda dataset, mesh: True)
    assert "warning: training needs" in plan.report(model, config, data, 10)


def test_an_accelerator_holds_arrays_of_one_process(tmp_path, monkeypatch):
    arrays = from_arrays(np.zeros((10, 8, 8, 1), np.uint8), np.zeros(10), "ab")
    assert feeds.accelerator_bytes(arrays, global_mesh()) == 10 * (64 + 4)
    several = types.SimpleNamespace(is_multi_process=True)
    assert feeds.accelerator_bytes(arrays, several) == 0
    monkeypatch.setattr(feeds, "_BYTES", 639)
    assert feeds.accelerator_bytes(arrays, global_mesh()) == 0
    prepared.write(tmp_path, "tiny", {"train": prepared.photos(5)})
    assert feeds.accelerator_bytes(load("tiny", "train", tmp_path, size=16), global_mesh()) == 0


@pytest.mark.usefixtures("fast_compilation")
def test_the_command_prints_a_plan_and_starts_nothing(tmp_path):
    out = run("train", *QUICK, "--plan", devices=2)
    assert "training on 2 x cpu" in out
    for name in plan.CHIPS:
        assert f"\n{name}" in out
    assert "warning" not in out
    assert "certification of 40 images x 10 classes: on the host at most" in out
    out = run("train", *QUICK, "--plan", f"--workdir={tmp_path / 'w'}", "--config.certify.tile=(1000000,100)")
    assert "warning: certification needs" in out
    assert "does not fit" in out
    assert not (tmp_path / "w").exists()
    out = run("train", *QUICK, "--plan", "--config.model.head=linear", "--config.certify.certificate=deterministic")
    assert "certification: deterministic, without samples" in out
    assert "a certificate" not in out.split("\n\n")[1]
    assert "not allowed with argument" in refused("train", *QUICK, "--plan", "--profile=1")
    assert "--workdir (or --plan)" in refused("train", *QUICK)


@pytest.mark.soak
def test_the_memory_of_a_plan_is_what_training_takes():
    out = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    print(out)
    ratios = [float(line.split("|")[-2]) for line in out.splitlines()[2:]]
    assert len(ratios) == 2
    assert all(0.8 <= ratio <= 1.2 for ratio in ratios)


def test_a_profile_is_recorded_beside_the_run(tmp_path):
    run("train", *QUICK, f"--workdir={tmp_path}", "--profile=0.1")
    run("certify", f"--workdir={tmp_path}", "--profile=0.1", "--config.certify.n=20000")
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 2
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 60
    assert "positive number of seconds" in refused("train", *QUICK, f"--workdir={tmp_path}", "--profile=0")
