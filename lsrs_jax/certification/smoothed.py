"""Certificates of the smoothed classifier: samples, their ledgers, and the table that is derived from them."""

import functools
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from lsrs_jax.certification import ledger, store
from lsrs_jax.certification.encode import Pipeline
from lsrs_jax.certification.identity import Identity, arithmetic_facts, sampling_facts, schedule_of
from lsrs_jax.certification.table import format_table
from lsrs_jax.certification.target import Target
from lsrs_jax.config import config_to_dict
from lsrs_jax.data import Dataset, Photos
from lsrs_jax.layers.lipschitz import LipschitzReport
from lsrs_jax.runtime.documents import first_difference
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.processes import ALONE, Process, devices
from lsrs_jax.runtime.progress import duration
from lsrs_jax.runtime.rng import root_key
from lsrs_jax.runtime.types import Config
from lsrs_jax.runtime.workdir import Workdir
from lsrs_jax.smoothing.arithmetic import make_arithmetic
from lsrs_jax.smoothing.certificates import Certificates
from lsrs_jax.smoothing.counts import Counts, ImageCounts
from lsrs_jax.smoothing.derivation import Derivation
from lsrs_jax.smoothing.engine import Engine, Status
from lsrs_jax.smoothing.schedule import make_schedule

DERIVED = ("alpha", "bound", "radii", "epsilon")  # fields of `certify` on which no sample depends
_SECONDS_PER_DERIVATION = 60.0


class Certification:
    """One folder: its identity, its ledgers, and the certificates derived from them.

    Args:
      identity: of the run; a resumption that differs in any of it is refused.
      lipschitz: the proof of the Lipschitz constant.
      process: the first one writes the certificates, each one its own ledger.
    """

    def __init__(
        self, folder: Path, config: Config, identity: Identity, lipschitz: LipschitzReport, process: Process = ALONE
    ) -> None:
        certify, arithmetic = config.certify, identity.arithmetic or {}
        self.folder, self.config, self.identity, self.lipschitz = folder, config, identity, lipschitz
        self.schedule, self.num_classes = schedule_of(config), identity.classes or 0
        self.derivation = Derivation(
            arithmetic["sigma"],
            certify.alpha,
            certify.bound,
            lipschitz.constant,
            arithmetic["tau"],
            tuple(certify.radii) or None,
            certify.epsilon,
        )
        self.process, self.decided_images = process, set[int]()

    def open_ledger(self) -> ledger.Ledger:
        """The open ledger of this process; its file is made if missing."""
        path, process = self.folder / ledger.name(self.process.index), self.process
        meet = functools.partial(process.wait, "ledgers")
        return ledger.Ledger(path, self.schedule, self.num_classes, process.count, meet)

    def decided(self, images: list[ImageCounts]) -> np.ndarray:
        """Whether images that are at a look are decided; remembers those that are."""
        found = self.derivation.decided(self.schedule, images)
        self.decided_images |= {image.idx for image, yes in zip(images, found, strict=True) if yes}
        return found

    def check_slack(self, images: Collection[ImageCounts]) -> None:
        """Raises UserError for an image with less slack than the rounding of any latent costs."""
        arithmetic = make_arithmetic(self.config.certify.arithmetic, self.config.sigma)
        least = float(arithmetic.slack(np.zeros((1, *self.lipschitz.output_shape)))[0])
        for image in images:
            if image.slack < least:
                raise UserError(
                    f"{self.folder}: image {image.idx} is charged {image.slack}, less than the rounding of its latent; "
                    "restore the ledger, or certify under another --config.certify.name"
                )

    def adopt(self, counts: ledger.Ledger) -> None:
        """Decides images that other processes have brought to a look since."""
        counts.refresh()
        waiting = [i for idx, i in counts.images.items() if idx not in self.decided_images and counts.at_a_look(idx)]
        if waiting:
            self.decided(waiting)

    def past_sessions(self) -> list[dict[str, Any]]:
        """The record of earlier sessions; refuses samples of another run. Without samples there is nothing to mix."""
        path = self.folder / "certificates.json"
        if not ledger.has_rows(self.folder):
            if (self.folder / "certificates.tsv").exists():
                if path.exists():
                    store.past_sessions(path, self.identity)
                raise UserError(
                    f"{self.folder} holds certificates but no votes; restore {ledger.name('*')}, or use another "
                    "--config.certify.name"
                )
            return []
        if not path.exists():
            raise UserError(
                f"{self.folder} holds votes but no {path.name}; restore it, or use another --config.certify.name"
            )
        return store.past_sessions(path, self.identity)

    def derive(
        self, counts: ledger.Ledger, record: list[dict[str, Any]], chosen: Collection[int]
    ) -> tuple[list[ImageCounts], Certificates | None]:
        """Writes certificates.tsv and certificates.json for the images `chosen`, which have reached a look.

        Returns:
          ``(counts, certificates)`` of these images; certificates are None without any.
        """
        counts.flush()  # no certificate without its samples on disk
        images = [counts.images[idx] for idx in sorted(chosen)]
        self.check_slack(images)
        if not images:
            store.write(self.folder, self.config, self.identity, self.lipschitz, record)
            return images, None
        certificates = self.derivation.certificates(self.schedule, images)
        text = format_table(images, certificates, self.lipschitz.constant)
        derivation = {"alpha": self.derivation.alpha, "bound": self.derivation.bound, "votes": counts.digests()}
        if self.identity.schedule == "staged":
            derivation |= {"radii": self.derivation.radii, "epsilon": self.derivation.epsilon}
        store.write(self.folder, self.config, self.identity, self.lipschitz, record, derivation, text)
        return images, certificates


