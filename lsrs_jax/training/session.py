"""A training in a workdir: its start, its resumption, and `fit`, which trains on a caller's images."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from lsrs_jax import models
from lsrs_jax.config import (
    TORCH,
    check_config,
    config_from_dict,
    config_to_dict,
    load_config,
    other_training,
    save_config,
)
from lsrs_jax.data import Dataset, Photos
from lsrs_jax.data.pairs import Given, pair_of
from lsrs_jax.models import custom
from lsrs_jax.models.torch_head import TorchHead, check_dtype, read_parameters
from lsrs_jax.runtime import documents, files, processes
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.rng import domain_key, pinned
from lsrs_jax.runtime.types import Config
from lsrs_jax.runtime.workdir import Workdir, checkpoints
from lsrs_jax.training import loop
from lsrs_jax.training.checkpoint import Checkpoints, restore, trained_on
from lsrs_jax.training.metrics import Metrics

_Call = Callable[[], None]


def network(config: Config, train_set: Dataset) -> models.Model:
    """The network of a configuration for these images; raises UserError if they do not fit the configuration."""
    loop.check_batch(config, train_set)
    model = models.build(config.model, train_set.shape, len(train_set.class_names))
    for section in ("train", "certify"):
        check_dtype(model.head, f"{section}.head_dtype", config[section].head_dtype)
    if custom.is_code(config.model.encoder):  # an encoder without a proven constant is refused before it is trained
        with pinned():
            model.for_certification(model.init(domain_key(config.seed, "init")))
    return model


@contextlib.contextmanager
def held(workdir: Workdir) -> Iterator[_Call]:
    """Holds the lock of a workdir for one training; yields a function that raises if the workdir is gone."""
    with files.locked(workdir.path / ".train.lock", f"training in {workdir.name}") as check:
        yield check


def first_parameters(config: Config, model: models.Model, workdir: Workdir) -> Any:
    """The parameters of ``train.start_from`` as NumPy arrays; None if it is empty, or if `workdir` has a checkpoint."""
    saved = checkpoints(workdir.path)
    if not config.train.start_from or (saved.is_dir() and any(path.name.isdigit() for path in saved.iterdir())):
        return None
    return _start(config, model)


def _start(config: Config, model: models.Model) -> Any:
    """The parameters of ``train.start_from``; those of a PyTorch file are of the head, and the encoder's are drawn."""
    source = config.train.start_from
    if model.training_head:
        raise UserError(
            "train.start_from cannot start a head with batch normalisation: leave it out, or give "
            "--config.model.head_norm=none"
        )
    if not source.startswith(TORCH):
        return jax.device_get(restore(Path(source), model)[0])
    if not isinstance(model.head, TorchHead):
        what = f"train.start_from={source} starts a head of PyTorch, model.head={config.model.head} is none"
        raise UserError(f"{what}: give --config.model.head={TORCH}NAME")
    head = read_parameters(model.head, Path(source.removeprefix(TORCH)))
    return jax.device_get(model.init(domain_key(config.seed, "init"))) | {"head": head}


def fit(
    config: Config,
    data: Given,
    test: Given,
    workdir: str | Path,
    class_names: Sequence[str] | None = None,
) -> tuple[models.Model, Any]:
    """Trains on a caller's images, as the command ``train`` does, and resumes a training that was interrupted.

    Args:
      config: `lsrs_jax.config.default()` with changed fields, or the result of a ``get_config`` in ``configs/``. The
        section ``data`` gives batch size and augmentation; the images come from the next two arguments.
      data: training images, as ``(images, labels)`` or as any object with the members of `lsrs_jax.data.Dataset`.
        Images are uint8, or floating point in [0, 1], of shape ``(N, H, W, C)`` (``data.layout`` may say NCHW) or
        ``(N, H, W)``; labels are whole numbers from 0 on.
      test: images for the evaluation during training.
      workdir: the folder that receives config.json, checkpoints/ and metrics.jsonl.
      class_names: one per class, for arrays; by default "0", "1", …

    Returns:
      ``(model, params)``. To certify with the command, save the test images with `numpy.savez_compressed` as
      ``x_test``, ``y_test`` and ``class_names`` and run
      ``python -m lsrs_jax.certify --workdir=WORKDIR --config.data.name=npz:FILE``.

    Raises:
      UserError: for images or labels that do not fit, or a workdir with another training.
    """
    config = config_from_dict(config_to_dict(config))
    train_set, test_set = pair_of(data, test, class_names, config.data)
    with config.unlocked():
        config.data.name, config.data.dir = train_set.name, ""
    check_config(config)
    home = Workdir(Path(workdir))
    with processes.started() as process, pinned(), custom.typed_code(config):
        model = network(config, train_set)
        start = first_parameters(config, model, home)
        with held(home) as check:
            train(home, process, config, model, train_set, test_set, start, check, lambda: None)
        return model, restore(home.path, model)[0]


