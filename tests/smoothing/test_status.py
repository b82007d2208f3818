"""The time left that is said, against the time that passes: the engine with a simulated clock and sampler."""

import math
import types
from concurrent.futures import Future

import numpy as np
import pytest

from lsrs_jax.smoothing import engine, status
from lsrs_jax.smoothing.counts import Counts
from lsrs_jax.smoothing.derivation import Derivation
from lsrs_jax.smoothing.engine import Engine, Images
from lsrs_jax.smoothing.packing import Packing, Waste
from lsrs_jax.smoothing.schedule import make_schedule
from lsrs_jax.smoothing.status import Status

TILE, CLASSES, COMPILATION = (32, 10), 10, 1.0


class Simulated:
    """A sampler of images with known shares of the classes: a step takes 20 ms, and a launch 1 ms more."""

    tile = TILE

    def __init__(self, shares, packs, clock):
        self._shares, self._packs, self._clock = shares, packs, clock
        self._rng, self._waste, self._packed = np.random.default_rng(1), Waste(), False

    def keys(self, key):
        return {"selection": None, "estimation": None}

    def put(self, latents, ids):
        return ids

    def launch(self, ids, key, first, stop, n):
        packing = Packing(TILE[0], len(ids), stop - first)
        if self._packs and packing.blocks > 1 and not self._packed and self._waste.left(COMPILATION) == 0:
            self._packed, self._clock[0] = True, self._clock[0] + COMPILATION
        launched = Future()
        launched.set_result((ids, stop - first, min(stop * TILE[1], n) - first * TILE[1], packing))
        return launched

    def collect(self, launched, images):
        ids, blocks, samples, packing = launched.result()
        seconds = 0.001 + 0.02 * math.ceil(blocks / self.together(launched))
        if self._packs and not self._packed and packing.blocks > 1:
            self._waste.add(seconds, packing)
        self._clock[0] += seconds
        return self._rng.multinomial(samples, self._shares[ids])

    def width(self, images):
        return TILE[0] // images if self._packed else 1

    def together(self, launched):
        return launched.result()[3].blocks if self._packed else 1

    @property
    def until_packed(self):
        if self._packed:
            return 0.0, 0.0
        return (self._waste.left(COMPILATION), COMPILATION) if self._packs else (math.inf, 0.0)


RUNS = {"fixed": (100, 4000), "staged": (250, 10_000), "anytime": (60, 3000)}  # images and samples
CASES = [("staged", radii, packs) for radii in (None, (0.25, 0.5)) for packs in (True, False)]
CASES += [("fixed", None, True), ("fixed", None, False), ("anytime", None, True), ("anytime", (0.25, 0.5), True)]


@pytest.mark.parametrize(("kind", "radii", "packs"), CASES)
def test_the_time_left_is_said_within_a_factor(kind, radii, packs, monkeypatch):
    """After the first tenth of a run, until hardly anything is left: a single image may then double it."""
    (images, n), clock, rng, said = RUNS[kind], [0.0], np.random.default_rng(0), []
    for module in (engine, status):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    leading = rng.beta(2, 0.5, (images, 1))
    shares = np.hstack([leading, rng.dirichlet(np.full(CLASSES - 1, 0.3), images) * (1 - leading)])
    schedule, derivation = make_schedule(kind, 100, n, TILE[1]), Derivation(0.5, 0.001, radii=radii)
    progress = Status(schedule, images, lambda line: said.append((clock[0], line)), derivation.decided)
    sampler, counts = Simulated(shares, packs, clock), Counts(schedule, CLASSES)
    decided = lambda found: derivation.decided(schedule, found)  # noqa: E731
    for idx in np.array_split(np.arange(images), 2):
        given = Images(idx.tolist(), [0] * len(idx), [0.0] * len(idx), np.zeros((len(idx), 1)))
        Engine(sampler, None, counts, decided, progress).run(given)
    total = clock[0]
    # Without packing, the time of the last batch is that of its hardest image.
    late = {True: lambda now, line: now > total - 2, False: lambda now, line: images - line.done < TILE[0]}[packs]
    judged = [(now, line) for now, line in said if now >= 0.1 * total and not late(now, line)]
    assert judged
    for now, line in judged:
        assert 1 / 1.5 < (1 / line.share - 1) * now / (total - now) < 1.5, (now, total, line)
