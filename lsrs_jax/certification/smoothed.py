"""Certificates of the smoothed classifier: votes, a ledger of them, and what they prove."""

import functools
import time

import numpy as np

from lsrs_jax import config as configuration
from lsrs_jax.certification import folder
from lsrs_jax.certification.casting import Caster
from lsrs_jax.distributed import ALONE, devices
from lsrs_jax.errors import UserError
from lsrs_jax.keys import IMPLEMENTATION
from lsrs_jax.progress import duration
from lsrs_jax.smoothing import ledger as ledgers
from lsrs_jax.smoothing import schedule
from lsrs_jax.smoothing.noise import arithmetic
from lsrs_jax.smoothing.sweep import Status, Sweep
from lsrs_jax.smoothing.table import format_table

DERIVED = ("alpha", "bound", "radii", "epsilon")  # fields of `certify` on which no vote depends
_SECONDS_PER_DERIVATION = 60.0


def _plan(certify):
    return schedule.plan(certify.schedule, certify.n0, certify.n, certify.tile[1])


def identity_of_config(config):
    """What the votes depend on, as far as the configuration says it."""
    certify = config.certify
    return {
        "sigma": config.sigma,
        "seed": config.seed,
        "n0": certify.n0,
        "n": certify.n,
        "schedule": certify.schedule,
        "stages": list(_plan(certify).looks),
        "tile": list(certify.tile),
        "noise": certify.noise,
        "head_dtype": certify.head_dtype,
    }


def _terms(law, latent_shape):
    """What an arithmetic means for the certificates of latents of this shape."""
    return law.identity | {"sigma": law.sigma, "tau": law.tau(int(np.prod(latent_shape)))}


class Certification:
    """One folder: its identity, its ledger, and the certificates derived from it.

    Args:
      place: the folder.
      config: the configuration.
      identity: what makes two sets of votes comparable; a resume that differs in any of it is refused.
      lipschitz: the `LipschitzReport` behind the certificates as a dict.
      process: `distributed.Place`; the first one writes the certificates, each one its own votes.
    """

    def __init__(self, place, config, identity, lipschitz, process=ALONE):
        certify, law = config.certify, identity["arithmetic"]
        self.folder, self.config, self.identity, self.lipschitz = place, config, identity, lipschitz
        self.plan = _plan(certify)
        self.derivation = schedule.Derivation(
            law["sigma"],
            certify.alpha,
            certify.bound,
            lipschitz["constant"],
            law["tau"],
            tuple(certify.radii) or None,
            certify.epsilon,
        )
        self.process, self.settled = process, set()

    def ledger(self):
        """The open `Ledger`; its file is made if missing."""
        path, process = self.folder / ledgers.name(self.process.index), self.process
        meet = functools.partial(process.wait, "ledgers")
        return ledgers.Ledger(path, self.plan, self.identity["classes"], process.count, meet)

    def settle(self, tallies):
        """bool per tally, all at a look; remembers the settled ones."""
        found = self.derivation.settled(self.plan, tallies)
        self.settled |= {tally.idx for tally, yes in zip(tallies, found, strict=True) if yes}
        return found

    def check_charges(self, tallies):
        """Raises UserError for an image that is charged less than the least that any latent is."""
        law = self.identity["arithmetic"]
        latent = np.zeros((1, *self.lipschitz["output_shape"]))
        least = float(arithmetic(law["name"], law["sigma"]).slack(latent)[0])
        for tally in tallies:
            if tally.slack < least:
                raise UserError(
                    f"{self.folder}: image {tally.idx} is charged {tally.slack}, less than the rounding of its latent; "
                    "restore the ledger, or certify under another --config.certify.name"
                )

    def adopt(self, ledger):
        """Settles what other processes have brought to a look since."""
        ledger.refresh()
        waiting = [tally for idx, tally in ledger.tallies.items() if idx not in self.settled and ledger.at_a_look(idx)]
        if waiting:
            self.settle(waiting)

    def past_sessions(self):
        """The record of earlier sessions; refuses votes of another run. Without votes there is nothing to mix."""
        path = self.folder / "certificates.json"
        if not ledgers.has_rows(self.folder):
            if (self.folder / "certificates.tsv").exists():
                if path.exists():
                    folder.read_record(path, self.identity)
                raise UserError(
                    f"{self.folder} holds certificates but no votes; restore {ledgers.name('*')}, or use another "
                    "--config.certify.name"
                )
            return []
        if not path.exists():
            raise UserError(
                f"{self.folder} holds votes but no {path.name}; restore it, or use another --config.certify.name"
            )
        return folder.read_record(path, self.identity)

    def derive(self, ledger, record, chosen):
        """Writes certificates.tsv and certificates.json for the images `chosen`, which have reached a look.

        Returns:
          ``(tallies, certificates)``; certificates are None without any.
        """
        ledger.flush()  # no certificate without its votes on disk
        tallies = [ledger.tallies[idx] for idx in sorted(chosen)]
        self.check_charges(tallies)
        if not tallies:
            folder.write(self.folder, self.config, self.identity, self.lipschitz, record)
            return tallies, None
        certificates = self.derivation.certificates(self.plan, tallies)
        text = format_table(tallies, certificates, self.lipschitz["constant"])
        derivation = {"alpha": self.derivation.alpha, "bound": self.derivation.bound, "votes": ledger.digests()}
        if self.identity["schedule"] == "staged":
            derivation |= {"radii": self.derivation.radii, "epsilon": self.derivation.epsilon}
        folder.write(self.folder, self.config, self.identity, self.lipschitz, record, derivation, text)
        return tallies, certificates


