"""Compare certified classifiers: a table in Markdown and a curve as PNG and SVG.

  lsrs report runs/digits --out=report
  lsrs report runs/digits runs/digits_isrs --out=report
  lsrs report LSRS=runs/digits Cohen=logs/sigma_0.25.tsv --out=report --radii=0,0.25,0.5

Each RUN is a workdir, a folder with certificates.tsv, or any table in the field's format (idx label predict radius
correct time), also a published log; LABEL=RUN names its row and curve. Logs of other programs may deviate from the
format where their meaning is clear; a note says how. If certificates have been audited, a dashed curve shows the
accuracy that the attacks left. The command writes report.md, curve.png and curve.svg, and with --board=DATA:TITLE
(CIFAR-10:My paper) board.yml, entries for the leaderboard of certified robustness.

It also writes report.html, one file that works without a network: a sortable table, curves, cost against accuracy, and
the certified images of workdirs. Images of the embedded digits are put into it by default, those of other data sets
with --images, because whoever gets the page gets them.
"""

if __name__ == "__main__":
    from lsrs_jax.cli import main

    main("report")

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lsrs_jax import cli
from lsrs_jax.reporting import curve
from lsrs_jax.reporting.board import board
from lsrs_jax.reporting.runs import Run, incomparable, load_runs, radius_grid, unit
from lsrs_jax.runtime import files
from lsrs_jax.runtime.errors import first_line
from lsrs_jax.runtime.progress import duration

_FORMATS = ("png", "svg")
_LEGEND = (
    "Certified accuracy at r: share of images classified correctly with a certified ℓ2 radius of at least r "
    "({unit}); abstentions count as wrong. Worst class: the lowest certified accuracy of a class. Expected invalid: "
    "alpha times the number of images; on average, at most so many certificates do not hold. ACR: average certified "
    "radius; wrong images count as 0. Cap: the radius that n agreeing samples certify, and so the largest "
    "ACR. ACR grows with n and with the cap, and a few very large radii raise it; compare certified accuracies first."
)


