"""Reads certificates.json in every format, and writes it together with certificates.tsv, the table it describes.

`table.read_table` reads tables.
"""

import dataclasses
import datetime
import hashlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lsrs_jax import __version__
from lsrs_jax.certification import OTHER_NAME, ledger
from lsrs_jax.certification.identity import Identity, contradiction
from lsrs_jax.config import CERTIFICATES, check_config, chosen_images, config_from_dict, config_to_dict
from lsrs_jax.layers.lipschitz import LipschitzReport
from lsrs_jax.runtime import documents, files
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.format import FIELD_COLUMNS
from lsrs_jax.runtime.types import Config
from lsrs_jax.smoothing.counts import ImageCounts
from lsrs_jax.smoothing.derivation import Certificates

_PART = {"bytes": int, "sha256": str}  # of a file that only grows
_MOST = 2**20  # classes, or pixels in a row


@dataclasses.dataclass(frozen=True)
class Stored:
    """The content of a certificates.json."""

    format: int  # of the file; certificates were derived by the rules of this format
    identity: Identity
    # The other facts on which the table depends; None before there is a table. ``certificates`` is the digest of the
    # table; there is ``bound``, and for smoothed certificates ``alpha``, ``votes`` (size and digest of each ledger;
    # None in old files), the settings of the staged schedule, and size and digest of fallback.tsv if there is one.
    derivation: dict[str, Any] | None
    lipschitz: LipschitzReport
    config: Config | None  # None in old files
    training: str | None  # digest of the config.json of the training; None if there was none
    record: list[dict[str, Any]]  # one entry per session
    sealed: bool  # whether the file names its own digest; nobody can tell whether an unsealed file is intact

    @property
    def settings(self) -> Config:
        """The configuration of a sealed file; such a file always has one."""
        assert self.config is not None
        return self.config

    @property
    def wanted(self) -> range | None:
        """The images that the configuration asks for; None for an old file that does not know how many there are."""
        return chosen_images(self.settings, self.identity.images)


def read(path: Path) -> Stored:
    """The content of a certificates.json of any format; raises UserError for a damaged file, or a newer format."""
    found: list[Stored] = []
    documents.read_sealed(path, lambda content: found.append(_parse(content)), OTHER_NAME)
    return found[0]


def check_files(folder: Path) -> None:
    """Raises UserError for a pipe, a folder or another thing in the place of a file, on which a reader could wait."""
    for name in ("certificates.json", "certificates.tsv", "fallback.tsv", "inputs.tsv", "audit.json", "audit.tsv"):
        if (path := folder / name).exists() and not path.is_file():
            raise UserError(f"{path} is not a file; remove it, or {OTHER_NAME}")


def read_folder(folder: Path, use: str) -> Stored:
    """Reads the certificates.json in a folder, which must be sealed. An error names the `use`."""
    check_files(folder)
    path = folder / "certificates.json"
    if path.exists():
        return require_sealed(path)
    if ledger.has_rows(folder) or (folder / "certificates.tsv").exists():
        raise UserError(f"{folder} has lost its {path.name}; restore it, or {OTHER_NAME}")
    raise UserError(f"{folder} holds no certification {use}: run python -m lsrs_jax.certify first")


def require_sealed(path: Path) -> Stored:
    """Reads a certificates.json that must name its own digest."""
    stored = read(path)
    if not stored.sealed:
        why = "an old version wrote it without a digest, so nobody can tell whether it was changed"
        raise UserError(f"{path} is unsealed: {why}. report reads it; to certify, {OTHER_NAME}")
    return stored


def _parse(content: dict[str, Any]) -> Stored:
    """Raises UserError, ValueError, KeyError or TypeError for content that no version has written."""
    derived = ("alpha", "bound", "radii", "epsilon", "certificates", "votes", "fallback", "inputs")
    known: dict[str, Any] = dict.fromkeys(("format", "identity", "config", "training", "record", "digest"))
    known |= {"derivation": derived, "lipschitz": ("layers", "input_shape", "output_shape", "constant")}
    documents.refuse_unknown(content, known)
    sealed = content["digest"] is not None
    config = check_config(config_from_dict(content["config"])) if sealed or "config" in content else None
    wanted = {"certificate": str, "checkpoint": {"step": int, "digest": str}, "data": dict, "platform": str}
    wanted |= {"model": {"input_shape": list}}
    _check_types(content, {"identity": wanted, "lipschitz": dict, "record": list})
    identity, lipschitz = Identity.from_dict(content["identity"]), LipschitzReport.from_dict(content["lipschitz"])
    classes = 2 if identity.classes is None and not sealed else identity.classes
    if identity.certificate not in CERTIFICATES or type(classes) is not int or not 2 <= classes <= _MOST:
        raise ValueError("identity is of no certificate")
    if config and (found := contradiction(identity, config)):
        raise UserError(f"it contradicts itself: {found}; restore it, or {OTHER_NAME}")
    if not all(type(size) is int and 1 <= size <= _MOST for size in identity.model["input_shape"]):
        raise ValueError("input_shape cannot be the shape of an image")
    begun, images = identity.format, identity.images
    if type(begun) is not int or not 1 <= begun <= max(content["format"], 1):
        raise ValueError(f"its folder cannot have been begun in format {begun!r}")
    unknown = identity.streamed and identity.data.get("name") == "arrays"
    if begun > 1 and not unknown and (type(images) is not int or not 1 <= images < 2**53):
        raise ValueError("identity.images is missing")
    derivation = content["derivation"]
    if derivation is not None:
        _check_types(content, {"derivation": {"certificates": str, "bound": str}})
    if identity.certificate == "smoothed":
        _check_types(content, {"identity": {"arithmetic": {"name": str}}})
        if derivation is not None:
            derivation = derivation | {"votes": _parse_votes(content)} if sealed else {"votes": None} | derivation
            if bool(identity.fallback) != bool(derivation.get("fallback")):
                raise ValueError("only one of identity and derivation names a fallback")
            for name in ("fallback", "inputs"):
                if name in derivation:
                    _check_types(derivation, {name: _PART}, "derivation.")
            if identity.streamed != ("inputs" in derivation):
                raise ValueError("only one of identity and derivation says that inputs came in batches")
    training, record = content.get("training"), content["record"]
    return Stored(content["format"], identity, derivation, lipschitz, config, training, record, sealed)


