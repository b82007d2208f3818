"""The folder of one certification, and the files derived in it."""

import datetime
import hashlib
import platform
import re

import jax
import numpy as np

import lsrs_jax
from lsrs_jax import config as configuration
from lsrs_jax import sealed
from lsrs_jax.config import CERTIFICATES
from lsrs_jax.errors import UserError
from lsrs_jax.files import write_atomic
from lsrs_jax.materialize import LipschitzReport
from lsrs_jax.smoothing import ledger as ledgers

_MOST_CLASSES = 2**20  # and pixels in a row
_IDENTITY = {
    "certificate": str,
    "checkpoint": {"step": int, "digest": str},
    "classes": int,
    "data": dict,
    "model": {"input_shape": list},
    "platform": str,
}


def read(path):
    """The content of a certificates.json, intact by its own digest, with the fields that readers rely on.

    Raises:
      UserError: for a damaged one, or one of another version.
    """
    return sealed.read(path, _check_content, "certify under another --config.certify.name")


def of_place(place, purpose):
    """`read` of the certificates.json in a folder; where there is none, the error says for which `purpose`."""
    path = place / "certificates.json"
    if path.exists():
        return read(path)
    if ledgers.has_rows(place) or (place / "certificates.tsv").exists():
        raise UserError(f"{place} has lost its {path.name}; restore it, or certify under another --config.certify.name")
    raise UserError(f"{place} holds no certification {purpose}: run python -m lsrs_jax.certify first")


def _check_content(stored):
    """Raises ValueError, KeyError or TypeError for what `write` would not have written."""
    _check(stored, {"identity": _IDENTITY, "lipschitz": dict, "config": dict, "record": list}, "")
    identity, derivation = stored["identity"], stored["derivation"]
    if identity["certificate"] not in CERTIFICATES or not 2 <= identity["classes"] <= _MOST_CLASSES:
        raise ValueError("identity is that of no certificate")
    shape = identity["model"]["input_shape"]
    if not isinstance(shape, list) or not all(type(size) is int and 1 <= size <= _MOST_CLASSES for size in shape):
        raise ValueError("input_shape is that of no image")
    LipschitzReport.from_dict(stored["lipschitz"])
    config = configuration.check(configuration.from_dict(stored["config"]))
    if config.certify.certificate != identity["certificate"]:
        raise ValueError("identity and config are of different kinds")
    smoothed = identity["certificate"] == "smoothed"
    if smoothed:
        _check(identity, {"arithmetic": {"name": str}}, "identity.")
    if derivation is not None:
        votes = {"alpha": float, "votes": dict} if smoothed else {}
        _check(derivation, {"certificates": str, "bound": str} | votes, "derivation.")
        if smoothed and not derivation["votes"]:
            raise ValueError("its certificates name no ledger")
        for name in derivation["votes"] if smoothed else ():
            if not re.fullmatch(r"votes\.\d{1,9}\.tsv", name):
                raise ValueError(f"{name[:40]!r} is no ledger")
            _check(derivation["votes"][name], {"bytes": int, "sha256": str}, f"derivation.votes.{name}.")


def _check(values, wanted, prefix):
    """Raises TypeError unless a dict has these fields of these types."""
    for name, kind in wanted.items():
        value = values.get(name) if isinstance(values, dict) else None
        if isinstance(kind, dict):
            _check(value, kind, f"{prefix}{name}.")
        elif not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{prefix}{name} is missing")


def training(place):
    """SHA-256 of the configuration that a training left in the workdir of a folder; None where there is none."""
    path = place.parents[1] / "config.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def read_record(path, identity):
    """The record of earlier sessions in a certificates.json; refuses one of another identity."""
    stored = read(path)
    difference = _difference(stored["identity"], identity)
    if difference:
        raise UserError(
            f"{path.parent} holds certificates of another run: {difference}; use another --config.certify.name, or the "
            "old value to resume"
        )
    return list(stored["record"])


_FOLLOWING = ("arithmetic", "checkpoint.digest", "data.digest", "stages")
# Where the configuration has what an identity names.
_FIELDS = {"arithmetic.name": "certify.arithmetic"}
_FIELDS |= {name: f"certify.{name}" for name in ("certificate", "n0", "n", "schedule", "tile", "noise", "head_dtype")}


def _difference(old, new):
    """In what two identities differ, in words; None where they agree."""
    # The kind of certificate first, for everything else follows from it; last what follows from the others itself.
    found = configuration.first_difference(*({"certificate": one["certificate"]} for one in (old, new)))
    found = found or configuration.first_difference(old, new, _FOLLOWING) or configuration.first_difference(old, new)
    if not found:
        return None
    name, was, now = found
    if name == "checkpoint.step":
        return f"they are of the checkpoint of step {was}, and the newest is that of step {now}"
    if name == "checkpoint.digest":
        return f"the checkpoint of step {new['checkpoint']['step']} has other weights than it had"
    if name == "data.digest":
        data = new["data"]
        return f"images or labels of {data['name']} {data['version']}, split {data['split']}, are not what they were"
    return f"{_FIELDS.get(name, name)} was {was!r} and is now {now!r}"


def session(images):
    """A new entry of the record; `seconds` is filled in at the end."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": None,
        "images": images,
        "devices": f"{jax.device_count()} x {jax.local_devices()[0].device_kind}",
        "processes": jax.process_count(),
        "host": platform.machine(),
        "versions": {
            "lsrs_jax": lsrs_jax.__version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def write(folder, config, identity, lipschitz, record, derivation=None, text=None):
    """Writes certificates.json and, where it changed, certificates.tsv.

    Args:
      config: the configuration, kept whole beside what follows from it.
      lipschitz: the `LipschitzReport` behind the certificates, as a dict.
      derivation: what the table depends on beside the identity; None before there is one.
      text: the table.
    """
    content = {
        "identity": identity,
        "derivation": None,
        "lipschitz": lipschitz,
        "config": configuration.to_dict(config),
        "training": training(folder),
        "record": record,
    }
    json_path, path = folder / "certificates.json", folder / "certificates.tsv"

    if text is not None and not (path.exists() and path.read_bytes() == text.encode()):
        # Between these writes the old table must not stand beside the new derivation, nor the other way round.
        sealed.write(json_path, content)
        write_atomic(path, text)
    if text is not None:
        content["derivation"] = derivation | {"certificates": hashlib.sha256(text.encode()).hexdigest()}
    sealed.write(json_path, content)
