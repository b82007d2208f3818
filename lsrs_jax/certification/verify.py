"""Compares the files of a certification with their digests, and derives its certificates again from its ledgers."""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np

from lsrs_jax import models
from lsrs_jax.auditing.table import Attacked, check_attacked, read_finished
from lsrs_jax.certification import deterministic, ledger, store
from lsrs_jax.certification.identity import names_its_data
from lsrs_jax.certification.reopened import reopen
from lsrs_jax.certification.smoothed import Certification
from lsrs_jax.certification.table import LAST_DIGITS, parse_number, read_table
from lsrs_jax.certification.target import Target, target_of_certificates
from lsrs_jax.config import CALLER, SEED_DERIVED, SEED_OF_TRAINING, config_to_dict, load_config, other_training
from lsrs_jax.data import Photos
from lsrs_jax.layers.lipschitz import LipschitzReport
from lsrs_jax.models.custom import code_of
from lsrs_jax.runtime.errors import NotHere, UserError
from lsrs_jax.runtime.files import digest_of
from lsrs_jax.runtime.workdir import checkpoints
from lsrs_jax.smoothing.counts import Counts, ImageCounts
from lsrs_jax.training.checkpoint import restore

_BATCH = 100  # images whose pixels are compared at a time
_SAME = 1e-9  # relative: how far the Lipschitz constant of an encoder may differ between two machines


