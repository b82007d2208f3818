"""Makes the tables of the second round from the files of benchmarks/second_round.py."""

import math

from lsrs_jax.runtime.errors import UserError
from studies import paired, results
from studies.accelerator import device_name, load, table
from studies.runs import STUDIES

ROWS, WHOLE = STUDIES["second"].rows, "LSRS, Haar, blocks"  # the 10,000 test images are certified with WHOLE
KEPT = "kept"  # folder of the runs that are complete


def markdown(out):
    """The tables of the results in a folder: runs, pairs of LSRS and ISRS, heads alone, the whole test set."""
    folders = {label: out / KEPT / run.name for label, run in ROWS.items()}
    kept = {label: results.load(path) for label, path in folders.items() if (path / "card.md").exists()}
    found, machines = load(out)
    if not kept and not machines:
        raise UserError(f"{out} holds no results: call1 of benchmarks.second_round makes them")
    parts = [f"Made on {device_name(machine)}, {machine['day']}." for machine in machines]
    if kept:
        cells = {label: results.cells(run) for label, run in kept.items()}
        header = ["run", *next(iter(cells.values()))]
        parts.append(table(header, [[label, *row.values()] for label, row in cells.items()]))
    tables = {label: run.table for label, run in kept.items()}
    isrs = {label: tables.pop(label) for label in list(tables) if label.startswith("ISRS")}
    if tables and isrs:
        parts.append(paired.markdown(isrs, tables, paired.RADII))
    pieces = found["second"]
    return "\n\n".join([*parts, *_heads(pieces.get("rates", {}), kept), *_whole(pieces)])


def _heads(rates, kept):
    """The table of heads that had the device for themselves."""
    rows = []
    for label, one in rates.items():
        samples = kept[label].table.samples.mean() if label in kept else math.nan
        speed, share = one["votes"], one["effective_flops"] * one["votes"] / one["ceiling"]
        cells = [f"{speed / 1e6:.3g} M", f"{one['flops'] / 1e6:.3g}", f"{one['effective_flops'] / 1e6:.3g}"]
        cells += [f"{share:.1%}", f"{one['ceiling'] / 1e12:.3g}", f"{one['noise_share']:.0%}"]
        rows.append([label, *cells, f"{samples:,.0f}", f"{1e3 * samples / speed:.3g}"])
    columns = "head in bfloat16, alone|samples/s|MFLOP per sample|effective|share of the matmul ceiling"
    columns += "|this ceiling, TFLOP/s|time for the noise|samples per certificate|these samples, ms"
    return [table(columns, rows)] if rows else []


def _whole(pieces):
    """The table of the whole test set."""
    rows = []
    for name, one in pieces.items():
        if "loop_seconds" in one:
            seconds = f"{one['command_seconds']:.1f}" if one["command_seconds"] else "-"
            cells = [f"{one['images']:,}", f"{one['votes']:,}", seconds, f"{one['loop_seconds']:.1f}"]
            rows.append([name, *cells, f"{one['average_certified_radius']:.3f}"])
    columns = f"whole test set, {WHOLE}|images|samples|command, s|sampling and decisions, s|ACR"
    return [table(columns, rows)] if rows else []
