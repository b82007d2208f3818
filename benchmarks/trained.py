"""Schedules, bounds and arithmetics compared on trained models, and on published logs, for benchmarks/certify.py."""

import dataclasses
import functools
import re
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from measure import say

from lsrs_jax import models
from lsrs_jax.certification.table import read_table
from lsrs_jax.certification.target import restore
from lsrs_jax.config import load_config
from lsrs_jax.data import load_split
from lsrs_jax.layers.lipschitz import Float64Encoder
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.rng import root_key
from lsrs_jax.smoothing import SmoothedClassifier, certified_radius, confidence
from lsrs_jax.smoothing.counts import Counts, ImageCounts, Row
from lsrs_jax.smoothing.derivation import Derivation
from lsrs_jax.smoothing.schedule import SCHEDULES, Schedule, block_count, make_schedule

N0, ALPHA, SPACING, FEW = 100, 0.001, 0.25, (0.25, 0.5, 0.75, 1.0)
_LARGEST = 0.85  # of the largest radius: above it the split of α costs radius, as the command says
_REACH = 10.0  # in σ: no certificate reaches further
_LOGGED = 2000  # images of a published log that are simulated at most


def grid(sigma):
    """Radii of a table: every 0.25 up to 4σ, which no n = 100,000 samples certify."""
    return tuple((SPACING * np.arange(1, int(4 * sigma / SPACING) + 1)).tolist())


