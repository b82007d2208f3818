"""The folder of one certification: what identifies it, and the files derived in it."""

import dataclasses
import datetime
import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lsrs_jax
from lsrs_jax import config as configuration
from lsrs_jax import data as datasets
from lsrs_jax import models
from lsrs_jax.errors import UserError
from lsrs_jax.files import write_atomic


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be certified, and where the results go.

    Attributes:
      config: the whole configuration.
      folder: ``<workdir>/certify/<name>``.
      dataset: the split, whole.
      indices: which of its images.
      model, params, meta: the trained classifier and its checkpoint's ``{"step", "digest"}``.
    """

    config: Any
    folder: Path
    dataset: datasets.Dataset
    indices: range
    model: models.Model
    params: Any
    meta: dict

    def identity(self, certificate):
        """What makes two certifications comparable, whatever the kind of `certificate`."""
        dataset = self.dataset
        return {
            "certificate": certificate,
            "checkpoint": {"step": self.meta["step"], "digest": self.meta["digest"]},
            "data": {
                "name": dataset.name,
                "version": dataset.version,
                "split": dataset.split,
                "digest": dataset.digest(),
            },
            "model": configuration.to_dict(self.config.model) | {"input_shape": list(self.model.input_shape)},
            "platform": f"{jax.default_backend()} {jax.local_devices()[0].device_kind}",
        }


def read(path):
    """The content of a certificates.json."""
    try:
        stored = json.loads(path.read_text())
        for name, kind in (("identity", dict), ("lipschitz", dict), ("record", list)):
            if not isinstance(stored[name], kind):
                raise TypeError(f"{name} is missing")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or use another --config.certify.name") from error
    return stored


def read_record(path, identity):
    """The record of earlier sessions in a certificates.json; refuses one of another identity."""
    stored = read(path)
    # The kind of certificate first: everything else follows from it.
    difference = configuration.first_difference(
        {"certificate": stored["identity"].get("certificate")}, {"certificate": identity["certificate"]}
    ) or configuration.first_difference(stored["identity"], identity)
    if difference:
        name, old, new = difference
        raise UserError(
            f"{path.parent} holds certificates of another run: {name} was {old!r} and is now {new!r}; use another "
            "--config.certify.name, or the old value to resume"
        )
    return list(stored["record"])


def session(images):
    """A new entry of the record; `seconds` is filled in at the end."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": None,
        "images": images,
        "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
        "host": platform.machine(),
        "versions": {
            "lsrs_jax": lsrs_jax.__version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def write(folder, identity, lipschitz, record, derivation=None, text=None):
    """Writes certificates.json and, where it changed, certificates.tsv.

    Args:
      lipschitz: the `LipschitzReport` behind the certificates, as a dict.
      derivation: what the table depends on beside the identity; None before there is one.
      text: the table.
    """
    content = {"identity": identity, "derivation": None, "lipschitz": lipschitz, "record": record}
    json_path, path = folder / "certificates.json", folder / "certificates.tsv"

    def write_json():
        write_atomic(json_path, json.dumps(content, indent=2) + "\n")

    if text is not None and not (path.exists() and path.read_text() == text):
        # Between these writes the old table must not stand beside the new derivation, nor the other way round.
        write_json()
        write_atomic(path, text)
    if text is not None:
        content["derivation"] = derivation | {"certificates": hashlib.sha256(text.encode()).hexdigest()}
    write_json()
