"""The studies on CIFAR-10 and MNIST: trains and certifies runs, keeps certificates, rebuilds tables and figures.

  python benchmarks/studies.py render                      # seconds, from the certificates kept in docs/results
  python benchmarks/studies.py list                        # the commands of every run
  TFDS_DATA_DIR=... python benchmarks/studies.py run       # hours: what is missing; then keeps and renders
  TFDS_DATA_DIR=... python benchmarks/studies.py run --study=split --jobs=2

Every run is two commands of the package. Stopped at any moment, the same command goes on. Workdirs lie under --runs.
Kept of a run are its certificates, run.json (configuration, cost, training) and card.md. The prose of
docs/results/*.md is written by hand: `render` replaces what stands between its markers.
"""

import argparse
import concurrent.futures
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import kept
import numpy as np
from script import ended
from study_runs import STUDIES

from lsrs_jax import cli, report
from lsrs_jax.config import config_from_dict, config_to_dict
from lsrs_jax.runtime import signals
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"


def page(name):
    """Where the table of a study stands."""
    return RESULTS / f"{STUDIES[name].page}.md"


def folder(name):
    """Where the runs of a study are kept, and its figure."""
    return RESULTS / STUDIES[name].page


def shown(run):
    """The two commands as a reader types them."""
    return [f"python -m {shlex.join(words)}" for words in run.commands(f"runs/{run.name}")]


def made(run, place):
    """Whether the very run, by its commands and what its configuration says today, is kept in a folder already."""
    try:
        facts = kept.load(place).facts
        config = config_to_dict(config_from_dict(facts["config"]))  # of any format
    except UserError:
        return False
    flags = [flag for flag in run.commands("")[0] if flag.startswith("--config.")]
    wanted = config_to_dict(cli.config_from_flags([f"--config={ROOT / run.config}", *flags]))
    return facts["commands"] == shown(run) and config == wanted


_under_way = []  # processes of the package's commands


def make(run, place, workdir):
    """Trains and certifies one run, and keeps it in a folder; returns what went wrong, or None."""
    for module, *flags in run.commands(workdir):
        print(f"python -m {module} {shlex.join(flags)}", file=sys.stderr, flush=True)
        arguments, line = [sys.executable, "-m", module, *flags], f"{module} failed and said nothing"
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        # In a session of its own: a signal of the terminal's would be the first of two.
        with subprocess.Popen(arguments, cwd=ROOT, text=True, start_new_session=True, **streams) as process:
            _under_way.append(process)
            for line in process.stdout:
                print(f"{run.name}: {line}", end="", file=sys.stderr, flush=True)
        _under_way.remove(process)
        if process.returncode:
            return f"{run.name}: {line.strip()}"
    try:
        kept.keep(workdir, place, shown(run))
    except UserError as error:
        return f"{run.name}: {error}"
    print(f"{run.name} is kept", file=sys.stderr, flush=True)
    return None


def markers(name):
    """Around the part of the page that belongs to a study."""
    return f"<!-- {name}: written by benchmarks/studies.py -->", f"<!-- end of {name} -->"


def tables(name):
    """Label → `kept.Kept` of the runs of a study that are there."""
    rows = {label: folder(name) / run.name for label, run in STUDIES[name].rows.items()}
    return {label: kept.load(place) for label, place in rows.items() if (place / "card.md").exists()}


