"""What a figure draws: runs one by one, or the mean and the spread of groups of them, or their envelope."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from lsrs_jax.certification.table import Table
from lsrs_jax.reporting.kinds import Kind
from lsrs_jax.reporting.runs import Run

MOST = 8  # curves in a figure
_STEPS = 10_000  # of a curve


@dataclasses.dataclass(frozen=True)
class Group:
    """A curve of a figure: of one run, or of several runs together."""

    label: str
    kind: Kind
    runs: tuple[Run, ...]
    envelope: bool = False  # whether the curve is the maximum of the runs, and not their mean

    @property
    def steps(self) -> np.ndarray:
        """0, and the radii just behind which the curve falls.

        Of very many, some: between two of them the curve is then drawn as low as at the second one.
        """
        radii = np.unique(np.concatenate([[0.0], *(certified_radii(run.table) for run in self.runs)]))
        return radii[np.unique(np.linspace(0, len(radii) - 1, _STEPS).astype(int))]

    def accuracy(self, radii: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Certified accuracy at some radii: of the curve, of the lowest and of the highest run."""
        each = np.array([_accuracies(run.table, radii) for run in self.runs])
        low, high = each.min(axis=0), each.max(axis=0)
        return high if self.envelope else each.mean(axis=0), low, high

    @property
    def seconds(self) -> float:
        """Seconds per image, the mean over the runs; NaN if a table does not have them."""
        return float(np.mean([run.table.seconds.mean() for run in self.runs]))

    @property
    def legend(self) -> str:
        """Its name, and what a reader must know of it."""
        run, count = self.runs[0], len(self.runs)
        if count > 1:
            return f"{self.label} ({count} runs)"
        known = run.unfinished and not run.unfinished.endswith("?")
        facts = ", ".join(filter(None, [run.mark, f"{run.images} images" if known else ""]))
        return f"{self.label} ({facts})" if facts else self.label


def certified_radii(table: Table) -> np.ndarray:
    """The radii of the images that are classified correctly, ascending."""
    return np.sort(table.radius[table.correct])


def _accuracies(table: Table, radii: np.ndarray) -> np.ndarray:
    radius = certified_radii(table)
    return (len(radius) - np.searchsorted(radius, radii)) / len(table)


def grouped(runs: Sequence[Run], envelope: bool = False) -> tuple[list[Group], str]:
    """The curves of some runs, and a note if they are not the runs themselves.

    Of more than `MOST` runs, those are one group whose configurations differ only in the seed; if that leaves more than
    `MOST`, those of one method and σ, then those of one method.
    """
    if envelope:
        found = _collect(runs, lambda run: (run.kind.method, run.kind.family))
        found = [dataclasses.replace(group, envelope=True) for group in found]
        return found, "envelope: at every radius the best of the runs; no one classifier has it"
    if len(runs) <= MOST:
        return [Group(run.label, run.kind, (run,)) for run in runs], ""
    keys: dict[str, Callable[[Run], Hashable]] = {
        "over seeds": lambda run: run.kind if run.kind.family else run.label,
        "of a method and σ": lambda run: (run.kind.method, run.kind.sigma),
        "of a method": lambda run: run.kind.method,
    }
    choices = [(words, _collect(runs, key)) for words, key in keys.items()]
    words, found = next((choice for choice in choices if len(choice[1]) <= MOST), choices[-1])
    return found, f"lines: means {words}; bands: lowest to highest run"


def _collect(runs: Sequence[Run], key: Callable[[Run], Hashable]) -> list[Group]:
    members = collections.defaultdict(list)
    for run in runs:
        members[key(run)].append(run)
    groups = []
    for group in members.values():
        kinds, sigmas = {run.kind for run in group}, {run.kind.sigma for run in group}
        families = {kind.family for kind in kinds}
        family = families.pop() if len(families) == 1 else ""
        kind = Kind(group[0].kind.method, sigmas.pop() if len(sigmas) == 1 else None, family)
        name = _without_seeds(group) if family else _named(kind)
        groups.append(Group(group[0].label if len(group) == 1 else name, kind, tuple(group)))
    names = collections.Counter(group.label for group in groups)
    return [
        group if names[group.label] == 1 else dataclasses.replace(group, label=f"{group.runs[0].label} and others")
        for group in groups
    ]


def _without_seeds(runs: Sequence[Run]) -> str:
    """What the labels of some runs begin with, without seed and σ at the end."""
    letters = zip(*(run.label for run in runs), strict=False)
    shared = "".join(own[0] for own in itertools.takewhile(lambda own: len(set(own)) == 1, letters))
    ends = r"[\s,;:/_-]*((seed|σ|sigma|noise)[\s=_-]*[\d.]*)?[\s,;:/_=.-]*$"
    return re.sub(ends, "", shared) or _named(runs[0].kind)


def _named(kind: Kind) -> str:
    name = kind.method or "method not known"
    return name if kind.sigma is None else f"{name}, σ {kind.sigma:g}"