def run(target: Target, process: Process, workdir: Workdir, tick: Callable[[], None]) -> None:
    """Draws the samples that are missing in the ledgers, derives the certificates and prints a summary.

    Every process of the run calls this with the same target. Each takes its share of the undecided images, on its own
    devices: the noise of an image does not depend on the process that draws it.

    Args:
      tick: called with every line of progress.
    """
    with process.together("the preparation of the samples"):
        certification, record, pipeline = _prepare(target, process)
    with certification.open_ledger() as counts:
        with process.together("the ledgers"):
            check_labels(target.folder, counts, target.dataset)
        at_a_look = [image for idx, image in counts.images.items() if counts.at_a_look(idx)]
        if at_a_look:
            certification.decided(at_a_look)
        pending = [idx for idx in target.indices if idx not in certification.decided_images]
        print(pipeline.report)
        print(_headline(target, certification, len(pending)), flush=True)
        if pending:
            _sample(target, workdir, certification, counts, pipeline, pending, record, tick)
        if not process.leads:
            return
        images, certificates = certification.derive(counts, record, certification.decided_images)
    if certificates is not None:
        _print_summary(target.folder, certification, images, certificates, target.indices)


def _prepare(target: Target, process: Process) -> tuple[Certification, list[dict[str, Any]], Pipeline]:
    """What sampling needs, tried out before any sample is drawn: ``(certification, record, pipeline)``."""
    config = target.config
    encoder, head = target.model.for_certification(target.params, config.certify.head_dtype)
    arithmetic = make_arithmetic(config.certify.arithmetic, config.sigma)
    identity = target.identity("smoothed").sampled(config, arithmetic, encoder.report.output_shape)
    certification = Certification(target.folder, config, identity, encoder.report, process)
    return certification, certification.past_sessions(), Pipeline(target, encoder, head)


