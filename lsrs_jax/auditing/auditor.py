"""Runs all attacks on a batch of certified images, and the predictions that judge them."""

import functools
import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lsrs_jax.auditing import attacks
from lsrs_jax.auditing.table import Attacked, Found, Settings
from lsrs_jax.layers.lipschitz import Float64Encoder, Materialized
from lsrs_jax.runtime.progress import Progress
from lsrs_jax.runtime.rng import domain_key, pinned, root_key
from lsrs_jax.smoothing.head_check import Head
from lsrs_jax.smoothing.sampler import Sampler

_PUSHES = (0.05, 0.15, 0.4)  # steps beyond the boundary, in σ/L: at the boundary itself `predict` abstains
_LADDER = (1.0, 2.0, 4.0)  # radii of PGD beyond the certified radius, in σ/L
_DIRECTIONS = 24  # neighbours per step of the decision-based attack

_Images = Float[np.ndarray, "images *image"]
_Classes = Int[np.ndarray, " images"]
_PerImage = Float[np.ndarray, " images"]


class _Batch:
    """A batch of images under attack, and the results so far."""

    def __init__(
        self, predict: Callable[[_Images], _Classes], images: _Images, certified: _Classes, radius: _PerImage
    ) -> None:
        count, unperturbed = len(images), predict(images)
        self.images, self.radius, self._predict, self._certified = images, radius, predict, certified
        self.classes = np.where(certified >= 0, certified, unperturbed)
        none = np.full(count, "none", dtype=object)
        pairs, flips, undecided, answer = np.zeros((4, count), int)
        distance, point = np.full(count, np.inf), images.astype(np.float32)
        self.found = Found(unperturbed, pairs, flips, undecided, distance, none, point, answer)
        self.judge("none", images, unperturbed)

    def norms(self, points: _Images) -> _PerImage:
        """ℓ2 distances from the images."""
        return np.linalg.norm((points - self.images).reshape(len(points), -1), axis=1)

    def judge(self, name: str, points: _Images, predicted: _Classes | None = None) -> None:
        """Predicts at points that an attack returned, and counts flips."""
        distance, found = self.norms(points), self.found
        predicted = self._predict(points) if predicted is None else predicted
        flipped = (predicted >= 0) & (self.classes >= 0) & (predicted != self.classes)
        inside = (self._certified >= 0) & (distance < self.radius)
        found.pairs[:] += inside
        found.flips[:] += inside & flipped
        found.undecided[:] += inside & (predicted < 0)
        nearer = flipped & (distance < found.distance)
        found.distance[nearer], found.attack[nearer] = distance[nearer], name
        found.point[nearer], found.answer[nearer] = points[nearer], predicted[nearer]

    def scaled(self, points: _Images, lengths: _PerImage) -> _Images:
        """Moves points along their directions from the images to these distances, rounded down."""
        scale = lengths / np.maximum(self.norms(points), 1e-300) * (1 - 1e-9)
        return self.images + scale.reshape(-1, *[1] * (self.images.ndim - 1)) * (points - self.images)


