"""Makes the tables and figures on the pages of docs/results from the files that are committed there."""

import re
from pathlib import Path

import numpy as np

from lsrs_jax.reporting import curve, style
from lsrs_jax.reporting.kinds import kind_of
from lsrs_jax.reporting.runs import Run, incomparable
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import write_atomic
from studies import accelerator, page_figures, paired, results
from studies.runs import ENCODERS, STUDIES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
LEARNED = ENCODERS["learned"]
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
    parts = [f"![{name}]({home}/{name}.png)"]
    parts += [gains(found)] if STUDIES[name].figure == "grid" else []
    parts += [accelerator.folded(table, most=0)]
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


def pareto(found):
    """The average certified radius over the FLOPs of a sample."""
    figure = style.new_figure(2.3)
    axes, groups, highest = figure.subplots(), {}, {}
    for run in found.values():
        if not run.smoothed:
            radius = run.table.average_certified_radius
            axes.axhline(
                radius, color="gray", linestyle=":", label=f"margin of another network, no samples: {radius:.3f}"
            )
            continue
        model = run.facts["config"]["model"]
        latent = "LSRS, Haar strides" if model["encoder"] == "blocks_haar" else "LSRS"
        group = latent if model["noise"] == "latent" else "ISRS of the same network"
        x, y = run.cost.head / 1e6, run.table.average_certified_radius
        groups.setdefault(group if model["split"] else "ISRS of a free network", []).append((x, y))
        if model["noise"] == "latent" and model["split"]:
            highest[model["split"]] = x, max(y, highest.get(model["split"], (x, y))[1])
    for number, group in enumerate(sorted(groups, reverse=True)):
        line = {"linestyle": "-" if "LSRS" in group else "none", "color": style.PALETTE[number]}
        axes.plot(*zip(*sorted(groups[group]), strict=True), marker=style.MARKERS[number], label=group, **line)
    for split, point in highest.items():
        axes.annotate(f"{split}", point, textcoords="offset points", xytext=(0, 5), fontsize=7, ha="center")
    axes.set(xlabel="MFLOP per sample", ylabel="average certified radius", xscale="log")
    axes.margins(y=0.12)
    style.legend_below(figure, *axes.get_legend_handles_labels(), "numbers: blocks in front of the noise, of 6")
    return figure


def deciding(found):
    """Certified accuracy at one radius over the FLOPs that decide it; a point is a seed."""
    figure, groups = style.new_figure(2.0), {}
    axes = figure.subplots()
    for label, run in found.items():
        groups.setdefault(label.rpartition(", seed ")[0], []).append(run)
    radius = _decided(found)
    for (label, runs), color, marker in zip(groups.items(), style.PALETTE, style.MARKERS, strict=False):
        flops = [results.flops_to_decide(run) / 1e6 for run in runs]
        certified = np.array([run.table.correct & (run.table.radius >= radius) for run in runs])
        error = certified.mean(axis=0).std(ddof=1) / np.sqrt(certified.shape[1])
        mean = {"color": color, "marker": marker, "markersize": 8, "capsize": 3, "linestyle": "none"}
        axes.errorbar(np.mean(flops), certified.mean(), error, label=label, **mean)
        axes.plot(flops, certified.mean(axis=1), marker, color=color, fillstyle="none")
    axes.set(xlabel="MFLOP to decide an image (encoder and samples)")
    axes.set(ylabel=f"certified accuracy\nat r = {radius:g}")
    axes.margins(0.15)
    note = "small: seeds; large: their mean, with its standard error over images"
    style.legend_below(figure, *axes.get_legend_handles_labels(), note)
    return figure


def _pairs(found):
    """(encoder, head) → seed → run, of the runs of a grid."""
    groups = {}
    for label, run in found.items():
        kind, _, seed = label.rpartition(", seed ")
        groups.setdefault(tuple(kind.split("; ")), {})[seed] = run
    return groups


def _decided(found):
    """The radius that the runs of a study decide."""
    return next(iter(found.values())).facts["decided"]["radius"]