def _headline(target: Target, certification: Certification, pending: int) -> str:
    certify, schedule, dataset = target.config.certify, certification.schedule, target.dataset
    line = (
        f"{dataset.name} {dataset.split}: {len(target.indices):,} images, {len(target.indices) - pending:,} of them "
        f"done; sigma {target.config.sigma}, n0 {certify.n0}, n {certify.n:,}, alpha {certify.alpha}, "
        f"{certify.bound} bound, {certify.arithmetic} arithmetic; {devices()}"
    )
    if not schedule.staged:
        return line
    until = f"is known to {certify.epsilon:g} sigma / L"
    if certify.radii:
        until = f"{', '.join(f'{r:g}' for r in certify.radii)} are decided"
    wanted = "radii" if certify.radii else "the radius itself"
    return f"{line}\nstaged: {len(schedule.looks)} looks from {schedule.looks[0]:,} samples on, until {wanted} {until}"


def check_labels(folder: Path, counts: Counts, dataset: Dataset | Photos) -> None:
    """Raises UserError unless the rows in a folder are of images with the labels of a data set."""
    for image in counts.images.values():
        if image.idx >= len(dataset) or image.label != dataset.labels[image.idx]:
            raise UserError(f"{folder} does not fit the data: image {image.idx} has another label in its votes")


def _sample(
    target: Target,
    workdir: Workdir,
    certification: Certification,
    counts: ledger.Ledger,
    pipeline: Pipeline,
    pending: list[int],
    record: list[dict[str, Any]],
    tick: Callable[[], None],
) -> None:
    process, start = certification.process, time.monotonic()
    session, derived = store.new_session(len(pending)), start
    share = pending[process.index :: process.count]

    def begin() -> None:
        """Called with the first samples, not before: a head that cannot be certified leaves nothing behind."""
        record.append(session)
        # Images that are decided already get the derivation of this session with the first write.
        certification.derive(counts, record, certification.decided_images)

    def decided(images: list[ImageCounts]) -> np.ndarray:
        nonlocal derived
        found = certification.decided(images)
        if process.leads and time.monotonic() - derived > _SECONDS_PER_DERIVATION:
            workdir.pull()
            certification.adopt(counts)
            certification.derive(counts, record, certification.decided_images)
            derived = time.monotonic()
        return found

    def say(line: str) -> None:
        tick()
        print(line if process.count == 1 else f"{line} (of this process's share)", flush=True)

    total, before, first = len(target.indices), len(target.indices) - len(pending), begin
    if process.count > 1:
        # The identity must be on disk before any process writes a sample.
        with process.together("the first samples"):
            if process.leads:
                begin()
                workdir.push()
        total, before, first = len(share), 0, lambda: None
    status = Status(certification.schedule, total, before, say)
    engine = Engine(pipeline.sampler, root_key(target.config.seed), counts, decided, status, first)
    for images in pipeline.encoded(share, {idx: image.slack for idx, image in counts.images.items()}):
        engine.run(images)
    status.show()
    counts.flush()
    workdir.push()
    process.wait("the samples")
    if process.leads:
        workdir.pull()
        certification.adopt(counts)
    session["seconds"] = round(time.monotonic() - start, 3)


def from_counts(folder: Path, config: Config) -> None:
    """Derives certificates anew from the ledgers in a folder: no model, no data, no forward pass.

    Raises:
      UserError: where the ledgers cannot support what the configuration asks for.
    """
    certify, stored = config.certify, store.read_folder(folder, "to derive from")
    held = stored.identity.certificate
    if held != "smoothed" or certify.certificate != "smoothed":
        wrong = f"{folder} holds {held} ones" if held != "smoothed" else "leave --config.certify.certificate out"
        raise UserError(f"--from-counts is for smoothed certificates: {wrong}")
    certification = reopen(folder, config, stored)
    if not ledger.has_rows(folder):
        raise UserError(f"{folder} holds no votes; restore {ledger.name('*')}")
    with certification.open_ledger() as counts:
        chosen = [idx for idx in counts.images if counts.at_a_look(idx)]
        left_out = len(counts.images) - len(chosen)
        indices = range(certify.start, certify.stop or max(chosen, default=0) + 1, certify.step)
        if not any(idx in indices for idx in chosen):
            raise UserError(
                f"no image of this selection in {folder} has all its samples; run certify without --from-counts first"
            )
        images, certificates = certification.derive(counts, stored.record, chosen)
    print(f"alpha {certify.alpha}, {certify.bound} bound, from the samples of {len(chosen):,} images")
    if left_out:
        print(f"note: {left_out:,} images whose sampling was interrupted are left out; certify resumes them")
    if certificates is not None:
        _print_summary(folder, certification, images, certificates, indices)


