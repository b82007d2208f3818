"""The fallback of a `SmoothedClassifier`: a function of scores, or a deterministic classifier of a workdir."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lsrs_jax.runtime.errors import UserError, reason
from lsrs_jax.runtime.rng import pinned
from lsrs_jax.runtime.validate import numbers
from lsrs_jax.smoothing.composition import answers, check_scores

_TRIED = 64  # inputs at which the Lipschitz constant is tried
_STEP = 0.1  # of the norm of an input
_ROUNDING = 1e-4  # relative: float32 scores of an input and of another one


class Fallback(Protocol):
    """What a composition needs of a deterministic classifier."""

    num_classes: int

    def certified(self, images: Float[np.ndarray, "inputs *input"]) -> tuple[np.ndarray, np.ndarray]: ...
    def classes(self, images: Float[np.ndarray, "inputs *input"]) -> Int[np.ndarray, " inputs"]: ...
    def scores(self, images: Float[Array, "inputs *input"]) -> Float[Array, "inputs classes"]: ...


class GivenFallback:
    """A caller's function of scores, as `composition.compose` describes them.

    That they are 1-Lipschitz is the caller's claim; it is tried at some inputs.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function, self.num_classes = function, 0  # known when it has been called

    def _evaluated(self, inputs: np.ndarray) -> Float[np.ndarray, "inputs classes"]:
        try:
            found = numbers("fallback", self._function(inputs))
        except UserError:
            raise
        except Exception as error:  # whatever the caller's function raises
            raise UserError(f"the fallback failed: {reason(error)}") from error
        check_scores("fallback", found)
        if len(found) != len(inputs):
            raise UserError(f"fallback returns scores of {len(found)} inputs for {len(inputs)}")
        self.num_classes = found.shape[1]
        return found

    def certified(self, images: Float[np.ndarray, "inputs *input"]) -> tuple[np.ndarray, np.ndarray]:
        """Classes, and the largest score of each input or 0; raises UserError if the scores are not 1-Lipschitz."""
        scores = self._evaluated(images)
        rng, tried = np.random.default_rng(0), images[:_TRIED]
        step = rng.standard_normal(tried.shape)
        step *= _STEP * (np.linalg.norm(tried) + 1e-3) / np.linalg.norm(step)
        for others in (tried + step, np.roll(tried, 1, axis=0)):
            distance = np.linalg.norm((others - tried).reshape(len(tried), -1), axis=1)
            own, there = scores[:_TRIED], self._evaluated(others)
            change, size = np.abs(there - own).max(axis=1), np.abs([own, there]).max(axis=(0, 2))
            for row in np.flatnonzero(change > distance * (1 + _ROUNDING) + _ROUNDING * size)[:1]:
                moved = f"a score changes by {change[row]:.4g} within a distance of {distance[row]:.4g}"
                raise UserError(f"fallback: scores must be 1-Lipschitz, and at input {row} {moved}")
        return scores.argmax(axis=1), np.maximum(scores.max(axis=1), 0.0)

    def classes(self, images: Float[np.ndarray, "inputs *input"]) -> Int[np.ndarray, " inputs"]:
        """The classes with a positive score, −1 where there is none."""
        return answers(self._evaluated(images))

    def scores(self, images: Float[Array, "inputs *input"]) -> Float[Array, "inputs classes"]:
        """The scores, where JAX traces the function."""
        return jnp.asarray(self._function(images), jnp.float32)


def classes_of(fallback: Fallback | None, inputs: np.ndarray, classes: int) -> np.ndarray | None:
    """Classes of a fallback, None without one; raises UserError for a fallback of another number of classes."""
    if fallback is None:
        return None
    found = fallback.classes(inputs)
    _check_classes(fallback, classes)
    return found


def _check_classes(fallback: Fallback, classes: int) -> None:
    if fallback.num_classes != classes:
        raise UserError(f"the fallback has {fallback.num_classes} classes, and the head has {classes}")


def answers_of(fallback: Fallback, inputs: np.ndarray, most: int, first: int) -> dict[int, tuple[int, float]]:
    """Classes and radii of a fallback, by the index of the input (from `first` on); raises as `classes_of` does."""
    classes, radii = fallback.certified(inputs)
    _check_classes(fallback, most)
    return dict(enumerate(zip(classes.tolist(), radii.tolist(), strict=True), first))


def fallback_of(given: Any) -> Fallback | None:
    """The fallback that a caller names: a function, a workdir of a network with a linear head, or None."""
    if given is None:
        return None
    if isinstance(given, str | Path):
        from lsrs_jax.api.loading import read_workdir  # which loads much more
        from lsrs_jax.certification.linear import LinearClassifier

        with pinned():
            _, model, params, _, _ = read_workdir(Path(given).expanduser())
            return LinearClassifier(model, params)
    if not callable(given):
        raise UserError(f"fallback must be a function of inputs or a workdir, got {type(given).__name__}")
    return GivenFallback(given)
