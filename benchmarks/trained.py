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

from lsrs_jax import checkpoint, models
from lsrs_jax import config as configuration
from lsrs_jax import data as datasets
from lsrs_jax.errors import UserError
from lsrs_jax.keys import pinned, root_key
from lsrs_jax.materialize import Float64Encoder
from lsrs_jax.smoothing import certified_radius, confidence, schedule
from lsrs_jax.smoothing.certificates import Certificates
from lsrs_jax.smoothing.sweep import Block, Status, Sweep
from lsrs_jax.smoothing.table import read_table
from lsrs_jax.smoothing.tally import Plan, Row, Tallies, chunks
from lsrs_jax.smoothing.votes import Votes

N0, ALPHA, SPACING, FEW = 100, 0.001, 0.25, (0.25, 0.5, 0.75, 1.0)
_LARGEST = 0.85  # of the largest radius: above it the split of α costs radius, as the command says
_REACH = 10.0  # in σ: no certificate reaches further
_LOGGED = 2000  # images of a published log that are simulated at most


def grid(sigma):
    """Radii of a table: every 0.25 up to 4σ, which no n = 100,000 votes certify."""
    return tuple((SPACING * np.arange(1, int(4 * sigma / SPACING) + 1)).tolist())


def targets(sigma):
    """Name → radii for the staged schedule; the grid of σ = 0.25 is the short list itself."""
    whole = {"every 0.25 up to 4σ": grid(sigma), "0.25, 0.5, 0.75, 1": FEW, "the radius itself": None}
    return {name: radii for name, radii in whole.items() if name == "every 0.25 up to 4σ" or radii != grid(sigma)}


class Outcome(NamedTuple):
    """Certificates of one schedule, and what they cost."""

    plan: Plan
    derivation: schedule.Derivation
    certificates: Certificates
    correct: np.ndarray  # bool: certified, as the right class
    slack: np.ndarray  # ℓ2 in the latent
    votes: float  # per image, selection included
    seconds: float
    tallies: list

    @property
    def acr(self):
        """Average certified radius, 0 for wrong or abstaining."""
        return float(np.where(self.correct, self.certificates.radius, 0).mean())

    @property
    def largest(self):
        """The radius of a unanimous vote."""
        return self.derivation.largest_radius(self.plan, float(self.slack.max()))

    def accuracy(self, radii):
        """Certified accuracy at each radius; 0 asks whether anything is certified."""
        return np.array([np.mean(self.correct & (self.certificates.radius >= radius)) for radius in radii])

    def under(self, **changes):
        """The same votes under another derivation, such as ``bound="multiclass"``."""
        derivation = dataclasses.replace(self.derivation, **changes)
        certificates = derivation.certificates(self.plan, self.tallies)
        labels = np.array([tally.label for tally in self.tallies])
        return self._replace(derivation=derivation, certificates=certificates, correct=certificates.predict == labels)


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
      n: estimation votes.
    """

    def __init__(self, workdir, images, n):
        self.path, self.n = Path(workdir), n
        stored = self.path / "config.json"
        if not stored.exists():
            raise UserError(f"{workdir} holds no training")
        self.config = configuration.load(stored)
        data = self.config.data
        self.dataset = datasets.of_config(data, data.split)
        step = max(1, len(self.dataset) // images)
        self.indices = list(range(0, len(self.dataset), step))[:images]
        self._prepare()
        self._loops: dict[str, Votes] = {}

    def _prepare(self):
        """The head, and float64 latents with what the encoder's rounding charges, as the command computes them."""
        config, dataset = self.config, self.dataset
        model = models.build(config.model, dataset.shape, dataset.num_classes)
        with pinned():
            target = jax.eval_shape(model.init, root_key(0))
        params, _ = checkpoint.restore_model(self.path, target)
        encoder, self.head = model.for_certification(params, config.certify.head_dtype)
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
        return _every_fourth(self.fixed), self.certify("fixed", arithmetic="float32", every=4)

    @property
    def reduction(self):
        """Fixed over staged votes, selection included, where a table on the grid of radii is wanted."""
        return self.fixed.votes / next(iter(self.staged.values())).votes

    def _loop(self, arithmetic):
        """The vote loop, compiled: seconds of a sweep are seconds of votes."""
        if arithmetic not in self._loops:
            say(f"{self.path}: compiling the loop, {arithmetic}")
            key, tile = root_key(self.config.seed), self.config.certify.tile
            fields = {"sigma": self.config.sigma, "key": key, "arithmetic": arithmetic, "tile": tile}
            loop = Votes(self.head, self.latents.shape[1:], devices=jax.local_devices()[:1], **fields)
            loop.collect(loop.launch(loop.put(loop.place(self.latents[:1]), [0]), "estimation", 0, 1, tile[1]), 1)
            self._loops[arithmetic] = loop
        return self._loops[arithmetic]

    def certify(self, kind, radii=None, arithmetic="sound", every=1):
        """What `smoothing.certify` does, from its parts: it would compile in every call, and it hands back no votes.

        Args:
          kind: ``"fixed"`` or ``"staged"``.
          radii: of the staged schedule.
          every: leave out all but every second, third, … image.

        Returns:
          an `Outcome`.
        """
        loop, members = self._loop(arithmetic), self.indices[::every]
        plan = schedule.plan(kind, N0, self.n, loop.tile[1])
        law = loop.arithmetic
        derivation = schedule.Derivation(law.sigma, ALPHA, "binary", self.lipschitz, loop.tau, radii)
        latents = self.latents[::every]
        slack, placed = law.slack(latents) + self._rounding[::every], loop.place(latents)
        tallies = Tallies(plan, loop.num_classes)
        block = Block(members, self.dataset.labels[members].tolist(), slack.tolist(), placed)
        status = Status(plan, len(members), 0, lambda line: say(f"{self.path}, {kind}, {arithmetic}: {line.strip()}"))
        start = time.perf_counter()
        Sweep(loop, tallies, lambda found: derivation.settled(plan, found), status).run(block)
        found = [tallies.tallies[i] for i in members]
        certificates = derivation.certificates(plan, found)
        seconds = time.perf_counter() - start
        votes = float(np.mean([sum(counts.sum() for counts in tally.counts.values()) for tally in found]))
        correct = certificates.predict == self.dataset.labels[members]
        return Outcome(plan, derivation, certificates, correct, slack, votes, seconds, found)


