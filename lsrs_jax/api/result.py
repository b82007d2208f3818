"""What `SmoothedClassifier.certify` returns: certificates with labels, as a table, a summary and a data frame."""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing.derivation import Certificates

_MOST_RADII = 8  # columns of the summary


class Prediction(NamedTuple):
    """What `SmoothedClassifier.predict` found; over inputs."""

    classes: Int[np.ndarray, " inputs"]  # −1 where it abstains
    counts: Int[np.ndarray, "inputs classes"]
    reasons: tuple[str, ...]  # why it abstains; "" where it does not


def prediction(classes: np.ndarray, counts: np.ndarray, composed: bool = False) -> Prediction:
    """The `Prediction` of these classes and counts, of votes alone or of a composition."""
    order, reasons = np.argsort(-counts, axis=1, kind="stable")[:, :2], []
    for found, (first, second), own in zip(classes, order, counts, strict=True):
        if composed:
            near = f"class {first} has {own[first]:,} of {own.sum():,} samples, too close to one half"
        else:
            near = f"classes {first} and {second} have {own[first]:,} and {own[second]:,} of {own.sum():,} samples"
            near += ", too close to tell apart"
        reasons.append("" if found >= 0 else f"{near}: more samples may decide")
    return Prediction(classes, counts, tuple(reasons))


@dataclasses.dataclass(frozen=True, repr=False)
class Result(Certificates):
    """Certificates of all inputs, in their order; see `Certificates` for the arrays."""

    labels: Int[np.ndarray, " images"] | None = None
    class_names: tuple[str, ...] = ()
    sigma: float = 0.0
    folder: Path | None = None  # with the ledger and certificates.tsv, if there is one
    radii: tuple[float, ...] = ()  # that were to be decided; other radii say less

    def accuracy(self, radius: float = 0.0) -> float:
        """Certified accuracy: share of inputs classified correctly with at least this ℓ2 radius.

        Abstentions count as wrong. Raises UserError without labels.
        """
        return float(np.mean(self._correct() & (self.radius >= radius)))

    @property
    def average_certified_radius(self) -> float:
        """ACR (Zhai et al. 2020): mean radius, where wrong classes and abstentions count as 0; needs labels."""
        return float(np.mean(np.where(self._correct(), self.radius, 0.0)))

    def _correct(self) -> np.ndarray:
        if self.labels is None:
            raise UserError("accuracy needs labels: give them to certify")
        return self.predict == self.labels

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with one row per input: label, predict, name, radius, abstain, n, p_A and p_B."""
        try:
            import pandas
        except ImportError as error:
            raise UserError("to_pandas needs pandas: pip install pandas") from error
        labels = {} if self.labels is None else {"label": self.labels, "correct": self._correct()}
        names = ["" if c < 0 else self.class_names[c] for c in self.predict] if self.class_names else None
        columns = {"predict": self.predict, "radius": self.radius, "abstain": self.abstain, "n": self.n}
        columns |= {"p_a_lower": self.p_a_lower, "p_b_upper": self.p_b_upper}
        return pandas.DataFrame(labels | ({"name": names} if names else {}) | columns)

    def __str__(self) -> str:
        """A few lines: certified accuracy (or, without labels, the share of certificates) over the radius."""
        radii = sorted({0.0, *self.radii}) if self.radii else _grid(float(self.radius.max(initial=0.0)))
        if self.labels is None:
            name, shares = "certified", [float(np.mean(~self.abstain & (self.radius >= r))) for r in radii]
            mean = f"mean radius {self.radius.mean():.4f}"
        else:
            name, shares = "accuracy", [self.accuracy(r) for r in radii]
            mean = f"average certified radius {self.average_certified_radius:.4f}"
        lines = [
            f"{len(self):,} inputs, sigma {self.sigma:g}: {mean}, abstained {self.abstain.mean():.3f}",
            "radius    " + "".join(f"{r:>7.3g}" for r in radii),
            f"{name:<10}" + "".join(f"{share:>7.3f}" for share in shares),
        ]
        return "\n".join([*lines, str(self.folder)] if self.folder else lines)

    __repr__ = __str__


def result_of(
    found: Certificates, labels: Any, names: tuple[str, ...] | None, sigma: float, radii: tuple[float, ...]
) -> Result:
    """The `Result` of these certificates; classes without names are numbered."""
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    names = names or tuple(map(str, range(found.counts.shape[1])))
    return Result(**fields, labels=labels, class_names=names, sigma=sigma, radii=radii)


def _grid(largest: float) -> list[float]:
    """Radii from 0 to the largest one, in steps of 1, 2, 2.5 or 5 times a power of ten."""
    if not 0 < largest < math.inf:
        return [0.0]
    magnitude = 10.0 ** math.floor(math.log10(largest / _MOST_RADII))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if largest / (m * magnitude) <= _MOST_RADII)
    return [step * i for i in range(int(largest / step) + 1)]