def reopen(folder: Path, config: Config, stored: store.Stored) -> Certification:
    """The `Certification` of the ledgers in a folder, from its certificates.json.

    Raises:
      UserError: where the samples were drawn under another configuration, or where numbers from which radii follow
        contradict each other.
    """
    path, identity, certify = folder / "certificates.json", stored.identity, config.certify
    facts = identity.arithmetic or {}
    wanted = sampling_facts(config) | {"arithmetic": certify.arithmetic}
    drawn = {name: getattr(identity, name) for name in wanted} | {"arithmetic": facts.get("name")}
    if difference := first_difference(drawn, wanted):
        name, old, new = difference
        raise UserError(
            f"the votes in {folder} were cast with {name} {old!r}, not {new!r}: only alpha, bound, radii and "
            "epsilon can be derived anew; certify under another --config.certify.name"
        )
    own, claimed = (
        {"data": {name: one["data"][name] for name in ("name", "split", "size")}, "model": one["model"]}
        for one in (config_to_dict(stored.settings), config_to_dict(config))
    )
    if difference := first_difference(own, claimed):
        name, old, new = difference
        raise UserError(f"the votes in {folder} were cast with {name} {old!r}, not {new!r}: leave that flag out")
    arithmetic = make_arithmetic(certify.arithmetic, config.sigma)
    if facts != arithmetic_facts(arithmetic, stored.lipschitz.output_shape):
        raise UserError(
            f"{path} is damaged (its arithmetic is not that of the configuration and the latent); restore it, or use "
            "another --config.certify.name"
        )
    return Certification(folder, config, identity, stored.lipschitz)


def _print_summary(
    folder: Path,
    certification: Certification,
    images: list[ImageCounts],
    certificates: Certificates,
    indices: Collection[int],
) -> None:
    wanted = np.array([image.idx in indices for image in images])
    correct = (certificates.predict == [image.label for image in images])[wanted]
    radius, abstain = certificates.radius[wanted], certificates.abstain[wanted]
    seconds = np.array([image.seconds for image in images])[wanted]
    print(
        f"{wanted.sum():,} images: certified accuracy {correct.mean():.3f}, average certified radius "
        f"{np.where(correct, radius, 0).mean():.4f}, abstained {abstain.mean():.3f}, "
        f"{certificates.n[wanted].mean():,.0f} samples and {duration(seconds.mean())} per image\n"
        f"{folder / 'certificates.tsv'}"
    )
    schedule, derivation = certification.schedule, certification.derivation
    slack = max(image.slack for image in images)
    largest = derivation.largest_radius(schedule, slack)
    if largest <= 0:
        print(
            f"note: with n={schedule.n} and alpha={derivation.alpha} nothing is certified even where all samples "
            "agree; raise certify.n"
        )
    elif schedule.staged:
        fixed = derivation.largest_radius(make_schedule("fixed", schedule.n0, schedule.n, schedule.samples), slack)
        between = "; between the radii asked for, a radius says only which of them it reaches"
        print(
            f"staged: alpha is split over {len(schedule.looks)} looks, so the largest radius is {largest:.4f} instead "
            f"of {fixed:.4f} with the fixed schedule; near it radii are lost, below {0.85 * fixed:.4f} hardly any"
            + (between if derivation.radii else "")
        )
