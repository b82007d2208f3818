"""Makes the tables and figures on the pages of docs/results from the files that are committed there."""

import itertools
import re
from pathlib import Path

import matplotlib
import numpy as np

from lsrs_jax.reporting import curve
from lsrs_jax.reporting.runs import Run, incomparable
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import write_atomic
from studies import accelerator, results
from studies.runs import STUDIES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
ACCELERATOR = "accelerator"  # a page whose tables come from benchmarks/accelerator.py


def page(name):
    """The page that has the table of a study."""
    return RESULTS / f"{STUDIES[name].page if name in STUDIES else name}.md"


def folder(name):
    """The folder that keeps the runs of a study, and its figure."""
    return page(name).with_suffix("")


def markers(name):
    """The lines around the part of a page that belongs to a study."""
    return f"<!-- {name}: written by python -m studies -->", f"<!-- end of {name} -->"


def kept_runs(name):
    """Label → `results.Result` of the runs of a study that are complete."""
    rows = {label: folder(name) / run.name for label, run in STUDIES[name].rows.items()}
    return {label: results.load(path) for label, path in rows.items() if (path / "card.md").exists()}


def section(name, found):
    """The figure of a study, and its table, as Markdown."""
    missing, home = len(STUDIES[name].rows) - len(found), STUDIES[name].page
    rows = {f"[{label}]({home}/{run.name}/card.md)": results.cells(run) for label, run in found.items()}
    header = ["run", *next(iter(rows.values()))]
    table = accelerator.table(header, [[label, *cells.values()] for label, cells in rows.items()])
    parts = [f"![{name}]({home}/{name}.png)", accelerator.folded(table, most=0)]
    different = incomparable([Run(label, run.table, sampling=run.sampling) for label, run in found.items()])
    parts += [different] if different else []
    parts += [_means(found, STUDIES[name].references)] if STUDIES[name].references and not missing else []
    parts += [f"{missing} of the {missing + len(found)} runs of this study have not been made."] if missing else []
    return "\n\n".join(parts)


def _interval(own, base):
    """The middle 95 % of the difference of two means over (seeds, images), if seeds and images are drawn again."""
    rng, differences = np.random.default_rng(0), []
    for _ in range(2000):
        images = rng.integers(own.shape[1], size=own.shape[1])
        means = (part[rng.integers(len(part), size=len(part))][:, images].mean() for part in (own, base))
        differences.append(next(means) - next(means))
    low, high = np.quantile(differences, (0.025, 0.975))
    return f"{low:+.3f} to {high:+.3f}"


def _means(found, references):
    """A table of means over seeds, each compared with the references over the seeds that both have."""
    groups = {}
    for label, run in found.items():
        kind, _, seed = label.rpartition(", seed ")
        groups.setdefault(kind, {})[seed] = run.table

    def radii(label, seeds):
        """Radius per seed and image; 0 where the prediction is wrong."""
        tables = [groups[label][seed] for seed in seeds]
        return np.array([np.where(table.predict == table.label, table.radius, 0.0) for table in tables])

    def compared(label, reference):
        if label == reference:
            return "-"
        seeds = [seed for seed in groups[label] if seed in groups[reference]]
        own, base = radii(label, seeds), radii(reference, seeds)
        difference = own.mean(axis=0) - base.mean(axis=0)
        error = difference.std(ddof=1) / np.sqrt(len(difference))
        return f"{own.mean() / base.mean():.1%}, {difference.mean():+.4f} ({error:.4f}); {_interval(own, base)}"

    header = ["mean of the seeds", "seeds", *(f"r={radius:g}" for radius in results.RADII)]
    header += ["ACR (standard deviation over seeds)"]
    columns = "difference (standard error over images); 95 % over seeds and images"
    header += [f"ACR over that of {label}, same seeds; {columns}" for label in references]
    rows = []
    for label, tables in groups.items():
        own = radii(label, tables)
        accuracies = ([table.certified_accuracy(radius) for table in tables.values()] for radius in results.RADII)
        deviation = f" ({own.mean(axis=1).std(ddof=1):.4f})" if len(own) > 1 else ""
        cells = [label, str(len(tables)), *(f"{np.mean(each):.3f}" for each in accuracies)]
        rows.append([*cells, f"{own.mean():.4f}{deviation}", *(compared(label, other) for other in references)])
    return accelerator.table(header, rows)