def train(
    workdir: Workdir,
    process: processes.Process,
    config: Config,
    model: models.Model,
    train_set: Dataset,
    test_set: Dataset,
    start: Any,
    check: _Call | None,
    tick: _Call,
) -> None:
    """Trains in a workdir, from its newest checkpoint if it has one, and otherwise from the parameters `start`.

    If they are None, they are drawn. The first process has `check`, which raises if the workdir is gone. `tick` is
    called with every line of metrics.
    """
    trained = describe(train_set)
    with Checkpoints(workdir.path, config.train.keep_checkpoints) as saved:
        first = saved.latest() or 0
        with process.together("the configuration"):
            if first:
                _check_resumed(workdir, config, model, trained, first)
            if first >= config.train.steps:
                return
            if not first and start is None and config.train.start_from:  # a folder without any complete checkpoint
                start = _start(config, model)
            if process.leads:
                save_config(config, workdir.path / "config.json")
                workdir.push()
        images = f"{len(train_set):,} training and {len(test_set):,} test images {train_set.shape}"
        print(f"{config.data.name}: {images}; {processes.devices()}\n{models.describe(model)}")
        if first:
            print(f"resuming after step {first}")
        elif start is not None:
            print(f"starting with the parameters of {config.train.start_from}")
        print("compiling the first step ...", flush=True)
        job = loop.Job(model, config, train_set, test_set, saved, trained, start)
        if check is None:
            loop.train(job, lambda *_: None)
            return
        with contextlib.closing(Metrics(workdir.path, first, config.train.steps)) as metrics:

            def log(values: dict[str, Any], left: str | None = None) -> None:
                check()  # otherwise checkpoints would be written into a folder that is gone
                metrics(values, left)
                tick()
                if "train_seconds" in values:  # with every checkpoint
                    workdir.push()

            loop.train(job, log)
            check()


def describe(train_set: Dataset) -> dict[str, Any]:
    """What a checkpoint says about the images on which it was trained."""
    facts = {name: getattr(train_set, name) for name in ("name", "version", "split")} | {"images": len(train_set)}
    facts["digest"] = train_set.sample_digest() if isinstance(train_set, Photos) else train_set.digest()
    names = list(train_set.class_names)
    return {"input_shape": list(train_set.shape), "classes": len(names), "class_names": names, "data": facts}


def _check_resumed(workdir: Workdir, config: Config, model: models.Model, trained: dict[str, Any], step: int) -> None:
    """Raises UserError unless the checkpoint is of this configuration and these images; says if it is the last one."""
    kept, given = config_to_dict(load_config(workdir.path / "config.json")), config_to_dict(config)
    if difference := other_training(kept, given):
        name, old, new = difference
        remedy = "use another --workdir, or the old value to resume"
        raise UserError(f"{workdir.name} was trained with {name}={old!r}, not {new!r}: {remedy}")
    stored = trained_on(workdir.path)
    now = {name: value for name, value in trained.items() if name in stored}  # older versions stored less
    if difference := documents.first_difference({name: stored[name] for name in now}, now):
        name, old, new = difference
        if name == "data.digest":
            what = "on other images or labels under the same name"
        else:
            what = f"on images whose {name} is {old!r}, and not {new!r}"
        raise UserError(f"{workdir.name} was trained {what}: give the same images, or use another --workdir")
    if step < config.train.steps:
        return
    restore(workdir.path, model, step)
    print(f"already trained to step {step}: {workdir.name}")
    if difference := documents.first_difference(kept, given):
        name, old, new = difference
        print(f"config.json there keeps {name} {old!r}, not {new!r}: give the new value to certify")
