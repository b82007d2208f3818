"""The table of `report`: as Markdown, as LaTeX for a column of a paper, and as CSV with all digits."""

import csv
import io
import math
from collections.abc import Sequence

from lsrs_jax.reporting.runs import Run
from lsrs_jax.runtime.progress import duration

_SPECIAL = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "σ": r"$\sigma$",
    "α": r"$\alpha$",
    "ε": r"$\varepsilon$",
    "µ": r"$\mu$",
}


def middle_radius(radii: Sequence[float]) -> float:
    """The radius of the table at which more is said: 0.5, or one in the middle."""
    return 0.5 if 0.5 in radii else sorted(radii)[len(radii) // 2]


def markdown(runs: Sequence[Run], radii: Sequence[float]) -> str:
    """The table: certified accuracy per radius, of the worst class too, abstention, ACR with its cap and n, cost."""
    middle = middle_radius(radii)
    header = ["run", "images", *(f"r={radius:g}" for radius in radii), f"worst class at r={middle:g}", "abstain"]
    header += ["expected invalid", "ACR", "cap", "n", "samples/image", "time/image"]
    rows, caps = [header], [run.sampling.cap for run in runs if run.sampling]
    for run in runs:
        table, sampling = run.table, run.sampling
        accuracy, worst = table.worst_class(middle)
        cells = [f"{share:.3f}" for share in map(table.certified_accuracy, radii)]
        cells += [f"{accuracy:.3f} ({_class(run, worst)})", f"{table.abstention:.3f}"]
        acr = f"{table.average_certified_radius:.3f}"
        if run.deterministic:
            capped = f" ({table.capped_radius(min(caps)):.3f} if capped at {min(caps):.3f})" if caps else ""
            cells += ["0", f"{acr}{capped}", "none", "0"]
        elif sampling:
            cells += [f"{sampling.alpha * len(table):.2g}", acr, f"{sampling.cap:.3f}", f"{sampling.n:,}"]
        else:
            cells += ["?", acr, "?", "?"]
        samples = "-" if table.samples is None else f"{table.samples.mean():,.0f}"
        rows.append([_name(run), run.images, *cells, samples, _time(run)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def latex(runs: Sequence[Run], radii: Sequence[float]) -> str:
    """A tabular with booktabs rules (``\\usepackage{booktabs}``): certified accuracies in percent, ACR, n and time."""
    shown = list(radii)[:5]
    header = ["", *(f"$r={radius:g}$" for radius in shown), "ACR", "$n$", "time"]
    lines = [
        "% \\usepackage{booktabs}; certified accuracy in percent, ACR, samples per image at most, time per image",
        f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        "\\toprule",
        " & ".join(header) + r" \\",
        "\\midrule",
    ]
    for run in runs:
        table, n = run.table, "0" if run.deterministic else f"{run.sampling.n:,}" if run.sampling else "?"
        cells = [f"{100 * table.certified_accuracy(radius):.1f}" for radius in shown]
        cells += [f"{table.average_certified_radius:.3f}", n.replace(",", "{,}"), _escaped(_time(run))]
        lines.append(" & ".join([_escaped(_name(run)), *cells]) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def comma_separated(runs: Sequence[Run], radii: Sequence[float]) -> str:
    """The table with all digits; a cell is empty where its value is not known."""
    middle, text = middle_radius(radii), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    worst = [f"certified accuracy of the worst class at r={middle:g}", "worst class"]
    header = ["run", "method", "sigma", "images", *(f"certified accuracy at r={radius:g}" for radius in radii), *worst]
    writer.writerow([*header, "abstention", "alpha", "ACR", "cap", "n", "samples per image", "seconds per image"])
    for run in runs:
        table, sampling, sigma = run.table, run.sampling, run.kind.sigma
        cells = [run.label, run.kind.method, "" if sigma is None else sigma, len(table)]
        cells += [*map(table.certified_accuracy, radii), *table.worst_class(middle), table.abstention]
        limits = ["", "", 0 if run.deterministic else ""]
        cap, alpha, n = (sampling.cap, sampling.alpha, sampling.n) if sampling else limits
        samples = "" if table.samples is None else float(table.samples.mean())
        seconds = float(table.seconds.mean())
        acr = table.average_certified_radius
        writer.writerow([*cells, alpha, acr, cap, n, samples, "" if math.isnan(seconds) else seconds])
    return text.getvalue()


def _class(run: Run, number: int) -> str:
    """The name of a class, or "class" and its number if it has none or is called by its number."""
    name = run.classes[number] if number < len(run.classes) else ""
    return name if name.strip(" 0123456789") else f"class {number}"


def _name(run: Run) -> str:
    return f"{run.label} ({run.mark})" if run.mark else run.label


def _time(run: Run) -> str:
    seconds = float(run.table.seconds.mean())
    return "-" if math.isnan(seconds) else duration(seconds)


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)
