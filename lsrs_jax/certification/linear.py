"""A linear head behind a Lipschitz encoder, in float64: predictions, certified margins, and scores for attacks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lsrs_jax import models
from lsrs_jax.certification.encode import encode_batches
from lsrs_jax.certification.margin import certified_margin, distances, float64_slack
from lsrs_jax.certification.platform_check import check_encoder
from lsrs_jax.data import Dataset
from lsrs_jax.layers.lipschitz import Float64Encoder

_BATCH = 50


class LinearClassifier:
    """The classifier argmax_c (Wᵀ encoder(x) + b)_c of a model with a linear head.

    Raises UserError for another head, and on a platform whose encoder exceeds the error budget.
    """

    def __init__(self, model: models.Model, params: Any) -> None:
        self._encoder, self._weights, self._bias = model.with_linear_head(params)
        self.report, self._encode = self._encoder.report, Float64Encoder(self._encoder, _BATCH)
        self.num_classes = len(self._bias)
        self._distances = distances(self._weights, self._weights.shape[1])
        check_encoder(self._encoder, self._encode)

    def certificates(self, dataset: Dataset, indices: np.ndarray) -> dict[str, Any]:
        """The columns predict, radius, lipschitz and slack of a table, for some images of a data set."""
        batches = zip(*encode_batches(dataset, indices, self._encode, _BATCH), strict=True)
        latents, norms = (np.concatenate(parts) for parts in batches)
        return self._certified(latents, norms)

    def certified(self, images: Float[np.ndarray, "images *image"]) -> tuple[np.ndarray, np.ndarray]:
        """Classes and certified radii of float64 images."""
        found = self._certified(self._encode(images), np.linalg.norm(images.reshape(len(images), -1), axis=1))
        return found["predict"], found["radius"]

    def _certified(self, latents: np.ndarray, norms: np.ndarray) -> dict[str, Any]:
        latents, lipschitz = latents.reshape(len(latents), -1), self.report.constant
        logits, head = latents @ self._weights + self._bias, (self._weights, self._bias)
        _, reach = certified_margin(logits, self._weights, lipschitz=lipschitz)  # without slack, the radii are largest
        slack = float64_slack(self.report.rounding(norms + reach), latents, *head, lipschitz * reach)
        predict, radius = certified_margin(logits, self._weights, lipschitz=lipschitz, slack=slack)
        return {"predict": predict, "radius": radius, "lipschitz": lipschitz, "slack": slack}

    def classes(self, images: Float[np.ndarray, "images *image"]) -> Int[np.ndarray, " images"]:
        """Classes of float64 images."""
        return self.certified(images)[0]

    def scores(self, images: Float[Array, "images *image"]) -> Float[Array, "images classes"]:
        """Margins of all classes in float32, as in `composition.compose`; differentiable, and without a guarantee."""
        params, weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (self._encoder.params, self._weights))
        logits = self._encoder.apply(params, images).reshape(len(images), -1) @ weights + self._bias.astype(np.float32)
        apart = jnp.asarray(self.report.constant * self._distances, jnp.float32)
        return ((logits[:, :, None] - logits[:, None, :]) / apart + _own(len(self._bias))).min(axis=2)


def _own(classes: int) -> np.ndarray:
    """Infinite for a class against itself."""
    return np.where(np.eye(classes, dtype=bool), np.inf, 0.0).astype(np.float32)
