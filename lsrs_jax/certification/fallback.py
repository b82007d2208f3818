"""The fallback of a composition: a deterministic classifier that answers where the votes do not.

Its classes and certified radii stand in fallback.tsv, in the folder of the certificates, before a sample is drawn. So
certificates can be derived again without the fallback itself.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lsrs_jax import models
from lsrs_jax.certification import OTHER_NAME, ledger, store
from lsrs_jax.certification.deterministic import COLUMNS, SAME
from lsrs_jax.certification.identity import base_name
from lsrs_jax.certification.linear import LinearClassifier
from lsrs_jax.certification.table import parse_number
from lsrs_jax.certification.target import check_images
from lsrs_jax.config import load_config, without_absent
from lsrs_jax.data import Dataset
from lsrs_jax.runtime import documents, files
from lsrs_jax.runtime.errors import NotHere, UserError
from lsrs_jax.runtime.types import Config
from lsrs_jax.training.checkpoint import restore, trained_on

FILE = "fallback.tsv"


@dataclasses.dataclass(frozen=True)
class Answers:
    """Classes and certified radii of a fallback, by index of the image, and the text of the file that holds them."""

    text: str
    by_image: dict[int, tuple[int, float]]

    def write(self, folder: Path) -> None:
        """Writes fallback.tsv, if it holds anything else."""
        path = folder / FILE
        if not (path.exists() and path.read_bytes() == self.text.encode()):
            files.write_atomic(path, self.text)

    def digest(self) -> dict[str, Any]:
        """Size and SHA-256 of the file."""
        return ledger.digest(self.text.encode())


@dataclasses.dataclass(frozen=True)
class Fallback:
    """A deterministic classifier of a workdir, and what the identity of a composition says about it."""

    classifier: LinearClassifier
    identity: dict[str, Any]  # step of the checkpoint, digest of parameters and network

    def answers(self, dataset: Dataset, indices: Collection[int], known: Answers | None) -> Answers:
        """The answers at some images of a data set. Those that are `known` stay as they are."""
        by_image, text = ({}, _header()) if known is None else (dict(known.by_image), known.text)
        if missing := np.array(sorted(set(indices) - set(by_image)), int).tolist():
            columns = self.classifier.certificates(dataset, np.array(missing))
            labels = {"idx": np.array(missing), "label": dataset.labels[missing], "time": 0.0, "n": 0}
            text += store.format_columns(labels | columns).partition("\n")[2]
            found = zip(missing, columns["predict"].tolist(), columns["radius"].tolist(), strict=True)
            by_image |= {idx: (predict, radius) for idx, predict, radius in found}
        return Answers(text, by_image)

    def check(self, folder: Path, dataset: Dataset, indices: np.ndarray, known: Answers) -> None:
        """Raises UserError unless the classifier gives the answers that are `known` at these images."""
        found = self.classifier.certificates(dataset, indices)
        slack = found["slack"] / found["lipschitz"]
        for idx, own, radius, near in zip(indices.tolist(), found["predict"], found["radius"], slack, strict=True):
            claimed, claims = known.by_image[idx]
            if abs(claims - radius) > SAME * (radius + near) or (claimed != own and radius > 0):
                there = f"image {idx} has class {claimed} and radius {claims!r} there"
                raise UserError(f"{folder / FILE}: {there}, the fallback gives {own} and {float(radius)!r}")


def check_settings(config: Config) -> None:
    """Raises UserError for settings with which a composition has no certificates."""
    certify = config.certify
    if not certify.fallback:
        return
    if certify.certificate != "smoothed":
        raise UserError("--config.certify.fallback is for smoothed certificates: leave it out")
    if certify.bound != "multiclass":
        raise UserError("certify.fallback needs a bound of every rival: give --config.certify.bound=multiclass")


def begun(folder: Path) -> dict[str, Any] | None:
    """What the identity of the certificates in a folder says about the fallback; None without one."""
    path = folder / "certificates.json"
    return store.require_sealed(path).identity.fallback if path.exists() else None


def load(config: Config, dataset: Dataset, begun: Mapping[str, Any] | None = None) -> Fallback | None:
    """The fallback of a configuration, None if it names none; `begun` is what an identity says about it.

    Raises UserError for a classifier of other data or without a linear head, or another one than `begun`, and NotHere
    if there is none.
    """
    check_settings(config)
    if not config.certify.fallback:
        return None
    workdir = Path(config.certify.fallback)
    if not (workdir / "config.json").exists():
        remedy = "give its workdir as --config.certify.fallback=WORKDIR"
        raise NotHere(f"the fallback {workdir} is not here: {remedy}, or {OTHER_NAME}")
    own = load_config(workdir / "config.json")
    if base_name(own.data.name) != base_name(config.data.name):
        raise UserError(
            f"the fallback {workdir} was trained on {own.data.name}, and {config.data.name} is certified: give a "
            "classifier of the same data"
        )
    check_images(workdir, trained_on(workdir), dataset)
    model = models.build(own.model, dataset.shape, len(dataset.class_names))
    params, meta = restore(workdir, model, begun["step"] if begun else None)
    section = without_absent(documents.plain(own.model.to_dict()), "model.")
    identity = {"step": meta["step"], "digest": documents.digest({"parameters": meta["digest"], "model": section})}
    if not hasattr(model.head, "matrix"):
        raise UserError(f"the fallback {workdir} has the head {own.model.head}, and a fallback needs a linear head")
    if begun and identity != begun:
        raise UserError(f"the fallback {workdir} is not the one of these certificates: give that one, or {OTHER_NAME}")
    return Fallback(LinearClassifier(model, params), identity)


def read(folder: Path, recorded: dict[str, Any] | None, classes: int | None) -> Answers | None:
    """The part of fallback.tsv from which certificates were derived, by its recorded digest; None without one.

    Rows may follow that an interrupted session has written; they are left out. Raises UserError if the part has
    changed, naming the line if it cannot be read.
    """
    if recorded is None:
        return None
    path = folder / FILE
    content = path.read_bytes()[: recorded["bytes"]] if path.exists() else b""
    if ledger.digest(content) != recorded:
        problem = "has changed: its digest is not the one in certificates.json" if path.exists() else "is missing"
        raise UserError(f"{path} {problem}; restore it, or {OTHER_NAME}")
    try:
        text = content.decode("utf-8")
    except ValueError as error:
        raise UserError(f"{path} is not a text file; restore it, or {OTHER_NAME}") from error
    by_image: dict[int, tuple[int, float]] = {}
    if not text.startswith(_header()) or not text.endswith("\n"):
        raise UserError(f"{path} is not a table of a fallback; restore it, or {OTHER_NAME}")
    for number, line in enumerate(text.splitlines()[1:], start=2):
        try:
            row = files.fields_of(line, COLUMNS)
            idx, radius = int(row["idx"]), parse_number(row["radius"])
            if idx in by_image or not 0 <= radius < math.inf:
                raise ValueError("the image is there twice, or its radius is out of range")
            if not 0 <= int(row["predict"]) < (classes or 0):
                raise ValueError(f"there is no class {row['predict']}")
            by_image[idx] = int(row["predict"]), radius
        except ValueError as error:
            raise UserError(f"{path} line {number} cannot be of a fallback: {error}") from error
    return Answers(text, by_image)


def _header() -> str:
    return "\t".join(COLUMNS) + "\n"