def gains(found):
    """A table of certified accuracies at one radius: a row per head, a column per encoder, and what learning adds."""
    groups, radius = _pairs(found), _decided(found)
    heads = list(dict.fromkeys(head for encoder, head in groups if encoder == LEARNED))
    fixed = list(dict.fromkeys(encoder for encoder, head in groups if encoder != LEARNED and head in heads))
    rows = []
    for head in heads:
        runs = {encoder: groups[encoder, head] for encoder in (*fixed, LEARNED) if (encoder, head) in groups}
        seeds = [seed for seed in runs[LEARNED] if all(seed in each for each in runs.values())]
        if len(runs) == 1 or not seeds:
            continue
        certified = {
            encoder: np.mean([each[seed].table.correct & (each[seed].table.radius >= radius) for seed in seeds], axis=0)
            for encoder, each in runs.items()
        }
        cells = [f"{certified[encoder].mean():.3f}" if encoder in certified else "-" for encoder in (*fixed, LEARNED)]
        own = certified.pop(LEARNED)
        best = max(certified, key=lambda encoder: certified[encoder].mean())
        gain = paired.difference(certified[best], own)
        rows.append([head, ", ".join(seeds), *cells, f"{gain.mean:+.3f} ({gain.error:.3f}), {best}"])
    gain = "learned minus the best other (standard error over images)"
    return accelerator.table([f"head, r={radius:g}", "seeds", *fixed, LEARNED, gain], rows)


def grid(found):
    """Certified accuracy at one radius over the FLOPs that decide it: a colour per encoder, a marker per head."""
    figure, groups = style.new_figure(2.4), _pairs(found)
    axes, radius = figure.subplots(), _decided(found)
    encoders = list(dict.fromkeys(encoder for encoder, _ in groups))
    heads = list(dict.fromkeys(head for _, head in groups))
    colors, markers = dict(zip(encoders, style.PALETTE, strict=False)), dict(zip(heads, style.MARKERS, strict=False))
    for (encoder, head), runs in groups.items():
        look = {"marker": markers[head], "color": colors[encoder], "linestyle": "none"}
        each = [(results.flops_to_decide(run) / 1e6, run.table.certified_accuracy(radius)) for run in runs.values()]
        axes.plot(*zip(*each, strict=True), **look, fillstyle="none", markersize=3)
        axes.plot(*np.mean(each, axis=0), **look, markersize=6)
    for encoder, color in colors.items():
        axes.plot([], [], color=color, linewidth=4, label=encoder)
    for _ in heads[len(encoders) :]:
        axes.plot([], [], " ", label=" ")  # so that the heads have a column of their own
    for head, marker in markers.items():
        axes.plot([], [], marker, color="black", label=head)
    axes.set(xlabel="MFLOP to decide an image (encoder and samples)", xscale="log")
    axes.set(ylabel=f"certified accuracy\nat r = {radius:g}")
    axes.margins(0.1)
    note = "color: encoder; marker: head; small: seeds; linear heads: margin, without samples"
    style.legend_below(figure, *axes.get_legend_handles_labels(), note)
    return figure


def curves(name, found):
    """Certified accuracy over the radius, of the runs that the page is about."""
    chosen = STUDIES[name].drawn or tuple(found)
    runs = [
        Run(label, run.table, kind=kind_of(run.certificates, run.facts["config"]))
        for label, run in found.items()
        if label in chosen or label.rpartition(", seed ")[0] in chosen
    ]
    return curve.figure(runs, envelope=STUDIES[name].figure == "envelope")


def figure(name, found):
    """The figure of a study, as an object of Matplotlib."""
    drawn = {"pareto": pareto, "deciding": deciding, "grid": grid}.get(STUDIES[name].figure)
    return drawn(found) if drawn else curves(name, found)


def write(name):
    """Rewrites table and figure of a study, the tables of `ACCELERATOR`, or the figure of a page's own tables."""
    if name == ACCELERATOR:
        _replace(name, accelerator.markdown(folder(name)))
    elif name in page_figures.FIGURES:
        text = page(name).read_text(encoding="utf-8")
        (picture,), _ = style.pictures(lambda: page_figures.FIGURES[name](text), ["png"])
        write_atomic(RESULTS / f"{name}.png", picture)
    elif found := kept_runs(name):
        _replace(name, section(name, found))
        (picture,), _ = style.pictures(lambda: figure(name, found), ["png"])
        write_atomic(folder(name) / f"{name}.png", picture)


def _replace(name, content):
    """Replaces what stands between the markers of a page."""
    (first, last), text = markers(name), page(name).read_text(encoding="utf-8")
    if first not in text or last not in text:
        raise UserError(f"{page(name)} has no markers of {name}: put {first} and {last} where its table shall stand")
    between = re.compile(re.escape(first) + ".*?" + re.escape(last), re.DOTALL)
    write_atomic(page(name), between.sub(lambda _: f"{first}\n{content}\n{last}", text))