@dataclasses.dataclass
class Verdict:
    """What was found to be right, and what could not be checked. A difference is a UserError instead.

    The exit code of the command is 0 if nothing is `unchecked` or `missing`, else 3. `beyond` names what no reading of
    files can check.
    """

    certificates: int
    split: int | None = None  # images of the split; None if an old file does not know
    wanted: int | None = None  # images of the split that the configuration asks for
    missing: int = 0  # of the images wanted
    others: int = 0  # certificates of images that the configuration does not ask for
    selection: dict[str, int] = dataclasses.field(default_factory=dict)  # start, stop and step of the images wanted
    equal: int | None = None  # certificates of images that equal another one of the table; None if nobody looked
    samples: int | None = None
    checked: list[str] = dataclasses.field(default_factory=list)
    unchecked: dict[str, str] = dataclasses.field(default_factory=dict)  # by a short name
    beyond: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return not (self.missing or self.others or self.unchecked)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for ``--json``."""
        lists = {"unchecked": list(self.unchecked.values()), "beyond": list(self.beyond.values())}
        return {"verdict": "intact" if self.complete else "incomplete"} | dataclasses.asdict(self) | lists

    def __str__(self) -> str:
        line = f"verdict: {'intact' if self.complete else 'incomplete'}: {self.certificates:,} certificates"
        if self.wanted is not None:
            of_all = f" of the {self.split:,} images of the split" if self.split else " images"
            which = ", ".join(f"{name} {value}" for name, value in self.selection.items())
            line += f"; {self.wanted:,}{of_all} were to be certified ({which}, which the author chose)"
        line += f", {self.missing:,} of these have none" if self.missing else ""
        line += f", {self.others:,} certificates are of others, and nothing says why" if self.others else ""
        line += f"; {self.equal:,} of the images compared equal another one" if self.equal else ""
        line += f"; checked: {', '.join(self.checked)}"
        line += f"; could not be checked: {', '.join(self.unchecked.values())}" if self.unchecked else ""
        return line + (f"; files cannot show: {', '.join(self.beyond.values())}" if self.beyond else "")


def run(folder: Path, data_dir: str | None = None) -> tuple[store.Stored, Verdict]:
    """Derives every certificate in a folder again and compares all digests, also of an audit; changes nothing.

    Deterministic certificates are computed again from the images in `data_dir`; if it is None, they are not. The
    configuration and the checkpoint of the workdir are compared if they still exist.

    Prints facts about the folder, and returns the content of certificates.json with the `Verdict`. Raises UserError for
    the first file that differs, naming the line and column of a table.
    """
    path, stored = folder / "certificates.json", store.read_folder(folder, "to verify")
    identity, derivation, config = stored.identity, stored.derivation, stored.settings
    if not derivation:
        call = (
            "the same call of SmoothedClassifier.certify" if config.model.head == CALLER else "certify without --verify"
        )
        raise UserError(f"{folder} holds samples but no certificates yet; {call} finishes them")
    table = folder / "certificates.tsv"
    try:
        text = table.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{table} is missing; certify or certify --from-counts writes it again") from error
    except ValueError as error:
        raise UserError(f"{table} has changed: it is not a text file any more") from error
    _check_training(folder, stored)
    checked = ["the digests in certificates.json", "the configuration"]
    verdict, counts = Verdict(text.count("\n") - 1, checked=checked), None
    if not names_its_data(config):
        how = "they were given in Python" if config.model.head == CALLER else "--recast=N"
        verdict.beyond["data"] = f"which images data.name={config.data.name!r} stands for ({how})"
    if identity.certificate == "smoothed":
        certification = reopen(folder, config, stored, stored.format)
        if (derivation["alpha"], derivation["bound"]) != (config.certify.alpha, config.certify.bound):
            raise UserError(f"{path} contradicts itself: its derivation and its configuration differ in alpha or bound")
        counts = _check_ledgers(certification, derivation["votes"])
        _compare(text, certification, counts)
        verdict.samples = sum(image.total for image in counts.images.values())
        verdict.checked.append("every radius from its samples")
        verdict.beyond["samples"] = "that the network gives these samples for these images and labels (--recast=N)"
        if identity.fallback:
            verdict.beyond["fallback"] = "that the fallback gives the answers in fallback.tsv (--recast=N)"
        if identity.run is None:
            verdict.unchecked["run"] = "that all samples are of this run (in format 1 they do not name it)"
    elif derivation["bound"] != "margin" or ledger.files(folder):
        raise UserError(f"{path} contradicts itself: deterministic certificates have the bound margin, and no ledger")
    else:
        deterministic.check_form(table, text, stored.lipschitz.constant)
    digest = digest_of(table)
    if derivation["certificates"] != digest:
        raise UserError(f"{table} has changed: its digest is not the one in {path.name}")
    _check_checkpoint(folder.parents[1], stored, verdict)
    _check_audit(folder / "audit.tsv", digest, verdict)
    _check_images(table, stored, verdict)
    if counts is None:
        _compute_again(folder, stored, data_dir, verdict)
    _report(folder, stored, counts, verdict)
    return stored, verdict


def _report(folder: Path, stored: store.Stored, counts: Counts | None, verdict: Verdict) -> None:
    config, data, settings = stored.settings, stored.identity.data, ""
    certify, rows = config.certify, verdict.certificates
    if counts is None:
        print(f"verified: {rows:,} deterministic certificates in {folder}")
    else:
        others = sum(counts.at_a_look(idx) for idx in counts.images) - rows
        left = f"; {others:,} other images have their samples there and no certificate" if others else ""
        samples = f"{verdict.samples:,} samples (n0 included)"
        print(f"verified: {rows:,} certificates follow from the {samples} in {folder}{left}")
        settings = f"; sigma {config.sigma}, n0 {certify.n0:,}, n {certify.n:,} ({certify.schedule}), "
        settings += f"alpha {certify.alpha}, {certify.bound} bound, {certify.arithmetic} arithmetic, "
        settings += f"head in {certify.head_dtype}"
        meanings = {SEED_DERIVED: "derived from weights and images", SEED_OF_TRAINING: "that of the training"}
        seed = meanings.get(certify.seed, "chosen by the author")
        settings += f"; noise of seed {stored.identity.seed}, {seed}"
    split = f"split {data.get('split')!r}" + (
        f" of {stored.identity.images:,} images" if stored.identity.images else ""
    )
    print(f"of {data.get('name')!r}, {split}, digest {str(data.get('digest'))[:12]!r}{settings}")
    print(f"Lipschitz constant {stored.lipschitz.constant:.15g}")
    trained = folder.parents[1] / "config.json"
    names = ("sigma", "seed") if certify.seed == SEED_OF_TRAINING else ("sigma",)
    for name in names if trained.exists() and config.model.head != CALLER else ():
        used, kept = config[name], load_config(trained)[name]
        if used != kept:
            print(f"note: certified with {name} {used}, trained with {kept}", flush=True)


def _check_images(table: Path, stored: store.Stored, verdict: Verdict) -> None:
    """Counts the images that the configuration asks for and that the table lacks."""
    split = stored.identity.images
    if stored.wanted is None:
        verdict.unchecked["images"] = "that no image is missing (in format 1 the size of the split is not known)"
        return
    found = read_table(table).idx
    if split is not None and found.max() >= split:
        raise UserError(f"{table} has a certificate of image {found.max()}, but the split has {split:,} images")
    _count_images(found, stored.wanted, split, verdict)


def _count_images(found: np.ndarray, wanted: range, split: int | None, verdict: Verdict) -> None:
    indices = set(found.tolist())
    verdict.wanted, verdict.split = len(wanted), split
    verdict.selection = {"start": wanted.start, "stop": wanted.stop, "step": wanted.step}
    verdict.missing, verdict.others = len(set(wanted) - indices), len(indices - set(wanted))
    if verdict.wanted and not (verdict.missing or verdict.others):
        verdict.checked.append("that no image is missing")


def check_dataset(target: Target, verdict: Verdict, chosen: np.ndarray) -> None:
    """Counts what only the images can show: missing ones of an old folder, and images that equal another one.

    Compares the pixels of all images of the table, or of those `chosen` where pixels must be decoded. Honest sets
    contain equal images.
    """
    found, dataset = read_table(target.folder / "certificates.tsv").idx, target.dataset
    if verdict.unchecked.pop("images", None):
        _count_images(found, target.indices, len(dataset), verdict)
    compared = chosen if isinstance(dataset, Photos) else found
    digests = [
        hashlib.sha256(image.tobytes()).digest()
        for part in np.array_split(compared, -(-len(compared) // _BATCH))
        for image in dataset.read(part, np.float64)[0]
    ]
    verdict.equal = len(digests) - len(set(digests))


def _check_training(folder: Path, stored: store.Stored) -> None:
    """Raises UserError if the workdir's configuration has changed since the certification."""
    path = folder.parents[1] / "config.json"
    if store.training_digest(folder) in (None, stored.training):
        return
    certified, trained = (config_to_dict(one) for one in (stored.settings, load_config(path)))
    trained["model"]["noise"] = certified["model"]["noise"]  # may be chosen when certifying
    old, new = ({name: values[name] for name in ("model", "train")} for values in (certified, trained))
    if difference := other_training(old, new):
        name, old, new = difference
        raise UserError(f"{path} has changed: {name} was {old!r} when these certificates were made and is {new!r}")
    remedy = "if you meant the change, certify again, which draws no sample twice"
    raise UserError(f"{path} has changed: its digest is not the one in certificates.json; {remedy}")


