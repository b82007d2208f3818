"""Train and certify a grid of classifiers, and compare them.

  python -m lsrs_jax.sweep --config=digits --sigma=0.25,0.5 --variants=lsrs,isrs --out=runs/sweep
  python -m lsrs_jax.sweep --config=digits --sigma=0.12,0.5 --variants=lsrs,isrs --seeds=3 --out=runs/sweep --jobs=2
  python -m lsrs_jax.sweep --config=cifar10 --sigma=0.25 --seeds=0,7 --out=runs/seeds --config.certify.n=10000

Every combination of a variant, a sigma and a seed is a run, with a workdir of its own in OUT, as
OUT/lsrs-sigma0.25-seed0. The command runs `train` and `certify` for each of them in processes of their own, with the
--config flags that are given here, then `report` for all that are finished, into OUT/report. OUT/logs has what they
print. A run that fails is named, and the others are finished; the exit code is then 1. The same command skips finished
runs and resumes the others. With --plan it only prints which are finished.
"""

if __name__ == "__main__":
    from lsrs_jax.cli import main

    main("sweep")

import argparse
import dataclasses
import itertools
import math
import sys
from pathlib import Path

from lsrs_jax import cli, report
from lsrs_jax.certification.table import read_table
from lsrs_jax.config import config_to_dict, load_config, other_training
from lsrs_jax.flags import config_from_flags, normalised
from lsrs_jax.runtime import files
from lsrs_jax.runtime.children import Job, run_jobs
from lsrs_jax.runtime.documents import first_difference
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.progress import duration, print_now
from lsrs_jax.runtime.types import Config

FINISHED = ".swept"  # a file in a workdir whose last command has succeeded


@dataclasses.dataclass(frozen=True)
class Run:
    """One combination of the grid: its workdir, its configuration, and the flags that give it."""

    workdir: Path
    config: Config
    flags: list[str]

    @property
    def table(self) -> Path:
        """The table of its certificates."""
        return self.workdir / "certify" / self.config.certify.name / "certificates.tsv"

    @property
    def state(self) -> str:
        """``finished``, ``begun`` or ``new``."""
        if (self.workdir / FINISHED).exists() and self.table.exists():
            return "finished"
        return "begun" if (self.workdir / "config.json").exists() else "new"

    def check_begun(self) -> None:
        """Raises UserError if the run was begun with another configuration."""
        path = self.workdir / "config.json"
        if not path.exists():
            return
        kept, given = config_to_dict(load_config(path)), config_to_dict(self.config)
        if difference := other_training(kept, given) or first_difference(kept["certify"], given["certify"]):
            name, old, new = difference
            raise UserError(f"{self.workdir} was begun with {name}={old!r}, not {new!r}: give that, or another --out")

    def job(self, logs: Path, allowed: list[str]) -> Job:
        """The commands of the run."""
        workdir = f"--workdir={self.workdir}"
        commands = [["train", *self.flags, *allowed, workdir], ["certify", *allowed, workdir]]
        return Job(self.workdir.name, commands, logs / f"{self.workdir.name}.log")


