"""Compares fixed, staged and anytime sampling at equal certified accuracy, and exact grid arithmetic with float32.

  python -m benchmarks.schedules --runs=runs/sigma0.25,runs/sigma0.5 [--images=200] [--n=100000]
  python -m benchmarks.schedules --reference=FOLDER [--seeds=5]

--runs are workdirs of trainings, such as those of configs/cifar10_small.py with several sigmas. Some images of each are
certified with fixed and staged sampling and both arithmetics, after compilation. --reference is a folder of published
logs (locuslab/smoothing): each image gets simulated samples, with the probability that its published radius stands for.
"""

import argparse
import dataclasses
import functools
import re
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.measuring import say
from lsrs_jax import cli, models
from lsrs_jax.certification.table import read_table
from lsrs_jax.config import load_config
from lsrs_jax.data import load_split
from lsrs_jax.layers.lipschitz import Float64Encoder
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.rng import root_key
from lsrs_jax.smoothing import SmoothedClassifier, certified_radius, confidence
from lsrs_jax.smoothing.counts import Counts, ImageCounts, Row
from lsrs_jax.smoothing.derivation import Derivation
from lsrs_jax.smoothing.schedule import SCHEDULES, Schedule, block_count, make_schedule
from lsrs_jax.training.checkpoint import restore
from studies.accelerator import table

N0, ALPHA, SPACING, FEW = 100, 0.001, 0.25, (0.25, 0.5, 0.75, 1.0)
_LARGEST = 0.85  # of the largest radius: above it, staged sampling loses radius because the looks share alpha
_REACH, _LOGGED = 10.0, 2000  # in sigma: no certificate reaches further; images of a log that are simulated at most


def grid(sigma):
    """Every 0.25 up to 4σ, which n = 100,000 samples cannot certify."""
    return tuple((SPACING * np.arange(1, int(4 * sigma / SPACING) + 1)).tolist())


