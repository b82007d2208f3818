"""Split classifiers: an encoder of orthogonal layers, a latent, and a head."""

from lsrs_jax.models.custom import register_head
from lsrs_jax.models.split import ACTIVATIONS, Cost, Model, build, cost, describe, effective_flops

__all__ = ["ACTIVATIONS", "Cost", "Model", "build", "cost", "describe", "effective_flops", "register_head"]