class Auditor:
    """Attacks on one classifier (from `models.Model.for_certification`), compiled once for a batch of images.

    The predictions of the certification's `sampler` at level `alpha` judge the attacks. `lipschitz` is the constant
    that the certificates claim, `seed` the seed of the certification (attacks draw from a domain of their own). With a
    `fallback` (`certification.linear.LinearClassifier`, or another object with its `classes` and `scores`) the attacks
    are on the composition.
    """

    def __init__(
        self,
        encoder: Materialized,
        head: Head,
        sampler: Sampler,
        *,
        lipschitz: float,
        alpha: float,
        settings: Settings,
        seed: int,
        fallback: Any = None,
    ) -> None:
        self._fallback = fallback
        self._settings, self._sampler, self._alpha = settings, sampler, alpha
        self._unit, self._batch = sampler.arithmetic.sigma / lipschitz, sampler.tile[0]
        self._encode = Float64Encoder(encoder, self._batch)
        self._key, self._predict_key = domain_key(seed, "audit"), root_key(seed)
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), encoder.params)
        scores = fallback.scores if fallback else None
        target = attacks.Smoothed(
            lambda x: encoder.apply(params, x), head, sampler.arithmetic.sigma, scores, self._unit
        )
        steps, samples = settings.steps, settings.samples

        def descend(images: jax.Array, classes: jax.Array, radius: jax.Array, key: jax.Array) -> jax.Array:
            """The best of several restarts, by predictions."""

            def attempt(restart: jax.Array) -> tuple[jax.Array, jax.Array]:
                attack_key, share_key = jax.random.split(jax.random.fold_in(key, restart))
                points = attacks.pgd(target, images, classes, radius, attack_key, steps=steps, samples=samples)
                return points, target.share(points, classes, share_key, samples, rounds=4)

            points, shares = jax.lax.map(attempt, jnp.arange(settings.restarts))
            return points[jnp.argmin(shares, axis=0), jnp.arange(len(images))]

        self._descend = jax.jit(descend)
        self._shorten = jax.jit(functools.partial(attacks.shorten, target, samples=samples, rounds=16))
        sizes = {"iterations": steps, "directions": _DIRECTIONS, "samples": samples}
        self._decide = jax.jit(functools.partial(attacks.decision, target, **sizes))

    def _predict(self, images: np.ndarray) -> np.ndarray:
        latents, n = self._encode(images), self._settings.votes
        fallback = self._fallback and self._fallback.classes(images)
        return self._sampler.predict(latents, self._predict_key, n, self._alpha, fallback)

    def _fill(self, values: np.ndarray) -> np.ndarray:
        """Fills the batch with repetitions of the last image."""
        return np.pad(values, ((0, self._batch - len(values)), *[(0, 0)] * (values.ndim - 1)), mode="edge")

    def __call__(self, images: _Images, certified: _Classes, radius: _PerImage, number: int) -> Found:
        """Attacks at most a batch of float64 images with certificates: class (−1 without one) and ℓ2 radius."""
        count, batch_key = len(images), jax.random.fold_in(self._key, number)  # the number of the batch sets the noise
        keys = (jax.random.fold_in(batch_key, use) for use in itertools.count())
        batch = _Batch(self._predict, images, certified, radius)
        padded, wanted = self._fill(images), self._fill(np.maximum(batch.classes, 0))
        device = jnp.asarray(padded, jnp.float32), jnp.asarray(wanted, jnp.int32)

        def descended(lengths: np.ndarray) -> np.ndarray:
            points = self._descend(*device, self._fill(lengths).astype(np.float32), next(keys))
            return np.asarray(points, np.float64)[:count]

        def beyond(name: str, points: np.ndarray) -> None:
            """Judges points beyond the boundary on the way from the images to `points`, and inside the radius."""
            near = self._shorten(device[0], jnp.asarray(self._fill(points), jnp.float32), device[1], next(keys))
            near = np.asarray(near, np.float64)[:count]
            boundary = batch.norms(near)
            for push in _PUSHES:
                batch.judge(name, batch.scaled(near, boundary + push * self._unit))
            batch.judge(name, batch.scaled(points, radius))

        with pinned(), jax.default_matmul_precision("highest"):
            for fraction in self._settings.fractions:
                lengths = fraction * radius
                batch.judge("pgd", batch.scaled(descended(lengths), lengths))
            for multiple in _LADDER:
                beyond("pgd", descended(radius + multiple * self._unit))
            points = self._decide(*device, _starts(padded, wanted), next(keys))
            beyond("decision", np.asarray(points, np.float64)[:count])
        return batch.found


def attack_batches(
    auditor: Auditor,
    table: Attacked,
    rows: Int[np.ndarray, " rows"],
    read: Callable[[Int[np.ndarray, " rows"]], _Images],
    batch: int,
    done: Collection[int],
    say: Callable[[str], object],
) -> Iterator[tuple[Attacked, Found]]:
    """Attacks some rows of a table, batch after batch; batches whose images are all in `done` are left out.

    `read` returns the float64 images with some idx; `say` receives lines of progress.
    """
    left, progress, finished = len(rows) - len(done), None, 0
    for number, part in enumerate(np.array_split(rows, -(-len(rows) // batch))):
        attacked = Attacked(*(column[part] for column in table))
        new = len(set(attacked.idx.tolist()) - set(done))
        if not new:
            continue
        yield attacked, auditor(read(attacked.idx), attacked.predict, attacked.radius, number)
        finished += new
        progress = progress or Progress(left, finished, say)  # the first batch compiles
        progress.show(finished, lambda done=finished: f"{done:>6,} of {left:,} images")


def _starts(images: np.ndarray, classes: np.ndarray) -> jax.Array:
    """For each image of a batch, the nearest image of another class in it, or noise if there is none."""
    rng = np.random.default_rng(0)
    starts = images + rng.normal(0, 1, images.shape)
    for row, own in enumerate(classes):
        others = np.flatnonzero(classes != own)
        if len(others):
            distance = np.linalg.norm((images[others] - images[row]).reshape(len(others), -1), axis=1)
            starts[row] = images[others[np.argmin(distance)]]
    return jnp.asarray(starts, jnp.float32)
