"""Figures of pages whose numbers are only in their own tables, drawn from these tables."""

import numpy as np
from matplotlib import ticker

from lsrs_jax.reporting import style
from lsrs_jax.runtime.errors import UserError

LOOPS = {  # how a row of the table of loops begins -> its name in the figure
    "PyTorch": "ISRS in PyTorch",
    "ISRS here, noise on the image": "ISRS",
    "ISRS here, the head alone": "ISRS of the head",
    "LSRS here": "LSRS",
}
SCHEDULES = {"fixed": "fixed", "staged: every 0.25 up to 4σ": "staged"}  # column "votes" -> name
IMAGES = 1000  # behind every accuracy of the table of families


def rows(text, *header):
    """The rows of the first table on a page whose header begins with these cells, each a dict by column."""
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines()]
    first = next((number for number, cells in enumerate(lines) if tuple(cells[: len(header)]) == header), None)
    if first is None:
        raise UserError(f"the page has no table with the columns {', '.join(header)}")
    end = next(number for number in range(first, len(lines)) if len(lines[number]) != len(lines[first]))
    return [dict(zip(lines[first], cells, strict=True)) for cells in lines[first + 2 : end]]


def number(text):
    return float(text.replace(",", ""))


def _bars(axes, names, values, colors):
    """Horizontal bars from the top, each with its value."""
    places = -np.arange(len(names))
    axes.barh(places, values, color=colors, height=0.7)
    axes.set(xlim=(0, 1.25 * max(values)), yticks=places, yticklabels=names)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(visible=False)
    for place, value in zip(places, values, strict=True):
        axes.annotate(f" {value:,.0f}", (value, place), va="center", fontsize=7)


def certification(text):
    """Samples per second of the loops, and samples per image of two schedules."""
    figure = style.new_figure(2.8)
    upper, lower = figure.subplots(2, height_ratios=(4, 6))
    loops = {name: row for name in LOOPS for row in rows(text, "loop", "votes/s") if row["loop"].startswith(name)}
    lsrs, isrs, light = (style.PALETTE[place] for place in (0, 1, 5))
    colors = [lsrs if name.startswith("LSRS") else isrs for name in loops]
    _bars(upper, [LOOPS[name] for name in loops], [number(row["votes/s"]) for row in loops.values()], colors)
    upper.set(xlabel="samples per second")
    chosen = [row for row in rows(text, "run", "images", "votes") if row["votes"] in SCHEDULES]
    names = [f"{row['run']}, {SCHEDULES[row['votes']]}" for row in chosen]
    colors = [light if row["votes"] == "fixed" else lsrs for row in chosen]
    _bars(lower, names, [number(row["per image"]) for row in chosen], colors)
    lower.set(xlabel="samples per image")
    return figure


def families(text):
    """Certified accuracy over the radius, by family of convolutions and initialisation, with its standard error."""
    figure, colors = style.new_figure(2.3), {}
    axes = figure.subplots()
    found = rows(text, "variant", "initialisation")
    columns = [name for name in found[0] if name.endswith("/255")]
    radii = np.array([0, *(number(name.removesuffix("/255")) for name in columns)])
    for place, row in enumerate(found):
        family, _, random = row["variant"].strip("`").partition("_")
        color = colors.setdefault(family, style.PALETTE[len(colors)])
        accuracy = np.array([number(row[name]) for name in ("clean", *columns)])
        error = np.sqrt(accuracy * (1 - accuracy) / IMAGES)
        label = f"{family}, {'random' if random else 'identity'}"
        line = {"color": color, "linestyle": ":" if random else "-", "marker": style.MARKERS[place], "capsize": 2}
        axes.errorbar(radii + 1.2 * (place - len(found) / 2), accuracy, error, label=label, **line)
    axes.set(xlabel="radius in ℓ2, pixels in [0, 1]", ylabel="certified accuracy", ylim=(0, None))
    axes.set(xlim=(-8, max(radii) + 12), xticks=radii, xticklabels=["0", *columns])
    style.legend_below(figure, *axes.get_legend_handles_labels(), "family, start; bars: standard error over images")
    return figure


FIGURES = {"certify": certification, "orthogonal": families}  # page -> its figure, of its text
