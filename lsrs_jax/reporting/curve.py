"""Draws certified accuracy over the radius, with Matplotlib."""

import io
import warnings
from collections.abc import Sequence

import numpy as np

from lsrs_jax.reporting.runs import Run, unit

_STEPS = 10_000  # of a curve


def render(runs: Sequence[Run], formats: Sequence[str]) -> tuple[list[bytes], bool]:
    """The curves of some runs as files of these formats (png, svg, …), and whether the font has all characters.

    It needs no backend of Matplotlib for windows, so no setting of the user chooses one.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "lsrs_jax"}), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        figure, pictures = Figure(figsize=(6.4, 4.0), layout="constrained"), []
        _draw(runs, figure.subplots())
        for kind in formats:
            content = io.BytesIO()
            figure.savefig(content, dpi=150, format=kind, metadata={"Date": None} if kind == "svg" else None)
            pictures.append(content.getvalue())
    return pictures, not any("Glyph" in str(warning.message) for warning in warned)


def _draw(runs: Sequence[Run], axes) -> None:
    largest = max(float(run.table.radius.max()) for run in runs)
    limit = 2 * max(largest, 1e-3)  # of the curves under attack
    for run in runs:
        radius = np.sort(run.table.radius[run.table.correct])
        # Certified accuracy is a step function that falls just after each radius. Of very many steps some are drawn;
        # between two of them the curve is then as low as at the second one.
        drawn = radius[np.unique(np.linspace(0, len(radius) - 1, _STEPS).astype(int))] if len(radius) else radius
        steps = np.concatenate([[0.0], drawn, [max(largest * 1.02, 1e-3)]])
        share = (len(radius) - np.searchsorted(radius, steps)) / len(run.table)
        images = f"{run.images} images" if run.unfinished else ""
        cap = f" of at most {run.sampling.cap:.3f}" if run.sampling else ""
        facts = [run.mark, images, f"ACR {run.table.average_certified_radius:.3f}{cap}"]
        label = f"{run.label} ({', '.join(filter(None, facts))})"
        (line,) = axes.step(steps, share, where="pre", label=label)
        if run.audit:
            distance = np.unique(run.audit.distance[np.isfinite(run.audit.distance)])
            steps = np.concatenate([[0.0], distance[distance < limit], [limit]])
            share = [run.audit.robust_accuracy(radius) for radius in steps]
            some = "" if len(run.audit.idx) == len(run.table) else f" ({len(run.audit.idx)} images)"
            attacked = f"{run.label}, under attack{some}"
            axes.step(steps, share, where="post", color=line.get_color(), linestyle="--", label=attacked)
    axes.set(xlabel=f"ℓ2 radius ({unit(runs)})", ylabel="certified accuracy", ylim=(0, 1), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
