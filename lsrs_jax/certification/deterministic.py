"""Certificates of the classifier without noise: the margin of a linear head behind a Lipschitz encoder."""

import time

import numpy as np

from lsrs_jax.certification import store
from lsrs_jax.certification.margin import certified_margin, float64_slack
from lsrs_jax.certification.platform_check import check_encoder
from lsrs_jax.certification.table import format_columns, read_table
from lsrs_jax.certification.target import Target
from lsrs_jax.layers.lipschitz import Float64Encoder
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.progress import Progress, duration

_BATCH = 50


def run(target: Target) -> None:
    """Certifies the images of a target in one forward pass each, writes the table and prints a summary."""
    encoder, weights, bias = target.model.with_linear_head(target.params)
    identity, path = target.identity("deterministic"), target.folder / "certificates.json"
    record = store.past_sessions(path, identity) if path.exists() else []
    if not path.exists() and any(target.folder.glob("*.tsv")):
        raise UserError(f"{target.folder} holds another certification; use another --config.certify.name")
    _check_selection(target)
    print(encoder.report)
    dataset, indices = target.dataset, np.array(target.indices)
    print(f"{dataset.name} {dataset.split}: {len(indices):,} images, no noise", flush=True)
    encode = Float64Encoder(encoder, min(_BATCH, len(indices)))
    check_encoder(encoder, encode)
    start, session = time.monotonic(), store.new_session(len(indices))
    latents, norms = _encode(target, indices, encode)
    logits, lipschitz = latents @ weights + bias, encoder.report.constant
    _, reach = certified_margin(logits, weights, lipschitz=lipschitz)  # the radii without slack: the largest ones
    slack = float64_slack(encoder.report.rounding(norms + reach), latents, weights, bias, lipschitz * reach)
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
    store.write(target.folder, target.config, identity, encoder.report, [*record, session], {"bound": "margin"}, text)
    correct = predict == dataset.labels[indices]
    print(
        f"{len(indices):,} images: clean accuracy {correct.mean():.3f}, certified at 36/255 "
        f"{np.mean(correct & (radius >= 36 / 255)):.3f}, average certified radius "
        f"{np.where(correct, radius, 0).mean():.4f}, {duration(session['seconds'] / len(indices))} per image\n"
        f"{target.folder / 'certificates.tsv'}"
    )


def _check_selection(target: Target) -> None:
    """Certificates on disk are extended or repeated, never dropped."""
    path = target.folder / "certificates.tsv"
    left_out = set(read_table(path).idx) - set(target.indices) if path.exists() else ()
    if left_out:
        raise UserError(
            f"{path} holds {len(left_out):,} images outside certify.start, stop and step; choose a selection that "
            "includes them, or use another --config.certify.name"
        )


def _encode(target: Target, indices: np.ndarray, encode: Float64Encoder) -> tuple[np.ndarray, np.ndarray]:
    """Flat float64 latents and the norms of their images, with progress."""
    parts, norms, progress = [], [], Progress(len(indices))
    for start in range(0, len(indices), _BATCH):
        images = target.dataset.pixels(indices[start : start + _BATCH], np.float64)
        latents = encode(images)
        parts.append(latents.reshape(len(latents), -1))
        norms.append(np.linalg.norm(images.reshape(len(images), -1), axis=1))
        done = start + len(latents)
        if start == 0:  # the first batch compiles
            progress = Progress(len(indices), done)
        progress.show(done, lambda done=done: f"{done:>6,} of {len(indices):,} images")
    return np.concatenate(parts), np.concatenate(norms)
