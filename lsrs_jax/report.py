"""Compare certified classifiers: a table in Markdown and a curve as PNG and SVG.

  python -m lsrs_jax.report runs/digits runs/digits_isrs --out=report
  python -m lsrs_jax.report LSRS=runs/digits Cohen=logs/sigma_0.25.tsv --out=report --radii=0,0.25,0.5

Each RUN is a workdir, a folder with certificates.tsv, or any table in the field's format (idx label predict radius
correct time), also a published log; LABEL=RUN names its row and curve. If certificates have been audited, a dashed
curve shows the accuracy that the attacks left. The command writes report.md, curve.png and curve.svg.
"""

if __name__ == "__main__":
    from lsrs_jax.cli import main

    main("report")

import collections
import dataclasses
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lsrs_jax import cli
from lsrs_jax.auditing.table import Audit, read_finished
from lsrs_jax.certification.table import Table, read_table
from lsrs_jax.config import chosen_images, config_from_dict
from lsrs_jax.runtime import documents, files
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.progress import duration
from lsrs_jax.runtime.validate import is_whole, real

_LEGEND = (
    "Certified accuracy at r: share of images classified correctly with a certified ℓ2 radius of at least r, in units "
    "of pixels in [0, 1]; abstentions count as wrong. ACR: average certified radius; wrong images count as 0."
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A table of certificates, and what the files beside it say."""

    label: str
    table: Table
    audit: Audit | None = None  # what attacks found on these certificates
    notes: Sequence[str] = ()  # what a reader must know about it


def load_runs(arguments: Sequence[str]) -> list[Run]:
    """The runs named by ``[LABEL=]PATH`` arguments; a workdir with several certifications gives several runs."""
    runs = []
    for argument in arguments:
        label, path = _split(argument)
        found = _tables(path)
        for file in found:
            suffix = f"/{file.parent.name}" if len(found) > 1 else ""
            name = label or path.resolve().name.removesuffix(".tsv")
            ours = file.name == "certificates.tsv"  # the files beside it are about the table of this name
            table = read_table(file)
            notes, audit = list(_derivation_notes(file, table.idx)) if ours else [], _audit(file) if ours else None
            if table.truncated:
                notes.insert(0, "its last line was cut off and is left out.")
            if audit:
                notes.append(_describe(audit, table))
            elif ours and file.with_name("audit.tsv").exists():
                notes.append("its audit is not finished and left out; the same audit command continues it.")
            runs.append(Run(_plain(name + suffix), table, audit, notes))
    label, times = collections.Counter(run.label for run in runs).most_common(1)[0]
    if times > 1:
        raise UserError(f"two runs are called {label!r}; name them: NAME=PATH")
    return runs


def _plain(name: str) -> str:
    """Replaces characters of a name that have a meaning in Markdown, in a picture, or on a terminal."""
    return "".join("_" if character in "|$\\`" or not character.isprintable() else character for character in name)


def _derivation_notes(table: Path, certified: np.ndarray) -> Iterator[str]:
    """Notes from the certificates.json beside a table of the images `certified`. Another program may have written it.

    Raises UserError for a damaged file, or a file about another table.
    """
    path, in_workdir = table.with_name("certificates.json"), table.parent.parent.name == "certify"
    try:
        content = documents.read_json(path) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or move it away") from error
    content = content if isinstance(content, dict) else {}
    ours = bool({"digest", "format", "identity", "lipschitz"} & content.keys())
    if ours:
        content = documents.read_sealed(path, lambda content: content["derivation"], "move it away")
    derivation = content["derivation"] if isinstance(content.get("derivation"), dict) else {}
    named = derivation.get("certificates")
    if (ours or isinstance(named, str)) and named != files.digest_of(table):
        counts = " --from-counts" if "votes" in derivation else ""
        remedy = f"restore it, or derive it again: {_command('certify', table)}{counts}"
        raise UserError(f"{table} is not the table that certificates.json beside it names; {remedy}")
    if in_workdir and "certificates" not in derivation:
        yield "no certificates.json beside it names this table; nothing says that certify wrote it."
    if ours and content["digest"] is None:
        yield "unsealed: an old version wrote its certificates.json, and nothing says whether it was changed."
    if ours and content["digest"] and isinstance(identity := content.get("identity"), dict) and "config" in content:
        images = identity.get("images")
        wanted = chosen_images(config_from_dict(content["config"]), images if is_whole(images) else None)
        if wanted and (missing := len(set(wanted) - set(certified.tolist()))):
            yield (
                f"{missing:,} of the {len(wanted):,} images that were to be certified are not in its table: it is not "
                "finished, or they were left out. Staged sampling decides the images without a certificate first."
            )
        if wanted and (others := len(set(certified.tolist()) - set(wanted))):
            yield f"{others:,} of its images are not among the {len(wanted):,} that were to be certified."
    radii = derivation.get("radii")  # another program may have written anything here
    if radii and isinstance(radii, list) and all(0 <= real(radius) <= 1e300 for radius in radii):
        decided = ", ".join(f"{radius:g}" for radius in radii)
        yield f"staged to decide the radii {decided}; at other radii, and in its ACR, it is a lower bound."


def _audit(table: Path) -> Audit | None:
    """The finished audit beside a table, if there is one; raises UserError if it is about another table."""
    path = table.with_name("audit.tsv")
    attacked, audit = (path.exists() and read_finished(path)) or (None, None)
    if audit and attacked != files.digest_of(table):
        remedy = f"move it and audit.json away, then audit this table: {_command('audit', table)}"
        raise UserError(f"{path} is the audit of another table, not of {table.name} beside it; {remedy}")
    return audit


def _describe(audit: Audit, table: Table) -> str:
    verdict = " (THESE CERTIFICATES DO NOT HOLD)" if audit.flips.any() else ""
    return (
        f"attacked at {audit.pairs.sum():,} points inside {(audit.predict >= 0).sum():,} of its certificates, "
        f"{audit.flips.sum():,} flips{verdict}, {audit.undecided.sum():,} undecided (`predict` abstained); dashed: the "
        f"accuracy that the attacks left on {len(audit.idx):,} of its {len(table):,} images."
    )


def _command(name: str, table: Path) -> str:
    """The command that makes the files beside a table."""
    folder = table.resolve().parent
    return f"python -m lsrs_jax.{name} --workdir={folder.parent.parent} --config.certify.name={folder.name}"


def _split(argument: str) -> tuple[str | None, Path]:
    label, equals, path = argument.partition("=")
    if not equals or Path(argument).exists():
        return None, Path(argument)
    if not label or _plain(label) != label:
        raise UserError(f"bad name {label!r} for a run: use plain text without any of | $ \\ `")
    return label, Path(path)


def _tables(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no run at {path}: give a workdir, or a file of certificates")
    if (path / "certificates.tsv").exists():
        return [path / "certificates.tsv"]
    if found := sorted(path.glob("certify/*/certificates.tsv")):
        return found
    raise UserError(f"no certificates in {path}: run python -m lsrs_jax.certify --workdir={path}")


def radius_grid(runs: Sequence[Run]) -> list[float]:
    """0, .25, … up to the largest certified radius; a finer or wider grid if that does not give 4 to 13 columns."""
    largest = max(float(run.table.radius.max()) for run in runs)
    step = 0.25
    if not 0.75 <= largest <= 3:
        magnitude = 10.0 ** math.floor(math.log10(max(largest, 1e-6) / 4))
        step = next(step * magnitude for step in (1, 2, 5, 10) if largest / (step * magnitude) <= 10)
    return [float(f"{step * i:.6g}") for i in range(int(largest / step) + 1)]


def markdown(runs: Sequence[Run], radii: Sequence[float]) -> str:
    """The table: certified accuracy per radius, ACR, abstention, cost."""
    header = ["run", "images", *(f"r={radius:g}" for radius in radii), "ACR", "abstain", "samples/image", "time/image"]
    rows = [header]
    for label, table in ((run.label, run.table) for run in runs):
        numbers = [*map(table.certified_accuracy, radii), table.average_certified_radius, table.abstention]
        samples = "-" if table.samples is None else f"{table.samples.mean():,.0f}"
        cells = [f"{number:.3f}" for number in numbers]
        rows.append([label, f"{len(table):,}", *cells, samples, duration(table.seconds.mean())])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def notes(runs: Sequence[Run]) -> list[str]:
    """Notes for the table: warnings about each run, and runs that were certified on other images or labels."""
    found, first = [f"{run.label}: {note}" for run in runs for note in run.notes], runs[0]
    for run in runs[1:]:
        order, other = np.argsort(run.table.idx), np.argsort(first.table.idx)
        if not np.array_equal(run.table.idx[order], first.table.idx[other]):
            found.append(f"{run.label} and {first.label} are certified on different images.")
        elif not np.array_equal(run.table.label[order], first.table.label[other]):
            found.append(f"{run.label} and {first.label} have different labels: they come from different data.")
    return found


def draw(runs: Sequence[Run], paths: Sequence[Path]) -> bool:
    """Writes the curves to every path (png, svg, …); returns False if Matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lsrs_jax"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    largest = max(float(run.table.radius.max()) for run in runs)
    limit = 2 * max(largest, 1e-3)  # of the curves under attack
    for run in runs:
        radius = np.sort(np.where(run.table.correct, run.table.radius, -1.0))
        # Certified accuracy is a step function that falls just after each radius.
        steps = np.concatenate([[0.0], radius[radius >= 0], [max(largest * 1.02, 1e-3)]])
        share = [run.table.certified_accuracy(r) for r in steps]
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
        files.write_atomic(path, content.getvalue())
    pyplot.close(figure)
    return True


def run(arguments: list[str]) -> None:
    """The command; see the module's docstring."""
    parser = cli.parser("report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN")
    parser.add_argument("--out", required=True, type=cli.folder, help="folder for report.md and the curve")
    radii = cli.checked(cli.numbers, lambda found: all(0 <= radius < math.inf for radius in found), "numbers >= 0")
    parser.add_argument("--radii", type=radii, help="radii of the table, e.g. 0,0.25,0.5")
    options = parser.parse_args(arguments)
    runs = load_runs(options.runs)
    table, below = markdown(runs, options.radii or radius_grid(runs)), [f"- {note}" for note in notes(runs)]
    options.out.mkdir(parents=True, exist_ok=True)
    drawn = draw(runs, [options.out / name for name in ("curve.png", "curve.svg")])
    picture = "![certified accuracy over the radius](curve.svg)" if drawn else ""
    parts = ["# Certified accuracy", table, "\n".join(below), picture, _LEGEND]
    files.write_atomic(options.out / "report.md", "\n\n".join(filter(None, parts)) + "\n")
    curve = f"curve: {options.out / 'curve.png'}"
    missing = "no curve: Matplotlib is not installed (pip install matplotlib)"
    print("\n".join([table, *below, f"table: {options.out / 'report.md'}", curve if drawn else missing]))