def targets(sigma):
    """Name → the radii that the staged schedule decides."""
    whole = {"every 0.25 up to 4σ": grid(sigma), "0.25, 0.5, 0.75, 1": FEW, "the radius itself": None}
    return {name: radii for name, radii in whole.items() if name == "every 0.25 up to 4σ" or radii != grid(sigma)}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Counts of one schedule, their certificates, and what they cost."""

    schedule: Schedule
    derivation: Derivation
    images: list[ImageCounts]
    labels: np.ndarray
    seconds: float

    @functools.cached_property
    def certificates(self):
        return self.derivation.certificates(self.schedule, self.images)

    @property
    def samples(self):
        """Samples per image, including those of the selection."""
        return float(np.mean([image.total for image in self.images]))

    @property
    def radius(self):
        """Certified radius per image; −1 where the class is wrong or missing."""
        return np.where(self.certificates.predict == self.labels, self.certificates.radius, -1.0)

    @property
    def acr(self):
        return float(np.maximum(self.radius, 0).mean())

    def accuracy(self, radii):
        """Certified accuracy at each radius."""
        return np.array([np.mean(self.radius >= radius) for radius in radii])

    def slack_share(self):
        """The share of the certified radii that the slack takes."""
        certified = self.certificates.radius > 0
        slack = np.array([image.slack for image in self.images])[certified].sum() / self.derivation.lipschitz
        return slack / max(self.certificates.radius[certified].sum(), 1e-300)


def losses(fixed, staged):
    """Largest loss of certified accuracy, in points: below 85 % of the largest certifiable radius, and anywhere."""
    radii = np.array([0.0, *(staged.derivation.radii or grid(staged.derivation.sigma))])
    lost = 100 * (fixed.accuracy(radii) - staged.accuracy(radii))
    largest = fixed.derivation.largest_radius(fixed.schedule, max(image.slack for image in fixed.images))
    return lost[radii < _LARGEST * largest].max(), lost.max()


class Run:
    """The trained model of a workdir, with the latents of some images of the split that its config names."""

    def __init__(self, workdir, images, n):
        self.path, self.n = Path(workdir), n
        self.config = load_config(self.path / "config.json")
        config, dataset = self.config, load_split(self.config.data, self.config.data.split)
        indices = list(range(0, len(dataset), max(1, len(dataset) // images)))[:images]
        model = models.build(config.model, dataset.shape, len(dataset.class_names))
        encoder, self.head = model.for_certification(restore(self.path, model)[0], config.certify.head_dtype)
        pixels, self.labels = dataset.read(indices, np.float64)
        say(f"{self.path}: encoding {len(pixels)} images")
        self.latents = Float64Encoder(encoder, config.certify.tile[0])(pixels)
        self.lipschitz = encoder.report.constant
        norms = np.linalg.norm(pixels.reshape(len(pixels), -1), axis=1)
        self.rounding = 2 * encoder.report.rounding(norms + _REACH * config.sigma / self.lipschitz)
        self.name = f"{self.path.name} (σ {config.sigma:g})"

    @functools.cache  # noqa: B019 (a run lives as long as the script)
    def classifier(self, arithmetic):
        """The compiled classifier of an arithmetic."""
        fields = {"sigma": self.config.sigma, "lipschitz": self.lipschitz, "tile": self.config.certify.tile}
        found = SmoothedClassifier(self.head, arithmetic=arithmetic, devices=jax.local_devices()[:1], **fields)
        found.sampler(
            self.latents.shape[1:]
        )  # compiles now, so that the times below are of sampling and decisions only
        return found

    def certify(self, kind, radii=None, arithmetic="sound", every=1):
        """The `Outcome` of a schedule, for every image or every second, third, … one."""
        classifier, latents = self.classifier(arithmetic), self.latents[::every]
        sampler, sampling = classifier.sampler(latents.shape[1:]), {"n0": N0, "n": self.n, "alpha": ALPHA}
        sampling |= {"schedule": kind, "radii": radii, "slack": self.rounding[::every]}
        sampling["progress"] = lambda line: say(f"{self.path}, {kind}, {arithmetic}: {line.strip()}")
        start = time.perf_counter()
        counts = classifier.certify(latents, key=root_key(self.config.seed), **sampling).samples
        seconds = time.perf_counter() - start
        derivation = Derivation(sampler.arithmetic.sigma, ALPHA, "binary", self.lipschitz, sampler.tau, radii)
        images = [counts.images[i] for i in range(len(latents))]
        return Outcome(counts.schedule, derivation, images, self.labels[::every], seconds)


def compare_runs(runs):
    """Prints the tables of trained models."""
    rows, arithmetics = [], []
    for run in runs:
        fixed = run.certify("fixed")
        staged = {name: run.certify("staged", radii) for name, radii in targets(run.config.sigma).items()}
        binary = dataclasses.replace(fixed.derivation, bound="multiclass")
        gain = dataclasses.replace(fixed, derivation=binary).acr / fixed.acr
        for name, outcome in {"fixed": fixed, **staged}.items():
            cells = [f"{outcome.samples:,.0f}", f"{fixed.samples / outcome.samples:.1f}x", f"{outcome.seconds:,.1f}"]
            cells += [f"{fixed.seconds / outcome.seconds:.1f}x", *(f"{lost:.2f}" for lost in losses(fixed, outcome))]
            cells += [f"{outcome.acr:.4f}", f"{gain:.3f}" if outcome is fixed else "-"]
            rows.append([run.name, str(len(outcome.images)), name, *cells])
        exact = dataclasses.replace(fixed, images=fixed.images[::4], labels=fixed.labels[::4])
        classic = run.certify("fixed", arithmetic="float32", every=4)
        radii = [float(outcome.certificates.radius.mean()) for outcome in (exact, classic)]
        cells = [f"{radii[0]:.4f}", f"{radii[1]:.4f}", f"{radii[0] / radii[1]:.4f}", f"{exact.slack_share():.3%}"]
        arithmetics.append([run.name, str(len(exact.images)), *cells])
    columns = "run|images|schedule, radii|samples per image|fewer|seconds|faster"
    columns += "|points lost below 85 % of the largest radius|points lost anywhere|ACR|ACR multiclass over binary"
    print(table(columns, rows) + "\n")
    columns = "run|images|mean certified radius, exact grid arithmetic|float32|exact over float32|radius lost to slack"
    print(table(columns, arithmetics) + "\n")


def compare_logs(folder, n, seeds):
    """Prints the table of published logs whose sigma is that of their training; all schedules see equal samples."""
    rows, ratios = [], []
    for path, sigma in _logs(folder):
        say(f"simulating {path}")
        log = read_table(path)
        some = np.arange(0, len(log), max(1, len(log) // _LOGGED))[:_LOGGED]
        right = log.predict[some] == log.label[some]
        for name, radii in targets(sigma).items():
            found = []
            for seed in range(seeds):
                rng = np.random.default_rng(seed)
                p = _probabilities(log.predict[some], log.radius[some], sigma, n, rng)
                found.append(_simulate(p, right, Derivation(sigma, ALPHA, radii=radii), n, rng))
            fixed, staged, anytime, *lost, mean, worst = np.mean(found, axis=0)
            cells = [str(path.relative_to(folder)), f"{len(some):,}", name, f"{staged:,.0f}", f"{anytime:,.0f}"]
            cells += [f"{fixed / staged:.1f}x", f"{fixed / anytime:.1f}x", f"{staged / anytime:.2f}x"]
            rows.append([*cells, *(f"{points:.2f}" for points in lost), f"{mean:+.3f}", f"{worst:+.2f}"])
            ratios.append((sigma, name, staged / anytime, mean))
    columns = "log|images|radii|samples per image, staged|anytime|staged: fewer than fixed|anytime: fewer than fixed"
    columns += "|anytime: fewer than staged|staged: points lost below 85 % of the largest radius|anywhere"
    columns += (
        "|anytime: points lost below 85 %|anywhere|points gained over staged, mean over the radii|at the worst radius"
    )
    print(f"Simulated on published logs, mean of {seeds} seeds:\n\n{table(columns, rows)}\n")
    for sigma, name in sorted({ratio[:2] for ratio in ratios}):
        some = np.array([ratio[2:] for ratio in ratios if ratio[:2] == (sigma, name)])
        fewer, points = np.exp(np.log(some[:, 0]).mean()), some[:, 1].mean()
        print(f"σ {sigma:g}, {name}: anytime takes {fewer:.2f} times fewer samples than staged, {points:+.3f} points")


def _logs(folder):
    for path in sorted(folder.rglob("*")):
        trained = re.findall(r"noise_(\d\.\d+)", str(path.relative_to(folder)))
        smoothed = re.findall(r"sigma_(\d\.\d+)", path.name) or trained
        if path.is_file() and trained and smoothed == trained[-1:] and "train" not in path.parts:
            yield path, float(trained[-1])


def _probabilities(predict, radius, sigma, n, rng):
    """P[class] per image: the share of samples that gives the published radius; 0.3 to 0.5 where it abstained."""
    counts = np.arange(n // 2, n + 1)
    lower = confidence.lower(counts, n, ALPHA)
    known = certified_radius(lower, 1 - lower, sigma)
    share = counts[np.clip(np.searchsorted(known, radius), 0, len(counts) - 1)] / n
    return np.where(predict >= 0, share, rng.uniform(0.3, 0.5, len(predict)))


def _simulate(p, right, derivation, n, rng):
    """What one seed gives, in the order in which `compare_logs` takes it apart."""
    schedules = {kind: make_schedule(kind, N0, n, 16) for kind in SCHEDULES}
    looks = np.unique(np.concatenate([schedule.looks for schedule in schedules.values()]))
    total = np.cumsum(rng.binomial(np.diff(looks, prepend=0), p[:, None]), axis=1)
    found = {}
    for kind, schedule in schedules.items():
        hits = np.diff(total[:, np.searchsorted(looks, schedule.looks)], prepend=0, axis=1)
        found[kind] = _replay(schedule, derivation, hits, right)
    fixed, staged, anytime = found.values()
    radii = np.array([0.0, *(derivation.radii or grid(derivation.sigma))])
    gained = 100 * (anytime.accuracy(radii) - staged.accuracy(radii))
    samples = [outcome.samples for outcome in found.values()]
    return *samples, *losses(fixed, staged), *losses(fixed, anytime), gained.mean(), gained.min()


def _replay(schedule, derivation, drawn, right):
    """The `Outcome` of binary samples that were drawn before: `drawn` for class 0, per image and look."""
    counts, pending, first = Counts(schedule, 2), list(range(len(drawn))), 0

    def count(stream, stop, size, hits):
        pairs = zip(pending, hits, strict=True)
        counts.append(Row(i, 0, 0.0, stream, first, stop, np.array([k, size - k]), 0.0) for i, k in pairs)

    count("selection", block_count(N0, schedule.samples), N0, [N0] * len(pending))
    for column, (size, look) in enumerate(zip(np.diff(schedule.looks, prepend=0), schedule.looks, strict=True)):
        stop = block_count(look, schedule.samples)
        count("estimation", stop, int(size), drawn[pending, column])
        done = derivation.decided(schedule, [counts.images[i] for i in pending])
        pending, first = [i for i, yes in zip(pending, done, strict=True) if not yes], stop
        if not pending:
            break
    labels = np.where(right, 0, -2)  # class 0 is wrong where the published prediction was wrong
    return Outcome(schedule, derivation, [counts.images[i] for i in range(len(drawn))], labels, seconds=0.0)


def main(arguments):
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", default="", help="workdirs of trainings, separated by commas")
    parser.add_argument("--images", type=int, default=200, help="of each run, evenly spaced")
    parser.add_argument("--n", type=int, default=100_000, help="estimation samples of the fixed schedule")
    parser.add_argument("--reference", type=Path, help="folder of published logs")
    parser.add_argument("--seeds", type=int, default=5, help="of the simulation on published logs")
    options = parser.parse_args(arguments)
    if not options.runs and not options.reference:
        raise UserError("give --runs=WORKDIR,... or --reference=FOLDER")
    if options.reference and not options.reference.is_dir():
        raise UserError(f"no folder {options.reference}")
    if options.runs:
        compare_runs([Run(path, options.images, options.n) for path in options.runs.split(",")])
    if options.reference:
        compare_logs(options.reference, options.n, options.seeds)


if __name__ == "__main__":
    cli.execute(main)
