"""Split classifiers: an encoder of orthogonal layers, a latent, and a head."""

from lsrs_jax.models.custom import register_head
from lsrs_jax.models.split import ACTIVATIONS, Cost, Model, build, cost, describe

__all__ = ["ACTIVATIONS", "Cost", "Model", "build", "cost", "describe", "register_head"]
