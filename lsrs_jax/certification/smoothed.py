"""Certificates of the smoothed classifier: draws samples, writes them to ledgers, and derives the table from them."""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lsrs_jax.certification import OTHER_NAME, fallback, ledger, store, summary
from lsrs_jax.certification.encode import Pipeline
from lsrs_jax.certification.identity import Identity, schedule_of
from lsrs_jax.certification.inputs import Inputs
from lsrs_jax.certification.table import LAST_DIGITS, read_table
from lsrs_jax.certification.target import Target
from lsrs_jax.data import Dataset
from lsrs_jax.layers.lipschitz import LipschitzReport
from lsrs_jax.runtime import rng
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.format import FORMAT
from lsrs_jax.runtime.processes import ALONE, Process
from lsrs_jax.runtime.progress import Update
from lsrs_jax.runtime.types import Config
from lsrs_jax.runtime.workdir import Workdir
from lsrs_jax.smoothing.arithmetic import make_arithmetic
from lsrs_jax.smoothing.composition import Composed
from lsrs_jax.smoothing.counts import Counts, ImageCounts
from lsrs_jax.smoothing.derivation import Certificates, Derivation
from lsrs_jax.smoothing.engine import Engine, Images
from lsrs_jax.smoothing.sampler import Sampler
from lsrs_jax.smoothing.settings import FLAGS
from lsrs_jax.smoothing.status import Status

DERIVED = ("alpha", "bound", "radii", "epsilon")  # fields of config.certify on which no sample depends
_SECONDS_PER_DERIVATION = 60.0
Say = Callable[[str], object]
Found = tuple[list[ImageCounts], Certificates | None]  # the images of a table, by index, and their certificates


