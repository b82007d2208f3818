"""The training loop: data parallel over the devices of all processes; resumes with exactly the next batch."""

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lsrs_jax.data import Dataset, batch_indices, training_batches
from lsrs_jax.models.heads import Images
from lsrs_jax.models.split import Model, Params
from lsrs_jax.models.torch_head import TorchHead, is_buffer, is_kernel
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.mesh import from_own_rows, global_mesh, own_rows, replicated, reshard, sharded
from lsrs_jax.runtime.progress import Progress
from lsrs_jax.runtime.rng import domain_key, pinned
from lsrs_jax.runtime.signals import agreed, deferred
from lsrs_jax.runtime.types import Config
from lsrs_jax.training.checkpoint import Checkpoints
from lsrs_jax.training.folding import Folding
from lsrs_jax.training.losses import Labels, make_loss

Log = Callable[..., None]  # takes a dict of metrics and, optionally, the time left as text
_UNDER_WAY = 2  # the host reads the stop flags of a step this many steps later
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


def step_function(
    model: Model, config: Config, update: optax.TransformUpdateFn, shardings: tuple[Any, Any] | None = None
) -> jax.stages.Wrapped:
    """One optimizer step, ``(state, images, labels, key, step)`` → ``(state, (loss, accuracy))``, jitted.

    The noise depends on the key and the number of the step only. `shardings` are the sharding of the state and the
    sharding of replicated arrays; XLA chooses both if it is None.
    """
    model = dataclasses.replace(model.in_training, head_dtype=config.train.head_dtype)
    loss, late, decay = make_loss(config), config.train.late_noises, config.train.ema
    late_loss, last_third = make_loss(config, late), config.train.steps - config.train.steps // 3

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings, compiler_options=compiler_options())
    def train_step(state: State, images: Images, labels: Labels, key: jax.Array, step: jax.Array) -> Any:
        def loss_of(loss: Any, params: Params) -> Any:
            if shardings:
                # XLA computes wrong gradients of orthogonal kernels built from sharded parameters (jax 0.10, not
                # reported upstream). Remove this when they equal the gradients of replicated parameters without it.
                params = jax.lax.with_sharding_constraint(params, shardings[1])
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


def parts(model: Model, config: Config, mesh: Mesh) -> tuple[Callable[[jax.Array], State], State, jax.stages.Wrapped]:
    """``(fresh, shardings, train_step)``: the function key → first `State`, its shardings, and `step_function`."""
    whole, transformation = replicated(mesh), make_optimizer(config.train)

    def fresh(key: jax.Array, start: Params | None = None) -> State:
        params = model.in_training.init(key) if start is None else start
        return State(params, transformation.init(params), jax.tree.map(jnp.copy, params) if config.train.ema else None)

    shapes = jax.eval_shape(fresh, domain_key(config.seed, "init"))
    shardings = sharded(mesh, shapes) if config.train.shard_parameters else jax.tree.map(lambda _: whole, shapes)
    return fresh, shardings, step_function(model, config, transformation.update, (shardings, whole))