def markdown(runs: Sequence[Run], radii: Sequence[float]) -> str:
    """The table: certified accuracy per radius, of the worst class too, abstention, ACR with its cap and n, cost."""
    middle = 0.5 if 0.5 in radii else sorted(radii)[len(radii) // 2]
    header = ["run", "images", *(f"r={radius:g}" for radius in radii), f"worst class at r={middle:g}", "abstain"]
    header += ["expected invalid", "ACR", "cap", "n", "samples/image", "time/image"]
    rows, caps = [header], [run.sampling.cap for run in runs if run.sampling]
    for run in runs:
        table, sampling = run.table, run.sampling
        accuracy, worst = table.worst_class(middle)
        cells = [f"{share:.3f}" for share in map(table.certified_accuracy, radii)]
        cells += [f"{accuracy:.3f} (class {worst})", f"{table.abstention:.3f}"]
        acr = f"{table.average_certified_radius:.3f}"
        if run.deterministic:
            capped = f" ({table.capped_radius(min(caps)):.3f} if capped at {min(caps):.3f})" if caps else ""
            cells += ["0", f"{acr}{capped}", "none", "0"]
        elif sampling:
            cells += [f"{sampling.alpha * len(table):.2g}", acr, f"{sampling.cap:.3f}", f"{sampling.n:,}"]
        else:
            cells += ["?", acr, "?", "?"]
        samples = "-" if table.samples is None else f"{table.samples.mean():,.0f}"
        seconds = float(table.seconds.mean())
        time = "-" if math.isnan(seconds) else duration(seconds)
        name = f"{run.label} ({run.mark})" if run.mark else run.label
        rows.append([name, run.images, *cells, samples, time])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def notes(runs: Sequence[Run]) -> list[str]:
    """Notes for the table: warnings about each run, and runs of other images, labels or numbers of samples."""
    found, first = [f"{run.label}: {note}" for run in runs for note in run.notes], runs[0]
    for run in runs[1:]:
        order, other = np.argsort(run.table.idx), np.argsort(first.table.idx)
        if not np.array_equal(run.table.idx[order], first.table.idx[other]):
            found.append(f"{run.label} and {first.label} are certified on different images.")
        elif not np.array_equal(run.table.label[order], first.table.label[other]):
            found.append(f"{run.label} and {first.label} have different labels: they come from different data.")
    return [*found, *filter(None, [incomparable(runs)])]


def _write(folder: Path, parts: Sequence[str]) -> None:
    files.write_atomic(folder / "report.md", "\n\n".join(filter(None, parts)) + "\n")


def _board(text: str) -> tuple[str, str]:
    """Argument type: the name of the data and the title of the work."""
    data, colon, title = text.partition(":")
    if not (colon and data.strip() and title.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} must be DATA:TITLE, as in 'CIFAR-10:My paper'")
    return data.strip(), title.strip()


def _draw(runs: Sequence[Run], paths: Sequence[Path]) -> str:
    """Draws the curves to these paths; returns what kept Matplotlib from it, or ""."""
    try:
        pictures, readable = curve.render(runs, [path.suffix[1:] for path in paths])
    except Exception as error:  # whatever Matplotlib raises about its installation and the user's settings
        if isinstance(error, ModuleNotFoundError) and error.name == "matplotlib":
            return "Matplotlib is not installed (pip install matplotlib)"
        return f"Matplotlib failed ({type(error).__name__}: {first_line(error)})"
    for path, content in zip(paths, pictures, strict=True):
        files.write_atomic(path, content)
    if not readable:
        print("note: the font of the curve lacks some characters of the names")
    return ""


def _write_page(path: Path, runs: Sequence[Run], radii: Sequence[float], table: str, embed: bool) -> None:
    """Writes the page, or prints why there is none."""
    if embed:
        print("reading the images for the page ...", flush=True)
    try:
        from lsrs_jax.reporting import page

        content, lacking = page.build(runs, radii, table, notes(runs), _LEGEND.format(unit=unit(runs)), embed)
    except Exception as error:  # whatever it is, the table and the pictures are there
        old = f"; {path} is of an earlier report" if path.exists() else ""
        print(f"no page: {type(error).__name__}: {first_line(error)}{old}")
        return
    files.write_atomic(path, content)
    print("\n".join([*(f"note: {note}" for note in lacking), f"page: {path}"]))


def run(arguments: list[str]) -> None:
    """The command; see the module's docstring."""
    parser = cli.parser("report", __doc__, (), "[LABEL=]RUN ... --out=DIR [--radii=R,R,...] [--board=DATA:TITLE]")
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN")
    parser.add_argument("--out", required=True, type=cli.folder, help="folder for report.md and the curve")
    radii = cli.checked(cli.numbers, lambda found: all(0 <= radius < math.inf for radius in found), "numbers >= 0")
    parser.add_argument("--radii", type=radii, help="radii of the table, e.g. 0,0.25,0.5")
    parser.add_argument("--images", action="store_true", help="put the images of any data set into report.html")
    parser.add_argument("--board", type=_board, metavar="DATA:TITLE", help="write board.yml, for the leaderboard")
    options = parser.parse_args(arguments)
    runs = load_runs(options.runs)
    grid = options.radii or radius_grid(runs)
    table, below = markdown(runs, grid), [f"- {note}" for note in notes(runs)]
    before, paths = ["# Certified accuracy", table, "\n".join(below)], [options.out / f"curve.{k}" for k in _FORMATS]
    options.out.mkdir(parents=True, exist_ok=True)
    if options.board:
        files.write_atomic(options.out / "board.yml", board(runs, grid, *options.board))
    # The table is written and shown first, because drawing the curve may fail or be interrupted.
    legend = _LEGEND.format(unit=unit(runs))
    _write(options.out, [*before, legend])
    print("\n".join([table, *below, f"table: {options.out / 'report.md'}"]), flush=True)
    if failed := _draw(runs, paths):
        old = f"; {paths[0]} is of an earlier report" if paths[0].exists() else ""
        print(f"no curve: {failed}{old}")
    else:
        _write(options.out, [*before, "![certified accuracy over the radius](curve.svg)", legend])
        print(f"curve: {paths[0]}")
    _write_page(options.out / "report.html", runs, grid, table, options.images)
