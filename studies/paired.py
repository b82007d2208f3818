"""Compares runs with published logs on the images that both have certified.

  python -m studies.paired LOG ... RUN ...
  python -m studies.paired Cohen=sigma_0.25 docs/results/cifar10/full-isrs_resnet-gaussian --radii=0,0.25,0.5,0.75

A LOG is a file in the field's format, whose indices are positions in the official test set. A RUN is a folder with
certificates.tsv and certificates.json; the indices of its split `test_exact` of CIFAR-10 are translated by
docs/results/cifar10/test_exact.txt, which holds for each image of that split its position in the official test set.
LABEL=PATH names either. The labels of all common images must agree. The command prints a table in Markdown, with a row
for every run and every log: what each certifies, the difference (run minus log) with its standard error over images,
the images that only one of them certifies, and the p-value of McNemar's exact test on these two counts.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from lsrs_jax import cli
from lsrs_jax.certification.foreign import read_log
from lsrs_jax.certification.table import Table
from lsrs_jax.runtime import documents
from lsrs_jax.runtime.errors import UserError
from studies.accelerator import table

ORDER = Path(__file__).resolve().parents[1] / "docs" / "results" / "cifar10" / "test_exact.txt"
EXACT = "7df377a6806d4b2ab47cd4cebd785204288b6251f9fde50db9cf25ac47ae2dcb"  # digest of that split, under any name
RADII = (0.0, 0.25, 0.5, 0.75)  # of the table


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean difference of two runs over their common images, run minus log."""

    mean: float
    error: float  # standard error over images
    run_only: int = 0  # images that only the run certifies
    log_only: int = 0  # images that only the log certifies
    p_value: float = 1.0  # of McNemar's exact test, two-sided


def difference(log: np.ndarray, run: np.ndarray) -> Difference:
    """The `Difference` of two arrays over the same images, radii or booleans; booleans also get McNemar's counts."""
    apart = run.astype(np.float64) - log.astype(np.float64)
    found = Difference(float(apart.mean()), float(apart.std(ddof=1) / np.sqrt(len(apart))))
    if run.dtype != bool:
        return found
    run_only, log_only = int((run & ~log).sum()), int((log & ~run).sum())
    p_value = stats.binomtest(run_only, run_only + log_only).pvalue if run_only + log_only else 1.0
    return dataclasses.replace(found, run_only=run_only, log_only=log_only, p_value=float(p_value))


def common(log: Table, run: Table) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the images that both tables have; raises UserError if their labels differ, or for fewer than two."""
    images, rows, own = np.intersect1d(log.idx, run.idx, return_indices=True)
    if len(images) < 2:
        raise UserError(f"they have {len(images)} images in common: two are needed for a standard error")
    if len(other := images[log.label[rows] != run.label[own]]):
        raise UserError(f"image {other[0]} has another label in each: the indices are not of the same images")
    return rows, own


def load(path: Path) -> Table:
    """The table of a log, or of a run with the indices of the official test set."""
    if not path.is_dir():
        return read_log(path)[0]
    found, stored = read_log(path / "certificates.tsv")[0], documents.read_json(path / "certificates.json")
    data = stored["identity"]["data"]
    if (data["name"], data["split"]) != ("cifar10", "test_exact") and data.get("digest") != EXACT:
        return found
    order = np.array(ORDER.read_text(encoding="utf-8").split(), np.int64)
    return dataclasses.replace(found, idx=order[found.idx])


def cells(log: Table, run: Table, radii: Sequence[float]) -> dict[str, str]:
    """Name of a column → text: both values and their difference for every radius and for ACR."""
    rows, own = common(log, run)
    found = {"images": f"{len(rows):,}"}
    for radius in radii:
        theirs, ours = (log.correct & (log.radius >= radius))[rows], (run.correct & (run.radius >= radius))[own]
        apart = difference(theirs, ours)
        found[f"r={radius:g}: log, run"] = f"{theirs.mean():.3f}, {ours.mean():.3f}"
        found[f"r={radius:g}: difference (se)"] = f"{apart.mean:+.3f} ({apart.error:.3f})"
        found[f"r={radius:g}: run only, log only; p"] = f"{apart.run_only}, {apart.log_only}; {apart.p_value:.1g}"
    theirs, ours = np.where(log.correct, log.radius, 0.0)[rows], np.where(run.correct, run.radius, 0.0)[own]
    apart = difference(theirs, ours)
    found["ACR: log, run"] = f"{theirs.mean():.3f}, {ours.mean():.3f}"
    return found | {"ACR: difference (se)": f"{apart.mean:+.3f} ({apart.error:.3f})"}


def markdown(logs: dict[str, Table], runs: dict[str, Table], radii: Sequence[float]) -> str:
    """The table with a row for every run and every log."""
    rows = [{"run": run, "log": log} | cells(logs[log], runs[run], radii) for run in runs for log in logs]
    return table(list(rows[0]), [list(row.values()) for row in rows])


def _argument(text: str) -> tuple[str, Path]:
    label, equals, path = text.partition("=")
    found = Path(path if equals else text)
    if not found.exists():
        raise UserError(f"there is nothing at {found}")
    return label if equals else found.name, found


def main(arguments: list[str]) -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(
        "studies.paired", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("paths", nargs="+", metavar="[LABEL=]PATH", help="logs (files) and runs (folders)")
    parser.add_argument("--radii", type=cli.numbers, default=RADII, help="radii of the table")
    options = parser.parse_args(arguments)
    named = dict(map(_argument, options.paths))
    logs = {label: load(path) for label, path in named.items() if not path.is_dir()}
    runs = {label: load(path) for label, path in named.items() if path.is_dir()}
    if not logs or not runs or len(named) < len(options.paths):
        raise UserError(
            "give at least one log (a file) and one run (a folder), each with a name of its own: LABEL=PATH"
        )
    print(markdown(logs, runs, options.radii))


if __name__ == "__main__":
    cli.execute(main)
