"""The memory that `train --plan` foretells, beside what training steps take.

  python benchmarks/memory.py [--config=configs/imagenet.py:smoke --shape=224,224,3 --classes=1000 --batch=8]

Without arguments, both networks that CONFIGS names, each in a process of its own. On a CPU the peak is the growth of
the process's resident memory over that before the first step, batch included; on other platforms it is what the device
reports.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from lsrs_jax import models
from lsrs_jax.cli import config_from_flags
from lsrs_jax.runtime.mesh import from_own_rows, global_mesh
from lsrs_jax.runtime.rng import domain_key, pinned
from lsrs_jax.training import loop, plan

CONFIGS = (
    ("configs/imagenet.py:smoke", "224,224,3", 1000, 8),
    ("configs/cifar10.py", "32,32,3", 10, 1024),
)
STEPS = 4


def resident(field="VmRSS"):
    """Bytes of this process, by /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(config, shape, classes, batch):
    """``(bytes planned, bytes taken)`` of training steps on random images."""
    config.data.batch_size = batch
    model, mesh = models.build(config.model, shape, classes), global_mesh()
    planned = plan.training_need(model, config).memory
    rng = np.random.default_rng(0)
    images, labels = rng.random((batch, *shape), np.float32), np.zeros(batch, np.int32)
    with pinned():
        fresh, shardings, train_step = loop.parts(model, config, mesh)
        start = jax.jit(fresh, out_shardings=shardings)
        shapes = jax.eval_shape(fresh, domain_key(0, "init"))
        key, data = domain_key(0, "train"), from_own_rows(mesh, (images, labels))
        step = train_step.lower(shapes, *data, key, np.uint32(0)).compile()
        before = resident()
        if jax.default_backend() == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        state = start(domain_key(0, "init"))
        for number in range(STEPS):
            state, metrics = step(state, *data, key, np.uint32(number))
            jax.block_until_ready(metrics)
        device = jax.local_devices()[0]
        if device.platform != "cpu":
            return planned, device.memory_stats()["peak_bytes_in_use"]
        # The batch is an argument of the plan, and lay in memory before.
        return planned, resident("VmHWM") - before + images.nbytes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config")
    parser.add_argument("--shape", help="H,W,C")
    parser.add_argument("--classes", type=int)
    parser.add_argument("--batch", type=int)
    options = parser.parse_args()
    if not options.config:
        print("| config | batch | planned, MiB | taken, MiB | planned over taken |\n|---|---|---|---|---|", flush=True)
        for name, shape, classes, batch in CONFIGS:
            arguments = [f"--config={name}", f"--shape={shape}", f"--classes={classes}", f"--batch={batch}"]
            subprocess.run([sys.executable, __file__, *arguments], check=True)
        return
    config = config_from_flags([f"--config={options.config}"])
    shape = tuple(int(size) for size in options.shape.split(","))
    planned, taken = measure(config, shape, options.classes, options.batch)
    sizes = f"{planned / 2**20:,.0f} | {taken / 2**20:,.0f} | {planned / taken:.2f}"
    print(f"| `{options.config}` | {options.batch} | {sizes} |")


if __name__ == "__main__":
    main()