class Certification:
    """One folder: its identity, its ledgers, and the certificates derived from them.

    Each process writes its own ledger; the first process also writes the certificates. `record` has one entry per
    session, `decided_images` the indices of the images that are known to be decided. Radii follow the `rule` of a
    format. `say` receives notes, as lines of text.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        identity: Identity,
        lipschitz: LipschitzReport,
        process: Process = ALONE,
        rule: int = FORMAT,
        say: Say = print,
    ) -> None:
        certify, arithmetic = config.certify, identity.arithmetic or {}
        self.folder, self.config, self.identity, self.lipschitz = folder, config, identity, lipschitz
        self.schedule, self.num_classes = schedule_of(config), identity.classes or 0
        settings = {"lipschitz": lipschitz.constant, "radii": tuple(certify.radii) or None, "epsilon": certify.epsilon}
        settings |= {"sigma": arithmetic["sigma"], "tau": arithmetic["tau"]}
        self.derivation = Derivation(alpha=certify.alpha, bound=certify.bound, rule=rule, **settings)
        self.fallback: fallback.Answers | None = None
        self.inputs: Inputs | None = None  # of images that came in batches
        self.process, self.record, self.decided_images = process, list[dict[str, Any]](), set[int]()
        self._say = say
        self.stored: store.Stored | None = None  # certificates.json of the session before

    def take_fallback(self, answers: fallback.Answers | None) -> None:
        """Derives the certificates of a composition from now on, if there are answers of a fallback."""
        if answers is not None:
            settings = {field.name: getattr(self.derivation, field.name) for field in dataclasses.fields(Derivation)}
            self.fallback, self.derivation = answers, Composed(**settings, answers=answers.by_image)

    def open_ledger(self, lost: bool = False) -> ledger.Ledger:
        """Opens the ledger of this process; its file is made if missing.

        Raises UserError if the samples behind the last table have changed; `lost` is that of `ledger.check_recorded`.
        """
        path = self.folder / ledger.name(self.process.index)
        opened = ledger.Ledger(path, self.schedule, self.num_classes, self.identity.run, self.process)
        try:
            derivation = (self.stored and self.stored.derivation) or {}
            if shorter := ledger.check_recorded(self.folder, derivation.get("votes"), lost):
                names = " and ".join(str(path) for path in shorter)
                self._say(f"note: {names} lost samples from which certificates were derived; the rest is compared")
                self._compare_rest(opened, self.stored)
        except UserError:
            opened.close()
            raise
        return opened

    def _compare_rest(self, counts: Counts, stored: Any) -> None:
        """Raises UserError if samples that are left of a shortened ledger do not give the certificates of the table."""
        path = self.folder / "certificates.tsv"
        if not path.exists():
            return
        from lsrs_jax.certification.reopened import reopen  # which imports this module

        table, derivation = read_table(path), reopen(self.folder, stored.settings, stored).derivation
        derivation = dataclasses.replace(derivation, rule=stored.format)
        n = table.samples if table.samples is not None else np.zeros(len(table))
        rows = [  # the others have lost samples, which are drawn again
            row
            for row, idx in enumerate(table.idx.tolist())
            if counts.at_a_look(idx) and counts.images[idx].looks[-1].sum() == n[row]
        ]
        if not rows:
            return
        found = derivation.certificates(self.schedule, [counts.images[idx] for idx in table.idx[rows].tolist()])
        same = np.isclose(found.radius, table.radius[rows], rtol=LAST_DIGITS, atol=0)
        differ = (found.predict != table.predict[rows]) | ~same
        for idx in table.idx[rows][differ][:1]:
            changed = f"image {idx} has other samples in its ledger than its certificate was derived from"
            raise UserError(f"{self.folder}: {changed}; restore the ledger, or {OTHER_NAME}")

    def decided(self, images: list[ImageCounts]) -> np.ndarray:
        """Whether images that are at a look are decided; remembers the decided ones."""
        found = self.derivation.decided(self.schedule, images)
        self.decided_images |= {image.idx for image, yes in zip(images, found, strict=True) if yes}
        return found

    def pending(self, indices: Iterable[int]) -> list[int]:
        """The indices that are not known to be decided."""
        return [idx for idx in indices if idx not in self.decided_images]

    def catch_up(self, counts: ledger.Ledger) -> None:
        """Decides images that an earlier session or another process has brought to a look."""
        waiting = [counts.images[idx] for idx in self.pending(counts.images) if counts.at_a_look(idx)]
        if waiting:
            self.decided(waiting)

    def check_slack(self, images: Collection[ImageCounts]) -> None:
        """Raises UserError for an image with less slack than the smallest latent needs, or without its input."""
        arithmetic = make_arithmetic(self.config.certify.arithmetic, self.config.sigma)
        least = float(arithmetic.slack(np.zeros((1, *self.lipschitz.output_shape)))[0])
        for image in images:
            if self.inputs is not None and (
                image.idx >= len(self.inputs) or self.inputs.labels[image.idx] != image.label
            ):
                raise UserError(f"{self.inputs.path} does not have image {image.idx} with its label; restore it")
            if image.slack < least:
                wrong = f"image {image.idx} has the slack {image.slack}, less than the rounding of its latent"
                raise UserError(f"{self.folder}: {wrong}; restore the ledger, or {OTHER_NAME}")

    def resume(self) -> None:
        """Takes over the record of earlier sessions, and the format in which they began the folder.

        Raises UserError if they had another identity, or if their files are missing or have changed.
        """
        store.check_files(self.folder)
        path, has_rows = self.folder / "certificates.json", ledger.has_rows(self.folder)
        if not has_rows and not (self.folder / "certificates.tsv").exists():
            return  # without samples no identity matters
        if has_rows and not path.exists():
            raise UserError(f"{self.folder} holds samples but no {path.name}; restore it, or {OTHER_NAME}")
        stored = store.read_same_run(path, self.identity) if path.exists() else None
        if not has_rows or stored is None:
            lost = ledger.name("*")
            raise UserError(f"{self.folder} holds certificates but no samples; restore {lost}, or {OTHER_NAME}")
        self.identity, self.record = self.identity.begun_as(stored.identity), list(stored.record)
        self.stored = stored
        self.note_format()

    def take_program(self, sampler: Sampler) -> None:
        """Makes the program of the head a part of the identity; raises UserError for another one than before."""
        own = self.identity.sampled_by(sampler)
        if self.stored and (difference := self.identity.difference(own)):
            name, was, now = (value or "plain" for value in difference)
            raise UserError(f"{self.folder} was sampled with the {name} {was!r} of the head, and this is {now!r}")
        self.identity = own

    def note_format(self) -> None:
        """Says that nobody can tell which run the samples of an old folder belong to."""
        if self.identity.run is None and self.process.leads:
            self._say(f"note: {self.folder} was begun in format 1: its samples do not name the run they belong to")

    def derive(self, counts: ledger.Ledger, chosen: Collection[int]) -> Found:
        """Writes certificates.tsv and certificates.json for the images `chosen`, which have reached a look.

        Returns the counts and the certificates of these images; without images, the certificates are None.
        """
        counts.flush()  # the samples of a certificate must be on disk before it
        if self.fallback:
            self.fallback.write(self.folder)
        images = [counts.images[idx] for idx in sorted(chosen)]
        self.check_slack(images)
        certificates = derivation = table = None
        if images:
            certificates = self.derivation.certificates(self.schedule, images)
            derivation = {"alpha": self.derivation.alpha, "bound": self.derivation.bound, "votes": counts.digests()}
            if self.fallback:
                derivation["fallback"] = self.fallback.digest()
            if self.inputs is not None:
                derivation["inputs"] = self.inputs.digest()
            if self.identity.schedule in ("staged", "anytime"):
                derivation |= {"radii": self.derivation.radii, "epsilon": self.derivation.epsilon}
            table = store.format_table(images, certificates, self.lipschitz.constant)
        store.write(self.folder, self.config, self.identity, self.lipschitz, self.record, derivation, table)
        return images, certificates

    def summary(self, images: list[ImageCounts], certificates: Certificates | None, indices: range) -> str:
        """`summary.summary` of these images."""
        return summary.summary(self.folder, self.schedule, self.derivation, images, certificates, indices)


def run(
    target: Target,
    process: Process,
    workdir: Workdir,
    say: Say,
    tick: Callable[[], None],
    facts: Mapping[str, Any] | None = None,
) -> Found | None:
    """Draws the samples that are missing in the ledgers, and derives the certificates; returns them.

    Every process of the run calls this with the same target, and takes its share of the undecided images: the noise of
    an image does not depend on the process that draws it. Only the first one derives. `tick` is called with every line
    of progress, and `say` with the line and all others. The entry of this session in the record gets the `facts`.
    """
    config = target.config
    say("compiling encoder and head ...")
    with process.together("the preparation of the samples"):  # finds errors before any sample is drawn
        report = target.encoder().report
        arithmetic = make_arithmetic(config.certify.arithmetic, config.sigma)
        composed = fallback.load(config, target.dataset, fallback.begun(target.folder))
        facts_of_target = dataclasses.replace(target.identity("smoothed"), fallback=composed and composed.identity)
        identity = facts_of_target.sampled(config, arithmetic, report.output_shape)
        certification = Certification(target.folder, config, identity, report, process, say=say)
        certification.inputs = target.inputs()
        certification.resume()
        stored = certification.stored
        flags = stored.identity.flags if stored else {name: config.certify[name] for name in FLAGS}
        pipeline = Pipeline(target, flags, say)
        certification.take_program(pipeline.sampler)
    with certification.open_ledger(lost=certification.identity.run is not None) as counts:
        with process.together("the ledgers"):
            check_labels(target.folder, counts, target.dataset)
            target.check_slack(counts.images.values())
            if composed:
                recorded = ((stored and stored.derivation) or {}).get("fallback")
                known = fallback.read(target.folder, recorded, identity.classes)
                images = {*target.indices, *counts.images}
                constant = composed.classifier.report.constant
                say(f"fallback {config.certify.fallback}: Lipschitz constant {constant:.15g}")
                certification.take_fallback(composed.answers(target.dataset, images, known))
        certification.catch_up(counts)
        pending = len(certification.pending(target.indices))
        say(str(pipeline.report))
        say(summary.headline(target, certification.schedule, pending))
        if pending or certification.inputs is not None:
            session = store.new_session(pending) | dict(facts or {})
            _sample(pipeline, certification, counts, session, workdir, say, tick)
        if not process.leads:
            return None
        found = certification.derive(counts, certification.decided_images)
    say(certification.summary(*found, target.indices if certification.inputs is None else range(len(target.dataset))))
    return found


def check_labels(folder: Path, counts: Counts, dataset: Dataset) -> None:
    """Raises UserError unless the images in a folder's ledgers have the labels of the data set."""
    for image in counts.images.values():
        if image.idx >= len(dataset) or image.label != dataset.labels[image.idx]:
            raise UserError(f"{folder} does not fit the data: image {image.idx} has another label in its ledger")


