"""The training loop: data parallel over the devices of all processes, resumable to the exact next batch."""

import collections
import contextlib
import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lsrs_jax import data as datasets
from lsrs_jax import distributed, interrupt
from lsrs_jax.errors import UserError
from lsrs_jax.keys import domain_key, pinned
from lsrs_jax.progress import Progress
from lsrs_jax.training import losses, optimizer


class State(NamedTuple):
    """What a training carries from step to step.

    Attributes:
      params: parameters that are trained.
      optimizer: state of the optimizer.
      average: their exponential moving average, or None where none is kept.
    """

    params: Any
    optimizer: Any
    average: Any

    @property
    def result(self):
        """The parameters that are evaluated, certified and kept as the model."""
        return self.params if self.average is None else self.average

    @property
    def rest(self):
        """What a resumption needs beside the result."""
        return self.optimizer if self.average is None else (self.optimizer, self.params)

    def resumed(self, result, rest):
        """The state of which these are the two halves."""
        if self.average is None:
            return State(result, rest, None)
        return State(rest[1], rest[0], result)


_ON_GPU = {"xla_gpu_enable_triton_gemm": False}


def compiler_options():
    """Of programs that build orthogonal kernels, for `jax.jit`; None where there is nothing to say.

    On a GPU XLA would try dozens of its own kernels for each of their many small products: minutes of compilation,
    where cuBLAS takes seconds.
    """
    return _ON_GPU if jax.default_backend() == "gpu" else None


def step_function(model, config, update, shardings=None):
    """One jitted optimizer step. The noise of step s comes from the key of (seed, "train", s) alone.

    Args:
      shardings: those of the state, and that of whatever every device has whole; left to XLA where None.
    """
    model = dataclasses.replace(model, head_dtype=config.train.head_dtype)
    loss, decay = losses.of_config(config), config.train.ema

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings, compiler_options=compiler_options())
    def train_step(state, images, labels, key, step):
        def loss_of(params):
            if shardings:
                # XLA gives wrong gradients of an orthogonal kernel's construction from parameters that are divided.
                params = jax.lax.with_sharding_constraint(params, shardings[1])
            return loss(model, params, images, labels, jax.random.fold_in(key, step))

        metrics, gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, optimizer_state = update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        if state.average is None:
            return State(params, optimizer_state, None), metrics
        # A lower decay at first forgets the random start.
        kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
        average = jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, state.average, params)
        return State(params, optimizer_state, average), metrics

    return train_step


def parts(model, config, mesh):
    """``(fresh, shardings, train_step)``: key → first `State`, how a mesh holds it, and `step_function` on it."""
    settings, whole = config.train, distributed.replicated(mesh)
    transformation = optimizer.build(settings)

    def fresh(key):
        params = model.init(key)
        return State(params, transformation.init(params), jax.tree.map(jnp.copy, params) if settings.ema else None)

    shapes = jax.eval_shape(fresh, domain_key(config.seed, "init"))
    shardings = jax.tree.map(lambda _: whole, shapes)
    if settings.shard_parameters:
        shardings = distributed.sharded(mesh, shapes)
    return fresh, shardings, step_function(model, config, transformation.update, (shardings, whole))


