"""All attacks on a batch of certified images, and the prediction that judges them."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax.auditing import attacks
from lsrs_jax.keys import domain_key, pinned
from lsrs_jax.materialize import Float64Encoder
from lsrs_jax.smoothing.montecarlo import classes as predict

_PUSHES = (0.05, 0.15, 0.4)  # in σ/L, beyond the boundary an attack found: there a vote is close, `predict` abstains
_LADDER = (1.0, 2.0, 4.0)  # radii of PGD beyond the certified one, in σ/L
_DIRECTIONS = 24  # neighbours that a decision-based step asks


class Settings(NamedTuple):
    """How hard to try; part of an audit's identity."""

    images: int
    fractions: tuple[float, ...]
    restarts: int
    steps: int
    samples: int
    votes: int


class Found(NamedTuple):
    """What attacks found on a batch of images; arrays ``(B,)``.

    Attributes:
      unperturbed: class that `predict` gives the image itself, or −1.
      pairs: points inside the certified radius that were tried.
      flips: those among them where `predict` returned another class than the certificate.
      undecided: those where it abstained: no flips, and no class of the certificate either.
      distance: ℓ2 norm of the nearest flip of all, inf without one; away from the certified class where there is a
        certificate, else from `unperturbed`.
      attack: the one that found it.
    """

    unperturbed: np.ndarray
    pairs: np.ndarray
    flips: np.ndarray
    undecided: np.ndarray
    distance: np.ndarray
    attack: np.ndarray


class Auditor:
    """Attacks on one classifier, compiled once for a batch of images.

    Args:
      encoder, head: as `models.Model.for_certification` gave them.
      votes: the `Votes` loop that certified, or one like it: its predictions judge the attacks.
      lipschitz: constant of the encoder, as the certificates claim it.
      alpha: level of `predict`.
      settings: `Settings`.
      seed: of the noise that attacks draw.
    """

    def __init__(self, encoder, head, votes, *, lipschitz, alpha, settings, seed):
        self._settings, self._votes, self._alpha, self._lipschitz = settings, votes, alpha, lipschitz
        self._batch = votes.tile[0]
        self._encode = Float64Encoder(encoder, self._batch)
        self._key = domain_key(seed, "audit")
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), encoder.params)
        target = attacks.Smoothed(lambda x: encoder.apply(params, x), head, votes.arithmetic.sigma)
        steps, samples = settings.steps, settings.samples

        @jax.jit
        def descend(images, classes, radius, key):
            """The best of several restarts, by votes."""

            def attempt(restart):
                attack_key, vote_key = jax.random.split(jax.random.fold_in(key, restart))
                points = attacks.pgd(target, images, classes, radius, attack_key, steps=steps, samples=samples)
                return points, target.share(points, classes, vote_key, samples, rounds=4)

            points, shares = jax.lax.map(attempt, jnp.arange(settings.restarts))
            return points[jnp.argmin(shares, axis=0), jnp.arange(len(images))]

        @jax.jit
        def shorten(images, points, classes, key):
            return attacks.shorten(target, images, points, classes, key, samples=samples, rounds=16)

        @jax.jit
        def decide(images, classes, starts, key):
            size = {"iterations": steps, "directions": _DIRECTIONS, "samples": samples}
            return attacks.decision(target, images, classes, starts, key, **size)

        self._descend, self._shorten, self._decide = descend, shorten, decide

    def _predict(self, images):
        return predict(self._votes, self._encode(images), self._settings.votes, self._alpha)

    def __call__(self, images, certified, radius, number):
        """Attacks up to a batch of images.

        Args:
          images: float64 ``(B, H, W, C)``.
          certified: class of each certificate, −1 without one.
          radius: ℓ2 radius of each certificate.
          number: of the batch; its noise follows from it.

        Returns:
          `Found`.
        """
        count, batch_key = len(images), jax.random.fold_in(self._key, number)
        keys = (jax.random.fold_in(batch_key, use) for use in itertools.count())
        unperturbed = self._predict(images)
        classes = np.where(certified >= 0, certified, unperturbed)
        found = Found(
            unperturbed,
            *np.zeros((3, count), int),
            np.full(count, np.inf),
            np.full(count, "none", dtype=object),
        )

        def fill(values):
            """Up to a whole batch, with repetitions of the last image."""
            return np.pad(values, ((0, self._batch - count), *[(0, 0)] * (values.ndim - 1)), mode="edge")

        padded, wanted = fill(images), fill(np.maximum(classes, 0))
        device = jnp.asarray(padded, jnp.float32), jnp.asarray(wanted, jnp.int32)

        def judge(name, points, there=None):
            """Has `predict` look at points, and books what it says."""
            distance = np.linalg.norm((points - images).reshape(count, -1), axis=1)
            there = self._predict(points) if there is None else there
            flipped = (there >= 0) & (classes >= 0) & (there != classes)
            inside = (certified >= 0) & (distance < radius)
            found.pairs[:] += inside
            found.flips[:] += inside & flipped
            found.undecided[:] += inside & (there < 0)
            nearer = flipped & (distance < found.distance)
            found.distance[nearer], found.attack[nearer] = distance[nearer], name

        def at(points, lengths):
            """The same directions from the images, with these lengths; never longer."""
            offset = points - images
            norm = np.linalg.norm(offset.reshape(count, -1), axis=1)
            scale = lengths / np.maximum(norm, 1e-300) * (1 - 1e-9)
            return images + scale.reshape(-1, *[1] * (images.ndim - 1)) * offset

        def descended(lengths):
            points = self._descend(*device, fill(lengths).astype(np.float32), next(keys))
            return np.asarray(points, np.float64)[:count]

        def beyond(name, points):
            """The way from the image to points of an attack: where it leaves the class, and inside the radius."""
            near = self._shorten(device[0], jnp.asarray(fill(points), jnp.float32), device[1], next(keys))
            near = np.asarray(near, np.float64)[:count]
            boundary = np.linalg.norm((near - images).reshape(count, -1), axis=1)
            for push in _PUSHES:
                judge(name, at(near, boundary + push * unit))
            judge(name, at(points, radius))

        unit = self._votes.arithmetic.sigma / self._lipschitz
        judge("none", images, unperturbed)
        with pinned(), jax.default_matmul_precision("highest"):
            for fraction in self._settings.fractions:
                lengths = fraction * radius
                judge("pgd", at(descended(lengths), lengths))
            for multiple in _LADDER:
                beyond("pgd", descended(radius + multiple * unit))
            points = self._decide(*device, self._starts(padded, wanted), next(keys))
            beyond("decision", np.asarray(points, np.float64)[:count])
        return found

    def _starts(self, images, classes):
        """For each image of a batch another one of it with another class, or noise where there is none."""
        rng = np.random.default_rng(0)
        starts = images + rng.normal(0, 1, images.shape)
        for row, own in enumerate(classes):
            others = np.flatnonzero(classes != own)
            if len(others):
                distance = np.linalg.norm((images[others] - images[row]).reshape(len(others), -1), axis=1)
                starts[row] = images[others[np.argmin(distance)]]
        return jnp.asarray(starts, jnp.float32)