def run(arguments: list[str]) -> None:
    """The command; see the module's docstring."""
    usage = "--config=NAME [--sigma=S,S,...] [--variants=V,V,...] [--seeds=N] --out=DIR [--jobs=N] [--config.F=V ...]"
    parser = cli.parser("sweep", __doc__, ("train.steps", "certify.n"), usage)
    positive = cli.checked(cli.numbers, lambda found: all(0 < sigma < math.inf for sigma in found), "positive numbers")
    parser.add_argument("--sigma", type=positive, help="noise levels, as 0.25,0.5; by default the configuration's")
    parser.add_argument("--variants", type=_words, help="variants of the configuration, as lsrs,isrs")
    parser.add_argument("--seeds", type=_seeds, help="a number of seeds (3: 0, 1 and 2), or a list, as 0,7")
    parser.add_argument("--out", required=True, type=cli.folder, help="folder for the workdirs and the report")
    count = cli.checked(int, lambda value: value >= 1, "a whole number of at least 1")
    parser.add_argument("--jobs", type=count, default=1, help="runs at a time; they share the cores (default 1)")
    parser.add_argument("--plan", action="store_true", help="print the runs and which are finished, and stop")
    cli.add_allow_code(parser)
    options, rest = parser.parse_known_args(arguments)
    if any((options.out / name).exists() for name in ("config.json", "checkpoints")):
        raise UserError(f"{options.out} is the workdir of a training; give another folder as --out")
    runs = _grid(options, normalised(rest))
    for one in runs:
        one.check_begun()
    if options.plan:
        width = max(len(one.workdir.name) for one in runs)
        print("\n".join(f"{one.workdir.name:<{width}}  {one.state}" for one in runs))
        return
    with files.locked(options.out / ".sweep.lock", f"sweeping into {options.out}"):
        failed = _run_all(runs, options)
        finished = [str(one.workdir) for one in runs if one.state == "finished"]
        if finished:
            report.run([*finished, f"--out={options.out / 'report'}"])
    if failed:
        print(f"error: {len(failed)} of {len(runs)} runs failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def _words(text: str) -> tuple[str, ...]:
    """Argument type: different words with commas between them."""
    words = tuple(text.split(","))
    if not all(words) or len(set(words)) < len(words):
        raise argparse.ArgumentTypeError(f"must be different names with commas between them, got {text!r}")
    return words


def _seeds(text: str) -> tuple[int, ...]:
    """Argument type: a number of seeds, or the seeds with commas between them (one of them ends with a comma)."""
    words = text.removesuffix(",").split(",")
    if not all(word.isascii() and word.isdigit() for word in words):
        raise argparse.ArgumentTypeError(f"must be a number of seeds or a list such as 0,7, got {text!r}")
    seeds = tuple(map(int, words)) if "," in text else tuple(range(int(text)))
    if not seeds or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"must be at least one seed, and all of them different, got {text!r}")
    return seeds


def _grid(options: argparse.Namespace, flags: list[str]) -> list[Run]:
    """The runs, with configurations that were checked."""
    given = config_from_flags(flags)  # explains what is wrong with the flags themselves
    for name, values in (("sigma", options.sigma), ("seed", options.seeds)):
        if values and any(flag.startswith(f"--config.{name}=") for flag in flags):
            option = {"seed": "seeds"}.get(name, name)
            raise UserError(f"--{option} and --config.{name} are both given; leave one out")
    source = next(flag for flag in flags if flag.startswith("--config="))
    name, _, variant = source.removeprefix("--config=").partition(":")
    if variant and options.variants:
        raise UserError(f"{source} and --variants both name a variant; leave one out")
    variants = options.variants or (variant,)
    runs, others = [], [flag for flag in flags if flag != source]
    for one, sigma, seed in itertools.product(
        variants, options.sigma or (given.sigma,), options.seeds or (given.seed,)
    ):
        own = [f"--config={name}{':' * bool(one)}{one}", f"--config.sigma={sigma!r}", f"--config.seed={seed}"]
        folder = options.out / f"{one or Path(name).stem}-sigma{sigma:.12g}-seed{seed}"
        flags_of_run = [*own, *(flag for flag in others if not flag.startswith(("--config.sigma=", "--config.seed=")))]
        runs.append(Run(folder, config_from_flags(flags_of_run), flags_of_run))
    return runs


def _run_all(runs: list[Run], options: argparse.Namespace) -> list[str]:
    """Runs what is not finished; returns the names of the runs that failed."""
    by_name = {one.workdir.name: one for one in runs}
    todo = [one for one in runs if one.state != "finished"]
    failed, done = [], len(runs) - len(todo)
    at_once = f", {options.jobs} at a time" if options.jobs > 1 else ""
    print_now(f"{len(runs)} runs in {options.out}, {done} of them finished{at_once}")

    def finished(job: Job, left: float) -> None:
        nonlocal done
        done += 1
        if job.failed:
            failed.append(job.name)
            command, code = job.failed
            result = f"FAILED: {command} ended with exit code {code}: {job.last_line} ({job.log})"
        else:
            files.write_atomic(by_name[job.name].workdir / FINISHED, "")
            table = read_table(by_name[job.name].table)
            result = (
                f"certified accuracy {table.certified_accuracy(0):.3f}, average certified radius "
                f"{table.average_certified_radius:.4f}, in {duration(job.seconds)}"
            )
        ahead = f"; {duration(left)} left" if done < len(runs) else ""
        print_now(f"{done} of {len(runs)} runs: {job.name}: {result}{ahead}")

    allowed = [f"--allow-code={name}" for name in options.allow_code]
    run_jobs([one.job(options.out / "logs", allowed) for one in todo], options.jobs, finished)
    return failed
