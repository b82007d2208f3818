"""Whether the files of a certification are what they were, and whether its certificates follow from its votes."""

import hashlib
import math

from lsrs_jax import config as configuration
from lsrs_jax import models
from lsrs_jax.auditing.table import read_finished
from lsrs_jax.certification import folder
from lsrs_jax.certification.job import restore
from lsrs_jax.certification.smoothed import reopen
from lsrs_jax.errors import UserError
from lsrs_jax.smoothing import ledger as ledgers
from lsrs_jax.smoothing.table import format_table
from lsrs_jax.workdir import checkpoints

_SAME = 1e-9  # relative: the singular values of one encoder on two machines


def run(place):
    """Re-derives every certificate in a folder and compares digests, that of an audit as well; changes nothing.

    Prints what holds.

    Args:
      place: ``<workdir>/certify/<name>``. Of the workdir the configuration and the checkpoint, where they are still
        there, are compared.

    Returns:
      the content of certificates.json.

    Raises:
      UserError: naming the first file, and in a table the first line and column, that differs.
    """
    path = place / "certificates.json"
    stored = folder.of_place(place, "to verify")
    identity, derivation = stored["identity"], stored["derivation"]
    if not derivation:
        raise UserError(f"{place} holds votes but no certificates yet; run certify without --verify to finish")
    text = _read(place / "certificates.tsv")
    config = configuration.from_dict(stored["config"])
    _check_training(place, stored)
    smoothed = identity["certificate"] == "smoothed"
    if smoothed:
        certification = reopen(place, config, stored)
        if (derivation["alpha"], derivation["bound"]) != (config.certify.alpha, config.certify.bound):
            raise UserError(f"{path} contradicts itself: its derivation and its configuration differ in alpha or bound")
        tallies = _check_votes(certification, derivation["votes"])
        _compare(text, certification, tallies)
    elif derivation["bound"] != "margin" or ledgers.files(place):
        raise UserError(f"{path} contradicts itself: deterministic certificates have the bound margin, and no votes")
    digest = hashlib.sha256(text.encode()).hexdigest()
    if derivation["certificates"] != digest:
        raise UserError(f"{place / 'certificates.tsv'} has changed: its digest is not the one in {path.name}")
    weights = _check_checkpoint(place.parents[1], config, identity, stored["lipschitz"])
    constant = stored["lipschitz"]["constant"]
    audit = _check_audit(place / "audit.tsv", digest)
    count = text.count("\n") - 1
    if smoothed:
        votes = sum(int(counts.sum()) for tally in tallies.tallies.values() for counts in tally.counts.values())
        others = sum(tallies.at_a_look(idx) for idx in tallies.tallies) - count
        left = f"; {others:,} other images have their votes there and no certificate" if others else ""
        print(f"verified: {count:,} certificates follow from the {votes:,} votes in {place}{left}")
    else:
        print(f"verified: the table of {count:,} deterministic certificates in {place} is unchanged; they come from no")
        print("votes: to compute their radii again, certify under another --config.certify.name and compare")
    data, certify = identity["data"], config.certify
    print(f"of {data.get('name')!r}, split {data.get('split')!r}, digest {str(data.get('digest'))[:12]!r}", end="")
    if smoothed:
        print(
            f"; sigma {config.sigma}, n0 {certify.n0:,}, n {certify.n:,} ({certify.schedule}), alpha {certify.alpha}, "
            f"{certify.bound} bound, {certify.arithmetic} arithmetic, head in {certify.head_dtype}",
            end="",
        )
    print(f"\nLipschitz constant {constant:.15g}, configuration and {weights}{audit}")
    trained = place.parents[1] / "config.json"
    if trained.exists():
        own = configuration.load(trained)
        for name, used, kept in (("sigma", config.sigma, own.sigma), ("seed", config.seed, own.seed)):
            if used != kept:
                print(f"note: certified with {name} {used}, trained with {kept}")
    return stored


def _read(path):
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; certify, or certify --from-counts, writes it anew") from error
    except ValueError as error:
        raise UserError(f"{path} has changed: it is not a text file any more") from error


def _check_training(place, stored):
    """The workdir's configuration is still that of the training that was certified."""
    path = place.parents[1] / "config.json"
    if folder.training(place) in (None, stored["training"]):
        return
    trained = configuration.to_dict(configuration.load(path))
    trained["model"]["noise"] = stored["config"]["model"]["noise"]  # may be chosen when certifying
    old, new = ({name: values[name] for name in ("model", "train")} for values in (stored["config"], trained))
    difference = configuration.other_training(old, new)
    if difference:
        name, old, new = difference
        raise UserError(f"{path} has changed: {name} was {old!r} when these certificates were made and is {new!r}")
    raise UserError(
        f"{path} has changed: its digest is not the one in certificates.json; if the change was meant, certify again, "
        "which casts no vote twice"
    )