def run(job, process, workdir, tick):
    """Samples what is missing in the ledgers, derives the certificates and prints a summary.

    Every process of the run calls this with the same job. Each takes its share of the images that are not settled, on
    its own devices: the noise of an image does not depend on who casts its votes.

    Args:
      job: `job.Job`.
      process: `distributed.Place`.
      workdir: `workdir.Workdir`.
      tick: called with every line of progress.
    """
    with process.together("the preparation of the votes"):
        certification, record, caster = _prepare(job, process)
    with certification.ledger() as ledger:
        with process.together("the ledgers"):
            check_labels(job.folder, ledger, job.dataset)
        at_a_look = [tally for idx, tally in ledger.tallies.items() if ledger.at_a_look(idx)]
        if at_a_look:
            certification.settle(at_a_look)
        pending = [idx for idx in job.indices if idx not in certification.settled]
        print(caster.report)
        print(_headline(job, certification, len(pending)), flush=True)
        if pending:
            _sample(job, workdir, certification, ledger, caster, pending, record, tick)
        if not process.leads:
            return
        tallies, certificates = certification.derive(ledger, record, certification.settled)
    _print_summary(job.folder, certification, tallies, certificates, job.indices)


def _prepare(job, process):
    """What votes need, tried out before any is cast: ``(certification, record, caster)``."""
    config = job.config
    encoder, head = job.model.for_certification(job.params, config.certify.head_dtype)
    law = arithmetic(config.certify.arithmetic, config.sigma)
    identity = job.identity("smoothed") | identity_of_config(config)
    identity |= {"prng": IMPLEMENTATION, "arithmetic": _terms(law, encoder.report.output_shape)}
    certification = Certification(job.folder, config, identity, encoder.report.to_dict(), process)
    record = certification.past_sessions()
    return certification, record, Caster(job, encoder, head)


def _headline(job, certification, pending):
    certify, plan, dataset = job.config.certify, certification.plan, job.dataset
    lines = [
        f"{dataset.name} {dataset.split}: {len(job.indices):,} images, {len(job.indices) - pending:,} of them done; "
        f"sigma {job.config.sigma}, n0 {certify.n0}, n {certify.n:,}, alpha {certify.alpha}, {certify.bound} bound, "
        f"{certify.arithmetic} arithmetic; {devices()}"
    ]
    if len(plan.looks) > 1:
        wanted = f"radii {', '.join(f'{r:g}' for r in certify.radii)}" if certify.radii else "the radius itself"
        lines.append(
            f"staged: {len(plan.looks)} looks from {plan.looks[0]:,} votes on, until {wanted} "
            f"{'are decided' if certify.radii else f'is known to {certify.epsilon:g} sigma / L'}"
        )
    return "\n".join(lines)


def check_labels(place, tallies, dataset):
    """Raises UserError unless the votes in a folder are of images with the labels of a dataset."""
    for tally in tallies.tallies.values():
        if tally.idx >= len(dataset) or tally.label != dataset.labels[tally.idx]:
            raise UserError(f"{place} does not fit the data: image {tally.idx} has another label in its votes")


def _sample(job, workdir, certification, ledger, caster, pending, record, tick):
    process, start = certification.process, time.monotonic()
    session, derived = folder.session(len(pending)), start
    share = pending[process.index :: process.count]

    def begin():
        """With the first votes, not before: a head that cannot be certified leaves nothing behind."""
        record.append(session)
        # Images that are settled already get the derivation of this session with the first write.
        certification.derive(ledger, record, certification.settled)

    def settled(tallies):
        nonlocal derived
        found = certification.settle(tallies)
        if process.leads and time.monotonic() - derived > _SECONDS_PER_DERIVATION:
            workdir.pull()
            certification.adopt(ledger)
            certification.derive(ledger, record, certification.settled)
            derived = time.monotonic()
        return found

    def say(line):
        tick()
        print(line if process.count == 1 else f"{line} (of this process's share)", flush=True)

    if process.count == 1:
        before = len(job.indices) - len(pending)
        status = Status(certification.plan, len(job.indices), before, say)
        sweep = Sweep(caster.votes, ledger, settled, status, begin)
    else:
        # It must be on disk what votes are of before any process writes one.
        with process.together("the first votes"):
            if process.leads:
                begin()
                workdir.push()
        status = Status(certification.plan, len(share), 0, say)
        sweep = Sweep(caster.votes, ledger, settled, status)
    charged = {idx: tally.slack for idx, tally in ledger.tallies.items()}
    for block in caster.blocks(share, charged):
        sweep.run(block)
    status.show()
    ledger.flush()
    workdir.push()
    process.wait("the votes")
    if process.leads:
        workdir.pull()
        certification.adopt(ledger)
    session["seconds"] = round(time.monotonic() - start, 3)


