"""The distribution of a Gaussian rounded to a grid, sampled with integers alone. NumPy only.

Latents and noise are whole multiples of a spacing q = 2⁻ᵏ. Their sum is exact, so that no rounding of latent + noise
reveals the latent (the attack of Voráček and Hein, ICLR 2023). The noise is a *rounded* Gaussian, sampled by Walker's
alias method (Vose 1991) from 64 uniform bits per number: one table look-up and one comparison of integers, the same on
every platform.
"""

import decimal
import fractions
import functools
import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lsrs_jax.runtime import format
from lsrs_jax.runtime.cache import cached
from lsrs_jax.runtime.format import COLUMN_BITS, GRID_BITS, THRESHOLD_BITS

LIMIT = 2**24  # float32 holds every integer up to here
MAX_LATENT = 2**23  # latents in steps of q: noise of up to 2**18 steps cannot reach the limit
# Total variation between one sampled coordinate and a Gaussian rounded to the grid: masses are rounded to 2⁻⁶³ (2¹⁸ of
# them), and the tail beyond the table, at least 8σ out, is 2⁻⁴⁹.
TAU = 2.0**-44


class Grid(NamedTuple):
    """A grid spacing q, a power of two with σ/q in [2¹⁴, 2¹⁵), and the alias table of |noise| for it.

    The table is uint32 ``(2, 2**COLUMN_BITS)``. The first row has the high bits of each column's threshold, and below
    them its alias; the second row has the low 32 bits of the threshold.

    **Guarantee**: draw a uniform column c, a uniform threshold t and a uniform sign. The magnitude is c if t is below
    the column's threshold, otherwise the column's alias. The signed magnitude has the distribution of round(δ/q),
    δ ~ N(0, σ²), up to a total variation of `TAU`. The table is computed in integers: it is the same on every machine.
    """

    spacing: float
    table: np.ndarray


def spacing(sigma: float) -> float:
    """The spacing q of the grid for noise of this σ."""
    return 2.0 ** (math.frexp(sigma)[1] - GRID_BITS)


@functools.lru_cache(maxsize=8)
def grid(sigma: float) -> Grid:
    """The `Grid` for a σ; takes half a second, if its table is not in `runtime.cache`."""
    steps = fractions.Fraction(sigma) / fractions.Fraction(spacing(sigma))
    code = hashlib.sha256(Path(__file__).read_bytes() + Path(format.__file__).read_bytes()).hexdigest()[:16]
    content = cached(f"noise-{float(steps).hex()}-{code}", lambda: _table(steps).astype("<u4").tobytes())
    return Grid(spacing(sigma), np.frombuffer(content, "<u4").reshape(2, -1).astype(np.uint32))


def _table(steps: fractions.Fraction) -> np.ndarray:
    """The alias table for σ/q = `steps`."""
    thresholds, aliases = _alias(_masses(steps))
    high, low = thresholds >> 32, thresholds & 0xFFFFFFFF
    return np.stack([high << COLUMN_BITS | aliases, low])


_FIXED = 128  # fractional bits; with up to 2**19 steps of a recurrence the error stays below 2**-90


def _masses(steps: fractions.Fraction) -> list[int]:
    """P[|round(δ/q)| = j] · 2⁶³ as integers that add up to 2⁶³, for σ/q = `steps`.

    A recurrence gives the density at the cells' centres, and two more terms of the Taylor series the integral over each
    cell, up to a remainder below 2⁻⁷⁰ relative.
    """
    one = 1 << _FIXED
    h2 = 1 / steps**2  # squared width of a cell in units of σ
    with decimal.localcontext(prec=60):
        exponent = decimal.Decimal(h2.numerator) / decimal.Decimal(h2.denominator)
        ratio, step = (int((-exponent / part).exp() * one) for part in (2, 1))
    width, density, cells = one * h2.numerator // h2.denominator, one, []
    for j in range(1 << COLUMN_BITS):
        x2 = j * j * width
        fourth = ((x2 * x2 >> _FIXED) - 6 * x2 + 3 * one) * width >> _FIXED
        correction = (x2 - one) // 24 + fourth // 1920
        cells.append(density * (one + (correction * width >> _FIXED)) >> _FIXED)
        density = density * ratio >> _FIXED
        ratio = ratio * step >> _FIXED
    total = 2 * sum(cells) - cells[0]
    scale = 1 << (COLUMN_BITS + THRESHOLD_BITS)
    rest = [2 * cell * scale // total for cell in cells[1:]]
    return [scale - sum(rest), *rest]


def _alias(masses: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds and aliases of 2^COLUMN_BITS columns of 2^THRESHOLD_BITS each (Vose 1991), exact in integers."""
    full, left, aliases = 1 << THRESHOLD_BITS, list(masses), list(range(len(masses)))
    thresholds = [full - 1] * len(masses)  # a full column is its own alias, so that its threshold does not matter
    small = [j for j, mass in enumerate(left) if mass < full]
    large = [j for j, mass in enumerate(left) if mass >= full]
    while small and large:
        low, high = small.pop(), large[-1]
        thresholds[low], aliases[low] = left[low], high
        left[high] -= full - left[low]
        if left[high] < full:
            small.append(large.pop())
    return np.array(thresholds, np.int64), np.array(aliases, np.int64)


def total_variation(dimensions: int) -> float:
    """τ: total variation between a sampled noise vector and a rounded Gaussian; it lowers p_A and raises p_B."""
    return TAU * dimensions


def rounding_slack(dimensions: int, q: float) -> float:
    """√d·q, rounded up: the grid moves the certified latent and any other latent by q/2 per coordinate each."""
    return math.sqrt(dimensions) * q * (1 + 2.0**-50)
