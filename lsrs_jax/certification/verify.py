"""Compares the files of a certification with their digests, and derives its certificates again from its ledgers."""

import math
from pathlib import Path

from lsrs_jax import models
from lsrs_jax.auditing.table import read_finished
from lsrs_jax.certification import OTHER_NAME, ledger, store
from lsrs_jax.certification.smoothed import Certification, reopen
from lsrs_jax.certification.target import restore
from lsrs_jax.config import config_to_dict, load_config, other_training
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import digest_of
from lsrs_jax.runtime.workdir import checkpoints
from lsrs_jax.smoothing.counts import Counts, ImageCounts

_SAME = 1e-9  # relative: how far the Lipschitz constant of an encoder may differ between two machines


def run(folder: Path) -> store.Stored:
    """Derives every certificate in a folder again and compares all digests, also of an audit; changes nothing.

    Prints the results, and returns the content of certificates.json. The configuration and the checkpoint of the
    workdir are compared if they still exist. Raises UserError for the first file that differs, naming the line and
    column of a table.
    """
    path, stored = folder / "certificates.json", store.read_folder(folder, "to verify")
    identity, derivation, config = stored.identity, stored.derivation, stored.settings
    if not derivation:
        raise UserError(f"{folder} holds samples but no certificates yet; run certify without --verify to finish")
    table = folder / "certificates.tsv"
    try:
        text = table.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{table} is missing; certify or certify --from-counts writes it again") from error
    except ValueError as error:
        raise UserError(f"{table} has changed: it is not a text file any more") from error
    _check_training(folder, stored)
    counts, certify = None, config.certify
    if identity.certificate == "smoothed":
        certification = reopen(folder, config, stored)
        if (derivation["alpha"], derivation["bound"]) != (certify.alpha, certify.bound):
            raise UserError(f"{path} contradicts itself: its derivation and its configuration differ in alpha or bound")
        counts = _check_ledgers(certification, derivation["votes"])
        _compare(text, certification, counts)
    elif derivation["bound"] != "margin" or ledger.files(folder):
        raise UserError(f"{path} contradicts itself: deterministic certificates have the bound margin, and no ledger")
    digest = digest_of(table)
    if derivation["certificates"] != digest:
        raise UserError(f"{table} has changed: its digest is not the one in {path.name}")
    verdict = _check_checkpoint(folder.parents[1], stored) + _check_audit(folder / "audit.tsv", digest)
    _report(folder, stored, counts, text.count("\n") - 1, verdict)
    return stored


def _report(folder: Path, stored: store.Stored, counts: Counts | None, rows: int, verdict: str) -> None:
    config, data, settings = stored.settings, stored.identity.data, ""
    certify = config.certify
    if counts is None:
        table = f"the table of {rows:,} deterministic certificates in {folder}"
        print(f"verified: {table} is unchanged. To compute it again, {OTHER_NAME} and compare")
    else:
        samples = sum(image.total for image in counts.images.values())
        others = sum(counts.at_a_look(idx) for idx in counts.images) - rows
        left = f"; {others:,} other images have their samples there and no certificate" if others else ""
        print(f"verified: {rows:,} certificates follow from the {samples:,} samples in {folder}{left}")
        settings = f"; sigma {config.sigma}, n0 {certify.n0:,}, n {certify.n:,} ({certify.schedule}), "
        settings += f"alpha {certify.alpha}, {certify.bound} bound, {certify.arithmetic} arithmetic, "
        settings += f"head in {certify.head_dtype}"
    print(f"of {data.get('name')!r}, split {data.get('split')!r}, digest {str(data.get('digest'))[:12]!r}{settings}")
    print(f"Lipschitz constant {stored.lipschitz.constant:.15g}, configuration and {verdict}")
    trained = folder.parents[1] / "config.json"
    for name in ("sigma", "seed") if trained.exists() else ():
        used, kept = config[name], load_config(trained)[name]
        if used != kept:
            print(f"note: certified with {name} {used}, trained with {kept}")


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
    folder = certification.folder
    for name in digests:
        if not (folder / name).exists():
            raise UserError(f"{folder / name} is missing: without its samples no certificate can be checked")
    # Reading names a damaged line. If every line is well-formed, the digest still finds a change of the file.
    counts = ledger.read(folder, certification.schedule, certification.num_classes)
    for name, digest in digests.items():
        if ledger.digest((folder / name).read_bytes()[: digest["bytes"]]) != digest:
            raise UserError(f"{folder / name} has changed: its digest is not the one in certificates.json")
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
        name, old, new = next(cells for cells in zip(names, was, gives, strict=True) if cells[1] != cells[2])
        raise UserError(f"{path} line {number} (image {gives[0]}): {name} is {old[:40]!r}, the ledger gives {new!r}")


def _check_audit(path: Path, digest: str) -> str:
    """A clause about the audit of the table with this digest; raises UserError if the audit has changed."""
    if not path.exists():
        facts = path.with_suffix(".json")
        return f"; note: {facts.name} has no {path.name} beside it" if facts.exists() else ""
    attacked, audit = read_finished(path) or ("", None)
    if audit is None:
        return "; the audit beside them is unfinished"
    if attacked != digest:
        return f"; note: {path.name} is the audit of another table"
    return f"; the audit of {len(audit.idx):,} of them, with {audit.flips.sum():,} flips, is unchanged"


def _check_checkpoint(workdir: Path, stored: store.Stored) -> str:
    """Compares digest, shapes and Lipschitz constant of the weights; returns a clause about the result."""
    identity, config, step = stored.identity, stored.settings, stored.identity.checkpoint["step"]
    if not (checkpoints(workdir) / str(step)).is_dir():
        return f"ledger are intact; the checkpoint of step {step} is not here to be compared"
    model = models.build(config.model, tuple(identity.model["input_shape"]), identity.classes or 0)
    params, meta = restore(workdir, model, step)
    if meta["digest"] != identity.checkpoint["digest"]:
        raise UserError(f"the checkpoint of step {step} in {workdir} is not the one that was certified: digests differ")
    report = model.for_certification(params, config.certify.head_dtype)[0].report
    name, claims = f"the encoder of step {step} in {workdir}", stored.lipschitz
    own, claimed = report.constant, claims.constant
    if not math.isclose(own, claimed, rel_tol=_SAME):
        raise UserError(f"{name} has the Lipschitz constant {own!r}, the certificates claim {claimed!r}")
    own, claimed = tuple(report.output_shape), claims.output_shape
    if identity.certificate == "smoothed" and own != claimed:  # the encoder of a margin ends before the linear head
        raise UserError(f"{name} has latents of shape {own}, the certificates claim {claimed}")
    return f"checkpoint of step {step} are those of the certificates"
