"""Two classes that LSRS certifies and input smoothing cannot, whatever its base classifier: docs/separation.md.

  python -m studies.separation              # a minute on a CPU: prints the tables, draws docs/separation.png

Class B is the origin, class A the sphere of radius 1 in d dimensions. The encoder is one `L2Pool` over all entries, and
computes the norm; the head compares it with 1/2.
"""

import argparse
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import optimize, special, stats

from lsrs_jax import SmoothedClassifier, cli, layers
from lsrs_jax.layers.lipschitz import materialize
from lsrs_jax.reporting import style
from studies.accelerator import table

FIGURE = Path(__file__).resolve().parents[1] / "docs" / "separation.png"
N, ALPHA, SIGMA = 100_000, 0.001, 0.25
MEASURED = {48: (6, 8), 192: (12, 16), 768: (24, 32), 3072: (48, 64), 12_288: (96, 128), 150_528: (336, 448)}
BASELINE = 3072  # dimensions in which input smoothing itself is run


def reach(n: int = N, alpha: float = ALPHA) -> float:
    """Φ⁻¹ of the lower bound from n samples that all agree: no radius exceeds σ times this number."""
    return float(special.ndtri(alpha ** (1 / n)))


def quantile_of_any(dimensions: int, sigma: float) -> float:
    """Φ⁻¹(p*): p* is the largest probability with which any base classifier is right at every point, under this noise.

    It is that of the best threshold on |z|²/σ², which is χ² in class B and non-central χ² in class A.
    """
    shift, middle = 1 / sigma**2, dimensions + 1 / sigma**2 / 2
    apart = 40 * np.sqrt(2 * dimensions + 4 * shift)

    def wrong_more_often_at_the_sphere(threshold: float) -> float:
        far = stats.ncx2.cdf(threshold, dimensions, shift)
        return float(far - stats.chi2.sf(threshold, dimensions))

    ends = max(middle - apart, 1e-12), middle + apart
    threshold = optimize.brentq(wrong_more_often_at_the_sphere, *ends, xtol=1e-9)
    return float(-special.ndtri(stats.chi2.sf(threshold, dimensions)))


def best_sigma(dimensions: int, n: int = N, alpha: float = ALPHA) -> float:
    """The σ at which p* is what n agreeing samples prove. A smaller σ lowers what they prove, a larger one p*."""
    wrong = -np.expm1(np.log(alpha) / n)  # 1 − α^(1/n)
    threshold = stats.chi2.isf(wrong, dimensions)
    top = 20 * (np.sqrt(dimensions) + reach(n, alpha) ** 2)
    shift = optimize.brentq(lambda s: stats.ncx2.cdf(threshold, dimensions, s) - wrong, 1e-6, top, xtol=1e-9)
    return float(1 / np.sqrt(shift))


def input_smoothing_of_any(dimensions: int, sigma: float | None = None) -> float:
    """The largest radius that input smoothing of any base classifier certifies at every point, at a σ or at its best.

    **Guarantee**: for every base classifier there is a point at which it certifies more with probability at most α.
    """
    if sigma is None:
        return best_sigma(dimensions) * reach()
    return sigma * min(reach(), max(quantile_of_any(dimensions, sigma), 0.0))


