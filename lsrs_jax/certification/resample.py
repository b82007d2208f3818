"""Re-samples randomly chosen images from their raw pixels and compares the counts with the ledgers (--recast)."""

import dataclasses
import math
import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax.certification import comparison, deterministic, fallback, fresh, ledger, scan
from lsrs_jax.certification.encode import Pipeline
from lsrs_jax.certification.reopened import reopen
from lsrs_jax.certification.smoothed import Certification, check_labels
from lsrs_jax.certification.store import Stored
from lsrs_jax.certification.table import read_table
from lsrs_jax.certification.target import TrainedTarget, make_sampler
from lsrs_jax.certification.verify import Verdict, check_dataset, check_encoder
from lsrs_jax.runtime import rng
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.format import PRNG
from lsrs_jax.runtime.progress import Progress, print_now
from lsrs_jax.smoothing.counts import Counts, ImageCounts
from lsrs_jax.smoothing.engine import Engine, Images
from lsrs_jax.smoothing.sampler import Sampler
from lsrs_jax.smoothing.status import Status

_LEVEL = 0.05  # probability that the chosen images miss the share of other samples that is printed
_SEGMENTS = 32  # of the fresh samples; their spread shows how images that share their noise vary together
_FEWEST = 10_000  # fresh samples of an image, if n is not smaller
_TOGETHER = 128  # samples of an image that are counted together; flips in both directions among them are not seen


def run(target: TrainedTarget, stored: Stored, count: int, verdict: Verdict) -> None:
    """Computes some images of a table again, compares, and prints the result; changes no file.

    Every call chooses `count` images (or all) at random, so that the author of the ledger could not know them. The
    `target` is from `target.target_of_certificates`, and the files of its folder were verified before. The `verdict`
    gets what was checked.

    Raises UserError naming an image whose slack is too small for its latent, or samples that the network did not give.

    **Guarantee**: for the chosen images, the tests of `comparison`, `scan` and `fresh` find no difference between the
    recorded counts and those that the checkpoint gives, neither under the noise of σ and seed nor under noise that the
    author of the folder could not know. How much may differ is measured here; of what the folder records, only the
    dtype of the head, which is part of the classifier that it certifies, and the noise, which the first comparison
    checks, have a part in it. The tests assume what `comparison` says about rounding on other machines. If nothing
    differs and a share q of the table has any sample of another origin, N chosen images would have shown it with
    probability at least 1 − (1 − q)^N.
    """
    if stored.identity.certificate == "deterministic":
        chosen = deterministic.check(target, count)
        check_dataset(target, verdict, chosen)
        checked = len(chosen)
        verdict.unchecked.pop("radii", None)
        if checked < verdict.certificates:
            verdict.beyond["others"] = f"the radii of the other {verdict.certificates - checked:,} images"
        verdict.checked.append(f"the radii of {checked:,} images, computed again")
        return
    folder, identity = target.folder, stored.identity
    certification = reopen(folder, target.config, stored)
    of_the_table = (stored.derivation or {}).get("votes")
    recorded = ledger.read(folder, certification.schedule, certification.num_classes, identity.run, of_the_table)
    check_labels(folder, recorded, target.dataset)
    known = read_table(folder / "certificates.tsv").idx.tolist()
    indices = sorted(np.random.default_rng().choice(known, min(count, len(known)), replace=False).tolist())
    check_dataset(target, verdict, np.array(indices))
    if missing := len(set(target.indices) - set(known)):
        print(f"note: {missing:,} of the {len(target.indices):,} images that were to be certified are not in the table")
    composed = fallback.load(target.config, target.dataset, identity.fallback)
    if composed and certification.fallback:
        composed.check(folder, target.dataset, np.array(indices), certification.fallback)
        verdict.checked.append(f"the answers of the fallback at {len(indices):,} images")
        verdict.beyond.pop("fallback", None)
    print(f"sampling {len(indices):,} of {len(known):,} images again; compiling encoder and head ...", flush=True)
    if (here := target.identity("smoothed").platform) != identity.platform:
        print(f"note: the folder says that it was made on {identity.platform!r}; this is {here!r}")
        target = _with_smallest_batch(target, len(indices))
    pipeline = Pipeline(target, identity.flags)
    identity.check_first_layer(pipeline.sampler)
    if "weights" in verdict.unchecked:  # of a network whose code --verify does not import
        check_encoder(pipeline.report, "the encoder", stored, verdict)
    chunks = list(pipeline.encoded(indices, {idx: recorded.images[idx].slack for idx in indices}))
    again = _same_noise(pipeline, certification, recorded, chunks, identity.seed or 0)
    old, new = ([counts.images[idx] for idx in indices] for counts in (recorded, again))
    rounding, under_fresh = _under_fresh_noise(target, pipeline, chunks, old, certification.schedule.n)
    try:
        _compare(certification, old, new, rounding, under_fresh)
    except ValueError as error:
        raise UserError(f"{folder}: {error}; the certificates are not of this checkpoint, sigma and seed") from error
    _print_differences(certification, old, new)
    verdict.beyond.pop("samples", None)
    verdict.checked.append(f"the samples of {len(indices):,} images, under their own and under fresh noise")
    if len(indices) == len(known):
        verdict.unchecked.pop("run", None)
        print("these are all images of the table")
        return
    verdict.beyond["others"] = f"the samples of the other {len(known) - len(indices):,} images"
    share = 1 - _LEVEL ** (1 / len(indices))
    differences = " beyond such differences" * (comparison.samples_moved(old, new) > 0)
    print(
        f"if more than {math.ceil(1000 * share) / 10:g}% of the table had samples of another origin{differences}, "
        f"these images would have shown it with {1 - _LEVEL:.0%} probability"
    )