def _check_ledgers(certification: Certification, digests: dict[str, dict]) -> Counts:
    """The counts of the ledgers; raises UserError if the rows behind the table have changed. New rows may follow."""
    folder, run = certification.folder, certification.identity.run
    ledger.check_present(folder, digests)
    # Reading names a damaged line. If every line is well-formed, the digest still finds a change of the file.
    counts = ledger.read(folder, certification.schedule, certification.num_classes, run)
    ledger.check_recorded(folder, digests)
    if any(path.stat().st_size != digests.get(path.name, {}).get("bytes") for path in ledger.files(folder)):
        counts = ledger.read(folder, certification.schedule, certification.num_classes, run, digests)
    certification.check_slack(counts.images.values())
    return counts


def _compare(text: str, certification: Certification, counts: Counts) -> None:
    """Compares every line of the table with the line that follows from the ledgers."""
    path, lines = certification.folder / "certificates.tsv", text.split("\n")
    derivable = {str(idx): image for idx, image in counts.images.items() if counts.at_a_look(idx)}
    chosen: dict[str, ImageCounts] = {}
    for number, line in enumerate(lines[1:-1], start=2):
        idx = line.partition("\t")[0]
        if idx not in derivable:
            raise UserError(f"{path} line {number}: the ledger has no certificate for an image {idx[:40]!r}")
        if idx in chosen:
            raise UserError(f"{path} line {number}: image {idx} is there twice")
        chosen[idx] = derivable[idx]
    if not chosen:
        raise UserError(f"{path} holds no certificates")
    images = list(chosen.values())
    certificates = certification.derivation.certificates(certification.schedule, images)
    expected = store.format_table(images, certificates, certification.lipschitz.constant).split("\n")
    names = expected[0].split("\t")
    for number, (found, derived) in enumerate(zip(lines, expected, strict=True), start=1):
        if found == derived:
            continue
        was, gives = found.split("\t"), derived.split("\t")
        if len(was) != len(gives) or number == 1:
            raise UserError(f"{path} line {number} is {found[:80]!r}, the ledger gives {derived[:80]!r}")
        differing = (cells for cells in zip(names, was, gives, strict=True) if not _same_digits(*cells[1:]))
        if (first := next(differing, None)) is None:
            continue
        name, old, new = first
        raise UserError(f"{path} line {number} (image {gives[0]}): {name} is {old[:40]!r}, the ledger gives {new!r}")


