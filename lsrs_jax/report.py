"""Compare certified classifiers: tables in Markdown, LaTeX and CSV, and a figure as PNG, SVG and PDF.

  python -m lsrs_jax.report runs/digits --out=report
  python -m lsrs_jax.report runs/digits runs/digits_isrs --out=report
  python -m lsrs_jax.report LSRS=runs/digits Cohen=logs/sigma_0.25.tsv --out=report --radii=0,0.25,0.5

Each RUN is a workdir, a folder with certificates.tsv, or any table in the field's format (idx label predict radius
correct time), also a published log; LABEL=RUN names its row and curve. Logs of other programs may deviate from the
format where their meaning is clear; a note says how. If certificates have been audited, a dashed curve shows the
accuracy that the attacks left. Of more than eight runs, the figure shows means and ranges of those that differ only in
the seed. --cost adds a panel with certified accuracy over the time per certificate; --envelope draws, for each method,
the best of its runs at every radius (no one classifier has it).

The command writes report.md, table.tex, table.csv and curve.png, .svg and .pdf, and with --board=DATA:TITLE
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
from lsrs_jax.reporting.groups import grouped
from lsrs_jax.reporting.runs import Run, incomparable, load_runs, radius_grid, unit
from lsrs_jax.reporting.table import comma_separated, latex, markdown, middle_radius
from lsrs_jax.runtime import files
from lsrs_jax.runtime.errors import first_line

_FORMATS = ("png", "svg", "pdf")
_LEGEND = (
    "Certified accuracy at r: share of images classified correctly with a certified ℓ2 radius of at least r "
    "({unit}); abstentions count as wrong. Worst class: the lowest certified accuracy of a class. Expected invalid: "
    "alpha times the number of images; on average, at most so many certificates do not hold. ACR: average certified "
    "radius; wrong images count as 0. Cap: the radius that n agreeing samples certify, and so the largest "
    "ACR. ACR grows with n and with the cap, and a few very large radii raise it; compare certified accuracies first."
)


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


def _draw(runs: Sequence[Run], paths: Sequence[Path], envelope: bool, cost_at: float | None) -> str:
    """Draws the figure to these paths; returns what kept Matplotlib from it, or ""."""
    try:
        pictures, readable = curve.render(runs, [path.suffix[1:] for path in paths], envelope, cost_at)
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


def _about_the_figure(runs: Sequence[Run], envelope: bool, cost: bool) -> list[str]:
    """Notes on what the figure shows."""
    _, summary = grouped(runs, envelope)
    found = [f"figure: {summary}."] if summary else []
    untimed = [f"'{run.label}'" for run in runs if not run.table.seconds.mean() > 0]
    if cost:
        words = "compare times only if they were measured on one machine, without other work on it"
        left_out = f"; no times, and so no points: {', '.join(untimed)}" if untimed else ""
        found.append(f"time per certificate: means of the column time, without compilation; {words}{left_out}.")
    return found


def run(arguments: list[str]) -> None:
    """The command; see the module's docstring."""
    parser = cli.parser(
        "report", __doc__, (), "[LABEL=]RUN ... --out=DIR [--radii=R,R,...] [--envelope] [--cost] [--board=DATA:TITLE]"
    )
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN")
    parser.add_argument("--out", required=True, type=cli.folder, help="folder for report.md and the curve")
    radii = cli.checked(cli.numbers, lambda found: all(0 <= radius < math.inf for radius in found), "numbers >= 0")
    parser.add_argument("--radii", type=radii, help="radii of the table, e.g. 0,0.25,0.5")
    parser.add_argument("--images", action="store_true", help="put the images of any data set into report.html")
    parser.add_argument("--board", type=_board, metavar="DATA:TITLE", help="write board.yml, for the leaderboard")
    parser.add_argument("--envelope", action="store_true", help="draw the best run of each method at every radius")
    parser.add_argument("--cost", action="store_true", help="add a panel: certified accuracy over time per certificate")
    options = parser.parse_args(arguments)
    runs = load_runs(options.runs)
    grid = options.radii or radius_grid(runs)
    about = _about_the_figure(runs, options.envelope, options.cost)
    table, below = markdown(runs, grid), [f"- {note}" for note in (*notes(runs), *about)]
    before, paths = ["# Certified accuracy", table, "\n".join(below)], [options.out / f"curve.{k}" for k in _FORMATS]
    options.out.mkdir(parents=True, exist_ok=True)
    if options.board:
        files.write_atomic(options.out / "board.yml", board(runs, grid, *options.board))
    # The table is written and shown first, because drawing the curve may fail or be interrupted.
    legend = _LEGEND.format(unit=unit(runs))
    _write(options.out, [*before, legend])
    print("\n".join([table, *below, f"table: {options.out / 'report.md'}"]), flush=True)
    files.write_atomic(options.out / "table.tex", latex(runs, grid))
    files.write_atomic(options.out / "table.csv", comma_separated(runs, grid))
    if failed := _draw(runs, paths, options.envelope, middle_radius(grid) if options.cost else None):
        old = f"; {paths[0]} is of an earlier report" if paths[0].exists() else ""
        print(f"no curve: {failed}{old}")
    else:
        _write(options.out, [*before, "![certified accuracy over the radius](curve.svg)", legend])
        print(f"curve: {paths[0]}")
    _write_page(options.out / "report.html", runs, grid, table, options.images)