def points(shape: tuple[int, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random points of the sphere, and the origin as the last one, with their labels (0: origin, 1: sphere)."""
    x = np.random.default_rng(0).standard_normal((count, *shape))
    x /= np.sqrt((x**2).reshape(count, -1).sum(axis=1)).reshape(-1, *[1] * len(shape))
    return np.concatenate([x, np.zeros((1, *shape))]), np.array([1] * count + [0])


def latent_smoothing(shape: tuple[int, int], count: int) -> np.ndarray:
    """The radii that LSRS certifies at some points of the sphere and at the origin; 0 where it is wrong."""
    x, labels = points((*shape, 1), count)
    encoder = materialize(layers.Encoder((layers.L2Pool(shape),)), {}, x.shape[1:])
    classifier = SmoothedClassifier(_norm_head, sigma=SIGMA, encoder=encoder)
    found = classifier.certify(x, labels, n=N, alpha=ALPHA)
    return np.where(found.predict == labels, found.radius, 0.0)


def _norm_head(z: jnp.ndarray) -> jnp.ndarray:
    norm = z.reshape(len(z))
    return jnp.stack([0.5 - norm, norm - 0.5], axis=1)


def input_smoothing(dimensions: int) -> np.ndarray:
    """The radii of input smoothing of the best threshold, at its best σ: a point of the sphere, and the origin."""
    sigma = best_sigma(dimensions)
    wrong = -np.expm1(np.log(ALPHA) / N)
    threshold = float(sigma**2 * stats.chi2.isf(wrong, dimensions))

    def head(z: jnp.ndarray) -> jnp.ndarray:
        excess = jnp.sum(z**2, axis=1) - threshold
        return jnp.stack([-excess, excess], axis=1)

    x, labels = points((dimensions,), 1)
    found = SmoothedClassifier(head, sigma=sigma, tile=(2, 256)).certify(x, labels, n=N, alpha=ALPHA)
    return np.where(found.predict == labels, found.radius, 0.0)


def figure(measured: dict[int, float], baseline: float) -> Any:
    """Radius over dimension, as a figure of Matplotlib."""
    figure = style.new_figure(2.3)
    axes, dimensions = figure.subplots(), np.unique(np.geomspace(4, 150_528, 40).astype(int))
    blue, orange = style.PALETTE[:2]
    axes.axhline(0.5, color="gray", linestyle=":", label="true distance to the boundary")
    axes.plot(*zip(*measured.items(), strict=True), "o-", color=blue, label=f"LSRS, σ = {SIGMA}: measured")
    bound = [input_smoothing_of_any(int(d)) for d in dimensions]
    axes.plot(dimensions, bound, "-", color=orange, label="input smoothing, best σ: bound for any classifier")
    axes.plot([BASELINE], [baseline], "s", color=orange, label="input smoothing, best σ: best classifier, measured")
    bound = [input_smoothing_of_any(int(d), SIGMA) for d in dimensions]
    label = f"input smoothing, σ = {SIGMA}: bound for any classifier"
    axes.plot(dimensions, bound, "-.", color=orange, label=label)
    axes.set(xscale="log", xlabel="dimension of the input", ylabel="radius certified at every point", ylim=(0, 0.55))
    style.legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def main(arguments: list[str]) -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser("studies.separation", description=__doc__.split("\n\n")[0])
    parser.add_argument("--figure", type=Path, default=FIGURE, help="where to draw")
    options = parser.parse_args(arguments)
    rows, measured = [], {}
    for dimensions, shape in MEASURED.items():
        found = latent_smoothing(shape, 100 if dimensions < 100_000 else 10)
        measured[dimensions] = float(found.min())
        any_best, any_same = (input_smoothing_of_any(dimensions, sigma) for sigma in (None, SIGMA))
        cells = [f"{dimensions:,}", f"{any_same:.3f}", f"{best_sigma(dimensions):.4f}", f"{any_best:.3f}"]
        rows.append([*cells, f"{found.min():.4f}"])
    header = ["dimensions", f"input smoothing of any classifier, σ = {SIGMA}", "its best σ", "at its best σ"]
    print(table([*header, f"LSRS, σ = {SIGMA}, least radius certified"], rows))
    baseline = float(input_smoothing(BASELINE).min())
    print(f"\ninput smoothing of the best threshold, {BASELINE:,} dimensions, at its best σ: {baseline:.4f} certified")
    (picture,), _ = style.pictures(lambda: figure(measured, baseline), ["png"])
    options.figure.write_bytes(picture)


if __name__ == "__main__":
    cli.execute(main)
