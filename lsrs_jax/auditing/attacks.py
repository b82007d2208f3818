"""Attacks on a smoothed classifier, which try to break its certificates: pure functions of batches of images.

They run in float32. Their noise is independent of the noise of the certification and of the predictions that judge
them. A certificate holds in all of R^d, so the attacks do not clip pixels to [0, 1].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lsrs_jax.smoothing.composition import composed_scores

Images = Float[Array, "images *image"]
Classes = Int[Array, " images"]
PerImage = Float[Array, " images"]
_HALVINGS = 12  # steps of a bisection between an image and a point


class Smoothed(NamedTuple):
    """A smoothed classifier as attacks see it, differentiable if encoder and head are."""

    encode: Callable  # images (B, …) -> latents (B, …)
    head: Callable  # latents (B, …) -> logits (B, K)
    sigma: float
    fallback: Callable | None = None  # of a composition: images (B, …) -> scores (B, K), as in `composition.compose`
    unit: float = 1.0  # σ/L, in which the votes of a composition are compared with the fallback

    def _logits(self, images: Images, key: jax.Array, samples: int) -> Float[Array, "samples images classes"]:
        """Logits under noise; all images get the same noise."""
        latents = self.encode(images)
        noise = self.sigma * jax.random.normal(key, (samples, 1, *latents.shape[1:]), latents.dtype)
        noisy = (latents + noise).reshape(samples * len(latents), *latents.shape[1:])
        return self.head(noisy).astype(jnp.float32).reshape(samples, len(latents), -1)

    def soft_logits(self, images: Images, key: jax.Array, samples: int) -> Float[Array, "images classes"]:
        """Log of the mean softmax of every class: the soft classifier of Salman et al. 2019."""
        log_soft = jax.nn.log_softmax(self._logits(images, key, samples))
        return jax.nn.logsumexp(log_soft, axis=0) - jnp.log(samples)

    def log_probability(self, images: Images, classes: Classes, key: jax.Array, samples: int) -> PerImage:
        """What lowers one class per image: its soft logit; in a composition, its score with soft votes."""
        found = self.soft_logits(images, key, samples)
        if self.fallback is not None:
            odds = found - jnp.log(jnp.maximum(-jnp.expm1(found), 1e-7))  # positive where a class has more than half
            found = composed_scores(self.fallback(images), self.unit * odds)
        return jnp.take_along_axis(found, classes[:, None], axis=1)[:, 0]

    def share(self, images: Images, classes: Classes, key: jax.Array, samples: int, rounds: int = 1) -> PerImage:
        """Share of the samples for a class minus the share of the strongest other class: positive if the class wins.

        In a composition: the score of the class, with these shares less one half as the votes.
        """

        def shares(number: jax.Array) -> jax.Array:
            logits = self._logits(images, jax.random.fold_in(key, number), samples)
            return jax.nn.one_hot(jnp.argmax(logits, axis=2), logits.shape[2]).mean(axis=0)

        # `rounds` batches of `samples`, one after the other, to save memory
        mean = jax.lax.map(shares, jnp.arange(rounds)).mean(axis=0)
        if self.fallback is not None:
            scores = composed_scores(self.fallback(images), self.unit * (mean - 0.5))
            return jnp.take_along_axis(scores, classes[:, None], axis=1)[:, 0]
        own = jax.nn.one_hot(classes, mean.shape[1], dtype=bool)
        return (mean * own).sum(axis=1) - jnp.where(own, -1.0, mean).max(axis=1)


def _norm(offset: Images) -> jax.Array:
    """ℓ2 norm per image, with axes for broadcasting."""
    return jnp.sqrt(jnp.sum(offset**2, axis=tuple(range(1, offset.ndim)), keepdims=True))


def _unit(offset: Images) -> Images:
    return offset / jnp.maximum(_norm(offset), 1e-30)


def _like(numbers: PerImage, images: Images) -> jax.Array:
    """Numbers per image, with axes for broadcasting."""
    return numbers.reshape(-1, *[1] * (images.ndim - 1))


def pgd(
    target: Smoothed, images: Images, classes: Classes, radius: PerImage, key: jax.Array, *, steps: int, samples: int
) -> Images:
    """Projected gradient descent on the probability of `classes`, from a random start (Salman et al. 2019).

    Returns images with ``‖x′ − x‖ ≤ radius``, up to float32 rounding.
    """
    radius, (start_key, key) = _like(radius, images), jax.random.split(key)
    gradient = jax.grad(lambda x, step_key: target.log_probability(x, classes, step_key, samples).sum())

    def step(i: jax.Array, offset: jax.Array) -> jax.Array:
        downhill = -_unit(gradient(images + offset, jax.random.fold_in(key, i)))
        offset = offset + 2.5 / steps * radius * downhill
        return offset * jnp.minimum(1.0, radius / jnp.maximum(_norm(offset), 1e-30))

    start = radius * _unit(jax.random.normal(start_key, images.shape, images.dtype))
    return images + jax.lax.fori_loop(0, steps, step, start)


def shorten(
    target: Smoothed, images: Images, points: Images, classes: Classes, key: jax.Array, *, samples: int, rounds: int = 1
) -> Images:
    """Bisects between image and point for the nearest point at which the class loses; else returns the point."""
    direction = points - images

    def halve(i: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        inside, outside = bounds
        middle = (inside + outside) / 2
        between, share_key = images + _like(middle, images) * direction, jax.random.fold_in(key, i)
        wins = target.share(between, classes, share_key, samples, rounds)
        return jnp.where(wins > 0, middle, inside), jnp.where(wins > 0, outside, middle)

    bounds = jnp.zeros(len(images)), jnp.ones(len(images))
    return images + _like(jax.lax.fori_loop(0, _HALVINGS, halve, bounds)[1], images) * direction


def decision(
    target: Smoothed,
    images: Images,
    classes: Classes,
    starts: Images,
    key: jax.Array,
    *,
    iterations: int,
    directions: int,
    samples: int,
) -> Images:
    """A decision-based attack, from predictions without gradients (HopSkipJump; Chen, Jordan and Wainwright 2020).

    `starts` are points at which the class loses, such as images of other classes. The attack goes from them towards the
    images until the boundary. Each iteration estimates the normal of the boundary from predictions at random neighbours
    (`directions`), takes a step along it, and returns to the boundary. Returns the nearest points found; the caller
    checks that the class loses there.
    """

    def loses(points: jax.Array, share_key: jax.Array) -> jax.Array:
        return target.share(points, classes, share_key, samples) <= 0

    def step(i: jax.Array, points: jax.Array) -> jax.Array:
        normal_key, share_key, walk_key, bisect_key = jax.random.split(jax.random.fold_in(key, i), 4)
        distance = _norm(points - images)

        def ask(k: jax.Array) -> tuple[jax.Array, jax.Array]:
            unit = _unit(jax.random.normal(jax.random.fold_in(normal_key, k), images.shape, images.dtype))
            return unit, loses(points + 0.1 * distance * unit, jax.random.fold_in(share_key, k))

        units, lost = jax.lax.map(ask, jnp.arange(directions))
        answers = 2.0 * lost - 1.0
        mean = answers.mean(axis=0)
        # The weights are the answers if all agree, else their differences from the mean.
        weights = jnp.where(jnp.abs(mean) == 1, answers, answers - mean)
        normal = _unit(jnp.einsum("kb,kb...->b...", weights, units))

        def walk(j: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            further = points + distance / jnp.sqrt(i + 1.0) * 0.5**j * normal
            found = loses(further, jax.random.fold_in(walk_key, j))
            taken, reached = best
            return taken | found, jnp.where(_like(found & ~taken, images), further, reached)

        _, walked = jax.lax.fori_loop(0, 6, walk, (jnp.zeros(len(images), bool), points))
        back = shorten(target, images, walked, classes, bisect_key, samples=samples)
        return jnp.where(_norm(back - images) < distance, back, points)

    first = shorten(target, images, starts, classes, jax.random.fold_in(key, iterations), samples=samples)
    return jax.lax.fori_loop(0, iterations, step, first)
