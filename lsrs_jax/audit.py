"""Attack the certificates of a workdir.

  python -m lsrs_jax.audit --workdir=runs/digits
  python -m lsrs_jax.audit --workdir=runs/digits --images=100 --restarts=10
  python -m lsrs_jax.audit --workdir=runs/digits --config.certify.name=full

The audit attacks every certificate inside its radius: by gradients (PGD through the smoothed classifier, from several
random starts), and by predictions alone (a decision-based attack). A flip is a point within the radius at which
`predict` returns another class; it uses the alpha of the certification and noise that no attack has seen. Beyond the
radius the same attacks look for the nearest flip of each image. `report` draws these flips as an empirical upper bound
over the certified curve, and shows them beside the images. The audit writes audit.tsv, audit.json and the points of
the nearest flips (flips/*.npy) beside the certificates; the same command resumes.
The exit code is 1 if a certificate was broken.
"""

if __name__ == "__main__":
    from lsrs_jax.cli import main

    main("audit")

import sys
from pathlib import Path

import numpy as np

from lsrs_jax import cli
from lsrs_jax.auditing.auditor import Auditor, attack_batches
from lsrs_jax.auditing.table import Attacked, Journal, Settings, attacked_rows, check_votes, read_audit
from lsrs_jax.certification import fallback
from lsrs_jax.certification.store import Stored, read_folder
from lsrs_jax.certification.table import read_table
from lsrs_jax.certification.target import TrainedTarget, target_of_certificates
from lsrs_jax.flags import config_of_training, given
from lsrs_jax.models.custom import allowing
from lsrs_jax.runtime import files, processes
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.progress import print_now
from lsrs_jax.runtime.rng import pinned
from lsrs_jax.runtime.workdir import opened
from lsrs_jax.smoothing.confidence import MAX_SAMPLES

_NUMBERS = {  # flag: default, least value, meaning
    "images": (0, 0, "number of certificates to attack, evenly spaced; 0: all of them"),
    "restarts": (2, 1, "random starts of PGD per radius"),
    "steps": (20, 1, "steps of each attack"),
    "samples": (16, 1, "noise vectors per step or question"),
    "votes": (1000, 1, "samples of a prediction that judges an attack"),
}


def run(arguments: list[str]) -> None:
    """The command; see the module's docstring."""
    parser = cli.parser("audit", __doc__, ("certify.name", "data.dir"), "--workdir=DIR [--images=N] [...]")
    parser.add_argument("--workdir", required=True, type=cli.workdir, help="folder of a training, or gs://...")
    shares = cli.checked(
        cli.numbers, lambda found: all(0 < share <= 1 for share in found), "numbers in (0, 1], as 0.5,1"
    )
    help_text = "PGD looks at these shares of each radius"
    parser.add_argument("--fractions", type=shares, default="0.25,0.5,0.75,0.9,1", help=help_text)
    for name, (default, least, meaning) in _NUMBERS.items():
        words = f"a whole number from {least} to 2**27"
        number = cli.checked(int, lambda value, least=least: least <= value <= MAX_SAMPLES, words)
        parser.add_argument(f"--{name}", type=number, default=default, help=meaning)
    cli.add_allow_code(parser)
    options, rest = parser.parse_known_args(arguments)
    settings = Settings(**{name: getattr(options, name) for name in Settings._fields})
    processes.check_platform()
    with pinned(), allowing(options.allow_code), opened(options.workdir) as workdir:
        _run(workdir.path, settings, rest)


def _run(workdir: Path, settings: Settings, rest: list[str]) -> None:
    asked = config_of_training(workdir, rest, "audit", ("certify.name", "data.dir", "certify.fallback"))
    folder = workdir / "certify" / asked.certify.name
    stored, table = read_folder(folder, "to attack"), folder / "certificates.tsv"
    if stored.identity.certificate != "smoothed":
        raise UserError(f"{folder} holds {stored.identity.certificate} certificates; audit attacks smoothed ones")
    if not stored.derivation:
        raise UserError(
            f"{folder} holds samples but no certificates yet; let certify finish, or give its command again"
        )
    if not table.exists() or stored.derivation["certificates"] != files.digest_of(table):
        raise UserError(f"the table in {folder} is not the one its certificates.json names; see certify --verify")
    alpha = stored.settings.certify.alpha
    check_votes(settings, alpha)
    processes.cache_compilations()
    target = target_of_certificates(folder, stored, given(rest, asked, "data.dir"))
    target.config.certify.fallback = given(rest, asked, "certify.fallback") or target.config.certify.fallback
    composed = fallback.load(target.config, target.dataset, stored.identity.fallback)
    with files.locked(folder / ".audit.lock", f"auditing {folder}"):
        journal = Journal(folder, settings, stored.derivation["certificates"])
        _attack(target, settings, stored, journal, composed)
        journal.finish()
        _conclude(journal.path)


def _attack(
    target: TrainedTarget, settings: Settings, stored: Stored, journal: Journal, composed: fallback.Fallback | None
) -> None:
    table, config = read_table(target.folder / "certificates.tsv"), target.config
    rows = attacked_rows(settings.images, len(table))
    left = len(rows) - len(journal.done)
    print(
        f"{len(rows):,} certificates, {left:,} of them to attack: {len(settings.fractions)} radii inside each, "
        f"{settings.restarts} starts of {settings.steps} steps with {settings.samples} samples; predictions by "
        f"{settings.votes:,} samples at alpha {config.certify.alpha}; compiling the attacks ...",
        flush=True,
    )
    encoder, head = target.parts
    sampler = target.sampler(**stored.identity.flags)
    stored.identity.check_first_layer(sampler)
    levels = {"lipschitz": stored.lipschitz.constant, "alpha": config.certify.alpha}
    whole = {"seed": stored.identity.seed or 0, "fallback": composed and composed.classifier}
    auditor = Auditor(encoder, head, sampler, settings=settings, **whole, **levels)
    columns = Attacked(*(getattr(table, name) for name in Attacked._fields))
    batch = config.certify.tile[0]

    def read(idx: np.ndarray) -> np.ndarray:
        return target.dataset.read(idx, np.float64)[0]

    for attacked, found in attack_batches(auditor, columns, rows, read, batch, journal.done, print_now):
        journal.append(attacked, found)


def _conclude(path: Path) -> None:
    audit = read_audit(path)
    certified, broken, right = audit.predict >= 0, np.flatnonzero(audit.flips > 0), audit.correct
    found = f"{audit.flips.sum():,} flips, {audit.undecided.sum():,} undecided (`predict` abstained)"
    print(f"{audit.pairs.sum():,} points inside {certified.sum():,} certified balls: {found}")
    if right.any():
        flip, nearest = np.median(audit.distance[right]), "was found for no more than half of them"
        if np.isfinite(flip):
            nearest = f"lies at {flip:.4f} in the median"
        radius = f"their certified radius is {np.median(audit.radius[right]):.4f}"
        print(f"of {right.sum():,} images that are right without an attack, the nearest flip {nearest}; {radius}")
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
