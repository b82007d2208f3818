"""The optimizer of a configuration."""

import jax
import optax


def schedule(config):
    """Learning rate as a function of the step: linear warm-up, then constant or cosine to zero."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, config.steps - warmup)
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(peak / max(warmup, 1), peak, warmup), after], [warmup])


def _decays(params):
    """Kernels of the head decay. The encoder's raw parameters do not: that would pull its rotations to the identity."""

    def decays(path, leaf):
        return path[0].key == "head" and path[-1].key == "kernel"

    return jax.tree_util.tree_map_with_path(decays, params)


def build(config):
    """An optax transformation for parameters ``{"encoder": …, "head": …}``."""
    rate = schedule(config)
    decay = optax.add_decayed_weights(config.weight_decay, _decays)
    if config.optimizer == "adam":
        return optax.chain(optax.scale_by_adam(), decay, optax.scale_by_learning_rate(rate))
    return optax.chain(decay, optax.trace(0.9, nesterov=True), optax.scale_by_learning_rate(rate))
