"""One certification by 1, 2 and 4 processes, by 8 simulated devices, and in 2 and 4 shards: counts, and what it costs.

  python -m benchmarks.scaling [--images=64] [--n=20000] [--rounds=3]

A network for the digits is trained for a few steps. Each way then certifies the same images, in turns, `rounds` times.
Every way must give the same counts, or the program ends with an error. Printed are medians, with the least and the
largest: the seconds from start to end, and the seconds of the processor that all processes took together. On a machine
with few cores, processes and simulated devices share the cores, so the first number says nothing about the speed on
several machines. The second one shows the overhead: what N shards take beyond one process is the start of N programs;
what N processes with a coordinator take beyond N shards is the coordination; the shards need `merge` in addition.
"""

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measuring import say
from lsrs_jax import cli
from lsrs_jax.certification import store
from lsrs_jax.certification.identity import schedule_of
from lsrs_jax.certification.ledger import read

TRAIN = ("--config=digits", "--config.train.steps=20", "--config.train.evaluate_every=20")


def finished(processes):
    """Waits for processes; returns the seconds of the processor that they took."""
    seconds = 0.0
    for process in processes:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert not process.returncode, process.args
        seconds += usage.ru_utime + usage.ru_stime
    return seconds


def started(*arguments, **environment):
    """A command of lsrs in a process of its own, on the CPU."""
    settings = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", **environment}
    return subprocess.Popen([sys.executable, "-m", "lsrs_jax", *arguments], env=settings, stdout=subprocess.DEVNULL)


def processes(count, *arguments):
    """Runs the processes of one certification, which find each other over localhost."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)} if count > 1 else {}
    return finished(
        [started(*arguments, **together, JAX_PROCESS_ID=str(i)) for i in range(count)]
        if together
        else [started(*arguments)]
    )


def shards(count, given, *flags):
    """Runs shards one after the other, and merges them."""
    sampled = sum(finished([started("certify", given, *flags, f"--shard={i}/{count}")]) for i in range(count))
    merged = finished([started("merge", given)])
    say(f"{count} shards: {sampled:.1f} s of the processor, and {merged:.1f} s to merge them")
    return sampled + merged


def samples(folder):
    """The counts of every image."""
    stored = store.read_folder(folder, "")
    found = read(folder, schedule_of(stored.settings), stored.identity.classes, stored.identity.run)
    return {idx: (image.counts["selection"].tolist(), image.looks.tolist()) for idx, image in found.images.items()}


def main(arguments):
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in (("--images", 64), ("--n", 20_000), ("--rounds", 3)):
        parser.add_argument(name, type=int, default=value)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "digits"
        given, flags = (
            f"--workdir={workdir}",
            (f"--config.certify.stop={options.images}", f"--config.certify.n={options.n}"),
        )
        finished([started("train", given, *TRAIN)])
        certify = ("certify", given, *flags)
        ways = {f"{n} process{'es' * (n > 1)}": lambda n=n: processes(n, *certify) for n in (1, 2, 4)}
        ways["1 process, 8 simulated devices"] = lambda: finished([started(*certify, JAX_NUM_CPU_DEVICES="8")])
        ways |= {f"{n} shards, one after the other, and `merge`": lambda n=n: shards(n, given, *flags) for n in (2, 4)}
        expected, found = None, {way: [] for way in ways}
        for number in range(options.rounds + 1):  # the first round fills the cache of compiled programs
            for way, run in ways.items():
                for made in ("certify", "shards"):
                    shutil.rmtree(workdir / made, ignore_errors=True)
                start = time.perf_counter()
                processor = run()
                seconds = time.perf_counter() - start
                counts = samples(workdir / "certify" / "default")
                expected = expected or counts
                assert counts == expected, f"{way} has other counts"
                say(f"round {number}, {way}: {seconds:.1f} s, {processor:.1f} s of the processor")
                if number:
                    found[way].append((seconds, processor))
        print(f"{options.images} images of the digits, n = {options.n:,}, {os.cpu_count()} cores; all counts are equal")
        print("| certified by | seconds | seconds of the processor |\n|---|---|---|")
        for way, pairs in found.items():
            cells = [
                f"{statistics.median(each):.1f} ({min(each):.1f} to {max(each):.1f})"
                for each in zip(*pairs, strict=True)
            ]
            print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    cli.execute(main)
