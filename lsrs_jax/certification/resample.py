"""Re-samples randomly chosen images from their raw pixels and compares the counts with the ledgers (--recast)."""

import dataclasses
import math
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from lsrs_jax.certification import ledger
from lsrs_jax.certification.encode import Pipeline
from lsrs_jax.certification.smoothed import Certification, check_labels, reopen
from lsrs_jax.certification.store import Stored
from lsrs_jax.certification.table import read_table
from lsrs_jax.certification.target import Target
from lsrs_jax.runtime import rng
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing.counts import Counts, ImageCounts
from lsrs_jax.smoothing.engine import Engine, Status

# Share of an image's samples whose class may change because the head rounds differently on another machine. Some
# samples join a class and some leave it, so that a count changes by about the square root of their number: by at most
# `_DEVIATIONS` times the root for an image, and `_TOGETHER` times the root for the candidates of all images together.
_TURNED = {"float32": 1e-5, "bfloat16": 1e-2}
_DEVIATIONS, _TOGETHER = 5, 4
# Share of an image's samples that another kind of device may move in the same direction: its kernels round
# intermediate numbers at other points, which in bfloat16 shifts the logits of an image.
_SHIFTED = {"float32": 0.0, "bfloat16": 0.05}
_LEVEL = 0.05  # probability that the chosen images miss the share of other samples that is printed


class _Difference(NamedTuple):
    """The difference between the counts of an image in the ledger and the counts drawn again."""

    moved: int  # samples of another class
    surplus: int  # estimation samples by which the candidate leads its strongest rival more than now


def run(target: Target, stored: Stored, count: int) -> None:
    """Re-samples some images of a table, compares, and prints the result; changes no file.

    Every call chooses `count` images (or all) at random, so that the author of the ledger could not know them. The
    `target` is from `target.target_of_certificates`, and the files of its folder were verified before.

    Raises UserError naming an image whose slack is too small for its latent, or samples that the network did not give.

    **Guarantee**: the counts of the chosen images are the counts that the checkpoint gives for them, under the noise of
    σ and seed, except for changes by the head's rounding on another machine: no more than `allowance` for an image and
    a stream, and over all images to either side. If nothing differs and a share q of the table has any sample of
    another origin, N chosen images would have shown it with probability at least 1 − (1 − q)^N.
    """
    folder, identity, head_dtype = target.folder, stored.identity, target.config.certify.head_dtype
    if identity.certificate != "smoothed":
        raise UserError(f"{folder} holds {identity.certificate} certificates, which are not computed from samples")
    certification = reopen(folder, target.config, stored)
    if identity.prng != rng.PRNG:
        raise UserError(f"{folder} holds samples of another generator: prng {identity.prng!r}")
    recorded = ledger.read(folder, certification.schedule, certification.num_classes)
    check_labels(folder, recorded, target.dataset)
    known = read_table(folder / "certificates.tsv").idx.tolist()
    indices = sorted(np.random.default_rng().choice(known, min(count, len(known)), replace=False).tolist())
    if missing := len(set(target.indices) - set(known)):
        print(f"note: {missing:,} of the {len(target.indices):,} images that were to be certified are not in the table")
    print(f"sampling {len(indices):,} of {len(known):,} images again", flush=True)
    here, there, where = target.identity("smoothed").platform, identity.platform, ""
    if elsewhere := here != there:
        target = _for_another_device(target, len(indices), here, there)
        where = f"; they were drawn on {there!r}, and now on {here!r}"
    pipeline = Pipeline(target, *target.model.for_certification(target.params, head_dtype))
    again, found = Counts(certification.schedule, certification.num_classes), dict[int, _Difference]()

    def decided(images: list[ImageCounts]) -> np.ndarray:
        try:
            for image in images:
                found[image.idx] = _compare(recorded.images[image.idx], image, head_dtype, elsewhere)
        except ValueError as error:
            raise UserError(f"{folder}: {error}{where}") from error
        return np.array([len(image.looks) == len(recorded.images[image.idx].looks) for image in images])

    status = Status(certification.schedule, len(indices), 0, lambda line: print(line, flush=True))
    engine = Engine(pipeline.sampler, rng.root_key(target.config.seed), again, decided, status)
    for images in pipeline.encoded(indices, {idx: recorded.images[idx].slack for idx in indices}):
        engine.run(images)
    status.show()
    surplus, spread = _together(found.values())
    if surplus > _TOGETHER * spread:
        leads = f"in the ledger the certified classes lead their rivals by {surplus:,} samples more than now"
        raise UserError(f"{folder}: {leads}, nearly all to one side; rounding moves them to either side{where}")
    _print_differences(certification, recorded, again, sum(difference.moved for difference in found.values()))
    if len(indices) == len(known):
        print("these are all images of the table")
        return
    share, differences = 1 - _LEVEL ** (1 / len(indices)), " beyond such differences" * any(map(any, found.values()))
    print(
        f"if more than {math.ceil(1000 * share) / 10:g}% of the table had samples of another origin{differences}, "
        f"these images would have shown it with {1 - _LEVEL:.0%} probability"
    )