def _every_fourth(outcome):
    some, tallies = slice(None, None, 4), outcome.tallies[::4]
    certificates = outcome.derivation.certificates(outcome.plan, tallies)
    return outcome._replace(
        certificates=certificates, correct=outcome.correct[some], slack=outcome.slack[some], tallies=tallies
    )


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

    The votes of an image are binomial with the probability that its published radius stands for. Where it abstained,
    no radius tells: it gets one between 0.3 and 0.5. Fixed and staged see the same votes, as in the loop.
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
                found.append(_simulate(p, predict == label, schedule.Derivation(sigma, ALPHA, radii=radii), n, rng))
            name = str(path.relative_to(folder))
            yield Simulated(name, len(some), target, *np.mean(found, axis=0).tolist())


def _logs(folder):
    for path in sorted(folder.rglob("*")):
        trained = re.findall(r"noise_(\d\.\d+)", str(path.relative_to(folder)))
        smoothed = re.findall(r"sigma_(\d\.\d+)", path.name) or trained
        if path.is_file() and trained and smoothed == trained[-1:] and "train" not in path.parts:
            yield path, float(trained[-1])


def _probabilities(predict, radius, sigma, n, rng):
    """P[class] per image: the share of votes whose fixed-n radius is the published one."""
    votes = np.arange(n // 2, n + 1)
    lower = confidence.lower(votes, n, ALPHA)
    known = certified_radius(lower, 1 - lower, sigma)
    share = votes[np.clip(np.searchsorted(known, radius), 0, len(votes) - 1)] / n
    return np.where(predict >= 0, share, rng.uniform(0.3, 0.5, len(predict)))


def _simulate(p, right, derivation, n, rng):
    """(votes saved as a factor, points lost below 85 %, points lost anywhere, staged over fixed ACR) of one seed."""
    plans = {kind: schedule.plan(kind, N0, n, 16) for kind in schedule.SCHEDULES}
    sizes = np.diff(plans["staged"].looks, prepend=0)
    drawn = rng.binomial(sizes, p[:, None])
    last = drawn.sum(axis=1, keepdims=True)
    outcomes = {
        kind: _replay(plan, derivation, votes, right)
        for (kind, plan), votes in zip(plans.items(), (last, drawn), strict=True)
    }
    fixed, staged = outcomes["fixed"], outcomes["staged"]
    lost = losses(fixed, staged, derivation.radii or grid(derivation.sigma))
    return fixed.votes / staged.votes, *lost, staged.acr / fixed.acr


def _replay(plan, derivation, drawn, right):
    """The `Outcome` of votes that were drawn beforehand: `drawn` for the class, per image and look."""
    tallies, pending, first = Tallies(plan, 2), list(range(len(drawn))), 0

    def rows(purpose, stop, size, votes):
        return [
            Row(i, 0, 0.0, purpose, first, stop, np.array([k, size - k]), 0.0)
            for i, k in zip(pending, votes, strict=True)
        ]

    tallies.append(rows("selection", chunks(N0, plan.samples), N0, [N0] * len(pending)))
    start = time.perf_counter()
    for column, (size, look) in enumerate(zip(np.diff(plan.looks, prepend=0), plan.looks, strict=True)):
        stop = chunks(look, plan.samples)
        tallies.append(rows("estimation", stop, int(size), drawn[pending, column]))
        done = derivation.settled(plan, [tallies.tallies[i] for i in pending])
        pending, first = [i for i, yes in zip(pending, done, strict=True) if not yes], stop
        if not pending:
            break
    found = [tallies.tallies[i] for i in range(len(drawn))]
    certificates, votes = derivation.certificates(plan, found), np.mean([t.counts["estimation"].sum() for t in found])
    seconds, slack = time.perf_counter() - start, np.zeros(len(found))
    correct = right & (certificates.predict == 0)
    return Outcome(plan, derivation, certificates, correct, slack, float(votes) + N0, seconds, found)


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
