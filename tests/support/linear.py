"""A linear head, whose samples have a known distribution in closed form, and latents for it."""

import jax.numpy as jnp
import numpy as np

from lsrs_jax import smoothing
from support import threefry

DIM = (4, 4, 2)
LATENTS = np.random.default_rng(1).random((5, *DIM))
W = np.random.default_rng(2).standard_normal(DIM).astype(np.float32)
BIAS = np.float32(-0.5 * W.sum())


def linear_head(z):
    score = jnp.sum(z * W, axis=(1, 2, 3)) + BIAS
    return jnp.stack([score, -score], axis=-1)


def certify(head=linear_head, latents=LATENTS, **changes):
    return smoothing.certify(head, latents, **({"sigma": 0.5, "key": threefry(0), "n": 100} | changes))
