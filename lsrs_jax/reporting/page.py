"""Writes a report as one HTML page that works from disk without a network.

The page holds the numbers as JSON, the images as a second block of JSON, and scripts that draw both. It shows text of
others (names of classes, labels, paths) only as text: in the JSON no ``<`` is left, and the scripts set text contents.
A Content-Security-Policy allows these scripts by their digests, and forbids every connection.
"""

import base64
import dataclasses
import hashlib
import importlib.resources
import json
import math
from collections.abc import Sequence
from string import Template
from typing import Any

import numpy as np

from lsrs_jax import __version__
from lsrs_jax.reporting.gallery import Gallery, Pictures, collect
from lsrs_jax.reporting.runs import Run, unit
from lsrs_jax.reporting.table import middle_radius

_MOST = 20_000  # radii of a run in the page; of more images, only every k-th
_SCRIPTS = ("page.js", "gallery.js")  # before Plotly, which takes longest to load


def build(
    runs: Sequence[Run],
    radii: Sequence[float],
    table: str,
    notes: Sequence[str],
    legend: str,
    embed: bool,
) -> tuple[str, list[str]]:
    """The page, and notes about what it lacks.

    Args:
      radii: those of the table.
      table: the table in Markdown, whose texts the page repeats; no name in it has a "|".
      notes: what a reader must know about the runs.
      legend: explains the columns.
      embed: whether to embed images of any data set, and not only of those that come with a library.
    """
    pictures, galleries, lacking = collect(runs, embed)
    plotly = _plotly()
    if not plotly:
        lacking.append("no charts in the page: Plotly is not installed (pip install plotly).")
    header, _, *texts = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    rows = [
        [{"text": text, "value": value} for text, value in zip(row, _sort_values(run, radii), strict=True)]
        for run, row in zip(runs, texts, strict=True)
    ]
    data = {
        "version": __version__,
        "unit": unit(runs),
        "radii": list(radii),
        "header": header,
        "legend": legend,
        "notes": list(notes),
        "lacking": lacking,
        "runs": [
            _facts(run, gallery) | {"cells": row} for run, gallery, row in zip(runs, galleries, rows, strict=True)
        ],
        "pictures": [_described(one) for one in pictures],
    }
    sheets = [[base64.b64encode(file).decode() for file in one.sheets.files] for one in pictures]
    scripts = ["\n".join(map(_asset, _SCRIPTS)), plotly, _asset("charts.js")]
    names = ("script", "plotly", "charts")
    page = Template(_asset("page.html")).substitute(
        dict(zip(names, scripts, strict=True)),
        hashes=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
        style=_asset("page.css"),
        data=_json(data),
        sheets=_json(sheets),
    )
    return page, lacking


def _asset(name: str) -> str:
    return importlib.resources.files("lsrs_jax.reporting").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    """The source of plotly.js, which the package plotly contains; "" without that package."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return ""
    return get_plotlyjs().replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(content: Any) -> str:
    """JSON that no HTML parser reads as a tag, whatever the names in it are."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _sort_values(run: Run, radii: Sequence[float]) -> list[float | None]:
    """What the columns of the table are sorted by; None for the name of the run, and for what is not known."""
    table, sampling, middle = run.table, run.sampling, middle_radius(radii)
    invalid = 0.0 if run.deterministic else sampling and sampling.alpha * len(table)
    cap = math.inf if run.deterministic else sampling and sampling.cap
    samples = None if table.samples is None else float(table.samples.mean())
    known = [*map(table.certified_accuracy, radii), table.worst_class(middle)[0], table.abstention, invalid]
    known += [table.average_certified_radius, 1e308 if cap == math.inf else cap]
    known += [0 if run.deterministic else sampling and sampling.n, samples, _number(table.seconds.mean())]
    return [None, len(table), *known]


def _facts(run: Run, gallery: Gallery | None) -> dict[str, Any]:
    """What the page knows about a run. ``radii``: of every k-th correct image, the largest first; k is ``every``."""
    table = run.table
    every = -(-len(table) // _MOST)
    radii = np.sort(table.radius[table.correct])[::-1][every - 1 :: every]
    facts: dict[str, Any] = {"label": run.label, "mark": run.mark, "total": len(table), "every": every}
    facts |= {"radii": radii.tolist(), "n": 0 if run.deterministic else run.sampling and run.sampling.n}
    facts |= {"samples": None if table.samples is None else float(table.samples.mean())}
    facts |= {"seconds": _number(table.seconds.mean()), "audit": None, "gallery": None}
    if run.audit:
        distance = np.sort(run.audit.distance[run.audit.correct])
        finite = distance[np.isfinite(distance)]
        counts = {"total": len(run.audit.idx), "never": len(distance) - len(finite)}
        facts["audit"] = {"distances": finite.tolist()} | counts
    if gallery:
        shown = {name: getattr(table, name)[gallery.rows].tolist() for name in ("idx", "label", "predict", "radius")}
        shown |= {"pictures": gallery.pictures, "every": gallery.every, "place": gallery.place.tolist()}
        facts["gallery"] = shown | {"votes": gallery.votes, "samples": gallery.samples, "flips": gallery.flips}
        facts["gallery"]["flipped"] = gallery.flipped and dataclasses.asdict(gallery.flipped)
    return facts


def _described(pictures: Pictures) -> dict[str, Any]:
    """The facts about the sheets of a data set, without the files."""
    sheets = pictures.sheets._asdict()
    del sheets["files"]
    return sheets | {"name": pictures.name, "classes": list(pictures.classes)}
