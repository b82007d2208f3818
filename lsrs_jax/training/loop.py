"""The training loop: data parallel over the devices of all processes; resumes with exactly the next batch."""

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lsrs_jax.data import Dataset, batch_indices
from lsrs_jax.models.heads import Images
from lsrs_jax.models.split import Model, Params
from lsrs_jax.models.torch_head import TorchHead
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.mesh import from_own_rows, global_mesh, own_rows, replicated, reshard
from lsrs_jax.runtime.progress import Progress
from lsrs_jax.runtime.rng import domain_key, pinned
from lsrs_jax.runtime.signals import agreed, deferred
from lsrs_jax.runtime.types import Config
from lsrs_jax.training.checkpoint import Checkpoints
from lsrs_jax.training.feeds import make_feed
from lsrs_jax.training.folding import Folding
from lsrs_jax.training.losses import Labels
from lsrs_jax.training.steps import State, compiler_options, parts, schedule

Log = Callable[..., None]  # takes a dict of metrics and, optionally, the time left as text
_UNDER_WAY = 2  # the host reads the stop flags of a step this many steps later


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
        fresh, shardings, train_step = parts(model, config, self._mesh)
        key, start = domain_key(config.seed, "init"), job.start
        if start is None and isinstance(model.head, TorchHead):  # in a divided program, XLA warns of calls to the host
            start = jax.device_get(model.init(key))
        self._state = jax.jit(fresh, out_shardings=shardings)(key, start)
        self._first = checkpoints.latest() or 0
        if self._first:
            self._resume(shardings)
        self._feed = make_feed(train_step, job.train_set, config, self._mesh, shardings, self._first)
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
        settings, first = self._config.train, self._first
        intervals = settings.log_every, settings.evaluate_every, settings.checkpoint_every
        self._saved, done = time.monotonic(), first
        # A launch donates its state to the next one, so a signal takes effect after a launch, when its state is saved.
        with contextlib.closing(self._feed), deferred() as signalled:
            while done < settings.steps:
                compiles = done == first  # so the time of the first step says nothing about the rate
                if not self._window:
                    self._since = done, time.monotonic()
                limit = min(settings.steps, *((done // every + 1) * every for every in intervals))
                self._state, metrics, done = self._feed.advance(self._state, done, done + 1 if compiles else limit)
                if compiles:
                    jax.block_until_ready(metrics)
                    self._progress, self._since = Progress(settings.steps, done), (done, time.monotonic())
                self._window.append(metrics)
                report, evaluate, save = (done == settings.steps or done % every == 0 for every in intervals)
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
        found = [np.reshape(metrics, (-1, 2)) for metrics in jax.device_get(self._window)]
        losses, accuracies = np.concatenate(found).astype(np.float64).T
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