def _parse_votes(content: dict[str, Any]) -> dict[str, dict]:
    """The size and digest of every ledger in a sealed document."""
    _check_types(content, {"derivation": {"alpha": float, "votes": dict}})
    votes = content["derivation"]["votes"]
    if "sha256" in votes:  # written when there was only one ledger
        votes = {ledger.name(0): votes}
    if not votes:
        raise ValueError("its certificates name no ledger")
    for name, digest in votes.items():
        if not ledger.is_name(name):
            raise ValueError(f"{name[:40]!r} is no ledger")
        _check_types(digest, _PART, f"derivation.votes.{name}.")
    return votes


def _check_types(values: Any, wanted: dict[str, Any], prefix: str = "") -> None:
    """Raises TypeError unless a dict has these fields of these types."""
    for name, kind in wanted.items():
        value = values.get(name) if isinstance(values, dict) else None
        if isinstance(kind, dict):
            _check_types(value, kind, f"{prefix}{name}.")
        elif not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{prefix}{name} is missing")


def training_digest(folder: Path) -> str | None:
    """SHA-256 of the config.json in the workdir of a folder; None without one."""
    path = folder.parents[1] / "config.json"
    return files.digest_of(path) if path.exists() else None


def read_same_run(path: Path, identity: Identity) -> Stored:
    """The content of a certificates.json, to be continued; raises UserError for one of another identity."""
    stored = require_sealed(path)
    if difference := stored.identity.how_it_differs(identity.begun_as(stored.identity)):
        remedy = f"{OTHER_NAME}, or resume with what it was"
        raise UserError(f"{path.parent} holds certificates of another run: {difference}; {remedy}")
    return stored


def new_session(images: int) -> dict[str, Any]:
    """A new entry of the record; ``seconds`` is filled in at the end."""
    versions = {"lsrs_jax": __version__, "jax": jax.__version__, "numpy": np.__version__}
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    devices = f"{jax.device_count()} x {jax.local_devices()[0].device_kind}"
    session = {"started": started, "seconds": None, "images": images, "devices": devices}
    session |= {"processes": jax.process_count(), "host": platform.machine()}
    return session | {"versions": versions | {"python": platform.python_version()}}


def format_table(images: Sequence[ImageCounts], certificates: Certificates, lipschitz: float) -> str:
    """The text of certificates.tsv for images and their certificates, in the same order.

    The six columns of Cohen et al. 2019 come first. Radii are printed with full precision, never rounded up.
    """
    idx, label, seconds, slack = zip(*((i.idx, i.label, i.seconds, i.slack) for i in images), strict=True)
    proven = {name: getattr(certificates, name) for name in ("predict", "radius", "n", "p_a_lower", "p_b_upper")}
    columns = {"idx": idx, "label": label, "time": seconds} | proven
    return format_columns(columns | {"lipschitz": lipschitz, "slack": slack, "abstain": certificates.abstain})


def format_columns(columns: Mapping[str, Any]) -> str:
    """The text of a table in the field's format, from columns: name → array over images, or one number for all.

    The names include `FIELD_COLUMNS` except ``correct``, which is added here.
    """
    arrays = {name: np.broadcast_to(values, len(columns["idx"])) for name, values in columns.items()}
    arrays["correct"] = arrays["predict"] == arrays["label"]
    names = [*FIELD_COLUMNS, *(name for name in arrays if name not in FIELD_COLUMNS)]
    rows = zip(*(arrays[name] for name in names), strict=True)
    return "".join("\t".join(cells) + "\n" for cells in [names, *(map(_print, names, row) for row in rows)])


def _print(name: str, value: Any) -> str:
    if name == "time":
        return f"{value:.6f}"
    return repr(float(value)) if isinstance(value, np.floating) else str(int(value))


def write(
    folder: Path,
    config: Config,
    identity: Identity,
    lipschitz: LipschitzReport,
    record: list[dict[str, Any]],
    derivation: dict[str, Any] | None = None,
    table: str | None = None,
) -> None:
    """Writes certificates.json and, if it has changed, certificates.tsv with the text `table`.

    `derivation` has the facts on which the table depends besides the identity; None before there is a table.
    """
    content = {"identity": identity.to_dict(), "derivation": None, "lipschitz": lipschitz.to_dict()}
    content |= {"config": config_to_dict(config), "training": training_digest(folder), "record": record}
    document, path = folder / "certificates.json", folder / "certificates.tsv"
    if table is not None and derivation is not None:
        text = table.encode()
        digest = hashlib.sha256(text).hexdigest()
        if not (path.exists() and files.digest_of(path) == digest):
            # The order matters: clear the derivation, write the table, then write the new derivation.
            documents.write_sealed(document, content)
            files.write_atomic(path, text)
        content["derivation"] = derivation | {"certificates": digest}
    documents.write_sealed(document, content)
