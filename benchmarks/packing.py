"""What later sample blocks in the free slots of a batch save: staged sampling, and calls of one image.

  python -m benchmarks.packing --runs=WORKDIR,... [--images=100,1000 --n=100000 --rounds=3]
  python -m benchmarks.packing --heads [--samples=1000,10000 --rounds=3]

--runs are workdirs of trainings. Some images of each are sampled with the fixed schedule and with the staged one, with
packed launches and without, after compilation. --heads compares calls of one image each (the first eight) with one call
of 64, for heads of several sizes on latents 16x16x12. All take turns, and the best time of each counts.
"""

import argparse
import itertools
import time

import jax
import numpy as np

from benchmarks import measuring
from benchmarks.schedules import Run
from lsrs_jax import cli
from lsrs_jax.runtime.rng import domain_key
from lsrs_jax.smoothing import SmoothedClassifier
from studies.accelerator import table

SHAPE, CLASSES, SIGMA = (16, 16, 12), 10, 0.25
CALLED = ("mlp", "convnet_light", "resnet")  # heads
TOGETHER, SINGLE = 64, 8  # images of one call, and of those the ones that get a call of their own


def packing(sampler, on):
    """Makes the launches of a sampler packed, or not."""
    sampler._packed = None
    if on:
        sampler.pack()
    else:
        sampler._packed = False


def staged(run, radii, rounds):
    """Rows of the table of schedules for one run: fixed, staged without packing, staged with packing."""
    sampler = run.classifier("sound").sampler(run.latents.shape[1:])
    kinds = {"fixed": ("fixed", False), "staged, not packed": ("staged", False), "staged, packed": ("staged", True)}
    seconds, samples = {name: [] for name in kinds}, {}
    for _ in range(rounds):
        for name, (kind, on) in kinds.items():
            packing(sampler, on)
            found = run.certify(kind, radii)
            seconds[name].append(found.seconds)
            samples[name] = found.samples
    best = {name: min(times) for name, times in seconds.items()}
    rows = []
    for name in kinds:
        fewer, faster = samples["fixed"] / samples[name], best["fixed"] / best[name]
        cells = [f"{samples[name]:,.0f}", f"{fewer:.1f}x", f"{best[name]:.2f} to {max(seconds[name]):.2f}"]
        rows.append([run.name, f"{len(run.latents):,}", name, *cells, f"{faster:.1f}x", f"{faster / fewer:.2f}"])
    return rows


def calls(name, n, rounds):
    """A row of the table of heads: one call of many images, and calls of one image."""
    head = measuring.head_function(name, SHAPE, CLASSES, np.float32)
    classifier = SmoothedClassifier(head, sigma=SIGMA, tile=(64, 8), devices=jax.local_devices()[:1])
    sampler, latents = classifier.sampler(SHAPE), np.random.default_rng(0).uniform(0, 1, (TOGETHER, *SHAPE))
    packing(sampler, True)
    parts = {"one": [latents], "each": [latents[i : i + 1] for i in range(SINGLE)]}
    best = dict.fromkeys(parts, float("inf"))
    for index in range(rounds + 1):
        for work, batches in parts.items():
            began, count = time.perf_counter(), n if index else 1000  # the first round compiles
            for batch in batches:
                classifier.certify(batch, key=domain_key(0, "probe"), n=count)
            if index:
                best[work] = min(best[work], (time.perf_counter() - began) / sum(map(len, batches)))
    one, each = (1000 * best[work] for work in parts)
    cost = measuring.row_flops(head, SHAPE) / 1e6
    return [f"{name}, {cost:.2f} MFLOP per sample", f"{n:,}", f"{one:,.1f}", f"{each:,.1f}", f"{each / one:.2f}x"]


def main(arguments):
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", default="", help="workdirs, with commas between them")
    parser.add_argument("--images", default="100,1000", help="how many of each run")
    parser.add_argument("--radii", type=cli.numbers, default=(0.25, 0.5, 0.75), help="that are decided")
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--heads", action="store_true", help="compare calls of one image with one call")
    parser.add_argument("--samples", type=cli.numbers, default=(1000, 10_000), help="n of the calls of --heads")
    options = parser.parse_args(arguments)
    rows = []
    for path in filter(None, options.runs.split(",")):
        for images in options.images.split(","):
            rows += staged(Run(path, int(images), options.n), options.radii or None, options.rounds)
    if rows:
        columns = "run|images|schedule|samples per image|fewer than fixed|seconds, best to worst|faster|share"
        print(table(columns, rows) + "\n")
    if options.heads:
        cases = itertools.product(CALLED, map(int, options.samples))
        found = [calls(name, n, options.rounds) for name, n in cases]
        print(table("head|n|ms per image, one call|ms per image, a call for each|ratio", found))


if __name__ == "__main__":
    cli.execute(main)