def targets(sigma):
    """Name → radii for the staged schedule; the grid of σ = 0.25 is the short list itself."""
    whole = {"every 0.25 up to 4σ": grid(sigma), "0.25, 0.5, 0.75, 1": FEW, "the radius itself": None}
    return {name: radii for name, radii in whole.items() if name == "every 0.25 up to 4σ" or radii != grid(sigma)}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Counts of one schedule, the certificates that follow, and what they cost."""

    schedule: Schedule
    derivation: Derivation
    images: list[ImageCounts]
    labels: np.ndarray
    seconds: float

    @functools.cached_property
    def certificates(self):
        """`Certificates` of the images."""
        return self.derivation.certificates(self.schedule, self.images)

    @property
    def correct(self):
        """Whether each image is certified, as the right class."""
        return self.certificates.predict == self.labels

    @property
    def samples(self):
        """Samples per image, selection included."""
        return float(np.mean([image.total for image in self.images]))

    @property
    def slack(self):
        """ℓ2 in the latent, per image."""
        return np.array([image.slack for image in self.images])

    @property
    def acr(self):
        """Average certified radius, 0 for wrong or abstaining."""
        return float(np.where(self.correct, self.certificates.radius, 0).mean())

    @property
    def largest(self):
        """The radius where all samples agree."""
        return self.derivation.largest_radius(self.schedule, float(self.slack.max()))

    def accuracy(self, radii):
        """Certified accuracy at each radius; 0 asks whether anything is certified."""
        return np.array([np.mean(self.correct & (self.certificates.radius >= radius)) for radius in radii])

    def under(self, **changes):
        """The same samples under another derivation, such as ``bound="multiclass"``."""
        return dataclasses.replace(self, derivation=dataclasses.replace(self.derivation, **changes))

    def every(self, step):
        """The outcome for every `step`-th image."""
        return dataclasses.replace(self, images=self.images[::step], labels=self.labels[::step])


def losses(fixed, staged, radii):
    """Points of certified accuracy lost, at worst: below 85 % of the largest certifiable radius, and anywhere."""
    radii = np.array([0.0, *radii])
    lost = 100 * (fixed.accuracy(radii) - staged.accuracy(radii))
    return lost[radii < _LARGEST * fixed.largest].max(), lost.max()


class Run:
    """The trained model of a workdir, with the latents of some images of the split its config names.

    Args:
      workdir: folder of a training.
      images: how many, evenly spaced.
      n: estimation samples.
    """

    def __init__(self, workdir, images, n):
        self.path, self.n = Path(workdir), n
        stored = self.path / "config.json"
        if not stored.exists():
            raise UserError(f"{workdir} holds no training")
        self.config = load_config(stored)
        data = self.config.data
        self.dataset = load_split(data, data.split)
        step = max(1, len(self.dataset) // images)
        self.indices = list(range(0, len(self.dataset), step))[:images]
        self._prepare()
        self._classifiers: dict[str, SmoothedClassifier] = {}

    def _prepare(self):
        """The head, and float64 latents with what the encoder's rounding charges, as the command computes them."""
        config, dataset = self.config, self.dataset
        model = models.build(config.model, dataset.shape, dataset.num_classes)
        encoder, self.head = model.for_certification(restore(self.path, model)[0], config.certify.head_dtype)
        images = dataset.pixels(self.indices, np.float64)
        say(f"{self.path}: encoding {len(images)} images")
        self.latents = Float64Encoder(encoder, config.certify.tile[0])(images)
        self.lipschitz = encoder.report.constant
        reach = np.linalg.norm(images.reshape(len(images), -1), axis=1) + _REACH * config.sigma / self.lipschitz
        self._rounding = 2 * encoder.report.rounding(reach)

    @property
    def name(self):
        """For a row of a table."""
        return f"{self.path.name} (σ {self.config.sigma:g})"

    @functools.cached_property
    def fixed(self):
        """`Outcome` of the fixed schedule."""
        return self.certify("fixed")

    @functools.cached_property
    def staged(self):
        """Name of a target (`targets`) → `Outcome` of the staged schedule."""
        return {name: self.certify("staged", radii) for name, radii in targets(self.config.sigma).items()}

    @functools.cached_property
    def arithmetics(self):
        """`Outcome`s of the fixed schedule on every fourth image: sound, float32."""
        return self.fixed.every(4), self.certify("fixed", arithmetic="float32", every=4)

    @property
    def reduction(self):
        """Fixed over staged samples, selection included, where a table on the grid of radii is wanted."""
        return self.fixed.samples / next(iter(self.staged.values())).samples

    def certify(self, kind, radii=None, arithmetic="sound", every=1):
        """The `Outcome` of a schedule.

        Args:
          kind: ``"fixed"`` or ``"staged"``.
          radii: of the staged schedule.
          every: leave out all but every second, third, … image.
        """
        latents, sigma, tile = self.latents[::every], self.config.sigma, self.config.certify.tile
        if arithmetic not in self._classifiers:
            say(f"{self.path}: compiling the loop, {arithmetic}")
            fields = {"sigma": sigma, "lipschitz": self.lipschitz, "arithmetic": arithmetic, "tile": tile}
            self._classifiers[arithmetic] = SmoothedClassifier(self.head, devices=jax.local_devices()[:1], **fields)
        classifier = self._classifiers[arithmetic]
        sampler = classifier.sampler(latents.shape[1:])  # compiles: the seconds below are of sampling and decisions
        start = time.perf_counter()
        counts = classifier.certify(
            latents,
            key=root_key(self.config.seed),
            n0=N0,
            n=self.n,
            alpha=ALPHA,
            schedule=kind,
            radii=radii,
            slack=self._rounding[::every],
            progress=lambda line: say(f"{self.path}, {kind}, {arithmetic}: {line.strip()}"),
        ).samples
        seconds = time.perf_counter() - start
        derivation = Derivation(sampler.arithmetic.sigma, ALPHA, "binary", self.lipschitz, sampler.tau, radii)
        images = [counts.images[i] for i in range(len(latents))]
        return Outcome(counts.schedule, derivation, images, self.dataset.labels[self.indices[::every]], seconds)


class Simulated(NamedTuple):
    """The staged schedule on one published log, the mean over seeds."""

    log: str
    images: int
    target: str
    reduction: float
    below: float  # points lost below 85 % of the largest radius, at worst
    anywhere: float
    acr: float  # staged over fixed


