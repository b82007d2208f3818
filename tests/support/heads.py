"""Latents and two heads for them: a linear one, whose samples have a known distribution, and a small network."""

import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax import models, smoothing
from lsrs_jax.config import default
from support import threefry

DIM = (4, 4, 2)
LATENTS = np.random.default_rng(1).random((5, *DIM))
W = np.random.default_rng(2).standard_normal(DIM).astype(np.float32)
BIAS = np.float32(-0.5 * W.sum())


def linear_head(z):
    score = jnp.sum(z * W, axis=(1, 2, 3)) + BIAS
    return jnp.stack([score, -score], axis=-1)


def network():
    config = default().model
    config.encoder, config.head = "identity", "convnet_small"
    model = models.build(config, DIM, 4)
    with jax.threefry_partitionable(True), jax.enable_x64(False):
        params = model.init(threefry(3))
    head = model.for_certification(params)[1]
    # The logits are centred, so that every class wins sometimes.
    centre = head(LATENTS.astype(np.float32)).mean(axis=0)
    return lambda z: head(z) - centre


def certify(head=linear_head, latents=LATENTS, **changes):
    return smoothing.certify(head, latents, **({"sigma": 0.5, "key": threefry(0), "n": 100} | changes))