def _encoded(
    pipeline: Pipeline, certification: Certification, counts: Counts, session: dict[str, Any]
) -> Iterator[Images]:
    """The undecided images of this process, as many at a time as have arrived and fit into memory."""
    process = certification.process
    for portion in pipeline.target.arriving():
        share = certification.pending(portion)[process.index :: process.count]
        session["images"] += 0 if certification.inputs is None else len(share)
        yield from pipeline.encoded(share, {idx: counts.images[idx].slack for idx in share if idx in counts.images})


def _reporting(certification: Certification, say: Say, tick: Callable[[], None]) -> Callable[[Update], None]:
    """A function of an `Update`, which is given to `say`."""

    def report(line: Update) -> None:
        tick()
        if certification.inputs is not None:  # nobody knows how many come
            say(f"{len(certification.decided_images):>6,} of {len(certification.inputs):,} inputs so far decided")
        else:
            say(line if certification.process.count == 1 else line.noted("(of this process's share)"))

    return report


def _sample(
    pipeline: Pipeline,
    certification: Certification,
    counts: ledger.Ledger,
    session: dict[str, Any],
    workdir: Workdir,
    say: Say,
    tick: Callable[[], None],
) -> None:
    process, start, indices = certification.process, time.monotonic(), pipeline.target.indices
    share = certification.pending(indices)[process.index :: process.count]
    derived, pause = start, _SECONDS_PER_DERIVATION

    def begin() -> None:
        """Called with the first samples, not before, so that a head that cannot be certified leaves nothing behind."""
        certification.record.append(session)
        # Gives the images that are already decided the derivation settings of this session.
        certification.derive(counts, certification.decided_images)
        workdir.push()  # a bucket that cannot be written is found before much work is done

    def adopt() -> None:
        """Takes over the samples of the other processes."""
        workdir.pull()
        counts.refresh()
        certification.catch_up(counts)

    def decided(images: list[ImageCounts]) -> np.ndarray:
        nonlocal derived, pause
        found = certification.decided(images)
        if process.leads and (begun := time.monotonic()) - derived > pause:
            adopt()
            certification.derive(counts, certification.decided_images)
            derived = time.monotonic()
            pause = max(_SECONDS_PER_DERIVATION, 20 * (derived - begun))  # a table of a million images takes a minute
        return found

    report, rule = _reporting(certification, say, tick), certification.derivation.decided
    status, first = Status(certification.schedule, len(indices), report, rule), begin
    status.finish([counts.images[idx] for idx in indices if idx in certification.decided_images])
    if process.count > 1:
        with process.together("the first samples"):  # the identity must be on disk before any sample
            if process.leads:
                begin()
        status, first = Status(certification.schedule, len(share), report, rule), lambda: None
    seed = certification.identity.sampling_facts(certification.config)["seed"]
    engine = Engine(pipeline.sampler, rng.root_key(seed), counts, decided, status, first)
    for number, images in enumerate(_encoded(pipeline, certification, counts, session)):
        if number == 0:
            say(summary.before_sampling(pipeline, images))
        engine.run(images)
    status.show()
    counts.flush()
    workdir.push()
    process.wait("the samples")
    if process.leads:
        adopt()
    session["seconds"] = round(time.monotonic() - start, 3)