def simulate_logs(folder, n, seeds):
    """`Simulated` for every log under `folder` whose σ is that of its training, and every target.

    The samples of an image are binomial with the probability that its published radius stands for. Where it abstained,
    no radius tells: it gets one between 0.3 and 0.5. Fixed and staged see the same samples, as in the loop.
    """
    for path, sigma in _logs(Path(folder)):
        say(f"simulating {path}")
        table = read_table(path)
        some = np.arange(0, len(table), max(1, len(table) // _LOGGED))[:_LOGGED]
        label, predict, radius = table.label[some], table.predict[some], table.radius[some]
        for target, radii in targets(sigma).items():
            found = []
            for seed in range(seeds):
                rng = np.random.default_rng(seed)
                p = _probabilities(predict, radius, sigma, n, rng)
                found.append(_simulate(p, predict == label, Derivation(sigma, ALPHA, radii=radii), n, rng))
            name = str(path.relative_to(folder))
            yield Simulated(name, len(some), target, *np.mean(found, axis=0).tolist())


def _logs(folder):
    for path in sorted(folder.rglob("*")):
        trained = re.findall(r"noise_(\d\.\d+)", str(path.relative_to(folder)))
        smoothed = re.findall(r"sigma_(\d\.\d+)", path.name) or trained
        if path.is_file() and trained and smoothed == trained[-1:] and "train" not in path.parts:
            yield path, float(trained[-1])


def _probabilities(predict, radius, sigma, n, rng):
    """P[class] per image: the share of samples whose fixed-n radius is the published one."""
    counts = np.arange(n // 2, n + 1)
    lower = confidence.lower(counts, n, ALPHA)
    known = certified_radius(lower, 1 - lower, sigma)
    share = counts[np.clip(np.searchsorted(known, radius), 0, len(counts) - 1)] / n
    return np.where(predict >= 0, share, rng.uniform(0.3, 0.5, len(predict)))


def _simulate(p, right, derivation, n, rng):
    """(samples saved as a factor, points lost below 85 %, points lost anywhere, staged over fixed ACR) of one seed."""
    schedules = {kind: make_schedule(kind, N0, n, 16) for kind in SCHEDULES}
    sizes = np.diff(schedules["staged"].looks, prepend=0)
    staged = rng.binomial(sizes, p[:, None])
    drawn = {"fixed": staged.sum(axis=1, keepdims=True), "staged": staged}
    fixed, staged = (_replay(schedules[kind], derivation, drawn[kind], right) for kind in ("fixed", "staged"))
    lost = losses(fixed, staged, derivation.radii or grid(derivation.sigma))
    return fixed.samples / staged.samples, *lost, staged.acr / fixed.acr


def _replay(schedule, derivation, drawn, right):
    """The `Outcome` of samples that were drawn beforehand: `drawn` for class 0, per image and look."""
    counts, pending, first = Counts(schedule, 2), list(range(len(drawn))), 0

    def rows(stream, stop, size, hits):
        return [
            Row(i, 0, 0.0, stream, first, stop, np.array([k, size - k]), 0.0)
            for i, k in zip(pending, hits, strict=True)
        ]

    counts.append(rows("selection", block_count(N0, schedule.samples), N0, [N0] * len(pending)))
    for column, (size, look) in enumerate(zip(np.diff(schedule.looks, prepend=0), schedule.looks, strict=True)):
        stop = block_count(look, schedule.samples)
        counts.append(rows("estimation", stop, int(size), drawn[pending, column]))
        done = derivation.decided(schedule, [counts.images[i] for i in pending])
        pending, first = [i for i, yes in zip(pending, done, strict=True) if not yes], stop
        if not pending:
            break
    labels = np.where(right, 0, -2)  # class 0 is wrong where the published prediction was
    return Outcome(schedule, derivation, [counts.images[i] for i in range(len(drawn))], labels, seconds=0.0)


def radius_share(outcome):
    """What the slack takes of the certified radii, all together."""
    certified = outcome.certificates.radius > 0
    charged = (outcome.slack / outcome.derivation.lipschitz)[certified].sum()
    return charged / max(outcome.certificates.radius[certified].sum(), 1e-300)


def training_commands():
    """The commands that make the runs."""
    return "\n".join(
        f"python -m lsrs_jax.train --config=configs/cifar10_small.py --config.sigma={sigma} --workdir=runs/sigma{sigma}"
        for sigma in ("0.25", "0.5", "1.0")
    )
