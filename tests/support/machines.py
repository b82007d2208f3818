"""Simulated certifications on machines that round differently, and forgers of their counts.

The margin of a sample is normal; its class is the label if the margin is positive, and otherwise one of two rivals.
Another machine adds a rounding error to every margin: a part that is the same for all samples of an image, and a part
of its own for each sample.
"""

import numpy as np

from lsrs_jax.certification import comparison, scan
from lsrs_jax.certification import fresh as fresh_noise
from lsrs_jax.smoothing.counts import ImageCounts, Row
from lsrs_jax.smoothing.derivation import Derivation
from lsrs_jax.smoothing.schedule import make_schedule

SIGMA, N0 = 0.25, 100


class World:
    """Images of one head. `error` is the rounding error of bfloat16, in standard deviations of the margin."""

    def __init__(self, rng, images=40, n=2000, dtype="float32", error=0.01, shared=0.2, kind="fixed", uneven=0.0):
        self.rng, self.n, self.dtype, self.shared = rng, n, dtype, shared
        self.schedule = make_schedule(kind, N0, n, 8)
        self.error = {"bfloat16": error, "float32": error / 2**16}[dtype]
        self.coarse = error
        self.means = rng.normal(1.5, 1.5, images)  # of the margins; about one image in six is wrong
        # Of this machine and of another one; some images may be rounded more than others.
        self.scale = np.exp(rng.normal(size=(images, 1)) * uneven)
        self.offsets = rng.normal(size=(2, images, 1))
        self.derivation = Derivation(SIGMA, 0.001)

    def noise(self, n):
        """Margins ``(images, n)``, correlated as under shared noise."""
        common, own = self.rng.normal(size=n), self.rng.normal(size=(len(self.means), n))
        return self.means[:, None] + np.sqrt(self.shared) * common + np.sqrt(1 - self.shared) * own

    def rounded(self, margins, error, machine=0):
        """The margins with the rounding errors of one machine."""
        return margins + error * self.scale * (self.offsets[machine] + self.rng.normal(size=margins.shape)) / np.sqrt(2)

    def images(self, selection, estimation):
        """`ImageCounts` of all images at the last look; labels are 0."""
        found = []
        for idx, (first, rest) in enumerate(zip(selection, estimation, strict=True)):
            row = Row(idx, 0, 0.0, "selection", 0, 1, classes(first), 0.0)
            counts = {"selection": classes(first), "estimation": classes(rest)}
            looks = np.stack([classes(rest[:look]) for look in self.schedule.looks])
            found.append(ImageCounts(row, self.schedule, 3).changed(counts, looks))
        return found

    def stopped(self, images):
        """The images at the look at which the staged schedule stops them."""
        found = []
        for image in images:
            for look in range(1, image.reached + 1):
                early = image.changed(looks=image.looks[:look])
                if self.derivation.decided(self.schedule, [early])[0]:
                    break
            found.append(early)
        return found

    def run(self, elsewhere=False):
        """``(recorded, again, rounding, fresh)`` of an honest folder, made here or on another machine."""
        selection, estimation = self.noise(N0), self.noise(self.n)
        again = self.images(*(self.rounded(m, self.error) for m in (selection, estimation)))
        recorded = again
        if elsewhere:
            recorded = self.images(*(self.rounded(m, self.error, 1) for m in (selection, estimation)))
        if self.schedule.staged:
            recorded = self.stopped(recorded)
            again = [new.changed(looks=new.looks[: old.reached]) for new, old in zip(again, recorded, strict=True)]
        return recorded, again, *self.fresh(recorded)

    def fresh(self, images, segments=32):
        """What the person who checks sees under fresh noise: `Rounding` and `Fresh`."""
        size = self.n // segments
        margins = self.noise(size * segments)
        exact, coarse = margins > 0, self.rounded(margins, self.coarse) > 0
        here = exact if self.dtype == "float32" else coarse
        rival = np.array([image.counts["selection"].argmax() != 0 for image in images])[:, None]
        # A rival gets half of the samples that are not of the label.
        half = self.rng.random(here.shape) < 0.5
        hits, others = (np.where(rival, ~found & half, found) for found in (here, coarse if here is exact else exact))
        rounding = comparison.Rounding(
            (exact != coarse).sum(axis=1), others.sum(axis=1) - hits.sum(axis=1), size * segments, self.dtype
        )
        return rounding, fresh_noise.Fresh(hits.reshape(len(images), segments, size).sum(axis=2), size)

    def radii(self, images):
        found = self.derivation.certificates(self.schedule, images)
        return np.where(found.predict == 0, found.radius, 0.0)


