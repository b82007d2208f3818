"""Compare certified classifiers: a table in Markdown and a curve as PNG and SVG.

  python -m lsrs_jax.report runs/digits runs/digits_isrs --out=report
  python -m lsrs_jax.report LSRS=runs/digits Cohen=logs/sigma_0.25.tsv --out=report --radii=0,0.25,0.5

Each RUN is a workdir, a folder with certificates.tsv, or any table in the field's format (idx label predict radius
correct time), published logs included; LABEL=RUN names its row and curve. Writes report.md, curve.png and curve.svg.
"""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np

from lsrs_jax import command
from lsrs_jax.errors import UserError
from lsrs_jax.files import write_atomic
from lsrs_jax.progress import duration
from lsrs_jax.smoothing.table import Table, read_table


@dataclasses.dataclass(frozen=True)
class Run:
    label: str
    table: Table
    radii: tuple[float, ...] | None = None  # that a staged certification decided; its radii say no more than that


def load_runs(arguments):
    """The runs named by ``[LABEL=]PATH`` arguments; a workdir with several certifications gives several runs."""
    runs = []
    for argument in arguments:
        label, path = _split(argument)
        found = _tables(path)
        for table in found:
            suffix = f"/{table.parent.name}" if len(found) > 1 else ""
            name = label or re.sub(r"[|$\\`\n]", "_", path.resolve().name.removesuffix(".tsv"))
            runs.append(Run(name + suffix, read_table(table), _decided(table)))
    labels = [run.label for run in runs]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"two runs are called {label!r}; name them: NAME=PATH")
    return runs


def _decided(table):
    try:
        derivation = json.loads((table.parent / "certificates.json").read_text())["derivation"]
        return tuple(derivation["radii"]) if derivation.get("radii") else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # a table of somebody else's


def _split(argument):
    label, equals, path = argument.partition("=")
    if equals and not Path(argument).exists():
        if not label.isprintable() or not label or set(label) & set("|$\\`"):
            raise UserError(f"bad name {label!r} for a run: plain text without | $ \\ and backticks, please")
        return label, Path(path)
    return None, Path(argument)


def _tables(path):
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no run at {path}: give a workdir, or a file of certificates")
    if (path / "certificates.tsv").exists():
        return [path / "certificates.tsv"]
    found = sorted(path.glob("certify/*/certificates.tsv"))
    if not found:
        raise UserError(f"no certificates in {path}: run python -m lsrs_jax.certify --workdir={path}")
    return found


def radius_grid(runs):
    """0, .25, … up to the largest certified radius; a finer or wider grid where that would not give 4 to 13 columns."""
    largest = max(float(run.table.radius.max()) for run in runs)
    if 0.75 <= largest <= 3:
        step = 0.25
    else:
        magnitude = 10.0 ** math.floor(math.log10(max(largest, 1e-6) / 4))
        step = next(step * magnitude for step in (1, 2, 5, 10) if largest / (step * magnitude) <= 10)
    return [float(f"{step * i:.6g}") for i in range(int(largest / step) + 1)]


def markdown(runs, radii):
    """The table: certified accuracy per radius, ACR, abstention, cost."""
    header = [
        "run",
        "images",
        *(f"r={radius:g}" for radius in radii),
        "ACR",
        "abstain",
        "votes/image",
        "time/image",
    ]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for run in runs:
        table = run.table
        cells = [run.label, f"{len(table):,}"]
        cells += [f"{table.certified_accuracy(radius):.3f}" for radius in radii]
        cells += [f"{table.average_certified_radius:.3f}", f"{table.abstention:.3f}"]
        cells += [
            "-" if table.votes is None else f"{table.votes.mean():,.0f}",
            duration(table.seconds.mean()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def notes(runs):
    """What a reader must know before comparing rows."""
    found = [f"{run.label}: its last line was cut off and is left out." for run in runs if run.table.truncated]
    found += [
        f"{run.label}: staged to decide the radii {', '.join(f'{r:g}' for r in run.radii)}; at other radii, and in its "
        "ACR, it is a lower bound."
        for run in runs
        if run.radii
    ]
    first = runs[0]
    for run in runs[1:]:
        if not np.array_equal(np.sort(run.table.idx), np.sort(first.table.idx)):
            found.append(f"{run.label} and {first.label} are certified on different images.")
            continue
        order, other = np.argsort(run.table.idx), np.argsort(first.table.idx)
        if not np.array_equal(run.table.label[order], first.table.label[other]):
            found.append(f"{run.label} and {first.label} have different labels: they come from different data.")
    return found


def draw(runs, paths):
    """Writes the curves to every path (png, svg, …); returns False where Matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lsrs_jax"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    largest = max(float(run.table.radius.max()) for run in runs)
    for run in runs:
        radius = np.sort(np.where(run.table.correct, run.table.radius, -1.0))
        # Certified accuracy is a step function that falls just after each radius.
        steps = np.concatenate([[0.0], radius[radius >= 0], [max(largest * 1.02, 1e-3)]])
        share = [run.table.certified_accuracy(0), *(run.table.certified_accuracy(r) for r in steps[1:])]
        axes.step(steps, share, where="pre", label=f"{run.label} (ACR {run.table.average_certified_radius:.3f})")
    axes.set(xlabel="ℓ2 radius (pixels in [0, 1])", ylabel="certified accuracy", ylim=(0, 1), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return True


def _radii(text):
    try:
        radii = sorted({float(part) for part in text.split(",")})
    except ValueError:
        radii = [-1.0]
    if radii[0] < 0 or not np.isfinite(radii).all():
        raise UserError(f"--radii takes numbers >= 0 with commas between, got {text!r}")
    return radii


def run(arguments):
    """The command; see the module's docstring."""
    parser = command.parser("report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN")
    parser.add_argument("--out", required=True, type=command.folder, help="folder for report.md and the curve")
    parser.add_argument("--radii", help="radii of the table, e.g. 0,0.25,0.5")
    options = parser.parse_args(arguments)
    runs = load_runs(options.runs)
    table = markdown(runs, _radii(options.radii) if options.radii else radius_grid(runs))
    options.out.mkdir(parents=True, exist_ok=True)
    drawn = draw(runs, [options.out / name for name in ("curve.png", "curve.svg")])
    below = [f"- {note}" for note in notes(runs)]
    parts = ["# Certified accuracy", table, *(["\n".join(below)] if below else [])]
    parts += ["![certified accuracy over the radius](curve.svg)"] if drawn else []
    parts.append(
        "Certified accuracy at r: share of images classified correctly with a certified ℓ2 radius of at least r, in "
        "units of pixels in [0, 1]; abstentions count as wrong. ACR: average certified radius, wrong counted as 0."
    )
    write_atomic(options.out / "report.md", "\n\n".join(parts) + "\n")
    print("\n".join([table, *below]))
    print(f"table: {options.out / 'report.md'}")
    print(
        f"curve: {options.out / 'curve.png'}"
        if drawn
        else "no curve: Matplotlib is not installed (pip install matplotlib)"
    )


if __name__ == "__main__":
    command.main(run)