def _check_votes(certification, digests):
    """`Tallies` of the ledgers, which must be what they were when the certificates were derived; rows may have
    followed."""
    place = certification.folder
    for name in digests:
        if not (place / name).exists():
            raise UserError(f"{place / name} is missing: without votes no certificate can be checked")
    # A damaged line is named; where every line is well-formed, all that is known is that the file is another one.
    paths = ledgers.files(place)
    tallies = ledgers.read(paths, certification.plan, certification.identity["classes"])
    for name, digest in digests.items():
        if ledgers.digest((place / name).read_bytes()[: digest["bytes"]]) != digest:
            raise UserError(f"{place / name} has changed: its digest is not the one in certificates.json")
    certification.check_charges(tallies.tallies.values())
    return tallies


def _compare(text, certification, tallies):
    """Every line of the table against the ledger."""
    path, lines = certification.folder / "certificates.tsv", text.split("\n")
    chosen, seen = [], set()
    for number, line in enumerate(lines[1:-1], start=2):
        idx = line.partition("\t")[0]
        known = tallies.tallies.get(int(idx)) if idx.isascii() and idx.isdigit() and len(idx) < 18 else None
        if known is None or not tallies.at_a_look(known.idx):
            raise UserError(f"{path} line {number}: the ledger has no certificate for an image {idx[:40]!r}")
        if known.idx in seen:
            raise UserError(f"{path} line {number}: image {known.idx} is there twice")
        seen.add(known.idx)
        chosen.append(known)
    if not chosen:
        raise UserError(f"{path} holds no certificates")
    certificates = certification.derivation.certificates(certification.plan, chosen)
    expected = format_table(chosen, certificates, certification.lipschitz["constant"]).split("\n")
    names = expected[0].split("\t")
    for number, (found, derived) in enumerate(zip(lines, expected, strict=True), start=1):
        if found == derived:
            continue
        cells = found.split("\t"), derived.split("\t")
        column = next((i for i, pair in enumerate(zip(*cells, strict=False)) if pair[0] != pair[1]), None)
        if column is None or len(cells[0]) != len(cells[1]) or number == 1:
            raise UserError(f"{path} line {number} is {found[:80]!r}, the ledger gives {derived[:80]!r}")
        was, gives = (cell[column] for cell in cells)
        raise UserError(
            f"{path} line {number} (image {cells[1][0]}): {names[column]} is {was[:40]!r}, the ledger gives {gives!r}"
        )


def _check_audit(path, digest):
    """The audit of the table with this digest, where there is one, is what it was; says in words what was found."""
    if not path.exists():
        facts = path.with_suffix(".json")
        return f"; note: {facts.name} has no {path.name} beside it" if facts.exists() else ""
    found = read_finished(path)
    if found is None:
        return "; the audit beside them is unfinished"
    attacked, audit = found
    if attacked != digest:
        return f"; note: {path.name} is the audit of another table"
    return f"; the audit of {len(audit.idx):,} of them, with {audit.flips.sum():,} flips, is unchanged"


def _check_checkpoint(workdir, config, identity, lipschitz):
    """Digest, shapes and Lipschitz constant of the weights; says in words what could be compared."""
    step = identity["checkpoint"]["step"]
    if not (checkpoints(workdir) / str(step)).is_dir():
        return f"ledger are intact; the checkpoint of step {step} is not here to be compared"
    model = models.build(config.model, tuple(identity["model"]["input_shape"]), identity["classes"])
    params, meta = restore(workdir, model, step)
    if meta["digest"] != identity["checkpoint"]["digest"]:
        raise UserError(f"the checkpoint of step {step} in {workdir} is not the one that was certified: digests differ")
    encoder, _ = model.for_certification(params, config.certify.head_dtype)
    own, claimed = encoder.report.constant, lipschitz["constant"]
    if not math.isclose(own, claimed, rel_tol=_SAME):
        raise UserError(
            f"the encoder of step {step} in {workdir} has the Lipschitz constant {own!r}, the certificates claim "
            f"{claimed!r}"
        )
    own, claimed = list(encoder.report.output_shape), list(lipschitz["output_shape"])
    if identity["certificate"] == "smoothed" and own != claimed:  # a margin knows no span of a linear head
        raise UserError(
            f"the encoder of step {step} in {workdir} has latents of shape {own}, the certificates claim {claimed}"
        )
    return f"checkpoint of step {step} are those of the certificates"
