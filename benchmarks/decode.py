"""Measures how fast photos are decoded, cut and mirrored for training, beside what an accelerator would consume.

  python -m benchmarks.decode --data=$TFDS_DATA_DIR [--config=configs/imagenet.py] [--workers=0,1,2]

Measures `data.training_batches` with threads of one process (workers 0) and with worker processes of Grain, in turns.
The consumption of each chip is estimated, by the seconds of a step in `lsrs_jax.training.plan`.
"""

import argparse
import os
import statistics
import time

import jax

from lsrs_jax import cli, data, models
from lsrs_jax.flags import config_from_flags
from lsrs_jax.training import plan
from studies.accelerator import table


def rate(dataset, settings, workers, batches):
    """Images per second after the first batch, which waits until the workers have started."""
    settings.workers = workers
    stream = data.training_batches(dataset, settings, 0, 0, batches + 1)
    next(stream)
    start = time.monotonic()
    count = sum(len(labels) for _, labels in stream)
    return count / (time.monotonic() - start)


def main(arguments):
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default="", help="folder of tensorflow-datasets")
    parser.add_argument("--config", default="configs/imagenet.py")
    parser.add_argument("--workers", default="0,1,2", help="numbers of worker processes")
    parser.add_argument("--batches", type=int, default=20, help="of 64 photos, per rate")
    options = parser.parse_args(arguments)
    config = config_from_flags([f"--config={options.config}", f"--config.data.dir={options.data}"])
    dataset = data.load_split(config.data, config.data.train_split)
    model = models.build(config.model, dataset.shape, len(dataset.class_names))
    need, images = plan.training_need(model, config), config.data.batch_size / jax.device_count()
    config.data.batch_size = 64
    found = {int(number): [] for number in options.workers.split(",")}
    for _ in range(3):
        for count, rates in found.items():
            rates.append(rate(dataset, config.data, count, options.batches))
    cores, rows, best = os.cpu_count(), [], 0.0
    for count, rates in found.items():
        per_core = (middle := statistics.median(rates)) / min(count or cores, cores)
        name, best = f"{count} processes" if count else "threads of the training's process", max(best, per_core)
        rows.append([name, f"{middle:,.0f} ({min(rates):,.0f} to {max(rates):,.0f})", f"{per_core:,.0f}"])
    print(f"{len(dataset)} photos of {dataset.name}, to {config.data.size}x{config.data.size}; {cores} cores\n")
    print(table("decoded by|images/s|images/s per core in use", rows) + "\n")
    consumed = {name: images / need.seconds(chip, "training") for name, chip in plan.CHIPS.items()}
    rows = [[name, f"{number:,.0f}", f"{number / best:,.0f}"] for name, number in consumed.items()]
    print(table("chip|images/s consumed, estimated|cores that can feed it", rows))


if __name__ == "__main__":
    cli.execute(main)
