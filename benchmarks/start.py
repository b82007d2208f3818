"""Seconds of `certify` from command to exit for 32 images with n = 1,000, with and without files in the user's cache.

  python -m benchmarks.start [--configs=configs/digits.py,configs/cifar10_small.py --rounds=3 --than=FOLDER]

Each configuration is trained for one step. --than names a checkout of another version, whose command takes turns with
this one on the same training. The best time counts, and the slowest is printed beside it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import measuring
from lsrs_jax import cli
from lsrs_jax.runtime.errors import UserError
from studies.accelerator import table
from studies.render import ROOT

TRAIN = ("--config.train.steps=1", "--config.train.warmup_steps=0", "--config.data.batch_size=8")
CERTIFY = ("--config.certify.n=1000", "--config.certify.stop=32")


def run(root, cache, *words):
    """Seconds of a command of the checkout at `root`."""
    environment = os.environ | {"PYTHONPATH": str(root), "XDG_CACHE_HOME": str(cache)}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{' '.join(words)} failed: {(done.stderr.splitlines() or ['no message'])[-1]}")
    return time.perf_counter() - began


def measure(name, roots, rounds, folder):
    """Rows of the table for one configuration: seconds by version, warm and cold."""
    work = folder / "work"
    run(ROOT, folder / "cache", "lsrs_jax.train", f"--config={name}", f"--workdir={work}", *TRAIN)
    seconds = {(version, state): [] for version in roots for state in ("cold", "warm")}
    for index in range(rounds):
        for (version, state), times in seconds.items():
            measuring.say(f"{name}: {version}, {state}, round {index + 1} of {rounds}")
            cache = folder / f"cache-{version}"
            if state == "cold":  # the warm call that follows finds what this one leaves
                shutil.rmtree(cache, ignore_errors=True)
            shutil.rmtree(work / "certify", ignore_errors=True)
            times.append(run(roots[version], cache, "lsrs_jax.certify", f"--workdir={work}", *CERTIFY))
    return [
        [name, version, state, f"{min(times):.2f} to {max(times):.2f}"] for (version, state), times in seconds.items()
    ]


def main(arguments):
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--configs", default="configs/digits.py,configs/cifar10_small.py", help="with commas between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--than", type=Path, help="checkout of another version")
    options = parser.parse_args(arguments)
    roots, rows = {"this version": ROOT}, []
    if options.than:
        roots["the other version"] = options.than.resolve()
    for name in options.configs.split(","):
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(name, roots, options.rounds, Path(folder))
    print(table("configuration|version|cache|seconds, best to worst", rows))


if __name__ == "__main__":
    cli.execute(main)
