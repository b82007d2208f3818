"""Compare certified classifiers: a table in Markdown and a curve as PNG and SVG.

  python -m lsrs_jax.report runs/digits runs/digits_isrs --out=report
  python -m lsrs_jax.report LSRS=runs/digits Cohen=logs/sigma_0.25.tsv --out=report --radii=0,0.25,0.5

Each RUN is a workdir, a folder with certificates.tsv, or any table in the field's format (idx label predict radius
correct time), published logs included; LABEL=RUN names its row and curve. Where certificates have been audited, the
accuracy that the attacks left lies over the certified one, dashed. Writes report.md, curve.png and curve.svg.
"""

import dataclasses
import hashlib
import io
import math
from pathlib import Path

import numpy as np

from lsrs_jax import command, sealed
from lsrs_jax.arguments import real
from lsrs_jax.auditing.table import Audit, read_finished
from lsrs_jax.errors import UserError
from lsrs_jax.files import read_json, write_atomic
from lsrs_jax.progress import duration
from lsrs_jax.smoothing.table import Table, read_table

_SPECIAL = set("|$\\`")


@dataclasses.dataclass(frozen=True)
class Run:
    label: str
    table: Table
    radii: tuple[float, ...] | None = None  # that a staged certification decided; its radii say no more than that
    audit: Audit | None = None  # what attacks found on these certificates
    unfinished: bool = False  # an audit of them was begun
    unnamed: bool = False  # a table in a workdir without the certificates.json that would name it


def load_runs(arguments):
    """The runs named by ``[LABEL=]PATH`` arguments; a workdir with several certifications gives several runs."""
    runs = []
    for argument in arguments:
        label, path = _split(argument)
        found = _tables(path)
        for table in found:
            suffix = f"/{table.parent.name}" if len(found) > 1 else ""
            name = label or path.resolve().name.removesuffix(".tsv")
            # The files beside it are about the table of this name.
            beside = {}
            if table.name == "certificates.tsv":
                derivation = _derivation(table)
                in_workdir = table.parent.parent.name == "certify"
                beside = {"radii": _decided(derivation), "unnamed": in_workdir and "certificates" not in derivation}
                beside |= _audit(table)
            runs.append(Run(_plain(name + suffix), read_table(table), **beside))
    labels = [run.label for run in runs]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"two runs are called {label!r}; name them: NAME=PATH")
    return runs


def _plain(name):
    """A name that changes nothing around it in Markdown, in a picture, or on a terminal."""
    return "".join("_" if character in _SPECIAL or not character.isprintable() else character for character in name)


def _derivation(table):
    """The derivation that certificates.json beside a table holds; {} without one, or in a file of another program.

    Raises:
      UserError: for a damaged file, or that of another table.
    """
    path = table.with_name("certificates.json")
    try:
        stored = read_json(path)
        stored = stored if isinstance(stored, dict) else {}
        ours = "digest" in stored or {"identity", "lipschitz"} <= stored.keys()
        if ours:
            sealed.check(stored)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or move it away") from error
    derivation = stored["derivation"] if isinstance(stored.get("derivation"), dict) else {}
    named = derivation.get("certificates")
    if (ours or isinstance(named, str)) and named != _digest(table):
        counts = " --from-counts" if "votes" in derivation else ""
        raise UserError(
            f"{table} is not the table that certificates.json beside it names; restore it, or derive it again: "
            f"{_command('certify', table)}{counts}"
        )
    return derivation


def _decided(derivation):
    try:
        radii = derivation["radii"]
        return tuple(radii) if radii and all(0 <= real(radius) <= 1e300 for radius in radii) else None
    except (KeyError, TypeError):
        return None  # of another program


def _audit(table):
    """The audit beside a table as fields of a `Run`; refuses that of another table."""
    path = table.with_name("audit.tsv")
    if not path.exists():
        return {}
    found = read_finished(path)
    if found is None:
        return {"unfinished": True}
    attacked, audit = found
    if attacked != _digest(table):
        raise UserError(
            f"{path} is the audit of another table than {table.name} beside it; move it and audit.json away, "
            f"and audit this one: {_command('audit', table)}"
        )
    return {"audit": audit}


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _command(name, table):
    """The command that makes the files beside a table."""
    place = table.resolve().parent
    return f"python -m lsrs_jax.{name} --workdir={place.parent.parent} --config.certify.name={place.name}"


def _split(argument):
    label, equals, path = argument.partition("=")
    if equals and not Path(argument).exists():
        if not label or _plain(label) != label:
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
        f"{run.label}: no certificates.json beside it names this table; nothing says that certify wrote it."
        for run in runs
        if run.unnamed
    ]
    found += [
        f"{run.label}: staged to decide the radii {', '.join(f'{r:g}' for r in run.radii)}; at other radii, and in its "
        "ACR, it is a lower bound."
        for run in runs
        if run.radii
    ]
    found += [
        f"{run.label}: attacked at {run.audit.pairs.sum():,} points inside {(run.audit.predict >= 0).sum():,} of its "
        f"certificates, {run.audit.flips.sum():,} flips{_verdict(run.audit)}, {run.audit.undecided.sum():,} undecided "
        f"(`predict` abstained); dashed: what the attacks left of its accuracy on {len(run.audit.idx):,} of its "
        f"{len(run.table):,} images."
        for run in runs
        if run.audit
    ]
    found += [
        f"{run.label}: its audit is not finished and left out; the same audit command goes on with it."
        for run in runs
        if run.unfinished
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


def _verdict(audit):
    return " (THESE CERTIFICATES DO NOT HOLD)" if audit.flips.any() else ""


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
    limit = 2 * max(largest, 1e-3)  # of the attacks: a little beyond what is certified
    for run in runs:
        radius = np.sort(np.where(run.table.correct, run.table.radius, -1.0))
        # Certified accuracy is a step function that falls just after each radius.
        steps = np.concatenate([[0.0], radius[radius >= 0], [max(largest * 1.02, 1e-3)]])
        share = [run.table.certified_accuracy(0), *(run.table.certified_accuracy(r) for r in steps[1:])]
        label = f"{run.label} (ACR {run.table.average_certified_radius:.3f})"
        (line,) = axes.step(steps, share, where="pre", label=label)
        if run.audit:
            distance = np.unique(run.audit.distance[np.isfinite(run.audit.distance)])
            steps = np.concatenate([[0.0], distance[distance < limit], [limit]])
            share = [run.audit.robust_accuracy(radius) for radius in steps]
            some = "" if len(run.audit.idx) == len(run.table) else f" ({len(run.audit.idx)} images)"
            attacked = f"{run.label}, under attack{some}"
            axes.step(steps, share, where="post", color=line.get_color(), linestyle="--", label=attacked)
    axes.set(xlabel="ℓ2 radius (pixels in [0, 1])", ylabel="certified accuracy", ylim=(0, 1), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    for path in paths:
        content = io.BytesIO()
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(content, dpi=150, format=path.suffix[1:], metadata=metadata)
        write_atomic(path, content.getvalue())
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