def _with_smallest_batch(target: TrainedTarget, images: int) -> TrainedTarget:
    """The target with the smallest batch that suffices; the rounding of the head differs on this device anyway."""
    config = target.config.copy_and_resolve_references()
    most, samples = config.certify.tile
    config.certify.tile = (min(most, max(images, 2)), samples)
    return dataclasses.replace(target, config=config)


def _same_noise(
    pipeline: Pipeline, certification: Certification, recorded: Counts, chunks: list[Images], seed: int
) -> Counts:
    """Draws the samples of some images again, up to the look at which the ledger ends."""
    again = Counts(certification.schedule, certification.num_classes)

    def decided(images: list[ImageCounts]) -> np.ndarray:
        return np.array([image.reached == recorded.images[image.idx].reached for image in images])

    total = sum(len(images.idx) for images in chunks)
    status = Status(certification.schedule, total, print_now, lambda _, images: decided(images))
    engine = Engine(pipeline.sampler, rng.root_key(seed), again, decided, status)
    for images in chunks:
        engine.run(images)
    status.show()
    return again


def _under_fresh_noise(
    target: TrainedTarget, pipeline: Pipeline, chunks: list[Images], recorded: list[ImageCounts], n: int
) -> tuple[comparison.Rounding, fresh.Fresh]:
    """Counts of the candidates under noise that nobody could know, and how the dtype of the head changes them."""
    sampler = pipeline.sampler
    dtype, samples = target.config.certify.head_dtype, sampler.tile[1]
    other = "float32" if dtype == "bfloat16" else "bfloat16"
    head = target.model.for_certification(target.params, other)[1]
    rounded = make_sampler(target.config, head, sampler.latent_shape, **pipeline.flags)
    seed = jnp.asarray(np.frombuffer(secrets.token_bytes(8), np.uint32))
    key = sampler.keys(jax.random.wrap_key_data(seed, impl=PRNG))["estimation"]
    mean = int(np.mean([image.looks[-1].sum() for image in recorded]))
    blocks = max(1, _TOGETHER // samples)
    launches = -(-min(n, max(_FEWEST, mean)) // (blocks * samples * _SEGMENTS)) * _SEGMENTS
    candidates = np.array([image.counts["selection"].argmax() for image in recorded])
    progress, done, parts = Progress(len(recorded)), 0, []
    for chunk in chunks:
        for start in range(0, len(chunk.idx), sampler.tile[0]):
            part = slice(start, start + sampler.tile[0])
            before, after = (
                _per_launch(one, chunk.latents[part], chunk.idx[part], key, launches, blocks)
                for one in (sampler, rounded)
            )
            own = np.arange(before.shape[1])
            hits = before[:, own, candidates[done : done + len(own)]]
            shift = (after[:, own, candidates[done : done + len(own)]] - hits).sum(axis=0)
            flips = np.abs(after - before).sum(axis=(0, 2)) // 2
            parts.append((flips, shift, hits.reshape(_SEGMENTS, -1, len(own)).sum(axis=1).T))
            done += len(own)
            progress.show(done, lambda done=done: f"{done:>6,} of {len(recorded):,} images sampled under fresh noise")
    flips, shift, counts = (np.concatenate(found) for found in zip(*parts, strict=True))
    total = launches * blocks * samples
    return comparison.Rounding(flips, shift, total, dtype), fresh.Fresh(counts, total // _SEGMENTS)


def _per_launch(
    sampler: Sampler, latents: np.ndarray, ids: Any, key: jax.Array, launches: int, blocks: int
) -> np.ndarray:
    """Counts of every launch of some blocks, ``(launches, images, classes)``."""
    batch, total = sampler.put(latents, ids), launches * blocks * sampler.tile[1]
    spans = [(first * blocks, (first + 1) * blocks) for first in range(launches)]
    pending = [sampler.launch(batch, key, first, stop, total) for first, stop in spans]
    return np.stack([sampler.collect(launch, len(latents)) for launch in pending])


def _compare(
    certification: Certification,
    old: list[ImageCounts],
    new: list[ImageCounts],
    rounding: comparison.Rounding,
    under_fresh: fresh.Fresh,
) -> None:
    """Raises ValueError for the first test (of `comparison`, `scan` and `fresh`) that refuses the recorded counts."""
    if found := comparison.first_wrong(old, new, rounding):
        image, stream = old[found.row].idx, found.stream
        raise ValueError(
            f"image {image}: {found.moved:,} of its first {found.samples:,} {stream} samples are not from this "
            f"network, and rounding explains {found.allowed:,}"
        )
    lead = comparison.lead_gain(old, new, rounding)
    if lead.refused:
        raise ValueError(
            f"in the ledger the right classes lead their rivals by {lead.found:,.0f} samples more than now, and "
            f"rounding, which moves samples to either side, explains {lead.limit:,.0f}"
        )
    derivation = certification.derivation, certification.schedule
    radius = comparison.radius_gain(*derivation, old, new, rounding)
    if radius.refused:
        raise ValueError(
            f"the average certified radius of these images is {radius.found:.6f} larger than with the samples drawn "
            f"now, and rounding explains {radius.limit:.6f}"
        )
    scanned = scan.scan_gain(*derivation, old, new, rounding)
    if scanned.refused:
        raise ValueError(
            f"among images of similar radius the right classes have gained {scanned.found:.1f} standard errors, and "
            f"rounding, which moves samples to either side, explains {scanned.limit:.1f}"
        )
    if unlikely := fresh.first_unlikely(old, under_fresh, rounding):
        row, was, now = unlikely
        raise ValueError(
            f"image {old[row].idx}: its class has {was:.5f} of the samples in the ledger, and {now:.5f} of the samples "
            "under fresh noise: the samples in the ledger cannot be ordinary ones"
        )
    shared = certification.identity.noise == "shared"
    gain = fresh.fresh_gain(old, under_fresh, rounding, shared)
    if gain.refused:
        raise ValueError(
            f"in the ledger the right classes have {gain.found:,.0f} samples more than under fresh noise, and chance "
            f"and rounding explain {gain.limit:,.0f}: the noise of the seed favours this network"
        )
    print(f"under fresh noise: {under_fresh.total * len(old):,} samples; no test finds a difference")


def _print_differences(certification: Certification, old: list[ImageCounts], new: list[ImageCounts]) -> None:
    moved = comparison.samples_moved(old, new)
    total = sum(image.total for image in new)
    print(f"drawn again: {total:,} samples of {len(new):,} images (n0 included); {moved:,} differ")
    if moved:
        was, now = (certification.derivation.certificates(certification.schedule, images) for images in (old, new))
        print(
            "rounding on another machine explains this; with the samples drawn now "
            f"{(was.predict != now.predict).sum():,} predictions differ, the mean radius is {now.radius.mean():.6f} "
            f"instead of {was.radius.mean():.6f}, and no radius is more than "
            f"{max(0.0, (was.radius - now.radius).max()):.6f} smaller"
        )
