"""Whether the votes in a folder are those of its network: of some images they are cast again, from the pixels on."""

import math

import jax
import numpy as np

from lsrs_jax.certification.casting import Caster
from lsrs_jax.certification.smoothed import check_labels, reopen
from lsrs_jax.errors import UserError
from lsrs_jax.smoothing import ledger as ledgers
from lsrs_jax.smoothing.sweep import Status, Sweep
from lsrs_jax.smoothing.table import read_table
from lsrs_jax.smoothing.tally import Tallies

# Votes of an image that another machine's rounding of the head may move: the share of them, and so many in any case.
_ROUNDING = {"float32": 1e-4, "bfloat16": 1e-2}
_FEW = 3
_CHARGE = 1e-12  # relative: what two machines may differ in the charge of an image
_LEVEL = 0.05


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

    **Guarantee**: every vote of the images drawn is that of the checkpoint on the image, under the noise of σ and seed,
    but for the share of `_ROUNDING` that the head's rounding on another machine may move. Where a share q of a table
    does not follow from its network, N images drawn show it with probability at least 1 − (1 − q)^N.
    """
    if stored["identity"]["certificate"] != "smoothed":
        raise UserError(f"{job.folder} holds {stored['identity']['certificate']} certificates; they come from no votes")
    certification = reopen(job.folder, job.config, stored)
    recorded = ledgers.read(ledgers.files(job.folder), certification.plan, certification.identity["classes"])
    check_labels(job.folder, recorded, job.dataset)
    known = read_table(job.folder / "certificates.tsv").idx.tolist()
    indices = sorted(np.random.default_rng().choice(known, min(count, len(known)), replace=False).tolist())
    print(f"casting the votes of {len(indices):,} of {len(known):,} images again", flush=True)
    caster = Caster(job, *job.model.for_certification(job.params, job.config.certify.head_dtype))
    again = Tallies(certification.plan, certification.identity["classes"])
    differ = dict.fromkeys(indices, 0)

    def settled(tallies):
        for tally in tallies:
            differ[tally.idx] = _compare(job, recorded.tallies[tally.idx], tally)
        return [len(tally.looks) == len(recorded.tallies[tally.idx].looks) for tally in tallies]

    status = Status(certification.plan, len(indices), 0, lambda line: print(line, flush=True))
    sweep = Sweep(caster.votes, again, settled, status)
    for block in caster.blocks(indices, {}):
        _check_charges(job.folder, recorded, block)
        sweep.run(block)
    status.show()
    _conclude(certification, again, differ, len(known))


def _check_charges(place, recorded, block):
    for idx, charge in zip(block.idx, block.slack, strict=True):
        found = recorded.tallies[idx].slack
        if found < charge * (1 - _CHARGE):
            raise UserError(
                f"{place}: image {idx} is charged {found} in the ledger, less than the {charge} of its latent: its "
                "radius is too large; certify again under another --config.certify.name"
            )


def _compare(job, recorded, tally):
    """How many votes of an image, at the newest look of its tally, are not those of the ledger; refuses too many."""
    look = len(tally.looks) - 1
    pairs = (
        (recorded.counts["selection"], tally.counts["selection"]),
        (recorded.looks[look], tally.looks[look]),
    )
    votes = sum(int(cast.sum()) for _, cast in pairs)
    moved = sum(int(np.abs(found - cast).sum()) // 2 for found, cast in pairs)
    if moved > max(_FEW, _ROUNDING[job.config.certify.head_dtype] * votes):
        found, cast = max(pairs, key=lambda pair: np.abs(pair[0] - pair[1]).max())
        worst = int(np.abs(found - cast).argmax())
        raise UserError(
            f"{job.folder}: of the {votes:,} votes for image {tally.idx} {moved:,} are not those of the network: class "
            f"{worst} has {found[worst]:,} in the ledger, {cast[worst]:,} cast again; the certificates are not of this "
            "checkpoint, sigma and seed"
        )
    return moved


def _conclude(certification, again, differ, total):
    votes = sum(int(counts.sum()) for tally in again.tallies.values() for counts in tally.counts.values())
    moved, images = sum(differ.values()), len(differ)
    print(f"cast again: {votes:,} votes of {images:,} images; {moved:,} differ")
    if moved:
        here = f"{jax.default_backend()} {jax.local_devices()[0].device_kind}"
        print(f"(as the rounding of a head may; certified on {certification.identity['platform']}, here on {here})")
    if images == total:
        print("these are all images of the table")
        return
    share = 1 - _LEVEL ** (1 / images)
    print(
        f"had more than {math.ceil(1000 * share) / 10:g}% of the table another origin, these images would have shown "
        f"it with {1 - _LEVEL:.0%} probability"
    )
