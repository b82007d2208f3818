"""Certificates of the classifier without noise: the margin of a linear head behind a Lipschitz encoder."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lsrs_jax.certification import OTHER_NAME, store
from lsrs_jax.certification.linear import LinearClassifier
from lsrs_jax.certification.table import Table, parse_number, read_table
from lsrs_jax.certification.target import TrainedTarget
from lsrs_jax.layers.lipschitz import LipschitzReport
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import fields_of
from lsrs_jax.runtime.format import FIELD_COLUMNS
from lsrs_jax.runtime.progress import duration, print_now

COLUMNS = (*FIELD_COLUMNS, "n", "lipschitz", "slack")
_BESIDE = "-margin"  # what `beside` adds to the name of a certification
SAME = 1e-9  # relative: how far a radius may differ between two machines
Say = Callable[[str], object]


def run(target: TrainedTarget, say: Say = print_now) -> Table:
    """Certifies the images of a target in one forward pass each, and writes the table, which it returns.

    `say` receives the report of the encoder and what is certified.
    """
    identity, record = target.identity("deterministic"), list[dict[str, Any]]()
    document, table = target.folder / "certificates.json", target.folder / "certificates.tsv"
    store.check_files(target.folder)
    if not document.exists() and any(target.folder.glob("*.tsv")):
        raise UserError(f"{target.folder} holds another certification; {OTHER_NAME}")
    if document.exists():
        stored = store.read_same_run(document, identity)
        identity, record = identity.begun_as(stored.identity), list(stored.record)
    if left_out := set(read_table(table).idx) - set(target.indices) if table.exists() else ():
        outside = f"{len(left_out):,} images outside certify.start, stop and step"
        raise UserError(f"{table} holds {outside}; choose a selection that includes them, or {OTHER_NAME}")
    start, session, indices = time.monotonic(), store.new_session(len(target.indices)), np.array(target.indices)
    report, columns = _compute(target, indices, say)
    session["seconds"] = round(time.monotonic() - start, 3)
    text = store.format_columns({"idx": indices, "label": target.dataset.labels[indices], "n": 0} | columns)
    store.write(target.folder, target.config, identity, report, [*record, session], {"bound": "margin"}, text)
    return read_table(table)


def summary(target: TrainedTarget, table: Table) -> str:
    """The result on the images of a target."""
    wanted = np.isin(table.idx, target.indices)
    correct, radius = table.correct[wanted], table.radius[wanted]
    return (
        f"{wanted.sum():,} images: certified accuracy {correct.mean():.3f}, at 36/255 "
        f"{np.mean(correct & (radius >= 36 / 255)):.3f}, average certified radius "
        f"{np.where(correct, radius, 0).mean():.4f}, {duration(float(table.seconds[wanted].mean()))} per image"
    )


def beside(target: TrainedTarget) -> str:
    """Certifies the linear head of a smoothed run without noise as well, and returns a line about it.

    The certificates go to the folder ``<name>-margin`` beside that of the run. If they are there already, they stay.
    """
    config = target.config.copy_and_resolve_references()
    config.certify.certificate, config.certify.name = "deterministic", f"{target.folder.name}{_BESIDE}"
    config.certify.fallback = ""
    own = dataclasses.replace(target, config=config, folder=target.folder.with_name(config.certify.name))
    path = own.folder / "certificates.tsv"
    try:
        table = _complete(own, path) or run(own, lambda _: None)
        return f"without noise (no samples, no alpha): {summary(own, table)}; {path}"
    except UserError as error:  # the smoothed certificates are complete, so this is no reason to fail
        return f"note: no certificates without noise: {error}"


def _complete(target: TrainedTarget, path: Path) -> Table | None:
    """The table of a target, if it is finished and has all images."""
    document = path.with_name("certificates.json")
    if not (path.exists() and document.exists()):
        return None
    stored = store.read_same_run(document, target.identity("deterministic"))
    table = read_table(path)
    return table if stored.derivation and set(target.indices) <= set(table.idx.tolist()) else None


def _compute(target: TrainedTarget, indices: np.ndarray, say: Say) -> tuple[LipschitzReport, dict[str, Any]]:
    """The report of the encoder, and predictions, radii, Lipschitz constant, slack and seconds of some images.

    As in sampling, the seconds do not include the compilation, which is part of making the classifier.
    """
    classifier, dataset = LinearClassifier(target.model, target.params), target.dataset
    say(str(classifier.report))
    say(f"{dataset.name} {dataset.split}: {len(indices):,} images, no noise")
    start = time.monotonic()
    columns = classifier.certificates(dataset, indices)
    return classifier.report, columns | {"time": (time.monotonic() - start) / len(indices)}


def check_form(path: Path, text: str, lipschitz: float) -> None:
    """Raises UserError, which names the line, for a table that `run` cannot have written."""
    first, *lines = text.split("\n")
    if first.split("\t") != list(COLUMNS):
        raise UserError(f"{path} line 1: its columns are {first[:80]!r}, not {' '.join(COLUMNS)}")
    if lines[-1:] != [""]:
        raise UserError(f"{path} line {len(lines) + 1} does not end: the end of the table is missing; restore it")
    for number, line in enumerate(lines[:-1], start=2):
        try:
            row = fields_of(line, COLUMNS)
            own = {"correct": int(row["predict"] == row["label"]), "n": 0, "lipschitz": lipschitz}
            for name, value in own.items():
                if row[name] != repr(value):
                    raise ValueError(f"{name} is {row[name][:40]!r}, not {value!r}")
            for name in ("radius", "time", "slack"):
                if not 0 <= parse_number(row[name]) < math.inf:
                    raise ValueError(f"{name} is {row[name][:40]!r}")
        except ValueError as error:
            raise UserError(f"{path} line {number} cannot be of a deterministic certificate: {error}") from error


def check(target: TrainedTarget, count: int | None = None) -> np.ndarray:
    """Computes images of the table again, all or `count` that are chosen at random; returns their indices.

    Raises UserError, which names the image, if a prediction or a radius is not that of the network.
    """
    path = target.folder / "certificates.tsv"
    table = read_table(path)
    rows = np.random.default_rng().permutation(len(table))[:count]
    if table.idx.max() >= len(target.dataset) or (target.dataset.labels[table.idx] != table.label).any():
        raise UserError(f"{path} does not fit the data: an image has another label")
    _, found = _compute(target, table.idx[rows], print_now)
    near = SAME * (found["radius"] + found["slack"] / found["lipschitz"])
    wrong = np.abs(found["radius"] - table.radius[rows]) > near
    wrong |= (found["predict"] != table.predict[rows]) & (found["radius"] > 0)
    cells = np.array([line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()])
    for name, expected in (("lipschitz", found["lipschitz"]), ("slack", found["slack"])):
        written = cells[1:, COLUMNS.index(name)].astype(np.float64)[rows]
        if not np.allclose(written, expected, rtol=1e-6, atol=0):
            raise UserError(f"{path}: the column {name} is not that of the network")
    for row in np.flatnonzero(wrong)[:1]:
        claimed = f"class {table.predict[rows][row]} and radius {float(table.radius[rows][row])!r}"
        own = f"class {found['predict'][row]} and radius {float(found['radius'][row])!r}"
        raise UserError(f"{path}: image {table.idx[rows][row]} has {claimed}, the network gives {own}")
    return table.idx[rows]
