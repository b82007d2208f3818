"""Shards of a certification: parts that processes certify without knowing of each other, and how they are joined."""

import dataclasses
import itertools
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsrs_jax.certification import OTHER_NAME, fallback, ledger, store
from lsrs_jax.certification.reopened import reopen
from lsrs_jax.certification.rows import Lines
from lsrs_jax.certification.smoothed import Certification
from lsrs_jax.certification.target import TrainedTarget
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing.counts import Counts, Row
from lsrs_jax.smoothing.schedule import CERTIFYING

_SAME = 1e-9  # relative: how far the Lipschitz constant of an encoder may differ between two machines
_NAMED = 8  # missing images in a message


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index` of `count`: of the images to certify, every `count`-th one, beginning with number `index`."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def folder(self, workdir: Path, name: str) -> Path:
        """The folder of this part of the certification `name`; it holds the files of any certification."""
        return workdir / "shards" / f"{name}-{self.index}-of-{self.count}"


def shard_of(text: str) -> Shard:
    """The shard that ``i/N`` names; raises ValueError for another text."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(text)
    return Shard(int(found[1]), int(found[2]))


def part_of(target: TrainedTarget, shard: Shard, folder: Path) -> TrainedTarget:
    """A target with the images of a shard, whose results go to `folder`; raises UserError if it has none."""
    indices = target.indices[shard.index :: shard.count]
    if not indices:
        raise UserError(
            f"shard {shard} has no image: {len(target.indices)} are to be certified, so give N at most that"
        )
    return dataclasses.replace(target, indices=indices, folder=folder)


def begun(workdir: Path, name: str) -> list[Path]:
    """The folders of the shards of a certification in a workdir that have begun to sample."""
    form = re.compile(rf"{re.escape(name)}-[0-9]+-of-[0-9]+")
    found = [path for path in (workdir / "shards").glob("*") if form.fullmatch(path.name)]
    return sorted(path for path in found if (path / "certificates.json").exists() or ledger.has_rows(path))


def merge(folder: Path, parts: Sequence[Path]) -> None:
    """Joins the samples in the folders `parts` into `folder`, and derives its certificates as one process would have.

    Rows that `folder` has already are skipped: the same call continues after a kill, and adds what the parts have drawn
    since. Until the end, `folder` has its old certificates. Raises UserError for parts of another run or damaged ones,
    and for an image that two of them have with different samples; then `folder` stays as it was.
    """
    new = not (folder / "certificates.json").exists() and not ledger.has_rows(folder)
    others = set(folder.glob("*"))  # what may be there although nothing was certified
    before = None if new else store.read_folder(folder, "to merge into")
    stored = {part: store.read_folder(part, "to merge") for part in parts}
    _check_same(stored, ("alpha", "bound", "radii", "epsilon"))
    _check_same(({folder: before} if before else {}) | stored, ("start", "stop", "step"))
    opened = [reopen(part, own.settings, own) for part, own in stored.items()]
    joined = _joined(folder, before, opened)
    with joined.open_ledger() as counts:
        size = counts.size
        try:
            if new:  # certificates.json must be there before any sample
                joined.derive(counts, ())
            for part in opened:
                _take_samples(counts, part)
        except UserError:
            counts.cut(size)
            for path in set(folder.iterdir()) - others if new else ():
                path.unlink()
            if new and not others:
                shutil.rmtree(folder)
            raise
        joined.catch_up(counts)
        found = joined.derive(counts, joined.decided_images)
    wanted = stored[parts[0]].wanted or range(0)
    print(joined.summary(*found, wanted))
    if missing := [idx for idx in wanted if idx not in joined.decided_images]:
        named = ", ".join(map(str, missing[:_NAMED])) + (", ..." if len(missing) > _NAMED else "")
        print(f"note: {len(missing):,} of {len(wanted):,} images have no certificate yet: {named}")


def _check_same(stored: Mapping[Path, store.Stored], settings: tuple[str, ...]) -> None:
    """Raises UserError unless all folders are of one run, with the same values of these fields of ``certify``."""
    (first, base), *_ = stored.items()
    for folder, own in stored.items():
        if own.identity.certificate != "smoothed":
            raise UserError(f"{folder} holds deterministic certificates, which have no samples to join")
        if own.identity.streamed:
            raise UserError(f"{folder} is of inputs that were given in batches in Python, where there are no shards")
        if difference := base.identity.how_it_differs(own.identity):
            raise UserError(f"{folder} is of another run than {first}: {difference}; leave it out, or certify it again")
        for name in settings:
            if (was := base.settings.certify[name]) != (now := own.settings.certify[name]):
                remedy = f"give the same command there with --config.certify.{name}={was}"
                raise UserError(f"certify.{name} is {was!r} in {first} and {now!r} in {folder}; {remedy}")
        constant, claimed = base.lipschitz.constant, own.lipschitz.constant
        if (
            not math.isclose(constant, claimed, rel_tol=_SAME)
            or base.lipschitz.output_shape != own.lipschitz.output_shape
        ):
            raise UserError(f"the Lipschitz constant is {constant!r} in {first} and {claimed!r} in {folder}")


def _joined(folder: Path, before: store.Stored | None, parts: list[Certification]) -> Certification:
    """The certification in `folder`, which may have been begun `before`; it takes over all of the parts but samples."""
    held = [reopen(folder, before.settings, before)] if before else []
    config, everywhere = (held or parts)[0].config.copy_and_resolve_references(), [*held, *parts]
    with config.unlocked():
        config.certify.name = folder.name
    report = max((part.lipschitz for part in everywhere), key=lambda report: report.constant)
    joined = Certification(folder, config, parts[0].identity, report)
    joined.stored, record = before, dict[str, dict[str, Any]]()
    for session in itertools.chain(*(part.record for part in everywhere)):
        record[json.dumps(session | {"seconds": None}, sort_keys=True)] = session  # the last one knows how long it took
    joined.record = list(record.values())
    joined.take_fallback(_answers(everywhere))
    return joined


def _answers(parts: list[Certification]) -> fallback.Answers | None:
    """The answers of the fallback in all parts; None without one. Raises UserError for two answers at an image."""
    by_image, lines = dict[int, tuple[int, float]](), list[str]()
    for part in parts:
        if part.fallback is None:
            return None
        header, *rows = part.fallback.text.splitlines(keepends=True)
        lines = lines or [header]
        for line in rows:
            idx = int(line.partition("\t")[0])
            answer = part.fallback.by_image[idx]
            if idx not in by_image:
                lines.append(line)
            if by_image.setdefault(idx, answer) != answer:
                raise UserError(f"{part.folder}: the fallback has another answer at image {idx} than in another part")
    return fallback.Answers("".join(lines), by_image)


def _take_samples(counts: ledger.Ledger, part: Certification) -> None:
    """Adds the rows of a part to a ledger, except those that are there."""
    run, lines = part.identity.run, Lines(counts, part.identity.run)
    ledger.check_recorded(part.folder, ((part.stored and part.stored.derivation) or {}).get("votes"))
    with ledger.explained(lines):
        lines.find(ledger.parts_of(part.folder, run))
        for _, of_image in itertools.groupby(lines, key=lambda row: row.idx):
            rows = _new_rows(counts, list(of_image), part.folder)
            Counts.append(counts, rows)
            counts.write(rows)


def _new_rows(counts: Counts, rows: list[Row], folder: Path) -> list[Row]:
    """The rows of an image that follow those that were counted; raises UserError if it has other samples there."""
    if (known := counts.images.get(rows[0].idx)) is None:
        return rows
    old = [row for row in rows if row.first < known.done[CERTIFYING.index(row.stream)]]
    if not old:
        raise UserError(f"{folder} lacks samples of image {known.idx}: restore its ledger, or leave the folder out")
    own = Counts(counts.schedule, counts.num_classes)
    own.append(old)
    there, further = own.images[known.idx], rows[len(old) :]
    fits = there.label == known.label and np.array_equal(there.looks, known.looks[: there.reached])
    for stream, found in known.counts.items():
        equal = there.done == known.done or (there.done < known.done and not further)
        fits &= equal and (np.array_equal if there.done == known.done else _at_most)(there.counts[stream], found)
    if not fits:
        remedy = f"leave one of the folders out, or {OTHER_NAME}"
        raise UserError(f"{folder} has other samples of image {known.idx} than another part; {remedy}")
    return further


def _at_most(some: np.ndarray, more: np.ndarray) -> bool:
    return bool((some <= more).all())
