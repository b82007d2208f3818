"""Attacks on a smoothed classifier, which try to break its certificates. Pure functions over batches of images.

They run in float32 with noise of their own, never that of a certification or of the prediction that judges them. They
search all of R^d, as a certificate claims: nothing is clipped to pixels in [0, 1].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Images = Float[Array, "images *image"]
Classes = Int[Array, " images"]
PerImage = Float[Array, " images"]
_HALVINGS = 12  # of the way from an image to a point


class Smoothed(NamedTuple):
    """A smoothed classifier as attacks see it, differentiable where encoder and head are."""

    encode: Callable  # images (B, …) -> latents (B, …)
    head: Callable  # latents (B, …) -> logits (B, K)
    sigma: float

    def _logits(self, images: Images, key: jax.Array, samples: int) -> Float[Array, "samples images classes"]:
        """Logits under noise that the images share."""
        latents = self.encode(images)
        noise = self.sigma * jax.random.normal(key, (samples, 1, *latents.shape[1:]), latents.dtype)
        noisy = (latents + noise).reshape(samples * len(latents), *latents.shape[1:])
        return self.head(noisy).astype(jnp.float32).reshape(samples, len(latents), -1)

    def log_probability(self, images: Images, classes: Classes, key: jax.Array, samples: int) -> PerImage:
        """Log of the mean softmax of a class: the soft classifier of Salman et al. 2019."""
        log_soft = jax.nn.log_softmax(self._logits(images, key, samples))
        own = jnp.take_along_axis(log_soft, classes[None, :, None], axis=2)[..., 0]
        return jax.nn.logsumexp(own, axis=0) - jnp.log(samples)

    def share(self, images: Images, classes: Classes, key: jax.Array, samples: int, rounds: int = 1) -> PerImage:
        """Share of the samples for a class minus that of the strongest other class: positive where it wins.

        `samples` are drawn at once, `rounds` times, so that no more memory is needed than for one round.
        """

        def shares(number: jax.Array) -> jax.Array:
            logits = self._logits(images, jax.random.fold_in(key, number), samples)
            return jax.nn.one_hot(jnp.argmax(logits, axis=2), logits.shape[2]).mean(axis=0)

        mean = jax.lax.map(shares, jnp.arange(rounds)).mean(axis=0)
        own = jax.nn.one_hot(classes, mean.shape[1], dtype=bool)
        return (mean * own).sum(axis=1) - jnp.where(own, -1.0, mean).max(axis=1)


def _norm(offset: Images) -> jax.Array:
    """ℓ2 norm per image, with axes kept for broadcasting."""
    return jnp.sqrt(jnp.sum(offset**2, axis=tuple(range(1, offset.ndim)), keepdims=True))


def _unit(offset: Images) -> Images:
    return offset / jnp.maximum(_norm(offset), 1e-30)


def _like(numbers: PerImage, images: Images) -> jax.Array:
    """Numbers with axes for broadcasting against images."""
    return numbers.reshape(-1, *[1] * (images.ndim - 1))


def pgd(
    target: Smoothed, images: Images, classes: Classes, radius: PerImage, key: jax.Array, *, steps: int, samples: int
) -> Images:
    """Projected gradient descent on the smoothed classifier (Salman et al. 2019), from a random start.

    Tries to leave the `classes` in gradient steps with so many noise `samples` each. Returns images of
    ``‖x′ − x‖ ≤ radius``, up to float32 rounding.
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
    """Bisects between each point and its image for the nearest point where the class still loses.

    Where the class wins at the given point already, that point is returned.
    """
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
    """A decision-based attack: predictions, no gradients (HopSkipJump; Chen, Jordan and Wainwright 2020).

    Starts at points where the class loses, such as images of other classes, and goes to the boundary on the way to the
    image. Each iteration estimates the normal of the boundary from predictions at random neighbours (`directions`),
    takes a step along it, and returns to the boundary. Where the class wins at its start, nothing will be found.

    Returns the nearest points found; the caller checks whether the class really loses there.
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
        # Where all answers agree they count themselves; where they are mixed, their differences from the mean count.
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
