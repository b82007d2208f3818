"""Draws certified accuracy over the radius, and over the time per certificate, with Matplotlib."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lsrs_jax.reporting import style
from lsrs_jax.reporting.groups import Group, grouped
from lsrs_jax.reporting.runs import Run, unit
from lsrs_jax.reporting.style import Style

_MOST_ATTACKED = 2.0  # the curves under attack end at so many times the largest certified radius


def render(
    runs: Sequence[Run], formats: Sequence[str], envelope: bool = False, cost_at: float | None = None
) -> tuple[list[bytes], bool]:
    """The figure of some runs as files of these formats (png, svg, pdf), and whether the font has all characters.

    `envelope` draws for every method the best of its runs at every radius. `cost_at` adds a second panel: certified
    accuracy at this radius over the time per certificate.
    """
    return style.pictures(lambda: figure(runs, envelope, cost_at), formats)


def figure(runs: Sequence[Run], envelope: bool = False, cost_at: float | None = None) -> Any:
    """The figure of `render`, as an object of Matplotlib."""
    groups, note = grouped(runs, envelope)
    chosen = style.styles([group.kind for group in groups])
    figure = style.new_figure(2.0)
    panels = np.atleast_1d(figure.subplots(1, 1 if cost_at is None else 2))
    handles = _curves(panels[0], groups, chosen, unit(runs), cost_at is not None)
    if cost_at is not None:
        _costs(panels[1], groups, chosen, cost_at)
    alone = cost_at is None and not note and not any(group.runs[0].audit for group in groups)
    if not (alone and _labelled_at_their_ends(figure, panels[0], groups, chosen)):
        style.legend_below(figure, [handle for handle, _ in handles], [label for _, label in handles], note)
    return figure


def _curves(axes: Any, groups: Sequence[Group], chosen: Sequence[Style], unit: str, marked: bool) -> list[Any]:
    """Draws the curves; returns handles and labels of a legend."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    largest = max(float(group.steps[-1]) for group in groups)
    limit, handles, highest = _MOST_ATTACKED * max(largest, 1e-3), [], 0.0
    for group, own in zip(groups, chosen, strict=True):
        # Certified accuracy is a step function that falls just after each radius, and to 0 after the last one.
        radii = np.append(group.steps, np.nextafter(group.steps[-1], np.inf))
        mean, low, high = group.accuracy(radii)
        marker = {"marker": own.marker, "markevery": (0.1, 0.25)} if own.marked else {}
        axes.step(radii, mean, where="pre", color=own.color, linestyle=own.dash, **marker)
        if len(group.runs) > 1 and not group.envelope:
            axes.fill_between(radii, low, high, step="pre", color=own.color, alpha=0.2, linewidth=0)
        symbol = own.marker if own.marked or marked else ""
        handle = Line2D([], [], color=own.color, linestyle=own.dash, marker=symbol)
        handles.append((handle, group.legend))
        highest = max(highest, float(high[0]))
        for run in group.runs:
            if run.audit and len(group.runs) == 1:
                distance = np.unique(run.audit.distance[np.isfinite(run.audit.distance)])
                steps = np.concatenate([[0.0], distance[distance < limit], [limit]])
                share = [run.audit.robust_accuracy(radius) for radius in steps]
                some = "" if len(run.audit.idx) == len(run.table) else f" ({len(run.audit.idx)} images)"
                (line,) = axes.step(steps, share, where="post", color=own.color, linestyle="--", linewidth=0.8)
                handles.append((line, f"{run.label}, under attack{some}"))
                highest = max(highest, share[0])
    axes.set(xlabel=f"ℓ2 radius ({unit})", ylabel="certified accuracy", ylim=(0, _top(highest)))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if not 1e-3 < largest < 1e4:  # long numbers
        axes.xaxis.set_major_locator(MaxNLocator(2))
    return handles


def _top(highest: float) -> float:
    """The upper end of an axis of accuracies."""
    return min(1.0, np.ceil(10 * highest + 0.1) / 10)


def _costs(axes: Any, groups: Sequence[Group], chosen: Sequence[Style], radius: float) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    highest = 0.0
    for group, own in zip(groups, chosen, strict=True):
        (mean,), (low,), (high,) = group.accuracy(np.array([radius]))
        seconds, highest = group.seconds, max(highest, high)
        if seconds > 0:
            axes.errorbar(seconds, mean, [[mean - low], [high - mean]], color=own.color, marker=own.marker, ls="")
    axes.set(xscale="log", xlabel="time per certificate", ylabel=f"certified accuracy\nat r = {radius:g}")
    axes.set_ylim(0, _top(highest))
    axes.margins(x=0.2)
    axes.xaxis.set_major_locator(LogLocator(numticks=3))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter("s", places=0, sep=" "))


def _labelled_at_their_ends(figure: Any, axes: Any, groups: Sequence[Group], chosen: Sequence[Style]) -> bool:
    """Writes the names of the curves behind their ends, if they fit there; returns whether they do."""
    texts, curves, widest = [], [], 0.3 * figure.bbox.width
    for group, own in zip(groups, chosen, strict=True):
        radii = group.steps
        mean, _, _ = group.accuracy(radii)
        place = {"xy": (radii[-1], mean[-1]), "xytext": (4, 0), "textcoords": "offset points"}
        texts.append(axes.annotate(group.legend, color=own.color, va="center", fontsize=7, **place))
        curves.append((np.repeat(radii, 2), np.append(np.repeat(mean, 2)[1:], 0.0)))
    if all(text.get_window_extent().width < widest for text in texts) and _fit(figure, axes, texts, curves):
        return True
    for text in texts:
        text.remove()
    return False


def _fit(figure: Any, axes: Any, texts: Sequence[Any], curves: Sequence[Any]) -> bool:
    """Whether texts lie beside the axes or in them, apart from each other and from the curves."""
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts]
    points = [axes.transData.transform(np.transpose(curve)) for curve in curves]
    inside = all(box.x1 <= figure.bbox.x1 and box.y0 >= axes.bbox.y0 for box in boxes)
    apart = not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    return inside and apart and not any(_hits(box, line) for box in boxes for line in points)


def _hits(box: Any, points: np.ndarray) -> bool:
    """Whether a curve through these points, of horizontal and vertical pieces, crosses a box."""
    low, high = np.minimum(points[:-1], points[1:]), np.maximum(points[:-1], points[1:])
    return bool(((low < [box.x1, box.y1]) & (high > [box.x0, box.y0])).all(axis=1).any())
