"""Finds the images that runs certified, and what is known about each: votes, and the nearest flip of an audit."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lsrs_jax.auditing.flips import Flips
from lsrs_jax.certification import ledger
from lsrs_jax.data import Dataset, load_split
from lsrs_jax.reporting.pictures import BYTES, Sheets, make_sheets
from lsrs_jax.reporting.runs import Run
from lsrs_jax.runtime import documents
from lsrs_jax.runtime.errors import UserError, first_line
from lsrs_jax.smoothing.counts import ImageCounts
from lsrs_jax.smoothing.schedule import Schedule

if TYPE_CHECKING:  # it loads JAX, which a report of tables alone does not need
    from lsrs_jax.certification.store import Stored

SHIPPED = ("digits",)  # sets that come with a library: everybody has them, so that their images may be embedded
_MOST = 20_000  # images on a page
_LEADING = 3  # classes of which votes are shown
_BYTES_OF_FLIPS = BYTES // 3  # of their sheets, as `BYTES` of the images


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The images of one data set, which several runs on it share, or the flips of one run."""

    name: str
    classes: tuple[str, ...]
    sheets: Sheets


@dataclasses.dataclass(frozen=True)
class Gallery:
    """What the page shows about the images of a run; lists over `rows`."""

    pictures: int  # which `Pictures`
    every: int  # 1 if all certified images are shown, k if every k-th
    rows: np.ndarray  # of the run's table, in the order of the images
    place: np.ndarray  # of the images in the sheets
    votes: list[list[tuple[int, int]]] | None  # (class, estimation samples) of the leading classes; None if unknown
    samples: list[int] | None  # estimation samples of all classes
    flips: list[float | None] | None  # ℓ2 distance; None for no flip found. -1: not audited. None without an audit
    flipped: "FlipPictures | None" = None  # the points of these flips


@dataclasses.dataclass(frozen=True)
class FlipPictures:
    """The pictures of the nearest flips of a run; lists over the rows of its `Gallery`."""

    pictures: int  # which `Pictures`
    place: list[int]  # in the sheets; -1 without a picture
    predict: list[int]  # class at the flip, or -1


