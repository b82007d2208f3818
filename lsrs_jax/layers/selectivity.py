"""How much of the distances between inputs an encoder keeps, between classes and within them. NumPy and SciPy only."""

from typing import Any, NamedTuple

import numpy as np

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.validate import array, numbers, real


class Selectivity(NamedTuple):
    """Medians of ‖e(x) − e(x′)‖ / (L ‖x − x′‖), the share of a distance that an encoder keeps; 1 if it keeps all."""

    between: float  # over all pairs of different classes
    within: float  # over all pairs of one class
    nearest_between: float  # over inputs, each with the nearest input of another class
    nearest_within: float  # over inputs, each with the nearest other input of its class

    @property
    def ratio(self) -> float:
        """Between over within. Above 1, the encoder contracts within classes more than between them."""
        return self.between / self.within

    @property
    def nearest_ratio(self) -> float:
        """The same for the nearest pairs, which decide most errors."""
        return self.nearest_between / self.nearest_within

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.between:.2f} between classes, {self.within:.2f} within, ratio {self.ratio:.2f}; nearest pairs "
            f"{self.nearest_between:.2f}, {self.nearest_within:.2f}, ratio {self.nearest_ratio:.2f}"
        )


def encoder_selectivity(inputs: Any, latents: Any, labels: Any, *, lipschitz: float = 1.0) -> Selectivity:
    """The `Selectivity` of an encoder on some inputs.

    Args:
      inputs: ``(N, …)``.
      latents: ``(N, …)``, the outputs of the encoder for them.
      labels: ``(N,)`` whole numbers.
      lipschitz: the encoder's constant L, by which distances of latents are divided.

    Pairs of equal inputs are left out. "Nearest" is by the distance of the inputs. Memory and time grow with N².
    Raises UserError for shapes that do not fit, and if there is no pair of one class or no pair of two classes.
    """
    from scipy.spatial.distance import pdist, squareform  # takes a tenth of a second

    flat = [numbers(name, given) for name, given in (("inputs", inputs), ("latents", latents))]
    labels = array("labels", labels)
    if labels.ndim != 1 or any(part.ndim < 2 or len(part) != len(labels) for part in flat):
        shapes = ", ".join(str(part.shape) for part in (*flat, labels))
        raise UserError(f"selectivity needs inputs (N, ...), latents (N, ...) and labels (N,), got {shapes}")
    if not real(lipschitz) > 0:
        raise UserError(f"the Lipschitz constant must be a positive number, got {lipschitz!r}")
    before, after = (squareform(pdist(part.reshape(len(part), -1))) for part in flat)
    pairs = before > 0
    kept = np.divide(after, lipschitz * before, out=np.zeros_like(after), where=pairs)
    same = labels[:, None] == labels
    medians = []
    for kind, nearest in ((~same, False), (same, False), (~same, True), (same, True)):
        chosen = pairs & kind
        if not chosen.any():
            raise UserError("selectivity needs pairs of one class and pairs of two classes: give more inputs")
        if nearest:
            rows = np.flatnonzero(chosen.any(axis=1))
            column = np.where(chosen, before, np.inf).argmin(axis=1)
            medians.append(float(np.median(kept[rows, column[rows]])))
        else:
            medians.append(float(np.median(kept[chosen])))
    return Selectivity(*medians)