def _same_digits(found: str, derived: str) -> bool:
    """Whether two fields are equal, but for the last digits of a number: another version of SciPy may change them."""
    if found == derived:
        return True
    try:
        own, gives = parse_number(found), parse_number(derived)
    except ValueError:
        return False
    return "." in derived and 0 <= own <= gives * (1 + LAST_DIGITS) and own >= gives * (1 - LAST_DIGITS)


def _compute_again(folder: Path, stored: store.Stored, data_dir: str | None, verdict: Verdict) -> None:
    """Computes deterministic certificates again, if network and images are here."""
    target, why = None, "not asked for"
    if data_dir is not None:
        try:
            target = target_of_certificates(folder, stored, data_dir)
        except NotHere as error:
            why = str(error)
    if target is None:
        verdict.unchecked["radii"] = f"the radii, which were not computed again ({why})"
        return
    deterministic.check(target)
    check_dataset(target, verdict, read_table(target.folder / "certificates.tsv").idx)
    verdict.checked.append("every radius, computed again from the images")


def _check_audit(path: Path, digest: str, verdict: Verdict) -> None:
    """Says what the audit of the table with this digest is worth; raises UserError if the audit has changed."""
    if not path.exists():
        if path.with_suffix(".json").exists():
            verdict.unchecked["audit"] = f"the audit ({path.with_suffix('.json').name} has no {path.name} beside it)"
        return
    attacked, audit = read_finished(path) or ("", None)
    if audit is None:
        verdict.unchecked["audit"] = "the audit, which is unfinished"
    elif attacked != digest:
        verdict.unchecked["audit"] = "the audit, which is of another table"
    else:
        table = read_table(path.with_name("certificates.tsv"))
        check_attacked(path, audit, Attacked(*(getattr(table, name) for name in Attacked._fields)))
        verdict.checked.append(f"audit.tsv and audit.json ({len(audit.idx):,} images, {audit.flips.sum():,} flips)")
        verdict.beyond["attacks"] = "the attacks of the audit (move it away and run it again)"


def _check_checkpoint(workdir: Path, stored: store.Stored, verdict: Verdict) -> None:
    """Compares digest, shapes and Lipschitz constant of the weights."""
    identity, config, step = stored.identity, stored.settings, stored.identity.checkpoint["step"]
    constant = f"the Lipschitz constant {stored.lipschitz.constant:.15g}"
    if config.model.head == CALLER:
        given = "classifier, which was given in Python," if config.data.name == "arrays" else "PyTorch checkpoint"
        verdict.beyond["samples"] = f"that the {given} gives these samples"
        if stored.lipschitz.layers:
            verdict.unchecked["weights"] = f"{constant} of the encoder, which was given in Python"
        return
    if code := code_of(config.model):
        why = f"the network is the code {' and '.join(code)}, which only --recast=N with --allow-code imports"
        verdict.unchecked["weights"] = f"the weights and {constant} ({why})"
        return
    if not (checkpoints(workdir) / str(step)).is_dir():
        verdict.unchecked["weights"] = f"the weights and {constant} (the checkpoint of step {step} is not here)"
        return
    try:
        model = models.build(config.model, tuple(identity.model["input_shape"]), identity.classes or 0)
    except NotHere as error:  # PyTorch, of which the head is
        verdict.unchecked["weights"] = f"the weights and {constant} ({error})"
        return
    params, meta = restore(workdir, model, step)
    if meta["digest"] != identity.checkpoint["digest"]:
        raise UserError(f"the checkpoint of step {step} in {workdir} is not the one that was certified: digests differ")
    report = model.for_certification(params, config.certify.head_dtype)[0].report
    check_encoder(report, f"the encoder of step {step} in {workdir}", stored, verdict)


def check_encoder(report: LipschitzReport, name: str, stored: store.Stored, verdict: Verdict) -> None:
    """Raises UserError unless an encoder has the Lipschitz constant and the latents that the certificates claim."""
    claims = stored.lipschitz
    own, claimed = report.constant, claims.constant
    if not math.isclose(own, claimed, rel_tol=_SAME):
        raise UserError(f"{name} has the Lipschitz constant {own!r}, the certificates claim {claimed!r}")
    own, claimed = tuple(report.output_shape), claims.output_shape
    # The encoder of a margin ends before the linear head.
    if stored.identity.certificate == "smoothed" and own != claimed:
        raise UserError(f"{name} has latents of shape {own}, the certificates claim {claimed}")
    verdict.unchecked.pop("weights", None)
    verdict.checked.append("the weights and their Lipschitz constant")
