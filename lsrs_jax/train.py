"""Train a split classifier.

  python -m lsrs_jax.train --config=digits --workdir=runs/digits
  python -m lsrs_jax.train --config=digits:isrs --workdir=runs/digits_isrs --config.seed=1
  python -m lsrs_jax.train --config=digits --workdir=runs/mine --config.data.name=folder:PATH --config.data.size=32

Writes config.json, checkpoints/ and metrics.jsonl into the workdir. The same command resumes an interrupted training
with the exact next batch, on any number of devices and processes (docs/scale.md).
"""

if __name__ == "__main__":
    from lsrs_jax.cli import main

    main("train")

import contextlib

from lsrs_jax import cli
from lsrs_jax.config import chosen_images
from lsrs_jax.data import load_split
from lsrs_jax.data.pairs import check_pair
from lsrs_jax.flags import config_from_flags
from lsrs_jax.models import custom
from lsrs_jax.runtime import processes, profiling
from lsrs_jax.runtime.rng import pinned
from lsrs_jax.runtime.workdir import opened
from lsrs_jax.training import plan, session


def run(arguments: list[str]) -> None:
    """The command; see the module's docstring."""
    fields = ("data.name", "data.batch_size", "data.size", "sigma", "seed", "model.encoder", "model.head")
    usage = "--config=NAME[:VARIANT] --workdir=DIR [--config.FIELD=VALUE ...] [--plan]"
    parser = cli.parser("train", __doc__, (*fields, "train.steps", "train.loss", "train.learning_rate"), usage)
    parser.add_argument("--workdir", type=cli.workdir, help="folder of this training, made if missing; or gs://...")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--plan", action="store_true", help="print how much memory and time it will need, and stop")
    cli.add_profile(instead)
    cli.add_allow_code(parser)
    options, rest = parser.parse_known_args(arguments)
    if not (options.workdir or options.plan):
        parser.error("the following arguments are required: --workdir (or --plan)")
    config = config_from_flags(rest)
    with processes.started() as process, pinned(), contextlib.ExitStack() as stack:
        stack.enter_context(custom.allowing(options.allow_code))
        stack.enter_context(custom.typed_code(config))
        processes.cache_compilations()
        if options.plan:
            train_set = load_split(config.data, config.data.train_split)
            model = session.network(config, train_set)
            certified = chosen_images(config, len(load_split(config.data, config.data.split)))
            print(plan.report(model, config, train_set, len(certified or ())))
            return
        workdir = stack.enter_context(opened(options.workdir))
        check = None
        with process.together("the start"):
            train_set = load_split(config.data, config.data.train_split)
            model = session.network(config, train_set)
            test_set = load_split(config.data, config.data.validation_split or config.data.split)
            check_pair(train_set, test_set)
            start = session.first_parameters(config, model, workdir)
            if process.leads:
                check = stack.enter_context(session.held(workdir))
        tick = stack.enter_context(profiling.captured(options.profile, workdir.path / "profile"))
        session.train(workdir, process, config, model, train_set, test_set, start, check, tick)
    flags = ""
    if config.train.loss == "margin" and config.certify.certificate == "smoothed":
        flags = " --config.certify.certificate=deterministic --config.certify.name=margin"
    flags += "".join(f" --allow-code={name}" for name in custom.code_of(config.model))
    print(f"next: python -m lsrs_jax.certify --workdir={options.workdir}{flags}")
