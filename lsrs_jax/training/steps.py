"""The optimizer step of a training: its state, the schedule of the learning rate, and the compiled program."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from lsrs_jax.models.heads import Images
from lsrs_jax.models.split import Model, Params
from lsrs_jax.models.torch_head import is_buffer, is_kernel
from lsrs_jax.runtime.mesh import replicated, sharded
from lsrs_jax.runtime.rng import domain_key
from lsrs_jax.runtime.types import Config
from lsrs_jax.training.losses import Labels, Metrics, make_loss

# (state, images, labels, key, number of the step) → (state, (loss, accuracy))
Step = Callable[["State", Images, Labels, jax.Array, jax.Array], tuple["State", Metrics]]
_ON_GPU = {"xla_gpu_enable_triton_gemm": False}


class State(NamedTuple):
    """What a training carries from step to step.

    A checkpoint holds `result` (the model) and `rest`, or, with batch normalisation, the folded `result` and `all`.
    """

    params: Any
    optimizer: Any
    average: Any  # exponential moving average of the parameters, or None

    @property
    def result(self) -> Any:
        """The parameters that are evaluated and certified."""
        return self.params if self.average is None else self.average

    @property
    def rest(self) -> Any:
        return self.optimizer if self.average is None else (self.optimizer, self.params)

    @property
    def all(self) -> Any:
        return (self.params, self.optimizer) if self.average is None else tuple(self)

    def resumed(self, result: Any, rest: Any) -> "State":
        return State(result, rest, None) if self.average is None else State(rest[1], rest[0], result)


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

    def decays(path: Any, leaf: Any) -> bool:
        return (path[0].key == "head" and path[-1].key == "kernel") or is_kernel(path, leaf)

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam or SGD with Nesterov momentum, and weight decay on the kernels of the head."""
    decay = optax.add_decayed_weights(config.weight_decay, _decays)
    rate = optax.scale_by_learning_rate(schedule(config))
    if config.optimizer == "adam":
        return optax.chain(optax.scale_by_adam(), decay, rate)
    return optax.chain(decay, optax.trace(0.9, nesterov=True), rate)


def compiler_options() -> dict[str, bool] | None:
    """Options of `jax.jit` for programs that build orthogonal kernels.

    On a GPU, XLA would try dozens of its own kernels for each of the many small products, which takes minutes; cuBLAS
    takes seconds (NVIDIA/JAX-Toolbox#317). Remove this when XLA compiles such a program in seconds by default.
    """
    return _ON_GPU if jax.default_backend() == "gpu" else None


def make_step(
    model: Model, config: Config, update: optax.TransformUpdateFn, whole: NamedSharding | None = None
) -> Step:
    """One optimizer step, to be jitted. Noise depends on the key and the number of the step only.

    `whole` is the sharding of replicated arrays, for parameters that are divided over devices.
    """
    model = dataclasses.replace(model.in_training, head_dtype=config.train.head_dtype)
    loss, late, decay = make_loss(config), config.train.late_noises, config.train.ema
    late_loss, last_third = make_loss(config, late), config.train.steps - config.train.steps // 3

    def train_step(state: State, images: Images, labels: Labels, key: jax.Array, step: jax.Array) -> Any:
        def loss_of(loss: Any, params: Params) -> Any:
            if whole:
                # XLA computes wrong gradients of orthogonal kernels built from sharded parameters (jax 0.10, not
                # reported upstream). Remove this when they equal the gradients of replicated parameters without it.
                params = jax.lax.with_sharding_constraint(params, whole)
            return loss(model, params, images, labels, jax.random.fold_in(key, step), step)

        first, last = (
            functools.partial(jax.value_and_grad(loss_of, argnums=1, has_aux=True), each, state.params)
            for each in (loss, late_loss)
        )
        metrics, gradient = jax.lax.cond(step >= last_third, last, first) if late else first()
        updates, optimizer_state = update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        if state.average is None:
            return State(params, optimizer_state, None), metrics
        # A lower decay in the first steps removes the random initial parameters from the average.
        kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))

        def mean(path: Any, old: jax.Array, new: jax.Array) -> jax.Array:  # that of two equal numbers may be rounded
            return new if is_buffer(path) else kept * old + (1 - kept) * new

        average = jax.tree_util.tree_map_with_path(mean, state.average, params)
        return State(params, optimizer_state, average), metrics

    return train_step


def step_function(step: Step, shardings: tuple[Any, Any] | None = None) -> jax.stages.Wrapped:
    """Compiles a step. `shardings` are those of its results, the state and the metrics; by default XLA chooses them."""
    return jax.jit(step, donate_argnums=0, out_shardings=shardings, compiler_options=compiler_options())


def parts(model: Model, config: Config, mesh: Mesh) -> tuple[Callable[[jax.Array], State], State, Step]:
    """``(fresh, shardings, step)``: the function key → first `State`, its shardings, and the result of `make_step`."""
    whole, transformation = replicated(mesh), make_optimizer(config.train)

    def fresh(key: jax.Array, start: Params | None = None) -> State:
        params = model.in_training.init(key) if start is None else start
        return State(params, transformation.init(params), jax.tree.map(jnp.copy, params) if config.train.ema else None)

    shapes = jax.eval_shape(fresh, domain_key(config.seed, "init"))
    shardings = sharded(mesh, shapes) if config.train.shard_parameters else jax.tree.map(lambda _: whole, shapes)
    return fresh, shardings, make_step(model, config, transformation.update, whole)
