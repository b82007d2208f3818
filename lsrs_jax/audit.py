"""Attack the certificates of a workdir.

  python -m lsrs_jax.audit --workdir=runs/digits
  python -m lsrs_jax.audit --workdir=runs/digits --config.certify.name=full --images=100 --restarts=10

Every certificate is attacked inside its radius: by gradients (PGD through the smoothed classifier, from several random
starts), and by predictions alone (a decision-based attack). A flip is a point within the radius at which `predict`, at
the alpha of the certification and with noise that no attack has seen, returns another class. Beyond the radius the same
attacks look for the nearest flip of each image, which `report` draws as an empirical upper bound over the certified
curve. Writes audit.tsv and audit.json beside the certificates; the same command resumes. Exit code 1 where a
certificate was broken.
"""

if __name__ == "__main__":
    from lsrs_jax.cli import main

    main("audit")

import argparse
import math
import sys
from pathlib import Path

import numpy as np

from lsrs_jax import cli
from lsrs_jax.auditing.auditor import Auditor
from lsrs_jax.auditing.table import Attacked, Journal, Settings, read_audit
from lsrs_jax.certification.encode import make_sampler
from lsrs_jax.certification.store import Stored, read_folder
from lsrs_jax.certification.table import read_table
from lsrs_jax.certification.target import Target, target_of_certificates
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import digest_of, locked
from lsrs_jax.runtime.processes import cache_compilations, check_platform
from lsrs_jax.runtime.progress import Progress
from lsrs_jax.runtime.workdir import opened
from lsrs_jax.smoothing.confidence import MAX_SAMPLES


def _fractions(text: str) -> tuple[float, ...]:
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        found = (-1.0,)
    if not all(0 < fraction <= 1 for fraction in found):
        raise UserError(f"--fractions takes numbers in (0, 1] with commas between, got {text!r}")
    return found


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, Settings, list[str]]:
    parser = cli.parser("audit", __doc__)
    parser.add_argument(
        "--workdir", required=True, type=cli.workdir, help="folder of a training, certified; or gs://..."
    )
    parser.add_argument("--images", type=int, default=0, help="so many of the certificates, evenly; 0: all of them")
    parser.add_argument("--fractions", default="0.25,0.5,0.75,0.9,1", help="of each radius, where PGD looks inside it")
    parser.add_argument("--restarts", type=int, default=2, help="random starts of PGD per radius")
    parser.add_argument("--steps", type=int, default=20, help="of each attack")
    parser.add_argument("--samples", type=int, default=16, help="noise vectors per step or question")
    parser.add_argument("--votes", type=int, default=1000, help="samples of a prediction that judges an attack")
    options, rest = parser.parse_known_args(arguments)
    limits = {"images": 0, "restarts": 1, "steps": 1, "samples": 1, "votes": 1}
    for name, least in limits.items():
        if not least <= getattr(options, name) <= MAX_SAMPLES:
            raise UserError(f"--{name} must be a whole number from {least} to 2**27, got {getattr(options, name)}")
    fields = {name: getattr(options, name) for name in limits}
    return options, Settings(fractions=_fractions(options.fractions), **fields), rest


def run(arguments: list[str]) -> None:
    """The command; see the module's docstring."""
    cli.no_config_file("audit", arguments)
    options, settings, rest = _parse(arguments)
    check_platform()
    with opened(options.workdir) as workdir:
        _run(workdir.path, settings, rest)


def _run(workdir: Path, settings: Settings, rest: list[str]) -> None:
    asked = cli.config_of_training(workdir, rest)
    cli.only(workdir, asked, ("certify.name", "data.dir"), "audit")
    folder = workdir / "certify" / asked.certify.name
    stored, table = read_folder(folder, "to attack"), folder / "certificates.tsv"
    if stored.identity.certificate != "smoothed":
        raise UserError(f"{folder} holds {stored.identity.certificate} certificates; audit attacks smoothed ones")
    if not stored.derivation:
        raise UserError(f"{folder} holds votes but no certificates yet; let certify finish, or give its command again")
    if not table.exists() or stored.derivation["certificates"] != digest_of(table):
        raise UserError(f"the table in {folder} is not the one its certificates.json names; see certify --verify")
    alpha = stored.settings.certify.alpha
    least = math.ceil(1 - math.log2(0.99 * alpha))  # what the test of `predict` needs where all samples agree
    if settings.votes < least:
        raise UserError(f"--votes={settings.votes} can decide nothing at alpha {alpha}: {least} at least")
    cache_compilations()
    target = target_of_certificates(folder, stored, asked.data.dir)
    with locked(folder / ".audit.lock", f"auditing {folder}"):
        _audit(target, settings, stored, stored.derivation["certificates"])


def _audit(target: Target, settings: Settings, stored: Stored, digest: str) -> None:
    table, config = read_table(target.folder / "certificates.tsv"), target.config
    size = min(settings.images or len(table), len(table))
    rows = np.unique(np.linspace(0, len(table) - 1, size).astype(int))
    journal = Journal(target.folder, settings, digest)
    encoder, head = target.model.for_certification(target.params, config.certify.head_dtype)
    sampler = make_sampler(config, head, encoder.report.output_shape)
    levels = {"lipschitz": stored.lipschitz.constant, "alpha": config.certify.alpha}
    auditor = Auditor(encoder, head, sampler, settings=settings, seed=config.seed, **levels)
    left = len(rows) - len(journal.done)
    print(
        f"{len(rows):,} certificates, {left:,} of them to attack: {len(settings.fractions)} radii inside each, "
        f"{settings.restarts} starts of {settings.steps} steps with {settings.samples} samples; predictions by "
        f"{settings.votes:,} samples at alpha {config.certify.alpha}",
        flush=True,
    )
    progress, finished = None, 0
    for number, batch in enumerate(np.array_split(rows, -(-len(rows) // config.certify.tile[0]))):
        new = len(set(table.idx[batch].tolist()) - journal.done)
        if not new:
            continue
        images = target.dataset.pixels(table.idx[batch], np.float64)
        attacked = Attacked(table.idx[batch], table.label[batch], table.predict[batch], table.radius[batch])
        journal.append(attacked, auditor(images, attacked.predict, attacked.radius, number))
        finished += new
        progress = progress or Progress(left, finished)  # the first batch compiles
        progress.show(finished, lambda done=finished: f"{done:>6,} of {left:,} images")
    journal.finish()
    _conclude(journal.path)


def _conclude(path: Path) -> None:
    audit = read_audit(path)
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