class Evaluator:
    """Accuracy of the base classifier on a split, with one noise draw per image and without noise."""

    def __init__(self, model, sigma, dataset, mesh, batch=256):
        self._dataset, self._mesh = dataset, mesh
        self._batch = -(-min(batch, len(dataset)) // mesh.size) * mesh.size
        self._own = distributed.own_rows(mesh, self._batch)

        whole = distributed.replicated(mesh)

        @functools.partial(jax.jit, out_shardings=whole, compiler_options=compiler_options())
        def correct(params, images, labels, valid, key):
            latents = model.encode(params, images)
            noise = sigma * jax.random.normal(key, latents.shape, latents.dtype)
            hits = [jnp.argmax(model.classify(params, z), axis=-1) == labels for z in (latents + noise, latents)]
            return [jnp.sum(hit & valid, dtype=jnp.int32) for hit in hits]

        self._correct = correct

    def __call__(self, params, key):
        """``(noisy accuracy, clean accuracy)`` over the whole split; the last batch is padded and masked."""
        size, totals = len(self._dataset), np.zeros(2, np.int64)
        for index, start in enumerate(range(0, size, self._batch)):
            numbers = np.arange(start, start + self._batch)[self._own]
            rows = np.minimum(numbers, size - 1)
            arrays = distributed.joined(self._mesh, (*self._dataset.read(rows, np.float32), numbers < size))
            totals += [int(hits) for hits in self._correct(params, *arrays, jax.random.fold_in(key, index))]
        return totals / size


def check_batch(config, dataset):
    """Raises UserError unless batch and crop fit the data and the batch divides over the devices."""
    size, (height, width, _) = len(dataset), dataset.shape
    datasets.batch_indices(size, config.data.batch_size, config.seed, 0)
    if config.data.crop >= min(height, width):
        raise UserError(f"data.crop {config.data.crop} shifts images of {height}x{width} out of sight; make it smaller")
    devices = jax.device_count()
    if config.data.batch_size % devices:
        raise UserError(
            f"data.batch_size {config.data.batch_size} is not divisible by the {devices} devices; choose a "
            f"multiple of {devices}"
        )


_UNDER_WAY = 2  # steps for whose outcome the host does not wait


class _Stop:
    """After which step to stop: one that all processes agree on, once any of them was told to.

    Their flags meet on the devices beside each step, and are read a few steps later: nothing waits for them.
    """

    def __init__(self, mesh, told):
        self._mesh, self._told, self._meeting = mesh, told, collections.deque()
        self._any = jax.jit(jnp.max, out_shardings=distributed.replicated(mesh))

    def __call__(self):
        """Whether the step that was just launched is the last one."""
        if self._mesh.is_multi_process:
            flags = np.full(len(self._mesh.local_devices), self._told(), np.int32)
            self._meeting.append(self._any(distributed.joined(self._mesh, flags)))
            return len(self._meeting) > _UNDER_WAY and bool(self._meeting.popleft())
        return self._told()


def train(model, config, train_set, test_set, checkpoints, log):
    """Trains to ``config.train.steps``, from the newest checkpoint if there is one.

    Every process of the run calls this with the same arguments. A batch is the same whatever their number; each process
    cuts its own rows out of it.

    Args:
      model: `lsrs_jax.models.Model`.
      config: the whole configuration.
      train_set, test_set: `lsrs_jax.data.Dataset` or `lsrs_jax.data.Photos`.
      checkpoints: `lsrs_jax.checkpoint.Checkpoints`.
      log: function of a dict of metrics and, with training metrics, the time left as text; called in step order.

    Returns:
      the final parameters (their average, where one is kept).

    Raises:
      UserError: if the loss stops being finite (the last checkpoint is kept).
      Interrupted: after a signal to any process, when the steps under way are finished and saved.
    """
    mesh, settings = distributed.global_mesh(), config.train
    whole = distributed.replicated(mesh)
    with pinned():
        fresh, shardings, train_step = parts(model, config, mesh)
        state = jax.jit(fresh, out_shardings=shardings)(domain_key(config.seed, "init"))
        first = checkpoints.latest() or 0
        if first:
            # The result is kept whole, for whoever certifies it.
            result = distributed.placed(state.result, whole)
            result, rest = checkpoints.restore(first, result, state.rest)
            state = state.resumed(distributed.placed(result, shardings.result), rest)
        evaluate = Evaluator(model, config.sigma, test_set, mesh)
        rate = optimizer.schedule(settings)
        key, size = domain_key(config.seed, "train"), config.data.batch_size
        own = distributed.own_rows(mesh, size)
        batches = datasets.training_batches(train_set, config.data, config.seed, first, settings.steps, own)

        def report(window, since):
            """Logs the mean over the steps since the last report; reading them is what waits for the device.

            Their speed is that of the steps after ``since``, ``(number of steps, time)``: nothing else is in it.
            """
            losses, accuracies = np.asarray(jax.device_get(window), np.float64).T
            done = step + 1
            if not np.isfinite(losses).all():
                bad = done - len(losses) + 1 + int(np.argmin(np.isfinite(losses)))
                raise UserError(
                    f"the loss became {losses[~np.isfinite(losses)][0]} at step {bad}: train again with a lower "
                    f"train.learning_rate (now {settings.learning_rate}), or check sigma and model.std"
                    + (" into another --workdir; its checkpoints are kept" if checkpoints.latest() else "")
                )
            images, seconds = (done - since[0]) * config.data.batch_size, time.monotonic() - since[1]
            values = {"step": done, "loss": losses.mean(), "accuracy": accuracies.mean(), "learning_rate": rate(step)}
            if images:
                values["images_per_second"] = round(images / seconds, 1)
            log(values, progress.left(done) if first + 1 < done < settings.steps else None)

        def save(done):
            data = {"input_shape": list(train_set.shape), "classes": train_set.num_classes}
            checkpoints.save(done, distributed.placed(state.result, whole), state.rest, **data)
            # Since the checkpoint before: over all sessions they add up to the time of what was kept.
            log({"step": done, "train_seconds": round(time.monotonic() - start, 2)})

        start, window = time.monotonic(), []
        # A step hands its state to the next: a signal waits for its end, and for the checkpoint that keeps it.
        with contextlib.closing(batches), interrupt.deferred() as told:
            stopping = _Stop(mesh, told)
            for step, batch in zip(range(first, settings.steps), batches, strict=True):
                if not window:
                    since = step, time.monotonic()
                state, metrics = train_step(state, *distributed.joined(mesh, batch), key, np.uint32(step))
                done = step + 1
                if step == first:  # the step that compiles says nothing about the rate
                    jax.block_until_ready(metrics)
                    progress, since = Progress(settings.steps, done), (done, time.monotonic())
                window.append(metrics)
                due = [
                    done == settings.steps or done % every == 0
                    for every in (settings.log_every, settings.evaluate_every, settings.checkpoint_every)
                ]
                stop = stopping()
                if stop or any(due):
                    report(window, since)
                    window = []
                if due[1]:
                    try:
                        noisy, clean = evaluate(
                            state.result, jax.random.fold_in(domain_key(config.seed, "evaluate"), done)
                        )
                    except UserError:  # of the test data: what was trained is kept
                        if not mesh.is_multi_process:
                            save(done)
                            checkpoints.wait()
                        raise
                    log({"step": done, "test_noisy_accuracy": noisy, "test_clean_accuracy": clean})
                if stop or due[2]:
                    save(done)
                    start = time.monotonic()
                if stop:
                    checkpoints.wait()
                    raise interrupt.agreed()
            checkpoints.wait()
        return distributed.placed(state.result, whole)
