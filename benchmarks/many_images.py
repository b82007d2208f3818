"""Memory and time of the commands that read certificates of very many images, or of very many classes.

  python -m benchmarks.many_images                                    # 10^6 images of 10 classes, in 8 shards
  python -m benchmarks.many_images --images=50000 --classes=1000 --shards=4

The samples are those of a stub: counts are drawn from multinomial distributions, and written by the ledgers of the
program, so no network runs. Then every command runs in a process of its own: `merge` of all shards, `report`,
`certify --from-counts` with another alpha, `certify --verify`. Printed are its seconds and its largest memory in use.
"""

import argparse
import dataclasses
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measuring import say
from lsrs_jax import SmoothedClassifier, cli
from lsrs_jax.certification import smoothed, store
from lsrs_jax.certification.shards import Shard
from lsrs_jax.smoothing.counts import Row

BATCH = 2000  # images that are drawn at once
NAMES = {"merge": "merge", "report": "report", "from-counts": "certify --from-counts", "verify": "certify --verify"}


def begun(workdir, classes, n):
    """The content of a certificates.json of a head with so many classes, on a few inputs."""
    weights = np.random.default_rng(0).normal(size=(4, classes)).astype(np.float32)
    inputs = np.random.default_rng(1).random((2, 4))
    made = SmoothedClassifier(lambda z: z @ weights, sigma=0.25, tile=(2, 8))
    made.certify(inputs, [0, 1], out=workdir, n=n, name="few")
    return store.read_folder(workdir / "certify" / "few", "")


def write_shard(workdir, shard, images, classes, n):
    """Writes the folder of a shard with samples of a stub."""
    stored = begun(workdir, classes, n)
    config = stored.settings.copy_and_resolve_references()
    config.certify.name = "default"
    identity = dataclasses.replace(stored.identity, images=images)
    folder = shard.folder(workdir, "default")
    certification = smoothed.Certification(folder, config, identity, stored.lipschitz)
    certification.record = stored.record
    own, rng = range(images)[shard.index :: shard.count], np.random.default_rng(shard.index)
    slack, n0 = 1e-3, config.certify.n0
    stops = [certification.schedule.stops[stream][-1] for stream in certification.schedule.totals]
    with certification.open_ledger() as counts:
        certification.derive(counts, ())
        for start in range(0, len(own), BATCH):
            part = own[start : start + BATCH]
            top, labels = rng.beta(3, 1, len(part)), rng.integers(classes, size=len(part))
            share = np.repeat((1 - top)[:, None] / (classes - 1), classes, axis=1)
            share[np.arange(len(part)), labels] = top
            for stream, samples, stop in zip(certification.schedule.totals, (n0, n), stops, strict=True):
                drawn = rng.multinomial(samples, share)
                counts.append(
                    Row(idx, int(label), slack, stream, 0, stop, found, 1e-4)
                    for idx, label, found in zip(part, labels, drawn, strict=True)
                )
        certification.catch_up(counts)
        certification.derive(counts, certification.decided_images)


def measured(*arguments):
    """``(exit code, seconds, seconds of the processor, MiB)`` of a command of lsrs."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "lsrs_jax", *arguments], stdout=subprocess.PIPE, text=True)
    last = process.stdout.read().strip().splitlines()[-1:]
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    say(f"{' '.join(arguments)}: exit code {process.returncode}; {' '.join(last)[:200]}")
    seconds = time.perf_counter() - start
    return process.returncode, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**10


def main(arguments):
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in (("--images", 10**6), ("--classes", 10), ("--shards", 8), ("--n", 10_000)):
        parser.add_argument(name, type=int, default=value)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "many"
        for index in range(options.shards):
            say(f"writing shard {index} of {options.shards}")
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                pool.apply(
                    write_shard,
                    (workdir, Shard(index, options.shards), options.images, options.classes, options.n),
                )
        given = f"--workdir={workdir}"
        steps = {
            "merge": ("merge", given),
            "report": ("report", str(workdir / "certify" / "default"), f"--out={folder}/report"),
            "from-counts": ("certify", given, "--from-counts", "--config.certify.alpha=0.01"),
            "verify": ("certify", given, "--verify"),
        }
        ledger = (workdir / "certify" / "default" / "votes.0.tsv").stat
        print(f"{options.images:,} images, {options.classes:,} classes, {options.shards} shards, n = {options.n:,}")
        print(
            "| command | seconds | seconds of the processor | largest memory in use, MiB |\n|---|---|---|---|",
            flush=True,
        )
        for name, command in steps.items():
            code, seconds, processor, memory = measured(*command)
            assert code in (0, 3), name
            print(f"| `{NAMES[name]}` | {seconds:,.0f} | {processor:,.0f} | {memory:,.0f} |", flush=True)
        print(f"the ledger of the merged folder has {ledger().st_size / 2**20:,.0f} MiB")


if __name__ == "__main__":
    cli.execute(main)
