"""How the figures look: sized for a column of a paper, in colours that colour-blind readers tell apart."""

import contextlib
import dataclasses
import io
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from lsrs_jax.reporting import kinds
from lsrs_jax.reporting.kinds import Kind

WIDTH = 3.4  # inches: a column of most two-column papers
_RC = {
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "lsrs_jax",
    "pdf.fonttype": 42,  # publishers refuse Type 3
    "text.usetex": False,
}
_DATES = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}  # the same runs give the same bytes
# The colours of Okabe and Ito (2008), and of some of them two more shades.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
_SHADES = {
    kinds.LSRS: ("#0072B2", "#56B4E9", "#003A5C"),
    kinds.ISRS: ("#D55E00", "#E69F00", "#6E3000"),
    kinds.DETERMINISTIC: ("#009E73", "#7FD0B5", "#00523C"),
    kinds.COMPOSED: ("#CC79A7", "#E3B5CF", "#7A3F60"),
    kinds.UNKNOWN: ("#4D4D4D", "#999999", "#000000"),
}
_DASHES: tuple[Any, ...] = ("-", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))  # "--" is for what attacks left
MARKERS = "os^Dv*PX"


@dataclasses.dataclass(frozen=True)
class Style:
    """How one run or group of runs is drawn."""

    color: str
    dash: Any  # a linestyle of Matplotlib
    marker: str
    marked: bool  # whether its curve carries the marker, because another curve has its colour and dash


def styles(drawn: Sequence[Kind]) -> list[Style]:
    """A colour for every method, with shades for its runs, and a dash for every σ.

    If all are of one method, colours tell the runs apart.
    """
    sigmas = sorted({kind.sigma for kind in drawn if kind.sigma is not None})
    shades = _SHADES if len({kind.method for kind in drawn}) > 1 else dict.fromkeys(_SHADES, PALETTE)
    families: dict[str, list[str]] = {kind.method: [] for kind in drawn}
    found: list[Style] = []
    for position, kind in enumerate(drawn):
        own, name, colors = families[kind.method], kind.family or str(position), shades[kind.method]
        if name not in own:
            own.append(name)
        color = colors[own.index(name) % len(colors)]
        dash = "-" if kind.sigma is None else _DASHES[sigmas.index(kind.sigma) % len(_DASHES)]
        marked = any((other.color, other.dash) == (color, dash) for other in found)
        found.append(Style(color, dash, MARKERS[position % len(MARKERS)], marked))
    return found


def look() -> contextlib.AbstractContextManager[None]:
    """A context in which Matplotlib draws as here is said, whatever the user's settings are."""
    from matplotlib import style

    return style.context(["default", _RC])


def pictures(make: Callable[[], Any], formats: Sequence[str]) -> tuple[list[bytes], bool]:
    """The figure that ``make()`` draws as files of these formats, and whether the font has all characters.

    It needs no backend of Matplotlib for windows, so no setting of the user chooses one.
    """
    with look(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        figure, files = make(), []
        for kind in formats:
            content = io.BytesIO()
            figure.savefig(content, dpi=250, format=kind, metadata=_DATES.get(kind))
            files.append(content.getvalue())
    return files, not any("Glyph" in str(warning.message) for warning in warned)


def new_figure(height: float) -> Any:
    """An empty figure, as wide as a column, of this height in inches without its legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)  # it measures texts
    return figure


def legend_below(figure: Any, handles: Sequence[Any], labels: Sequence[str], note: str = "") -> None:
    """Puts a legend under the axes; the figure becomes taller by its height, and long labels take several lines."""
    columns = 2 if all(len(label) <= 22 for label in labels) and len(labels) > 2 else 1
    place = {"loc": "outside lower center", "frameon": False, "alignment": "left", "handlelength": 3}

    def legend(characters: int) -> Any:
        wrapped = ["\n".join(textwrap.wrap(label, characters)) for label in labels]
        title = "\n".join(textwrap.wrap(note, characters)) or None
        return figure.legend(handles, wrapped, ncols=columns, title=title, title_fontsize=7, **place)

    own, renderer = legend(characters := 54), figure.canvas.get_renderer()
    while own.get_window_extent(renderer).width > figure.bbox.width and characters > 10:
        own.remove()
        columns, characters = 1, characters - 4
        own = legend(characters)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + own.get_window_extent(renderer).height / figure.dpi - 0.1)
