"""Bounds on the error that float64 arithmetic adds to the output of a layer, relative to the norm of its input."""

import math

_UNIT = 2.0**-53


def gamma(terms: int) -> float:
    """Higham's γ_n = nu / (1 − nu): relative error of a sum of products of n terms, in any order (2002, Lemma 3.1)."""
    return terms * _UNIT / (1 - terms * _UNIT)


def product_rounding(terms: int) -> float:
    """ℓ2 error of y = Ax over ‖A‖‖x‖, for a matrix with at most `terms` entries in each row and column.

    Entrywise the error is at most γ|A||x|, and ‖|A|‖ ≤ √(‖A‖₁‖A‖∞) ≤ √terms · ‖A‖ (the Cauchy-Schwarz inequality for
    each row and each column).
    """
    return gamma(terms) * math.sqrt(terms)