def from_counts(place, config):
    """Derives certificates anew from the votes in a folder: no model, no data, no forward pass.

    Raises:
      UserError: where the ledger cannot support what the configuration asks for.
    """
    certify, stored = config.certify, folder.of_place(place, "to derive from")
    if stored["identity"].get("certificate") != "smoothed" or certify.certificate != "smoothed":
        held = stored["identity"].get("certificate")
        wrong = f"{place} holds {held} ones" if held != "smoothed" else "leave --config.certify.certificate out"
        raise UserError(f"--from-counts is for smoothed certificates: {wrong}")
    certification = reopen(place, config, stored)
    if not ledgers.has_rows(place):
        raise UserError(f"{place} holds no votes; restore {ledgers.name('*')}")
    with certification.ledger() as ledger:
        chosen = [idx for idx in ledger.tallies if ledger.at_a_look(idx)]
        left_out = len(ledger.tallies) - len(chosen)
        indices = range(certify.start, certify.stop or max(chosen, default=0) + 1, certify.step)
        if not any(idx in indices for idx in chosen):
            raise UserError(
                f"no image of this selection in {place} has all its votes; run certify without --from-counts first"
            )
        tallies, certificates = certification.derive(ledger, stored["record"], chosen)
    print(f"alpha {certify.alpha}, {certify.bound} bound, from the votes of {len(chosen):,} images")
    if left_out:
        print(f"note: {left_out:,} images whose sampling was interrupted are left out; certify resumes them")
    _print_summary(place, certification, tallies, certificates, indices)


def reopen(place, config, stored):
    """The `Certification` of votes in a folder, from the content of its certificates.json.

    Raises:
      UserError: where they were cast under another configuration, or where numbers from which radii would follow
        contradict each other.
    """
    path, identity = place / "certificates.json", stored["identity"]
    wanted = identity_of_config(config) | {"arithmetic": config.certify.arithmetic}
    cast = {name: identity.get(name) for name in wanted} | {"arithmetic": identity["arithmetic"].get("name")}
    difference = configuration.first_difference(cast, wanted)
    if difference:
        name, old, new = difference
        raise UserError(
            f"the votes in {place} were cast with {name} {old!r}, not {new!r}: only alpha, bound, radii and "
            "epsilon can be derived anew; certify under another --config.certify.name"
        )
    own, claimed = (
        {"data": {name: one["data"][name] for name in ("name", "split", "size")}, "model": one["model"]}
        for one in (stored["config"], configuration.to_dict(config))
    )
    difference = configuration.first_difference(own, claimed)
    if difference:
        name, old, new = difference
        raise UserError(f"the votes in {place} were cast with {name} {old!r}, not {new!r}: leave that flag out")
    law = arithmetic(config.certify.arithmetic, config.sigma)
    if identity["arithmetic"] != _terms(law, stored["lipschitz"]["output_shape"]):
        raise UserError(
            f"{path} is damaged (its arithmetic is not that of the configuration and the latent); restore it, or use "
            "another --config.certify.name"
        )
    return Certification(place, config, identity, stored["lipschitz"])


def _print_summary(place, certification, tallies, certificates, indices):
    wanted = np.array([tally.idx in indices for tally in tallies])
    correct = (certificates.predict == [tally.label for tally in tallies])[wanted]
    radius, abstain = certificates.radius[wanted], certificates.abstain[wanted]
    seconds = np.array([tally.seconds for tally in tallies])[wanted]
    print(
        f"{wanted.sum():,} images: certified accuracy {correct.mean():.3f}, average certified radius "
        f"{np.where(correct, radius, 0).mean():.4f}, abstained {abstain.mean():.3f}, "
        f"{certificates.n[wanted].mean():,.0f} votes and {duration(seconds.mean())} per image\n"
        f"{place / 'certificates.tsv'}"
    )
    plan, derivation = certification.plan, certification.derivation
    slack = max(tally.slack for tally in tallies)
    largest = derivation.largest_radius(plan, slack)
    if largest <= 0:
        print(
            f"note: with n={plan.n} and alpha={derivation.alpha} even a unanimous vote certifies nothing; raise "
            "certify.n"
        )
    elif len(plan.looks) > 1:
        fixed = derivation.largest_radius(schedule.plan("fixed", plan.n0, plan.n, plan.samples), slack)
        print(
            f"staged: alpha is split over {len(plan.looks)} looks, so the largest radius is {largest:.4f} instead of "
            f"{fixed:.4f} with the fixed schedule; near it radii are lost, below {0.85 * fixed:.4f} hardly any"
            + ("; between the radii asked for, a radius says only which of them it reaches" if derivation.radii else "")
        )