class Evaluator:
    """Accuracy of the base classifier on a data set, with one noise sample per image and without noise."""

    def __init__(self, model: Model, sigma: float, dataset: Dataset, mesh: Mesh, batch: int = 256) -> None:
        self._dataset, self._mesh = dataset, mesh
        self._batch = -(-min(batch, len(dataset)) // mesh.size) * mesh.size

        @functools.partial(jax.jit, out_shardings=replicated(mesh), compiler_options=compiler_options())
        def correct(params: Params, images: Images, labels: Labels, valid: jax.Array, key: jax.Array) -> Any:
            latents = model.encode(params, images)
            noise = sigma * jax.random.normal(key, latents.shape, latents.dtype)
            hits = [jnp.argmax(model.classify(params, z), axis=-1) == labels for z in (latents + noise, latents)]
            return [jnp.sum(hit & valid, dtype=jnp.int32) for hit in hits]

        self._correct = correct

    def __call__(self, params: Params, key: jax.Array) -> np.ndarray:
        """``(noisy accuracy, clean accuracy)`` over the whole data set; the last batch is padded and masked."""
        size, totals, own = len(self._dataset), np.zeros(2, np.int64), own_rows(self._mesh, self._batch)
        for index, start in enumerate(range(0, size, self._batch)):
            rows = np.arange(start, start + self._batch)[own]
            images = self._dataset.read(np.minimum(rows, size - 1), np.float32)
            arrays = from_own_rows(self._mesh, (*images, rows < size))
            totals += [int(hits) for hits in self._correct(params, *arrays, jax.random.fold_in(key, index))]
        return totals / size


def check_batch(config: Config, dataset: Dataset) -> None:
    """Raises UserError unless batch and crop fit the data and the devices divide the batch."""
    (height, width, _), batch, devices = dataset.shape, config.data.batch_size, jax.device_count()
    batch_indices(len(dataset), batch, config.seed, 0)
    if config.data.crop >= min(height, width):
        remedy = f"give --config.data.crop={min(height, width) // 8}, for example"
        raise UserError(f"data.crop {config.data.crop} shifts images of {height}x{width} out of sight: {remedy}")
    if batch % devices:
        raise UserError(f"--config.data.batch_size={batch} must be a multiple of {devices}, the number of devices")


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained, on which images, and where the checkpoints go."""

    model: Model
    config: Config
    train_set: Dataset
    test_set: Dataset
    checkpoints: Checkpoints
    trained_on: dict[str, Any]  # what every checkpoint says about the images
    start: Params | None = None  # the first parameters, as NumPy arrays; by default they are drawn


class _Training:
    """The state of a training, with the methods that log and save it."""

    def __init__(self, job: Job, log: Log) -> None:
        model, config, checkpoints = job.model, job.config, job.checkpoints
        self._job, self._config, self._checkpoints, self._log = job, config, checkpoints, log
        self._mesh = global_mesh()
        self._whole, self._flags = replicated(self._mesh), collections.deque()
        self._any = jax.jit(jnp.max, out_shardings=self._whole)
        fresh, shardings, self._train_step = parts(model, config, self._mesh)
        key, start = domain_key(config.seed, "init"), job.start
        if start is None and isinstance(model.head, TorchHead):  # in a divided program, XLA warns of calls to the host
            start = jax.device_get(model.init(key))
        self._state = jax.jit(fresh, out_shardings=shardings)(key, start)
        self._first = checkpoints.latest() or 0
        if self._first:
            self._resume(shardings)
        self._evaluate = Evaluator(model, config.sigma, job.test_set, self._mesh)
        self._rate, self._window = schedule(config.train), []
        self._folding = model.training_head and Folding(model, config, job.train_set, self._mesh)
        self._folded: tuple[int, Params] | None = None  # step and parameters
        self._since = 0, 0.0  # step and time from which the next report measures the speed

    def _resume(self, shardings: Any) -> None:
        restore, state, model = self._checkpoints.restore, self._state, self._job.model
        if model.training_head:
            folded = jax.tree.map(lambda leaf: leaf.update(sharding=self._whole), model.shapes()[0])
            self._state = State(*restore(self._first, folded, state.all)[1], *[None] * (state.average is None))
            return
        # A checkpoint holds the result replicated, for certification.
        result, rest = restore(self._first, reshard(state.result, self._whole), state.rest)
        self._state = state.resumed(reshard(result, shardings.result), rest)

    def _result(self, done: int) -> Params:
        """The parameters that are evaluated and certified, with batch normalisation folded into the head."""
        if not self._folding:
            return self._state.result
        if self._folded is None or self._folded[0] != done:
            self._folded = done, self._folding(self._state.result)
        return self._folded[1]

    def run(self) -> Params:
        config, settings, first = self._config, self._config.train, self._first
        own = own_rows(self._mesh, config.data.batch_size)
        batches = training_batches(self._job.train_set, config.data, config.seed, first, settings.steps, own)
        key = domain_key(config.seed, "train")
        self._saved = time.monotonic()
        # A step donates its state to the next one, so a signal takes effect after a step, when its state is saved.
        with contextlib.closing(batches), deferred() as signalled:
            for step, batch in zip(range(first, settings.steps), batches, strict=True):
                done = step + 1
                if not self._window:
                    self._since = step, time.monotonic()
                self._state, metrics = self._train_step(
                    self._state, *from_own_rows(self._mesh, batch), key, np.uint32(step)
                )
                if step == first:  # this step compiles, so its time says nothing about the rate
                    jax.block_until_ready(metrics)
                    self._progress, self._since = Progress(settings.steps, done), (done, time.monotonic())
                self._window.append(metrics)
                report, evaluate, save = (
                    done == settings.steps or done % every == 0
                    for every in (settings.log_every, settings.evaluate_every, settings.checkpoint_every)
                )
                stop = self._stops(signalled())
                if stop or report or evaluate or save:
                    self._report(done)
                if evaluate:
                    self._test(done)
                if stop or save:
                    self._save(done)
                if stop:
                    self._checkpoints.wait()
                    raise agreed()
            self._checkpoints.wait()
        return reshard(self._result(settings.steps), self._whole)

    def _stops(self, signalled: bool) -> bool:
        """True if the step that was just launched is the last one. All processes agree on it."""
        if not self._mesh.is_multi_process:
            return signalled
        # The devices combine the flags of all processes with every step; the host reads them a few steps later.
        flags = np.full(len(self._mesh.local_devices), signalled, np.int32)
        self._flags.append(self._any(from_own_rows(self._mesh, flags)))
        return len(self._flags) > _UNDER_WAY and bool(self._flags.popleft())

    def _report(self, done: int) -> None:
        """Waits for the device; logs the means over the steps since the last report, and their speed."""
        losses, accuracies = np.asarray(jax.device_get(self._window), np.float64).T
        self._window, settings, finite = [], self._config.train, np.isfinite(losses)
        if not finite.all():
            bad = int(np.argmin(finite))
            raise UserError(
                f"the loss became {losses[bad]} at step {done - len(losses) + 1 + bad}: train again with a lower "
                f"train.learning_rate (now {settings.learning_rate}), or check sigma and model.std"
                + (" into another --workdir; its checkpoints are kept" if self._checkpoints.latest() else "")
            )
        images, seconds = (done - self._since[0]) * self._config.data.batch_size, time.monotonic() - self._since[1]
        values = {"step": done, "loss": losses.mean(), "accuracy": accuracies.mean()}
        values["learning_rate"] = self._rate(done - 1)
        if images:
            values["images_per_second"] = round(images / seconds, 1)
        self._log(values, self._progress.left(done) if self._first + 1 < done < settings.steps else None)

    def _test(self, done: int) -> None:
        try:
            key = jax.random.fold_in(domain_key(self._config.seed, "evaluate"), done)
            noisy, clean = self._evaluate(self._result(done), key)
        except UserError:  # about the test data: save what was trained
            if not self._mesh.is_multi_process:
                self._save(done)
                self._checkpoints.wait()
            raise
        self._log({"step": done, "test_noisy_accuracy": noisy, "test_clean_accuracy": clean})

    def _save(self, done: int) -> None:
        result, rest = reshard(self._result(done), self._whole), self._state.all if self._folding else self._state.rest
        self._checkpoints.save(done, result, rest, **self._job.trained_on)
        # Seconds since the last checkpoint: over all sessions they add up to the time that the saved steps took.
        self._log({"step": done, "train_seconds": round(time.monotonic() - self._saved, 2)})
        self._saved = time.monotonic()


def train(job: Job, log: Log) -> Params:
    """Trains to ``config.train.steps``, from the newest checkpoint if there is one.

    Every process of the run calls this with the same arguments and takes its own rows of each batch; the batches do not
    depend on the number of processes. Calls `log` in step order. Returns the final parameters, or their average.

    Raises:
      UserError: if the loss stops being finite; the last checkpoint is kept.
      Interrupted: after a signal to any process, when the steps under way are finished and saved.
    """
    with pinned():
        return _Training(job, log).run()
