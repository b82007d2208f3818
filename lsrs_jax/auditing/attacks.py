"""Attacks on a smoothed classifier: what tries to break a certificate. Pure functions over batches of images.

They work in float32 with noise of their own, never that of a certification or of the prediction that judges them, and
search all of R^d, as a certificate claims: nothing is clipped to pixels in [0, 1].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Smoothed(NamedTuple):
    """A smoothed classifier as attacks see it, differentiable where encoder and head are."""

    encode: Callable  # images (B, …) -> latents (B, …)
    head: Callable  # latents (B, …) -> logits (B, K)
    sigma: float

    def _logits(self, images, key, samples):
        """``(samples, B, K)`` under noise that the images share."""
        latents = self.encode(images)
        noise = self.sigma * jax.random.normal(key, (samples, 1, *latents.shape[1:]), latents.dtype)
        noisy = (latents + noise).reshape(samples * len(latents), *latents.shape[1:])
        return self.head(noisy).astype(jnp.float32).reshape(samples, len(latents), -1)

    def log_probability(self, images, classes, key, samples):
        """Log of the mean softmax of a class, ``(B,)``: the soft classifier of Salman et al. 2019."""
        log_soft = jax.nn.log_softmax(self._logits(images, key, samples))
        own = jnp.take_along_axis(log_soft, classes[None, :, None], axis=2)[..., 0]
        return jax.nn.logsumexp(own, axis=0) - jnp.log(samples)

    def share(self, images, classes, key, samples, rounds=1):
        """Share of the votes for a class less that of the strongest other, ``(B,)``: positive where it wins.

        `samples` votes at once, `rounds` times: as much memory as one round needs.
        """

        def vote(number):
            logits = self._logits(images, jax.random.fold_in(key, number), samples)
            return jax.nn.one_hot(jnp.argmax(logits, axis=2), logits.shape[2]).mean(axis=0)

        votes = jax.lax.map(vote, jnp.arange(rounds)).mean(axis=0)
        own = jax.nn.one_hot(classes, votes.shape[1], dtype=bool)
        return (votes * own).sum(axis=1) - jnp.where(own, -1.0, votes).max(axis=1)


def _norm(offset):
    """ℓ2 norm per image, with axes kept for broadcasting."""
    return jnp.sqrt(jnp.sum(offset**2, axis=tuple(range(1, offset.ndim)), keepdims=True))


def _unit(offset):
    return offset / jnp.maximum(_norm(offset), 1e-30)


def _like(numbers, images):
    """``(B,)`` with axes for broadcasting against images."""
    return numbers.reshape(-1, *[1] * (images.ndim - 1))


def pgd(target, images, classes, radius, key, *, steps, samples):
    """Projected gradient descent on the smoothed classifier (Salman et al. 2019), from a random start.

    Args:
      target: `Smoothed`.
      images: float32 ``(B, …)``.
      classes: int32 ``(B,)``, to be left.
      radius: ``(B,)``, of the ℓ2 balls.
      steps, samples: gradient steps, and noise vectors per step.

    Returns:
      images of ``‖x′ − x‖ ≤ radius``, up to float32 rounding.
    """
    radius, (start_key, key) = _like(radius, images), jax.random.split(key)
    gradient = jax.grad(lambda x, step_key: target.log_probability(x, classes, step_key, samples).sum())

    def step(i, offset):
        downhill = -_unit(gradient(images + offset, jax.random.fold_in(key, i)))
        offset = offset + 2.5 / steps * radius * downhill
        return offset * jnp.minimum(1.0, radius / jnp.maximum(_norm(offset), 1e-30))

    start = radius * _unit(jax.random.normal(start_key, images.shape, images.dtype))
    return images + jax.lax.fori_loop(0, steps, step, start)


def shorten(target, images, points, classes, key, *, samples, rounds=1, halvings=12):
    """Bisects from each point towards its image for the nearest place where the class still loses.

    Returns:
      such places; the points themselves where the class wins there already.
    """
    direction = points - images

    def halve(i, bounds):
        inside, outside = bounds
        middle = (inside + outside) / 2
        place, vote_key = images + _like(middle, images) * direction, jax.random.fold_in(key, i)
        wins = target.share(place, classes, vote_key, samples, rounds)
        return jnp.where(wins > 0, middle, inside), jnp.where(wins > 0, outside, middle)

    bounds = jnp.zeros(len(images)), jnp.ones(len(images))
    return images + _like(jax.lax.fori_loop(0, halvings, halve, bounds)[1], images) * direction


def decision(target, images, classes, starts, key, *, iterations, directions, samples):
    """A decision-based attack: votes for the class, no gradients (HopSkipJump; Chen, Jordan and Wainwright 2020).

    From points where the class loses, such as images of other classes, to the boundary on the way to the image; along
    it by the normal that votes at random neighbours tell, and back to the boundary.

    Args:
      target, images, classes: as in `pgd`.
      starts: ``(B, …)``, where the class should lose; where it wins, nothing will be found.
      iterations, directions, samples: steps along the boundary, neighbours asked per step, votes per question.

    Returns:
      the nearest places found, ``(B, …)``; whether the class really loses there is for others to say.
    """

    def loses(points, vote_key):
        return target.share(points, classes, vote_key, samples) <= 0

    def to_boundary(points, bisect_key):
        return shorten(target, images, points, classes, bisect_key, samples=samples)

    def step(i, points):
        normal_key, vote_key, walk_key, bisect_key = jax.random.split(jax.random.fold_in(key, i), 4)
        distance = _norm(points - images)

        def ask(k):
            unit = _unit(jax.random.normal(jax.random.fold_in(normal_key, k), images.shape, images.dtype))
            return unit, loses(points + 0.1 * distance * unit, jax.random.fold_in(vote_key, k))

        units, lost = jax.lax.map(ask, jnp.arange(directions))
        answers = 2.0 * lost - 1.0
        mean = answers.mean(axis=0)
        # One-sided answers say something on their own; mixed ones say more about their differences.
        weights = jnp.where(jnp.abs(mean) == 1, answers, answers - mean)
        normal = _unit(jnp.einsum("kb,kb...->b...", weights, units))

        def walk(j, best):
            further = points + distance / jnp.sqrt(i + 1.0) * 0.5**j * normal
            found = loses(further, jax.random.fold_in(walk_key, j))
            taken, place = best
            return taken | found, jnp.where(_like(found & ~taken, images), further, place)

        _, walked = jax.lax.fori_loop(0, 6, walk, (jnp.zeros(len(images), bool), points))
        back = to_boundary(walked, bisect_key)
        nearer = _norm(back - images) < distance
        return jnp.where(nearer, back, points)

    first = to_boundary(starts, jax.random.fold_in(key, iterations))
    return jax.lax.fori_loop(0, iterations, step, first)
