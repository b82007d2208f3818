"""Compares the memory that `train --plan` estimates with the memory that training steps take.

  python -m benchmarks.memory

Each network is measured in a process of its own. On a CPU the memory taken is the growth of the process since the
moment before the first step, plus the batch; on other platforms it is what the device reports.
"""

import argparse
import multiprocessing
from pathlib import Path

import jax
import numpy as np

from lsrs_jax import cli, models
from lsrs_jax.flags import config_from_flags
from lsrs_jax.runtime.mesh import from_own_rows, global_mesh, replicated
from lsrs_jax.runtime.rng import domain_key, pinned
from lsrs_jax.training import plan, steps

NETWORKS = (  # config, image shape, classes, batch
    ("configs/imagenet.py:smoke", (224, 224, 3), 1000, 8),
    ("configs/cifar10.py", (32, 32, 3), 10, 1024),
)
STEPS = 4


def resident(field):
    """Bytes of this process, from /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(name, shape, classes, batch):
    """``(bytes estimated, bytes taken)`` for training steps on random images."""
    config = config_from_flags([f"--config={name}"])
    config.data.batch_size = batch
    model, mesh = models.build(config.model, shape, classes), global_mesh()
    planned = plan.training_need(model, config).memory
    images, labels = np.random.default_rng(0).random((batch, *shape), np.float32), np.zeros(batch, np.int32)
    with pinned():
        fresh, shardings, one_step = steps.parts(model, config, mesh)
        train_step = steps.step_function(one_step, (shardings, replicated(mesh)))
        start = jax.jit(fresh, out_shardings=shardings)
        shapes = jax.eval_shape(fresh, domain_key(0, "init"))
        key, data = domain_key(0, "train"), from_own_rows(mesh, (images, labels))
        step = train_step.lower(shapes, *data, key, np.uint32(0)).compile()
        before = resident("VmRSS")
        if jax.default_backend() == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        state = start(domain_key(0, "init"))
        for number in range(STEPS):
            state, metrics = step(state, *data, key, np.uint32(number))
            jax.block_until_ready(metrics)
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return planned, device.memory_stats()["peak_bytes_in_use"]
    return planned, resident("VmHWM") - before + images.nbytes  # the estimate includes the batch


def main(arguments):
    """The command; see the module's docstring."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args(arguments)
    print("| config | batch | estimated, MiB | taken, MiB | estimated over taken |\n|---|---|---|---|---|", flush=True)
    for name, *rest, batch in NETWORKS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            planned, taken = pool.apply(measure, (name, *rest, batch))
        sizes = f"{planned / 2**20:,.0f} | {taken / 2**20:,.0f} | {planned / taken:.2f}"
        print(f"| `{name}` | {batch} | {sizes} |", flush=True)


if __name__ == "__main__":
    cli.execute(main)
