"""Attack the certificates of a workdir.

  python -m lsrs_jax.audit --workdir=runs/digits
  python -m lsrs_jax.audit --workdir=runs/digits --config.certify.name=full --images=100 --restarts=10

Every certificate is attacked inside its radius, by gradients (PGD through the smoothed classifier, from several random
starts) and by votes alone (a decision-based attack); a flip is a point within the radius at which `predict`, at the
alpha of the certification and with noise that no attack has seen, returns another class. Beyond the radius the same
attacks look for the nearest flip of each image: what `report` draws as the empirical upper bound over the certified
curve. Writes audit.tsv and audit.json beside the certificates; the same command resumes. Exit code 1 where a
certificate was broken.
"""

import hashlib
import math
import sys
import time

import numpy as np

from lsrs_jax import command
from lsrs_jax import workdir as workdirs
from lsrs_jax.auditing import table as tables
from lsrs_jax.auditing.auditor import Auditor, Settings
from lsrs_jax.certification import folder
from lsrs_jax.certification import job as jobs
from lsrs_jax.certification.casting import vote_loop
from lsrs_jax.distributed import cache_compilations, check_platform
from lsrs_jax.errors import UserError
from lsrs_jax.files import locked
from lsrs_jax.progress import Progress
from lsrs_jax.smoothing.confidence import MAX_VOTES
from lsrs_jax.smoothing.table import read_table

_SECONDS_PER_REPORT = 2.0


def _fractions(text):
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        found = (-1.0,)
    if not all(0 < fraction <= 1 for fraction in found):
        raise UserError(f"--fractions takes numbers in (0, 1] with commas between, got {text!r}")
    return found


def _parse(arguments):
    parser = command.parser("audit", __doc__)
    parser.add_argument(
        "--workdir", required=True, type=command.workdir, help="folder of a training, certified; or gs://..."
    )
    parser.add_argument("--images", type=int, default=0, help="so many of the certificates, evenly; 0: all of them")
    parser.add_argument("--fractions", default="0.25,0.5,0.75,0.9,1", help="of each radius, where PGD looks inside it")
    parser.add_argument("--restarts", type=int, default=2, help="random starts of PGD per radius")
    parser.add_argument("--steps", type=int, default=20, help="of each attack")
    parser.add_argument("--samples", type=int, default=16, help="noise vectors per step or question")
    parser.add_argument("--votes", type=int, default=1000, help="of a prediction that judges an attack")
    options, rest = parser.parse_known_args(arguments)
    limits = {"images": 0, "restarts": 1, "steps": 1, "samples": 1, "votes": 1}
    for name, least in limits.items():
        if not least <= getattr(options, name) <= MAX_VOTES:
            raise UserError(f"--{name} must be a whole number from {least} to 2**27, got {getattr(options, name)}")
    fields = {name: getattr(options, name) for name in limits}
    return options, Settings(fractions=_fractions(options.fractions), **fields), rest


def run(arguments):
    """The command; see the module's docstring."""
    command.no_config_file("audit", arguments)
    options, settings, rest = _parse(arguments)
    check_platform()
    with workdirs.opened(options.workdir) as workdir:
        _run(workdir.path, options, settings, rest)


def _run(workdir, options, settings, rest):
    asked = command.config_of_training(workdir, rest)
    command.only(workdir, asked, ("certify.name", "data.dir"), "audit")
    place = workdir / "certify" / asked.certify.name
    stored = folder.of_place(place, "to attack")
    if stored["identity"]["certificate"] != "smoothed":
        raise UserError(f"{place} holds {stored['identity']['certificate']} certificates; audit attacks smoothed ones")
    text = (place / "certificates.tsv").read_bytes() if (place / "certificates.tsv").exists() else b""
    if not stored["derivation"]:
        raise UserError(f"{place} holds votes but no certificates yet; let certify finish, or give its command again")
    if stored["derivation"]["certificates"] != hashlib.sha256(text).hexdigest():
        raise UserError(f"the table in {place} is not the one its certificates.json names; see certify --verify")
    alpha = stored["config"]["certify"]["alpha"]
    least = math.ceil(1 - math.log2(0.99 * alpha))  # the test of `predict` at a unanimous vote
    if settings.votes < least:
        raise UserError(f"--votes={settings.votes} can decide nothing at alpha {alpha}: {least} at least")
    cache_compilations()
    job = jobs.of_certificates(place, stored, asked.data.dir)
    with locked(place / ".audit.lock", f"auditing {place}"):
        _audit(job, settings, stored)


def _audit(job, settings, stored):
    table = read_table(job.folder / "certificates.tsv")
    size = min(settings.images or len(table), len(table))
    rows = np.unique(np.linspace(0, len(table) - 1, size).astype(int))
    journal = tables.Journal(job.folder, settings, stored["derivation"]["certificates"])
    auditor = _auditor(job, settings, stored["lipschitz"]["constant"])
    left = len(rows) - len(journal.done)
    print(
        f"{len(rows):,} certificates, {left:,} of them to attack: {len(settings.fractions)} radii inside each, "
        f"{settings.restarts} starts of {settings.steps} steps with {settings.samples} samples; predictions by "
        f"{settings.votes:,} votes at alpha {job.config.certify.alpha}",
        flush=True,
    )
    progress, finished, shown = None, 0, time.monotonic()
    for number, batch in enumerate(np.array_split(rows, -(-len(rows) // job.config.certify.tile[0]))):
        new = len(set(table.idx[batch].tolist()) - journal.done)
        if not new:
            continue
        images = job.dataset.pixels(table.idx[batch], np.float64)
        journal.append(table, batch, auditor(images, table.predict[batch], table.radius[batch], number))
        finished += new
        if progress is None:  # the first batch compiles
            progress = Progress(left, finished)
        elif time.monotonic() - shown > _SECONDS_PER_REPORT:
            shown = time.monotonic()
            print(f"{finished:>6,} of {left:,} images  {progress.left(finished)} left", flush=True)
    journal.finish()
    _conclude(journal.path)


def _auditor(job, settings, lipschitz):
    certify, seed = job.config.certify, job.config.seed
    encoder, head = job.model.for_certification(job.params, certify.head_dtype)
    votes = vote_loop(job.config, head, encoder.report.output_shape)
    return Auditor(encoder, head, votes, lipschitz=lipschitz, alpha=certify.alpha, settings=settings, seed=seed)


def _conclude(path):
    audit = tables.read(path)
    certified, broken, right = audit.predict >= 0, np.flatnonzero(audit.flips > 0), audit.correct
    print(
        f"{audit.pairs.sum():,} points inside {certified.sum():,} certified balls: {audit.flips.sum():,} flips, "
        f"{audit.undecided.sum():,} undecided (`predict` abstained)"
    )
    if right.any():
        flip = np.median(audit.distance[right])
        nearest = (
            f"lies at {flip:.4f} in the median" if np.isfinite(flip) else "was found for no more than half of them"
        )
        print(
            f"of {right.sum():,} images that are right without an attack, the nearest flip {nearest}; their certified "
            f"radius is {np.median(audit.radius[right]):.4f}"
        )
    print(path)
    if len(broken):
        first = broken[0]
        print(
            f"error: the certificates do not hold: {len(broken):,} of {certified.sum():,} were broken; image "
            f"{audit.idx[first]} is certified as {audit.predict[first]} to {audit.radius[first]:.4f} and flips at "
            f"{audit.distance[first]:.4f}; by chance a share of alpha of them may fail",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    command.main(run)
