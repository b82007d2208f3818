"""Certificates of the classifier without noise: the margin of a linear head behind a Lipschitz encoder."""

import time

import numpy as np

from lsrs_jax import selfcheck
from lsrs_jax.certification import folder
from lsrs_jax.errors import UserError
from lsrs_jax.margin import certified_margin, float64_slack
from lsrs_jax.materialize import Float64Encoder
from lsrs_jax.progress import Progress, duration
from lsrs_jax.smoothing.table import format_columns, read_table

_BATCH = 50
_SECONDS_PER_REPORT = 2.0


def run(job):
    """Certifies the images of `job` in one forward pass each, writes the table and prints a summary."""
    encoder, weights, bias = job.model.with_linear_head(job.params)
    identity = job.identity("deterministic")
    path = job.folder / "certificates.json"
    record = folder.read_record(path, identity) if path.exists() else []
    if not path.exists() and any(job.folder.glob("*.tsv")):
        raise UserError(f"{job.folder} holds another certification; use another --config.certify.name")
    _check_selection(job)
    print(encoder.report)
    dataset, indices = job.dataset, np.array(job.indices)
    print(f"{dataset.name} {dataset.split}: {len(indices):,} images, no noise", flush=True)
    encode = Float64Encoder(encoder, min(_BATCH, len(indices)))
    selfcheck.check_encoder(encoder, encode)
    start, session = time.monotonic(), folder.session(len(indices))
    latents, norms = _encode(dataset, indices, encode)
    logits, lipschitz = latents @ weights + bias, encoder.report.constant
    _, uncharged = certified_margin(logits, weights, lipschitz=lipschitz)  # what is charged only shortens them
    rounding = encoder.report.rounding(norms + uncharged)
    slack = float64_slack(rounding, latents, weights, bias, lipschitz * uncharged)
    predict, radius = certified_margin(logits, weights, lipschitz=lipschitz, slack=slack)
    session["seconds"] = round(time.monotonic() - start, 3)
    text = format_columns(
        {
            "idx": indices,
            "label": dataset.labels[indices],
            "predict": predict,
            "radius": radius,
            "time": np.full(len(indices), session["seconds"] / len(indices)),
            "n": np.zeros(len(indices), int),
            "lipschitz": np.full(len(indices), lipschitz),
            "slack": slack,
        }
    )
    report, record = encoder.report.to_dict(), [*record, session]
    folder.write(job.folder, job.config, identity, report, record, {"bound": "margin"}, text)
    correct = predict == dataset.labels[indices]
    print(
        f"{len(indices):,} images: clean accuracy {correct.mean():.3f}, certified at 36/255 "
        f"{np.mean(correct & (radius >= 36 / 255)):.3f}, average certified radius "
        f"{np.where(correct, radius, 0).mean():.4f}, {duration(session['seconds'] / len(indices))} per image\n"
        f"{job.folder / 'certificates.tsv'}"
    )


def _check_selection(job):
    """Certificates on disk are extended or repeated, never dropped."""
    path = job.folder / "certificates.tsv"
    left_out = set(read_table(path).idx) - set(job.indices) if path.exists() else ()
    if left_out:
        raise UserError(
            f"{path} holds {len(left_out):,} images outside certify.start, stop and step; choose a selection that "
            "includes them, or use another --config.certify.name"
        )


def _encode(dataset, indices, encode):
    """Flat float64 latents and the norms of their images, with progress."""
    parts, norms, progress, shown = [], [], Progress(len(indices)), time.monotonic()
    for start in range(0, len(indices), _BATCH):
        images = dataset.pixels(indices[start : start + _BATCH], np.float64)
        latents = encode(images)
        parts.append(latents.reshape(len(latents), -1))
        norms.append(np.linalg.norm(images.reshape(len(images), -1), axis=1))
        if start == 0:  # the first batch compiles
            progress = Progress(len(indices), len(latents))
        elif time.monotonic() - shown > _SECONDS_PER_REPORT:
            shown, done = time.monotonic(), start + len(latents)
            print(f"{done:>6,} of {len(indices):,} images  {progress.left(done)} left", flush=True)
    return np.concatenate(parts), np.concatenate(norms)
