"""Train a split classifier.

  python -m lsrs_jax.train --config=configs/digits.py --workdir=runs/digits
  python -m lsrs_jax.train --config=configs/digits.py:isrs --workdir=runs/digits_isrs --config.seed=1

Writes config.json, checkpoints/ and metrics.jsonl into the workdir. The same command resumes an interrupted training
with the exact next batch, on any number of devices and processes (docs/scale.md).
"""

if __name__ == "__main__":
    from lsrs_jax.cli import main

    main("train")

import contextlib
from collections.abc import Callable
from typing import Any

from lsrs_jax import cli, models
from lsrs_jax.certification.target import restore
from lsrs_jax.config import chosen_images, config_to_dict, load_config, other_training, save_config
from lsrs_jax.data import ImageSet, load_split
from lsrs_jax.runtime import documents, files, processes, profiling
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.rng import pinned
from lsrs_jax.runtime.types import Config
from lsrs_jax.runtime.workdir import Workdir, opened
from lsrs_jax.training import loop, plan
from lsrs_jax.training.checkpoint import Checkpoints
from lsrs_jax.training.metrics import Metrics

_Call = Callable[[], None]
_Work = tuple[models.Model, ImageSet, ImageSet]  # the network, images of training and of test


def run(arguments: list[str]) -> None:
    """The command; see the module's docstring."""
    parser = cli.parser("train", __doc__)
    parser.add_argument("--workdir", type=cli.workdir, help="folder of this training, made if missing; or gs://...")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--plan", action="store_true", help="print how much memory and time it will need, and stop")
    cli.add_profile(instead)
    options, rest = parser.parse_known_args(arguments)
    if not (options.workdir or options.plan):
        parser.error("the following arguments are required: --workdir (or --plan)")
    config = cli.config_from_flags(rest)
    with processes.started() as process, pinned(), contextlib.ExitStack() as stack:
        processes.cache_compilations()
        if options.plan:
            certified = chosen_images(config, len(load_split(config.data, config.data.split)))
            print(plan.report(_network(config)[0], config, len(certified or ())))
            return
        workdir = stack.enter_context(opened(options.workdir))
        check = None
        with process.together("the start"):
            work = (*_network(config), load_split(config.data, config.data.split))
            if process.leads:
                lock = files.locked(workdir.path / ".train.lock", f"training in {options.workdir}")
                check = stack.enter_context(lock)
        tick = stack.enter_context(profiling.captured(options.profile, workdir.path / "profile"))
        _train(workdir, process, config, work, check, tick)
    flags = ""
    if config.train.loss == "margin" and config.certify.certificate == "smoothed":
        flags = " --config.certify.certificate=deterministic --config.certify.name=margin"
    print(f"next: python -m lsrs_jax.certify --workdir={options.workdir}{flags}")


def _network(config: Config) -> tuple[models.Model, ImageSet]:
    """The network of a configuration, and the images on which it is trained."""
    train_set = load_split(config.data, config.data.train_split)
    loop.check_batch(config, train_set)
    return models.build(config.model, train_set.shape, train_set.num_classes), train_set


def _resume(workdir: Workdir, config: Config, model: models.Model, step: int) -> None:
    """Raises UserError unless a workdir with a checkpoint has this configuration; says if its training is finished."""
    kept, given = config_to_dict(load_config(workdir.path / "config.json")), config_to_dict(config)
    if difference := other_training(kept, given):
        name, old, new = difference
        remedy = "use another --workdir, or the old value to resume"
        raise UserError(f"{workdir.name} was trained with {name}={old!r}, not {new!r}: {remedy}")
    if step < config.train.steps:
        return
    restore(workdir.path, model, step)
    print(f"already trained to step {step}: {workdir.name}")
    if difference := documents.first_difference(kept, given):
        name, old, new = difference
        print(f"config.json there keeps {name} {old!r}, not {new!r}: give the new value to certify")


def _train(
    workdir: Workdir, process: processes.Process, config: Config, work: _Work, check: _Call | None, tick: _Call
) -> None:
    """Trains. The first process has `check`, which raises if the workdir is gone."""
    model, train_set, test_set = work
    with Checkpoints(workdir.path, config.train.keep_checkpoints) as checkpoints:
        first = checkpoints.latest() or 0
        with process.together("the configuration"):
            if first:
                _resume(workdir, config, model, first)
            if first >= config.train.steps:
                return
            if process.leads:
                save_config(config, workdir.path / "config.json")
                workdir.push()
        images = f"{len(train_set):,} training and {len(test_set):,} test images {train_set.shape}"
        print(f"{config.data.name}: {images}; {processes.devices()}\n{models.describe(model)}", flush=True)
        if first:
            print(f"resuming after step {first}", flush=True)
        if check is None:
            loop.train(model, config, train_set, test_set, checkpoints, lambda *_: None)
            return
        with contextlib.closing(Metrics(workdir.path, first)) as metrics:

            def log(values: dict[str, Any], left: str | None = None) -> None:
                check()  # otherwise checkpoints would be written into a folder that is gone
                metrics(values, left)
                tick()
                if "train_seconds" in values:  # with every checkpoint
                    workdir.push()

            loop.train(model, config, train_set, test_set, checkpoints, log)
            check()