def pareto(found, path):
    """Draws the average certified radius over the FLOPs of a sample."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    groups = {"LSRS": [], "LSRS, Haar strides": [], "ISRS, same network": [], "ISRS, free network": []}
    for run in found.values():
        if not run.smoothed:
            radius = run.table.average_certified_radius
            axes.axhline(radius, color="gray", linestyle=":", label=f"margin, no samples (ACR {radius:.3f})")
            continue
        model = run.facts["config"]["model"]
        latent = "LSRS, Haar strides" if model["encoder"] == "blocks_haar" else "LSRS"
        group = latent if model["noise"] == "latent" else "ISRS, same network"
        point = run.cost.head / 1e6, run.table.average_certified_radius, model["split"]
        groups[group if model["split"] else "ISRS, free network"].append(point)
    for (group, points), marker in zip(groups.items(), "oDs*", strict=True):
        x, y, splits = np.reshape(sorted(points), (-1, 3)).T
        axes.plot(x, y, marker=marker, label=group if points else "_", linestyle="-" if "LSRS" in group else "none")
        for *point, split in zip(x, y, splits, strict=True):
            axes.annotate(f"{split:g}", point, textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(xlabel="MFLOP per sample", ylabel="average certified radius", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def deciding(found, path):
    """Draws certified accuracy at one radius over the FLOPs that decide it; a point is the mean of the seeds."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    groups = {}
    for label, run in found.items():
        groups.setdefault(label.rpartition(", seed ")[0] or label, []).append(run)
    for (label, runs), marker in zip(groups.items(), itertools.cycle("os^Dv*PX")):
        sampled = [run for run in runs if "decided" in run.facts]
        radius = sampled[0].facts["decided"]["radius"] if sampled else 0.5
        flops = [results.flops_to_decide(run) if run in sampled else run.cost.encoder + run.cost.head for run in runs]
        accuracy = [run.table.certified_accuracy(radius) for run in runs]
        ends = np.array([[np.mean(accuracy) - min(accuracy)], [max(accuracy) - np.mean(accuracy)]])
        name = f"{label} ({len(runs)} seeds)" if len(runs) > 1 else label
        axes.errorbar(np.mean(flops) / 1e6, np.mean(accuracy), yerr=ends, marker=marker, capsize=3, ls="", label=name)
    (left, right), top = axes.get_xlim(), axes.get_ylim()[1]
    axes.set(xscale="log", xlabel="MFLOP per image to decide it (encoder and all samples)")
    axes.set(xlim=(left / 10, right * 10), ylim=(0, 1.2 * top), ylabel=f"certified accuracy at r = {radius:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


FIGURES = {"pareto": pareto, "deciding": deciding}


def write(name):
    """Rewrites the table and the figure of a study, or the tables of the page `ACCELERATOR`."""
    if name == ACCELERATOR:
        _replace(name, accelerator.markdown(folder(name)))
    elif found := kept_runs(name):
        _replace(name, section(name, found))
        figure = folder(name) / f"{name}.png"
        if STUDIES[name].figure in FIGURES:
            FIGURES[STUDIES[name].figure](found, figure)
        else:
            runs = [Run(label, run.table) for label, run in found.items()]
            write_atomic(figure, curve.render(runs, ["png"])[0][0])


def _replace(name, content):
    """Replaces what stands between the markers of a page."""
    (first, last), text = markers(name), page(name).read_text(encoding="utf-8")
    if first not in text or last not in text:
        raise UserError(f"{page(name)} has no markers of {name}: put {first} and {last} where its table shall stand")
    between = re.compile(re.escape(first) + ".*?" + re.escape(last), re.DOTALL)
    write_atomic(page(name), between.sub(lambda _: f"{first}\n{content}\n{last}", text))