def _for_another_device(target: Target, images: int, here: str, there: str) -> Target:
    """The target with the smallest batch that suffices; the rounding of the head differs on this device anyway."""
    config = target.config.copy_and_resolve_references()
    (most, samples), head_dtype = config.certify.tile, config.certify.head_dtype
    config.certify.tile = (min(most, max(images, 2)), samples)
    if share := _SHIFTED[head_dtype]:
        differ = f"up to {share:.0%} of an image's samples may differ; on {there!r} only a few may"
        print(f"note: {there!r} and {here!r} round a head in {head_dtype} differently: {differ}")
    return dataclasses.replace(target, config=config)


def allowance(samples: int, head_dtype: str, elsewhere: bool = False) -> int:
    """The number of an image's samples in one stream that may differ on another machine.

    `elsewhere` says whether that machine has another kind of device.
    """
    shifted = math.ceil(_SHIFTED[head_dtype] * samples) if elsewhere else 0
    return shifted + math.ceil(_DEVIATIONS * math.sqrt(_TURNED[head_dtype] * samples))


def _compare(recorded: ImageCounts, again: ImageCounts, head_dtype: str, elsewhere: bool = False) -> _Difference:
    """Compares the counts of an image in the ledger with its new counts; ValueError for more than `allowance`."""
    moved, selected, look = 0, recorded.counts["selection"], len(again.looks) - 1
    now, then = again.looks[look], recorded.looks[look]
    pairs = {"selection": (selected, again.counts["selection"]), "estimation": (then, now)}
    for stream, (found, drawn) in pairs.items():
        samples, change = int(drawn.sum()), int(np.abs(found - drawn).sum()) // 2
        if change > allowance(samples, head_dtype, elsewhere):
            worst = int(np.abs(found - drawn).argmax())
            of_image = f"image {again.idx}: {change:,} of its {samples:,} {stream} samples are not from this network"
            of_class = f"class {worst} has {found[worst]:,} in the ledger, {drawn[worst]:,} now"
            why = "the certificates are not of this checkpoint, sigma and seed"
            raise ValueError(f"{of_image}: {of_class}; {why}")
        moved += change
    candidate, surplus = int(selected.argmax()), then - now
    rival = int(np.where(np.arange(len(now)) == candidate, -1, now).argmax())
    return _Difference(moved, int(surplus[candidate] - surplus[rival]))


def _together(differences: Collection[_Difference]) -> tuple[int, float]:
    """The sum of all surpluses, and its standard deviation if each had a random sign."""
    surplus = np.array([difference.surplus for difference in differences], np.float64)
    return int(surplus.sum()), float(np.sqrt(np.sum(surplus**2)))


def _print_differences(certification: Certification, recorded: Counts, again: Counts, moved: int) -> None:
    total = sum(image.total for image in again.images.values())
    print(f"drawn again: {total:,} samples of {len(again.images):,} images; {moved:,} differ")
    if moved:
        pairs = ([counts.images[idx] for idx in sorted(again.images)] for counts in (recorded, again))
        old, new = (certification.derivation.certificates(certification.schedule, images) for images in pairs)
        print(
            "rounding on another machine explains this; with the samples drawn now "
            f"{(old.predict != new.predict).sum():,} predictions differ, the mean radius is {new.radius.mean():.6f} "
            f"instead of {old.radius.mean():.6f}, and no radius is more than "
            f"{max(0.0, (old.radius - new.radius).max()):.6f} smaller"
        )
