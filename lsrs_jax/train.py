"""Train a split classifier.

  python -m lsrs_jax.train --config=configs/digits.py --workdir=runs/digits
  python -m lsrs_jax.train --config=configs/digits.py:isrs --workdir=runs/digits_isrs --config.seed=1

Writes config.json, checkpoints/ and metrics.jsonl into the workdir. The same command resumes an interrupted training
with the exact next batch, on any number of devices and processes (docs/scale.md).
"""

import contextlib
import json

from lsrs_jax import command, models, plan, profiling
from lsrs_jax import config as configuration
from lsrs_jax import data as datasets
from lsrs_jax import workdir as workdirs
from lsrs_jax.certification import job as jobs
from lsrs_jax.checkpoint import Checkpoints
from lsrs_jax.distributed import cache_compilations, devices, started
from lsrs_jax.errors import UserError
from lsrs_jax.files import locked, naming, write_atomic
from lsrs_jax.training import loop


class _Metrics:
    """metrics.jsonl, TensorBoard where installed, and lines on the screen."""

    def __init__(self, workdir, first):
        self._path = workdir / "metrics.jsonl"
        # Steps after the checkpoint run again; a line half-written by a kill is dropped with them.
        kept = [line for line in _complete_lines(self._path) if json.loads(line)["step"] <= first]
        write_atomic(self._path, "".join(f"{line}\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            self._board = None
        else:
            self._board = SummaryWriter(str(workdir / "tensorboard"))

    def __call__(self, metrics, left=None):
        metrics = {key: value if key == "step" else float(value) for key, value in metrics.items()}
        with naming(self._path):
            self._file.write(json.dumps(metrics) + "\n")
            self._file.flush()
        if self._board:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, metrics["step"])
        shown = "  ".join(f"{name} {_brief(value)}" for name, value in metrics.items() if name != "step")
        print(f"step {metrics['step']:>6}  {shown}" + (f"  {left} left" if left else ""), flush=True)

    def close(self):
        self._file.close()
        if self._board:
            self._board.close()


def _brief(value):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _complete_lines(path):
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line for line in text[: text.rfind("\n") + 1].splitlines() if _is_metrics(line)]


def _is_metrics(line):
    try:
        return isinstance(json.loads(line)["step"], int)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def run(arguments):
    """The command; see the module's docstring."""
    parser = command.parser("train", __doc__)
    parser.add_argument("--workdir", type=command.workdir, help="folder of this training, made if missing; or gs://...")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--plan", action="store_true", help="print what it will need, and start nothing")
    profiling.add_argument(instead)
    options, rest = parser.parse_known_args(arguments)
    if not (options.workdir or options.plan):
        parser.error("the following arguments are required: --workdir (or --plan)")
    config = command.config_from_flags(rest)
    with started() as process, contextlib.ExitStack() as stack:
        cache_compilations()
        if options.plan:
            train_set = datasets.of_config(config.data, config.data.train_split)
            loop.check_batch(config, train_set)
            print(plan.report(models.build(config.model, train_set.shape, train_set.num_classes), config))
            return
        workdir = stack.enter_context(workdirs.opened(options.workdir))
        data = config.data
        with process.together("the start"):
            train_set = datasets.of_config(data, data.train_split)
            test_set = datasets.of_config(data, data.split)
            model = models.build(config.model, train_set.shape, train_set.num_classes)
            loop.check_batch(config, train_set)
            check = _no_check
            if process.leads:
                lock = locked(workdir.path / ".train.lock", f"training in {options.workdir}")
                check = stack.enter_context(lock)
        tick = stack.enter_context(profiling.captured(options.profile, workdir.path / "profile"))
        _train(workdir, process, check, config, model, train_set, test_set, tick)
    margin = config.train.loss == "margin" and config.certify.certificate == "smoothed"
    print(
        f"next: python -m lsrs_jax.certify --workdir={options.workdir}"
        + (" --config.certify.certificate=deterministic --config.certify.name=margin" if margin else "")
    )


def _check_same_training(workdir, config):
    """A workdir with a checkpoint belongs to the configuration that made it."""
    path = workdir.path / "config.json"
    if not path.exists():
        raise UserError(f"{workdir.name} holds checkpoints but no config.json: restore it, or use another --workdir")
    old = configuration.to_dict(configuration.load(path))
    difference = configuration.other_training(old, configuration.to_dict(config))
    if difference:
        raise UserError(
            f"{workdir.name} was trained with {difference[0]}={difference[1]!r}, not {difference[2]!r}: "
            "use another --workdir, or the old value to resume"
        )


def _say_trained(workdir, config, model, step):
    """That there is nothing to do: the checkpoint can be read, and the configuration of what follows is left alone."""
    jobs.restore(workdir.path, model, step)
    print(f"already trained to step {step}: {workdir.name}")
    kept, given = (configuration.to_dict(one) for one in (configuration.load(workdir.path / "config.json"), config))
    difference = configuration.first_difference(kept, given)
    if difference:
        name, old, new = difference
        print(f"config.json there keeps {name} {old!r}, not {new!r}: give certify what is to differ")


def _no_check():
    pass


def _no_log(*_):
    pass


def _train(workdir, process, check, config, model, train_set, test_set, tick):
    with Checkpoints(workdir.path, config.train.keep_checkpoints) as checkpoints:
        first = checkpoints.latest() or 0
        with process.together("the configuration"):
            if first:
                _check_same_training(workdir, config)
            if first >= config.train.steps:
                _say_trained(workdir, config, model, first)
                return
            if process.leads:
                configuration.save(config, workdir.path / "config.json")
                workdir.push()
        print(
            f"{config.data.name}: {len(train_set):,} training and {len(test_set):,} test images {train_set.shape}; "
            f"{devices()}\n"
            f"{models.describe(model)}" + (f"\nresuming after step {first}" if first else ""),
            flush=True,
        )
        if not process.leads:
            loop.train(model, config, train_set, test_set, checkpoints, _no_log)
            return
        metrics = _Metrics(workdir.path, first)

        def log(*row):
            check()  # into a folder that is gone, checkpoints would be written all the same
            metrics(*row)
            tick()
            if "train_seconds" in row[0]:  # with every checkpoint
                workdir.push()

        try:
            loop.train(model, config, train_set, test_set, checkpoints, log)
            check()
        finally:
            metrics.close()


if __name__ == "__main__":
    command.main(run)
