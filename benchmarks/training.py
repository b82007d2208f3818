"""What a training step takes beyond its kernels: batches from the host, and steps in a loop on the device.

  python -m benchmarks.training [--configs=configs/digits.py:split4,configs/cifar10_small.py --steps=50 --rounds=3]

All take turns: steps on one batch that stays on the device (the kernels), steps with batches of the host as `train`
takes them on a CPU (`feeds.HostFeed`), the host's work alone, and steps on data that the device holds
(`feeds.DeviceFeed`), which `train` takes on accelerators. The best time of each counts.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring
from lsrs_jax import cli, models
from lsrs_jax.data import load_split, training_batches
from lsrs_jax.flags import config_from_flags
from lsrs_jax.runtime.mesh import from_own_rows, global_mesh, replicated
from lsrs_jax.runtime.rng import domain_key, pinned
from lsrs_jax.training.feeds import DeviceFeed, HostFeed
from lsrs_jax.training.steps import parts, step_function
from studies.accelerator import table

NO_WARMUP = "--config.train.warmup_steps=0"  # which would have to end before the few steps do


def measure(name, steps, rounds):
    """A row of the table: milliseconds per step of each way."""
    config = config_from_flags([f"--config={name}", f"--config.train.steps={steps * (rounds + 1) + 2}", NO_WARMUP])
    data, mesh = load_split(config.data, config.data.train_split), global_mesh()
    model = models.build(config.model, data.shape, len(data.class_names))
    fresh, shardings, step = parts(model, config, mesh)
    state, key = jax.jit(fresh, out_shardings=shardings)(domain_key(0, "init")), domain_key(0, "train")
    compiled = step_function(step, (shardings, replicated(mesh)))
    batches = training_batches(data, config.data, 0, 0, config.train.steps)
    batch = from_own_rows(mesh, next(batches))
    host = HostFeed(step, data, config, mesh, shardings, 0)
    device = DeviceFeed(step, data, config, mesh, shardings)

    def kernels(state):
        for number in range(steps):
            state, _ = compiled(state, *batch, key, np.uint32(number))
        return state

    def fed(feed):
        def run(state):
            done = 0
            while done < steps:
                state, _, done = feed.advance(state, done, steps)
            return state

        return run

    def making(_):
        return [from_own_rows(mesh, next(batches)) for _ in range(steps)]

    works = {"kernels": kernels, "host": fed(host), "making": making, "device": fed(device)}
    seconds = {work: [] for work in works}
    for index in range(rounds + 1):  # the first round compiles
        for work, run in works.items():
            measuring.say(f"{name}: {work}, round {index}")
            copy = jax.block_until_ready(jax.tree.map(jnp.copy, state))
            began = time.perf_counter()
            jax.block_until_ready(run(copy))
            if index:
                seconds[work].append((time.perf_counter() - began) / steps)
    best = {work: min(times) for work, times in seconds.items()}
    cells = [f"{1000 * best[work]:.2f}" for work in works]
    ratios = [f"{best[work] / best['kernels']:.2f}x" for work in ("host", "device")]
    return [name, str(config.data.batch_size), *cells, *ratios]


def main(arguments):
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    configs = "configs/digits.py:split4,configs/cifar10_small.py,configs/cifar10_mlp.py"
    parser.add_argument("--configs", default=configs, help="with commas between them")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    with pinned():
        rows = [measure(name, options.steps, options.rounds) for name in options.configs.split(",")]
    columns = "configuration|batch|kernels, ms|with batches of the host|making them alone|on the device"
    print(table(f"{columns}|host over kernels|device over kernels", rows))


if __name__ == "__main__":
    cli.execute(main)
