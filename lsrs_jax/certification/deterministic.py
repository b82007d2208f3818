"""Certificates of the classifier without noise: the margin of a linear head behind a Lipschitz encoder."""

import time

import numpy as np

from lsrs_jax.certification import OTHER_NAME, store
from lsrs_jax.certification.encode import encode_batches
from lsrs_jax.certification.margin import certified_margin, float64_slack
from lsrs_jax.certification.platform_check import check_encoder
from lsrs_jax.certification.table import read_table
from lsrs_jax.certification.target import Target
from lsrs_jax.layers.lipschitz import Float64Encoder
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.progress import duration

_BATCH = 50


def run(target: Target) -> None:
    """Certifies the images of a target in one forward pass each, writes the table and prints a summary."""
    encoder, weights, bias = target.model.with_linear_head(target.params)
    identity = target.identity("deterministic")
    document, table = target.folder / "certificates.json", target.folder / "certificates.tsv"
    if not document.exists() and any(target.folder.glob("*.tsv")):
        raise UserError(f"{target.folder} holds another certification; {OTHER_NAME}")
    record = store.past_sessions(document, identity) if document.exists() else []
    if left_out := set(read_table(table).idx) - set(target.indices) if table.exists() else ():
        outside = f"{len(left_out):,} images outside certify.start, stop and step"
        raise UserError(f"{table} holds {outside}; choose a selection that includes them, or {OTHER_NAME}")
    print(encoder.report)
    dataset, indices = target.dataset, np.array(target.indices)
    print(f"{dataset.name} {dataset.split}: {len(indices):,} images, no noise", flush=True)
    encode = Float64Encoder(encoder, min(_BATCH, len(indices)))
    check_encoder(encoder, encode)
    start, session = time.monotonic(), store.new_session(len(indices))
    batches = zip(*encode_batches(dataset, indices, encode, _BATCH), strict=True)
    latents, norms = (np.concatenate(parts) for parts in batches)
    latents = latents.reshape(len(latents), -1)
    logits, lipschitz = latents @ weights + bias, encoder.report.constant
    _, reach = certified_margin(logits, weights, lipschitz=lipschitz)  # without slack, the radii are largest
    slack = float64_slack(encoder.report.rounding(norms + reach), latents, weights, bias, lipschitz * reach)
    predict, radius = certified_margin(logits, weights, lipschitz=lipschitz, slack=slack)
    session["seconds"] = round(time.monotonic() - start, 3)
    labels, seconds = dataset.labels[indices], session["seconds"] / len(indices)
    columns = {"idx": indices, "label": labels, "predict": predict, "radius": radius, "time": seconds, "n": 0}
    text = store.format_columns(columns | {"lipschitz": lipschitz, "slack": slack})
    store.write(target.folder, target.config, identity, encoder.report, [*record, session], {"bound": "margin"}, text)
    correct = predict == labels
    certified, acr = np.mean(correct & (radius >= 36 / 255)), np.where(correct, radius, 0).mean()
    print(
        f"{len(indices):,} images: clean accuracy {correct.mean():.3f}, certified at 36/255 {certified:.3f}, average "
        f"certified radius {acr:.4f}, {duration(seconds)} per image\n{table}"
    )
