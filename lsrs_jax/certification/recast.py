"""Whether the votes in a folder are those of its network: of some images they are cast again, from the pixels on."""

import copy
import dataclasses
import math
from typing import NamedTuple

import numpy as np

from lsrs_jax.certification.casting import Caster
from lsrs_jax.certification.smoothed import check_labels, reopen
from lsrs_jax.errors import UserError
from lsrs_jax.keys import IMPLEMENTATION
from lsrs_jax.smoothing import ledger as ledgers
from lsrs_jax.smoothing.sweep import Status, Sweep
from lsrs_jax.smoothing.table import read_table
from lsrs_jax.smoothing.tally import Tallies

# Share of an image's votes that the rounding of a head on another machine may turn. It turns them to either side, so
# that counts change by about the root of their number: by `_DEVIATIONS` of it at most for an image, and by `_TOGETHER`
# of it at most for the candidates of all images together.
_TURNED = {"float32": 1e-5, "bfloat16": 1e-2}
# Share of an image's votes that another kind of device may turn to one and the same side: its kernels round
# intermediate numbers elsewhere, which in bfloat16 shifts the logits of an image.
_SHIFTED = {"float32": 0.0, "bfloat16": 0.05}
_DEVIATIONS = 5
_TOGETHER = 4
_LEVEL = 0.05


class _Difference(NamedTuple):
    """Between the votes of an image in the ledger and those cast again."""

    moved: int  # votes for another class
    surplus: int  # of the ledger's candidate over its strongest rival, among the estimation votes


def run(job, stored, count):
    """Casts the votes of some images of a table again and compares them; changes nothing.

    The images are drawn anew with every call, so that who wrote the ledger could not know them. Prints what was seen.

    Args:
      job: `job.of_certificates`; the files of its folder were verified.
      stored: content of certificates.json.
      count: how many images; all of the table where it has no more.

    Raises:
      UserError: naming an image whose charge is smaller than that of its latent, or the votes that are not those of the
        network.

    **Guarantee**: the counts of the images drawn are those of the checkpoint on the image, under the noise of σ and
    seed, but for what the head's rounding on another machine may change: no more than `allowance` for an image and a
    purpose, and over the images to either side. Where nothing differs and a share q of the table has any vote of
    another origin, N images drawn had shown it with probability at least 1 − (1 − q)^N.
    """
    if stored["identity"]["certificate"] != "smoothed":
        raise UserError(f"{job.folder} holds {stored['identity']['certificate']} certificates; they come from no votes")
    certification = reopen(job.folder, job.config, stored)
    if certification.identity.get("prng") != IMPLEMENTATION:
        raise UserError(f"{job.folder} holds votes of another generator: prng {certification.identity.get('prng')!r}")
    recorded = ledgers.read(ledgers.files(job.folder), certification.plan, certification.identity["classes"])
    check_labels(job.folder, recorded, job.dataset)
    known = read_table(job.folder / "certificates.tsv").idx.tolist()
    indices = sorted(np.random.default_rng().choice(known, min(count, len(known)), replace=False).tolist())
    missing = len(set(job.indices) - set(known))
    if missing:
        print(f"note: {missing:,} of the {len(job.indices):,} images that were to be certified are not in the table")
    print(f"casting the votes of {len(indices):,} of {len(known):,} images again", flush=True)
    here, there = job.identity("smoothed")["platform"], certification.identity["platform"]
    elsewhere, head_dtype = here != there, job.config.certify.head_dtype
    where = f"; they were cast on {there!r}, and now on {here!r}" if elsewhere else ""
    if elsewhere:
        # Another batch of the head rounds elsewhere too, and rows of a tile that hold no image cost as much as others.
        config = copy.deepcopy(job.config)
        images, samples = config.certify.tile
        config.certify.tile = (min(images, max(len(indices), 2)), samples)
        job = dataclasses.replace(job, config=config)
        if _SHIFTED[head_dtype]:
            print(
                f"note: {there!r} and {here!r} round a head in {head_dtype} in other places: "
                f"{_SHIFTED[head_dtype]:.0%} of an image's votes may differ; on the kind of device that cast them few "
                "may"
            )
    caster = Caster(job, *job.model.for_certification(job.params, head_dtype))
    again = Tallies(certification.plan, certification.identity["classes"])
    found = {}

    def settled(tallies):
        try:
            for tally in tallies:
                found[tally.idx] = _compare(recorded.tallies[tally.idx], tally, head_dtype, elsewhere)
        except ValueError as error:
            raise UserError(f"{job.folder}: {error}{where}") from error
        return [len(tally.looks) == len(recorded.tallies[tally.idx].looks) for tally in tallies]

    status = Status(certification.plan, len(indices), 0, lambda line: print(line, flush=True))
    sweep = Sweep(caster.votes, again, settled, status)
    for block in caster.blocks(indices, {idx: recorded.tallies[idx].slack for idx in indices}):
        sweep.run(block)
    status.show()
    surplus, spread = _together(found.values())
    if surplus > _TOGETHER * spread:
        raise UserError(
            f"{job.folder}: in the ledger the certified classes lead their rivals by {surplus:,} votes more than are "
            f"cast now, nearly all to the same side, where rounding turns votes to either side{where}"
        )
    _conclude(certification, recorded, again, found)
    if len(indices) == len(known):
        print("these are all images of the table")
        return
    share, differences = 1 - _LEVEL ** (1 / len(indices)), " beyond such differences" * any(map(any, found.values()))
    print(
        f"had more than {math.ceil(1000 * share) / 10:g}% of the table votes of another origin{differences}, these "
        f"images would have shown it with {1 - _LEVEL:.0%} probability"
    )