def classes(margins):
    """Counts of the label and of two rivals that share the other samples."""
    wrong = int((margins <= 0).sum())
    return np.array([len(margins) - wrong, wrong - wrong // 2, wrong // 2])


def refusals(world, recorded, again, rounding, fresh):
    """The names of the tests that refuse the recorded counts."""
    derivation = world.derivation, world.schedule
    found = {
        "image": comparison.first_wrong(recorded, again, rounding) is not None,
        "lead": comparison.lead_gain(recorded, again, rounding).refused,
        "radius": comparison.radius_gain(*derivation, recorded, again, rounding).refused,
        "scan": scan.scan_gain(*derivation, recorded, again, rounding).refused,
        "fresh image": fresh_noise.first_unlikely(recorded, fresh, rounding) is not None,
        "fresh": fresh_noise.fresh_gain(recorded, fresh, rounding, True).refused,
    }
    return {name for name, refused in found.items() if refused}


def forged(images, sizes):
    """Images with some samples of every look moved to the label (or, if negative, from it to its strongest rival)."""
    n = comparison.sizes_at_looks(images)
    return comparison.moved(images, np.sign(sizes) * np.ceil(np.abs(sizes) * n / n[-1]))


def room_of(images, rounding):
    """How many samples of each image may differ in all."""
    n = comparison.sizes_at_looks(images)
    return comparison.allowance(rounding, n[-1], len(n))


def cheapest_forgery(world, again, rounding, gain, best=None):
    """Moves as few samples as possible so that the mean radius grows by the relative `gain`.

    Every image of the `best` ones (all by default) that selected its label gets the same share of its allowance.
    Returns None if even the whole allowance does not suffice.
    """
    now = world.radii(again)
    room = room_of(again, rounding)
    room *= np.array([image.counts["selection"].argmax() == 0 for image in again])
    if best is not None:
        worth = world.radii(forged(again, room)) - now
        room[np.argsort(-worth)[best:]] = 0
    for share in np.linspace(0.05, 1, 20):
        sizes = np.ceil(share * room)
        candidate = forged(again, sizes)
        if world.radii(candidate).sum() >= (1 + gain) * now.sum():
            return candidate
    return None


def just_below(world, again, rounding):
    """Raises the certified accuracy at the radius at which the allowance of each image lifts it most."""
    now, room = world.radii(again), room_of(again, rounding)
    full = world.radii(forged(again, room))
    radius = max(np.linspace(0.01, 0.6, 119), key=lambda r: ((now < r) & (full >= r)).sum())
    low, high = np.zeros(len(now)), np.where((now < radius) & (full >= radius), room, 0.0)
    for _ in range(14):  # the fewest samples that suffice, by bisection
        middle = np.floor((low + high) / 2)
        enough = world.radii(forged(again, middle)) >= radius
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    candidate = forged(again, high)
    return candidate, float((world.radii(candidate) >= radius).mean() - (now >= radius).mean())


def moved_to_the_first_look(images):
    """Images that selected their label, and whose rivals give it all samples of the first look that it has later."""
    found = []
    for image in images:
        looks = image.looks.copy()
        left = int(image.looks[-1, 0] - image.looks[0, 0]) * (image.counts["selection"].argmax() == 0)
        for rival in (1, 2):
            size = min(int(image.looks[0, rival]), left)
            looks[:-1, 0] += size
            looks[:-1, rival] -= size
            left -= size
        found.append(image.changed(looks=looks))
    return found
