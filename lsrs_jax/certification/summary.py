"""Lines about a smoothed certification: what is sampled, and the result."""

from pathlib import Path

import numpy as np

from lsrs_jax.certification.encode import Pipeline
from lsrs_jax.certification.table import worst_class
from lsrs_jax.certification.target import Target
from lsrs_jax.layers import encoder_selectivity
from lsrs_jax.runtime import progress
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.processes import devices
from lsrs_jax.smoothing.counts import ImageCounts
from lsrs_jax.smoothing.derivation import Certificates, Derivation
from lsrs_jax.smoothing.engine import Images
from lsrs_jax.smoothing.noise_check import accuracy_under_noise
from lsrs_jax.smoothing.schedule import Schedule, make_schedule

_PAIRED = 200  # images whose distances are compared
_ENTRIES = 2**24  # pixels of all of them


def headline(target: Target, schedule: Schedule, pending: int) -> str:
    """What is sampled, and how."""
    certify, dataset = target.config.certify, target.dataset
    line = (
        f"{dataset.name} {dataset.split}: {len(target.indices):,} images, {len(target.indices) - pending:,} of them "
        f"done; sigma {target.config.sigma}, n0 {certify.n0}, n {certify.n:,}, alpha {certify.alpha}, "
        f"{certify.bound} bound, {certify.arithmetic} arithmetic; {devices()}"
    )
    if not schedule.staged:
        return line
    radii = f"radii {', '.join(f'{radius:g}' for radius in certify.radii)} are decided"
    until = radii if certify.radii else f"the radius is known to {certify.epsilon:g} sigma / L"
    name = certify.schedule
    return f"{line}\n{name}: {len(schedule.looks)} looks from {schedule.looks[0]:,} samples on, until {until}"


def before_sampling(pipeline: Pipeline, images: Images) -> str:
    """What the first images say of the classifier: its accuracy under the noise, and the distances it keeps."""
    lines = accuracy_under_noise(pipeline.sampler, images), _distances_kept(pipeline, images)
    return "\n".join(filter(None, lines))


def _distances_kept(pipeline: Pipeline, images: Images) -> str:
    """The `Selectivity` of the encoder on some images; "" without an encoder, or if they are not of several classes."""
    if not pipeline.report.layers:
        return ""
    size = int(np.prod(pipeline.report.input_shape))
    idx, labels = (np.array(part[: min(_PAIRED, _ENTRIES // size)]) for part in (images.idx, images.labels))
    inputs = pipeline.target.dataset.read(idx, np.float64)[0]
    spacing = pipeline.sampler.arithmetic.identity.get("spacing", 1.0)
    latents = images.latents[: len(idx)].astype(np.float64) * spacing
    try:
        found = encoder_selectivity(inputs, latents, labels, lipschitz=pipeline.report.constant)
    except UserError:  # one class only
        return ""
    return f"distances kept by the encoder, medians over pairs of {len(idx)} images: {found}"


def middle_radius(largest: float) -> float:
    """The radius at which certified accuracy is shown where none was asked for: 0.5, or half of the largest one.

    The table of the field has 0.5 if radii reach from 0.5 to 4.
    """
    return 0.5 if 0.5 < largest <= 4 else float(f"{largest / 2:.2g}")


def summary(
    folder: Path,
    schedule: Schedule,
    derivation: Derivation,
    images: list[ImageCounts],
    certificates: Certificates | None,
    indices: range,
) -> str:
    """The results on the images `indices`, the path of the table, and what limits the radii."""
    if certificates is None:
        return "no certificates"
    wanted = np.array([image.idx in indices for image in images])
    labels, seconds = (np.array([getattr(i, name) for i in images])[wanted] for name in ("label", "seconds"))
    correct, radius = certificates.predict[wanted] == labels, certificates.radius[wanted]
    slack = max(image.slack for image in images)
    largest, shown = derivation.largest_radius(schedule, slack), middle_radius(derivation.largest_radius(schedule))
    there = correct & (radius >= shown)
    worst, number = worst_class(labels, there)
    acr, abstained = np.where(correct, radius, 0).mean(), certificates.abstain[wanted].mean()
    cost = f"{certificates.n[wanted].mean():,.0f} samples and {progress.duration(seconds.mean())} per image"
    lines = [
        f"{wanted.sum():,} images: certified accuracy {correct.mean():.3f}, {there.mean():.3f} at r = {shown:g} (worst "
        f"class, {number}: {worst:.3f}), average certified radius {acr:.4f} (at most {largest:.4f} with n = "
        f"{schedule.n:,}), abstained {abstained:.3f}, {cost}; at most {derivation.alpha * wanted.sum():.2g} invalid "
        "certificates are expected (alpha x images)",
        str(folder / "certificates.tsv"),
    ]
    if largest <= 0:
        settings = f"n={schedule.n} and alpha={derivation.alpha}"
        lines.append(f"note: with {settings} nothing is certified even if all samples agree; raise --config.certify.n")
    elif schedule.staged:
        fixed = derivation.largest_radius(make_schedule("fixed", schedule.n0, schedule.n, schedule.samples), slack)
        between = "; a radius says only which of the radii asked for it reaches" if derivation.radii else ""
        most = f"the largest radius is {largest:.4f} instead of {fixed:.4f} with the fixed schedule"
        shrink = f"radii near it shrink, radii below {0.85 * fixed:.4f} hardly do{between}"
        split = f"staged: alpha is split over {len(schedule.looks)} looks"
        split = "anytime: the bounds hold at every number of samples" if schedule.anytime else split
        lines.append(f"{split}, so {most}; {shrink}")
    return "\n".join(lines)