def allowance(votes, head_dtype, elsewhere=False):
    """By how many of so many votes the counts of an image may differ on another machine.

    Args:
      votes: of an image, for one purpose.
      head_dtype: in what the head computes.
      elsewhere: whether it is another kind of device.
    """
    shifted = math.ceil(_SHIFTED[head_dtype] * votes) if elsewhere else 0
    return shifted + math.ceil(_DEVIATIONS * math.sqrt(_TURNED[head_dtype] * votes))


def _compare(recorded, tally, head_dtype, elsewhere=False):
    """The `_Difference` of an image at the newest look of its tally.

    Raises:
      ValueError: for more than `allowance`.
    """
    moved, look = 0, len(tally.looks) - 1
    pairs = {
        "selection": (recorded.counts["selection"], tally.counts["selection"]),
        "estimation": (recorded.looks[look], tally.looks[look]),
    }
    for purpose, (found, cast) in pairs.items():
        votes, change = int(cast.sum()), int(np.abs(found - cast).sum()) // 2
        if change > allowance(votes, head_dtype, elsewhere):
            worst = int(np.abs(found - cast).argmax())
            raise ValueError(
                f"of the {votes:,} {purpose} votes for image {tally.idx} {change:,} are not those of the network: "
                f"class {worst} has {found[worst]:,} in the ledger, {cast[worst]:,} cast again; the certificates are "
                "not of this checkpoint, sigma and seed"
            )
        moved += change
    candidate = int(recorded.counts["selection"].argmax())
    found, cast = pairs["estimation"]
    rival = int(np.where(np.arange(len(cast)) == candidate, -1, cast).argmax())
    change = found - cast
    return _Difference(moved, int(change[candidate] - change[rival]))


def _together(differences):
    """The candidates' surplus over all images, and how large it would be about if each had either sign."""
    surplus = np.array([difference.surplus for difference in differences], np.float64)
    return int(surplus.sum()), float(np.sqrt(np.sum(surplus**2)))


def _conclude(certification, recorded, again, found):
    tallies = [again.tallies[idx] for idx in sorted(again.tallies)]
    votes = sum(int(counts.sum()) for tally in tallies for counts in tally.counts.values())
    moved = sum(difference.moved for difference in found.values())
    print(f"cast again: {votes:,} votes of {len(tallies):,} images; {moved:,} differ")
    if moved:
        kept = [recorded.tallies[tally.idx] for tally in tallies]
        old, new = (certification.derivation.certificates(certification.plan, each) for each in (kept, tallies))
        print(
            "by rounding, as it may on another machine; with the votes cast now "
            f"{(old.predict != new.predict).sum():,} predictions are others, and radii {new.radius.mean():.6f} in the "
            f"mean instead of {old.radius.mean():.6f}, {max(0.0, (old.radius - new.radius).max()):.6f} smaller at most"
        )
