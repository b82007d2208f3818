"""The class of the smoothed classifier, or abstention (Cohen et al. 2019, PREDICT)."""

import math

import jax
import numpy as np
from jaxtyping import Float, Int
from scipy import special

from lsrs_jax.smoothing.confidence import trusted_lower
from lsrs_jax.smoothing.sampler import Sampler


def predict_classes(
    sampler: Sampler, key: jax.Array, latents: Float[np.ndarray, "images *latent"], n: int, alpha: float
) -> Int[np.ndarray, " images"]:
    """`api.predict` with a compiled sampler, for float64 latents."""
    size = sampler.tile[0]
    parts = [range(start, min(start + size, len(latents))) for start in range(0, len(latents), size)]
    counts = [sampler.one_batch(latents[part], key, "prediction", n, part) for part in parts]
    return leaders(np.concatenate(counts), alpha, sampler.tau)


def leaders(counts: Int[np.ndarray, "images classes"], alpha: float, tau: float) -> Int[np.ndarray, " images"]:
    """The class with the most samples where the second has significantly fewer, else −1.

    If two classes are equally probable, half of the samples in either of them fall in each. τ can move that half by at
    most τ over the probability of the two together. A hundredth of the level pays for a lower bound on that
    probability, for all pairs of classes at once, because the samples themselves choose the pair.
    """
    rows, leader = np.arange(len(counts)), counts.argmax(axis=1)
    first, others = counts[rows, leader], counts.copy()
    others[rows, leader] = -1
    both, half, level = first + others.max(axis=1), np.float64(0.5), alpha
    if tau:
        pairs = math.comb(counts.shape[1], 2)
        together = trusted_lower(both, counts.sum(axis=1), alpha / 100 / pairs)
        half = 0.5 + tau / np.maximum(together - tau, 1e-300)
        level = 0.99 * alpha
    # P[at least `first` of `both`]
    certain = 2 * special.betainc(first, both - first + 1, np.minimum(half, 1.0)) <= level
    return np.where(certain, leader, -1)