def collect(runs: Sequence[Run], embed: bool) -> tuple[list[Pictures], list[Gallery | None], list[str]]:
    """The embedded images, the gallery of each run, and notes: why a run has none, or what it lacks.

    Images of sets that do not come with a library are embedded if `embed` is true.
    """
    loaded: dict[str, Dataset] = {}  # by digest
    known: dict[str, Dataset | str] = {}  # by what names it: the set, or why it cannot be read
    found: list[tuple[str, Stored] | None] = []
    reasons: dict[str, list[str]] = {}
    for run in runs:
        try:
            stored = _stored(run)
            dataset = _dataset(stored, embed, known)
            digest = dataset.digest()
            if digest != stored.identity.data.get("digest"):
                raise UserError(f"{dataset.name}, split {dataset.split}, does not hold the certified images")
            if run.table.idx.max() >= len(dataset) or (dataset.labels[run.table.idx] != run.table.label).any():
                raise UserError(f"its images have other labels in {dataset.name}, split {dataset.split}")
            loaded.setdefault(digest, dataset)
            found.append((digest, stored))
        except Exception as error:  # whatever the readers of a data set raise; the report goes on without images
            found.append(None)
            reasons.setdefault(_reason(error), []).append(run.label)
    notes = [f"no images of {', '.join(labels)}: {reason}." for reason, labels in reasons.items()]
    parts = {digest: _chosen(runs, found, digest) for digest in loaded}
    share = -(-sum(map(len, parts.values())) // _MOST)
    parts = {digest: idx[::share] for digest, idx in parts.items()}
    sheets = make_sheets([(loaded[digest], idx) for digest, idx in parts.items()])
    pictures = [
        Pictures(dataset.name, dataset.class_names, made) for dataset, made in zip(loaded.values(), sheets, strict=True)
    ]
    galleries = list[Gallery | None]()
    for run, one in zip(runs, found, strict=True):
        galleries.append(one and _gallery(run, one[1], list(parts).index(one[0]), parts[one[0]], share, notes))
    _add_flips(runs, galleries, list(loaded.values()), pictures, notes)
    return pictures, galleries, notes


def _add_flips(
    runs: Sequence[Run],
    galleries: list[Gallery | None],
    datasets: Sequence[Dataset],
    pictures: list[Pictures],
    notes: list[str],
) -> None:
    """Adds the pictures of the nearest flips to `galleries` and `pictures`, and notes of those that lack."""
    flips = dict[int, tuple[Flips, np.ndarray]]()
    for number, (run, gallery) in enumerate(zip(runs, galleries, strict=True)):
        if gallery and run.audit and np.isfinite(run.audit.distance).any():
            try:
                found = _nearest_flips(run, datasets[gallery.pictures])
                flips[number] = found, np.intersect1d(run.table.idx[gallery.rows], list(found.predict))
            except UserError as error:
                notes.append(f"no pictures of the nearest flips of {run.label}: {error}.")
    sheets = make_sheets(list(flips.values()), _BYTES_OF_FLIPS)
    for (number, (found, shown)), made in zip(flips.items(), sheets, strict=True):
        if gallery := galleries[number]:
            places = {i: place for place, i in enumerate(shown.tolist())}
            rows = runs[number].table.idx[gallery.rows].tolist()
            there = [places.get(i, -1) for i in rows], [found.predict.get(i, -1) for i in rows]
            galleries[number] = dataclasses.replace(gallery, flipped=FlipPictures(len(pictures), *there))
            pictures.append(Pictures("nearest flips", pictures[gallery.pictures].classes, made))


def _nearest_flips(run: Run, dataset: Dataset) -> Flips:
    """The points beside the audit of a run; raises UserError if there are none."""
    if not run.audit or not run.file:
        raise UserError("nothing beside the table holds them")
    distance = dict(zip(run.audit.idx.tolist(), run.audit.distance.tolist(), strict=True))
    found = Flips(run.file.parent, distance, dataset.shape, lambda idx: dataset.read(idx, np.float64)[0])
    if not found.predict:
        raise UserError("no file beside its audit.tsv holds them; move the audit away and audit again to get them")
    return found


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"


def _stored(run: Run) -> "Stored":
    """What certificates.json beside the table of a run says; raises UserError if it names no images."""
    # The files beside a table are about the table of this name.
    document = run.file and run.file.name == "certificates.tsv" and run.file.with_name("certificates.json")
    if not document or not document.exists() or not _is_ours(document):
        raise UserError("nothing beside the table says which images it is about")
    from lsrs_jax.certification import store

    stored = store.read(document)
    if stored.config is None or not stored.identity.data.get("digest"):
        raise UserError("an old version wrote its certificates.json, which does not say where the images are")
    return stored


def _is_ours(document: Path) -> bool:
    content = documents.read_json(document)
    return isinstance(content, dict) and "identity" in content and "record" in content


def _dataset(stored: "Stored", embed: bool, known: dict[str, Dataset | str]) -> Dataset:
    """The data set of a certification; `known` keeps what was read, and why a set could not be read."""
    data = stored.settings.data
    if data.name not in SHIPPED and not embed:
        raise UserError(f"those of {data.name} are put into the page with --images")
    name = repr(sorted(data.to_dict().items()))
    if name not in known:
        try:
            known[name] = load_split(data, data.split)
        except UserError as error:
            known[name] = str(error)
    dataset = known[name]
    if isinstance(dataset, str):
        raise UserError(dataset)
    return dataset


def _chosen(runs: Sequence[Run], found: Sequence[Any], digest: str) -> np.ndarray:
    """The sorted indices of the images that any run on this data set certified."""
    tables = [run.table.idx for run, one in zip(runs, found, strict=True) if one and one[0] == digest]
    return np.unique(np.concatenate(tables))


def _gallery(run: Run, stored: "Stored", pictures: int, idx: np.ndarray, every: int, notes: list[str]) -> Gallery:
    order = np.argsort(run.table.idx, kind="stable")
    rows = order[np.isin(run.table.idx[order], idx)]
    shown = run.table.idx[rows]
    try:
        images = _counts(run, stored)
    except UserError as error:
        images, _ = {}, notes.append(f"no votes of {run.label}: {error}.")
    votes = samples = flips = None
    if images:
        counts = [images[i].counts["estimation"] if i in images else np.zeros(1, int) for i in shown.tolist()]
        votes, samples = [_leading(one) for one in counts], [int(one.sum()) for one in counts]
    if run.audit:
        nearest = dict(zip(run.audit.idx.tolist(), run.audit.distance.tolist(), strict=True))
        flips = [None if (far := nearest.get(i, -1.0)) == np.inf else far for i in shown.tolist()]
    return Gallery(pictures, every, rows, np.searchsorted(idx, shown), votes, samples, flips)


def _counts(run: Run, stored: "Stored") -> dict[int, ImageCounts]:
    """The counts of the ledgers beside a table, by image; none for a deterministic certification."""
    identity, derivation = stored.identity, stored.derivation
    if identity.certificate != "smoothed" or not run.file or not derivation:
        return {}
    if not (identity.n0 and identity.stages and identity.tile and identity.classes):
        raise UserError("its certificates.json does not say how it was sampled")
    ledger.check_recorded(run.file.parent, derivation["votes"])
    anytime = identity.schedule == "anytime"
    schedule = Schedule(identity.n0, tuple(identity.stages), identity.tile[1], anytime)
    return ledger.read(run.file.parent, schedule, identity.classes, identity.run, derivation["votes"]).images


def _leading(counts: np.ndarray) -> list[tuple[int, int]]:
    """The classes with the most samples, the first of equals first."""
    order = np.argsort(-counts, kind="stable")[:_LEADING]
    return [(int(label), int(counts[label])) for label in order if counts[label]]
