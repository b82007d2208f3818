"""The optimizer that the section ``train`` of a configuration describes."""

from typing import Any

import jax
import optax

from lsrs_jax.models.split import Params
from lsrs_jax.runtime.types import Config


def schedule(config: Config) -> optax.Schedule:
    """Learning rate as a function of the step: linear warm-up, then constant or cosine to zero."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, config.steps - warmup)
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(peak / max(warmup, 1), peak, warmup), after], [warmup])


def _decays(params: Params) -> Any:
    """Marks the kernels of the head. Decay of the encoder's raw parameters would pull its kernels to the identity."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "head" and path[-1].key == "kernel", params)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam or SGD with Nesterov momentum, and weight decay on the kernels of the head."""
    decay = optax.add_decayed_weights(config.weight_decay, _decays)
    rate = optax.scale_by_learning_rate(schedule(config))
    if config.optimizer == "adam":
        return optax.chain(optax.scale_by_adam(), decay, rate)
    return optax.chain(decay, optax.trace(0.9, nesterov=True), rate)
