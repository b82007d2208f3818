"""The studies on CIFAR-10 and MNIST: trains and certifies runs, keeps their certificates, makes tables and figures.

  python -m studies render                      # seconds: from the files kept in docs/results
  python -m studies list                        # the commands of every run
  TFDS_DATA_DIR=... python -m studies run --study=split --jobs=2    # hours: makes, keeps and renders missing runs

Give these commands in the root of the repository. Every run is two or three commands of the package; after an
interruption the same command resumes. The text of docs/results/*.md is written by hand; `render` replaces what is
between its markers.
"""

import argparse
import concurrent.futures
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from lsrs_jax import cli
from lsrs_jax.config import SEED_OF_TRAINING, config_from_dict, config_to_dict
from lsrs_jax.flags import config_from_flags
from lsrs_jax.runtime import signals
from lsrs_jax.runtime.errors import UserError
from studies import page_figures, render, results
from studies.runs import STUDIES

_processes = []  # the package's commands that are running


def made(run, folder):
    """Whether this very run, by its commands and its configuration today, is kept in a folder."""
    try:
        facts = results.load(folder).facts
        config = config_to_dict(config_from_dict(facts["config"]))  # of any format
    except UserError:
        return False
    _, _, _, *flags = run.commands("")[0]
    wanted = config_to_dict(config_from_flags([f"--config={render.ROOT / run.config}", *flags]))
    if config["certify"]["seed"] == SEED_OF_TRAINING:  # made before the noise had a seed of its own
        wanted["certify"]["seed"] = SEED_OF_TRAINING
    for name in ("channels_last", "integer_first_layer"):  # how the program runs, not what was studied
        wanted["certify"][name] = config["certify"][name]
    return facts["commands"] == run.shown() and config == wanted


def make(run, folder, workdir):
    """Trains and certifies one run, and keeps it in a folder; returns an error message, or None."""
    for module, *flags in run.commands(workdir):
        print(f"python -m {module} {shlex.join(flags)}", file=sys.stderr, flush=True)
        arguments, line = [sys.executable, "-m", module, *flags], f"{module} failed and said nothing"
        # In a session of its own: otherwise a Ctrl-C at the terminal would reach the process twice.
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
        with subprocess.Popen(arguments, cwd=render.ROOT, text=True, **streams) as process:
            _processes.append(process)
            for line in process.stdout:
                print(f"{run.name}: {line}", end="", file=sys.stderr, flush=True)
        _processes.remove(process)
        if process.returncode:
            return f"{run.name}: {line.strip()}"
    try:
        return results.keep(workdir, folder, run.shown(), run.decides)
    except UserError as error:
        return f"{run.name}: {error}"


def make_missing(runs, options):
    """Makes the runs that are not kept yet; `runs` maps the folder of a run to it. Returns error messages."""
    missing = [folder for folder, run in runs.items() if not made(run, folder)]
    print(f"{len(missing)} of {len(runs)} runs to make", file=sys.stderr, flush=True)
    pool = concurrent.futures.ThreadPoolExecutor(options.jobs)
    try:
        errors = pool.map(lambda folder: make(runs[folder], folder, options.runs / folder.name), missing)
        return [error for error in errors if error]
    except signals.Interrupted:
        for process in _processes:  # each saves its progress
            process.send_signal(signal.SIGTERM)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def main(arguments):
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser("studies", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("run", "render", "list"))
    choices = (*STUDIES, render.ACCELERATOR, *page_figures.FIGURES)
    parser.add_argument("--study", action="append", choices=choices, help="may be repeated; all by default")
    parser.add_argument("--runs", type=Path, default=render.ROOT / "runs" / "studies", help="folder of the workdirs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; their times are not comparable")
    options = parser.parse_args(arguments)
    options.runs, names = options.runs.resolve(), options.study or choices
    if options.runs.exists() and not options.runs.is_dir():
        parser.error(f"--runs={options.runs} is no folder")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    studies = {name: STUDIES[name] for name in names if name in STUDIES}
    runs = {render.folder(name) / run.name: run for name, study in studies.items() for run in study.rows.values()}
    if options.what == "list":
        print("\n".join(line for run in runs.values() for line in run.shown()))
        return
    errors = make_missing(runs, options) if options.what == "run" else []
    for name in names:
        render.write(name)
    if errors:
        raise UserError(f"{len(errors)} runs failed; the same command tries them again. " + "; ".join(errors))


if __name__ == "__main__":
    cli.execute(main)
