"""Photos decoded, cut and mirrored for training, against what an accelerator would consume.

  python benchmarks/decode.py --data=$TFDS_DATA_DIR [--config=configs/imagenet.py] [--workers=0,1,2]

Rates of `data.training_batches` alone, in turns: by threads of one process (workers 0) and by Grain's worker processes.
The consumption is reckoned, not measured: images per step over the seconds of `lsrs_jax.training.plan` for each chip.
"""

import argparse
import os
import time

import jax

from lsrs_jax import data, models
from lsrs_jax.cli import config_from_flags
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.training import plan

ROUNDS = 3


def rate(dataset, settings, workers, batches):
    """Images per second after the first batch, which waits for the workers to start."""
    settings.workers = workers
    stream = data.training_batches(dataset, settings, 0, 0, batches + 1)
    next(stream)
    start = time.monotonic()
    count = sum(len(labels) for _, labels in stream)
    return count / (time.monotonic() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="folder of tensorflow-datasets")
    parser.add_argument("--config", default="configs/imagenet.py")
    parser.add_argument("--workers", default="0,1,2", help="numbers of worker processes")
    parser.add_argument("--batches", type=int, default=20, help="of 64 photos, per rate")
    options = parser.parse_args()
    config = config_from_flags([f"--config={options.config}", f"--config.data.dir={options.data}"])
    try:
        dataset = data.load_split(config.data, config.data.train_split)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    chips = consumption(config, dataset)
    config.data.batch_size = 64
    counts = [int(number) for number in options.workers.split(",")]
    found = {count: [] for count in counts}
    for _ in range(ROUNDS):
        for count in counts:
            found[count].append(rate(dataset, config.data, count, options.batches))
    cores = os.cpu_count()
    print(f"{len(dataset)} photos of {dataset.name}, to {config.data.size}x{config.data.size}; {cores} cores\n")
    print("| decoded by | images/s | images/s per core in use |\n|---|---|---|")
    for count, rates in found.items():
        used, middle = min(count or cores, cores), sorted(rates)[ROUNDS // 2]
        name = f"{count} processes" if count else "threads of the training's process"
        print(f"| {name} | {middle:,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) | {middle / used:,.0f} |")
    best = max(sorted(rates)[ROUNDS // 2] / min(count or cores, cores) for count, rates in found.items())
    print("\n| chip | images/s consumed, reckoned | cores to feed it |\n|---|---|---|")
    for name, consumed in chips.items():
        print(f"| {name} | {consumed:,.0f} | {consumed / best:,.0f} |")


def consumption(config, dataset):
    """Chip → images per second of a training, by the plan."""
    model = models.build(config.model, dataset.shape, dataset.num_classes)
    need, images = plan.training_need(model, config), config.data.batch_size / jax.device_count()
    return {name: images / need.seconds(chip, "training") for name, chip in plan.CHIPS.items()}


if __name__ == "__main__":
    main()