def section(name, found):
    """The table of a study, and its figure."""
    missing, home = len(STUDIES[name].rows) - len(found), STUDIES[name].page
    lines = ["| run | " + " | ".join(kept.header()) + " |", "|" + "---|" * (1 + len(kept.header()))]
    for label, run in found.items():
        cells = [f"[{label}]({home}/{run.name}/card.md)", *kept.columns(run)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += means(found, STUDIES[name].references) if STUDIES[name].references and not missing else []
    lines += [f"\n{missing} of the {missing + len(found)} runs of this study have not been made."] if missing else []
    return "\n".join(lines) + f"\n\n![{name}]({home}/{name}.png)"


def means(found, references):
    """The lines of a table of means over seeds, each compared with some labels over the seeds that both have."""
    groups = {}
    for label, run in found.items():
        kind, _, seed = label.rpartition(", seed ")
        groups.setdefault(kind, {})[seed] = run.table

    def radii(label, seeds):
        """Per seed and image; 0 where it is wrong."""
        tables = [groups[label][seed] for seed in seeds]
        return np.array([np.where(table.predict == table.label, table.radius, 0.0) for table in tables])

    def compared(label, reference):
        seeds = [seed for seed in groups[label] if seed in groups[reference]]
        own, base = radii(label, seeds), radii(reference, seeds)
        difference = own.mean(axis=0) - base.mean(axis=0)
        error = difference.std(ddof=1) / np.sqrt(len(difference))
        return f"{own.mean() / base.mean():.1%}, {difference.mean():+.4f} ({error:.4f})"

    header = ["mean of the seeds", "seeds", *(f"r={radius:g}" for radius in kept.RADII)]
    header += ["ACR (standard deviation over seeds)"]
    header += [f"ACR over that of {label}, same seeds; difference (standard error over images)" for label in references]
    lines = [f"\n| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for label, tables in groups.items():
        own = radii(label, tables)
        accuracies = ([table.certified_accuracy(radius) for table in tables.values()] for radius in kept.RADII)
        deviation = f" ({own.mean(axis=1).std(ddof=1):.4f})" if len(own) > 1 else ""
        cells = [label, str(len(tables)), *(f"{np.mean(each):.3f}" for each in accuracies)]
        cells += [f"{own.mean():.4f}{deviation}", *(compared(label, reference) for reference in references)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def pareto(found, path):
    """Average certified radius over FLOPs per vote; returns False where Matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    groups = {"LSRS": [], "LSRS, Haar strides": [], "ISRS, same network": [], "ISRS, free network": []}
    for run in found.values():
        if not run.smoothed:
            radius = run.table.average_certified_radius
            axes.axhline(radius, color="gray", linestyle=":", label=f"margin, no votes (ACR {radius:.3f})")
            continue
        model = run.facts["config"]["model"]
        strides = ", Haar strides" * (model["encoder"] == "blocks_haar")
        smoothed = f"LSRS{strides}" if model["noise"] == "latent" else "ISRS, same network"
        group = smoothed if model["split"] else "ISRS, free network"
        point = run.cost.head / 1e6, run.table.average_certified_radius, model["split"]
        groups[group].append(point)
    for (group, points), marker in zip(groups.items(), "oDs*", strict=True):
        if points:
            x, y, splits = zip(*sorted(points), strict=True)
            axes.plot(x, y, marker=marker, label=group, linestyle="-" if group.startswith("LSRS") else "none")
            for point in zip(splits, x, y, strict=True):
                axes.annotate(str(point[0]), point[1:], textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(xlabel="MFLOP per vote", ylabel="average certified radius", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def curves(found, path):
    """Certified accuracy over the radius; returns False where Matplotlib is not installed."""
    return report.draw([report.Run(label, run.table) for label, run in found.items()], [path])


def render(names):
    """Rewrites the tables on the pages, and the figures, of the studies that have runs."""
    for name in names:
        found, (first, last) = tables(name), markers(name)
        if not found:
            continue
        text = page(name).read_text(encoding="utf-8")
        if first not in text or last not in text:
            raise UserError(
                f"{page(name)} has no markers of {name}: put {first} and {last} where its table shall stand"
            )
        place = re.compile(re.escape(first) + ".*?" + re.escape(last), re.DOTALL)
        content = f"{first}\n{section(name, found)}\n{last}"
        write_atomic(page(name), place.sub(lambda _, content=content: content, text))
        if not {"pareto": pareto, "curves": curves}[STUDIES[name].figure](found, folder(name) / f"{name}.png"):
            print(f"no figure of {name}: Matplotlib is not installed", file=sys.stderr)


def parse(arguments):
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "render", "list"))
    parser.add_argument("--study", action="append", choices=STUDIES, help="one or several of them; all by default")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "studies", help="folder of the workdirs")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; their times are then not comparable")
    options = parser.parse_args(arguments)
    options.runs = options.runs.resolve()
    if options.runs.exists() and not options.runs.is_dir():
        parser.error(f"--runs={options.runs} is no folder")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    return options


def main(arguments):
    """The command; see the module's docstring."""
    options = parse(arguments)
    names = options.study or list(STUDIES)
    runs = {folder(name) / run.name: run for name in names for run in STUDIES[name].rows.values()}
    failed = []
    if options.what == "list":
        print("\n".join(line for run in runs.values() for line in shown(run)))
        return
    if options.what == "run":
        missing = [place for place, run in runs.items() if not made(run, place)]
        print(f"{len(missing)} of {len(runs)} runs to make", file=sys.stderr, flush=True)
        pool = concurrent.futures.ThreadPoolExecutor(options.jobs)
        try:
            errors = pool.map(lambda place: make(runs[place], place, options.runs / place.name), missing)
            failed = [error for error in errors if error]
        except signals.Interrupted:
            for process in _under_way:  # they save what they have
                process.send_signal(signal.SIGTERM)
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    render(names)
    if failed:
        raise UserError(f"{len(failed)} runs failed; the same command tries them again. " + "; ".join(failed))


if __name__ == "__main__":
    ended(main, sys.argv[1:])
