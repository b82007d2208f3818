"""Certification of a caller's classifier into a workdir: the same files as the command ``certify`` writes."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lsrs_jax.api.batches import Batches
from lsrs_jax.api.classifier import SmoothedClassifier
from lsrs_jax.api.encoding import all_positive
from lsrs_jax.api.result import Result
from lsrs_jax.certification import smoothed, store
from lsrs_jax.certification.identity import Identity
from lsrs_jax.certification.inputs import Inputs
from lsrs_jax.certification.target import Target
from lsrs_jax.config import CALLER, check_config, chosen_images, config_to_dict, default, load_config, save_config
from lsrs_jax.data import Dataset
from lsrs_jax.layers.lipschitz import Materialized
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.processes import ALONE
from lsrs_jax.runtime.rng import pinned
from lsrs_jax.runtime.types import Config
from lsrs_jax.runtime.workdir import SCHEMES, Workdir
from lsrs_jax.smoothing.arithmetic import make_arithmetic
from lsrs_jax.smoothing.derivation import Certificates
from lsrs_jax.smoothing.head_identity import ProgramIdentity
from lsrs_jax.smoothing.sampler import Sampler
from lsrs_jax.smoothing.settings import FLAGS


@dataclasses.dataclass(frozen=True)
class GivenTarget(Target):
    """A `Target` with a classifier that a caller has given."""

    classifier: SmoothedClassifier
    given_slack: np.ndarray  # ℓ2, per input

    def encoder(self) -> Materialized:
        return self.classifier.encoder(self.dataset.shape, all_positive(self.given_slack))

    def sampler(self, **flags: bool) -> Sampler:
        return self.classifier.sampler(self.encoder().report.output_shape, **flags)

    def slack(self, indices: list[int]) -> np.ndarray:
        return self.given_slack[indices]


@dataclasses.dataclass(frozen=True)
class BatchTarget(GivenTarget):
    """A `GivenTarget` whose inputs come in batches; `given_slack` is one number for all."""

    dataset: Batches  # pyright: ignore[reportIncompatibleVariableOverride]

    def slack(self, indices: list[int]) -> np.ndarray:
        return np.full(len(indices), self.given_slack)

    def identity(self, certificate: str) -> Identity:
        return dataclasses.replace(super().identity(certificate), images=None)  # nobody knows how many will come

    def inputs(self) -> Inputs:
        return self.dataset.known

    def arriving(self) -> Iterator[range]:
        for indices in self.dataset.arriving():
            self.config.certify.stop = len(self.dataset)
            yield indices


def certify_arrays(
    classifier: SmoothedClassifier,
    inputs: np.ndarray,
    labels: np.ndarray,
    slack: np.ndarray,
    out: Path,
    fields: dict[str, Any],
    say: smoothed.Say | None,
) -> Result:
    """`certify` for a caller's arrays."""
    slack = np.broadcast_to(slack, len(inputs))
    return certify(classifier, classifier.dataset(inputs, labels), slack, out, fields, say)


def certify(
    classifier: SmoothedClassifier,
    dataset: Dataset,
    slack: np.ndarray,
    out: Path,
    fields: dict[str, Any],
    say: smoothed.Say | None,
    data: Config | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Result:
    """Certifies images of a split into ``<out>/certify/<name>``, and continues what is there.

    Args:
      dataset: the whole split; its images are read when they are needed.
      slack: the caller's, per image of the split; one number for `Batches`.
      fields: values of the section ``certify``; start, stop and step choose the images.
      data: the section ``data`` that names the split; None for a caller's arrays.
      facts: for the entry of this session in the record, besides the program of the head.

    Returns the certificates of the chosen images, in the order of the split. Raises UserError for a folder of another
    classifier, other images or other settings.
    """
    low_precision = all_positive(slack)
    classifier.encoder(dataset.shape, low_precision)  # refuses one whose rounding is not covered
    fields = fields | ({} if fields.get("radii") is not None else {"radii": ()})
    config, batches = _config(classifier, out, fields, data), isinstance(dataset, Batches)
    indices = chosen_images(config, len(dataset)) or range(0)
    if not (indices or batches):
        raise UserError(f"no image to certify: start={config.certify.start} in a split of {len(dataset)}")
    folder = out / "certify" / config.certify.name
    identity = classifier.identity(dataset.shape, low_precision)
    classifier.require_current(dataset.shape)
    _check_program(folder, identity, config)
    meta = {"step": 0, "digest": identity.parameters}
    kind: Any = BatchTarget if batches else GivenTarget
    target = kind(config, folder, dataset, indices, meta, classifier, slack)
    facts = {"program": identity.program} | dict(facts or {})
    with pinned(), contextlib.nullcontext() if data else _for_callers():
        found = smoothed.run(target, ALONE, Workdir(out), say or (lambda line: None), lambda: None, facts)
    images, certificates = found or ([], None)
    assert certificates is not None, "this process derives, and there are images"
    rows = [row for row, image in enumerate(images) if batches or image.idx in indices]
    names = [field.name for field in dataclasses.fields(Certificates) if field.name != "samples"]
    chosen: dict[str, Any] = {name: getattr(certificates, name)[rows] for name in names}
    chosen |= {"labels": np.array([images[row].label for row in rows]), "class_names": dataset.class_names}
    radii = tuple(config.certify.radii) if config.certify.schedule != "fixed" else ()
    return Result(**chosen, sigma=classifier.sigma, folder=folder, radii=radii)


def check_same(classifier: SmoothedClassifier, dataset: Dataset, folder: Path, stored: store.Stored) -> None:
    """Raises UserError unless the certificates in a folder are of this classifier and these images."""
    config = stored.settings.copy_and_resolve_references()
    with config.unlocked():
        config.sigma = classifier.sigma
        config.certify.update({name: classifier.settings[name] for name in ("arithmetic", "noise", "tile")})
    identity = classifier.identity(dataset.shape)
    _check_program(folder, identity, config)
    meta, none = {"step": 0, "digest": identity.parameters}, np.zeros(len(dataset))
    target = GivenTarget(config, folder, dataset, range(len(dataset)), meta, classifier, none)
    arithmetic = make_arithmetic(config.certify.arithmetic, config.sigma)
    own = target.identity("smoothed").sampled(config, arithmetic, classifier.encoder(dataset.shape).report.output_shape)
    if difference := stored.identity.how_it_differs(own.begun_as(stored.identity)):
        raise UserError(f"{folder} holds certificates of another run: {difference}; give what was certified")


@contextlib.contextmanager
def _for_callers() -> Iterator[None]:
    """Errors of the command, in the words of the Python interface."""
    try:
        yield
    except UserError as error:
        raise type(error)(str(error).replace("--config.certify.name", "name")) from error


def _config(classifier: SmoothedClassifier, out: Path, fields: dict[str, Any], data: Config | None) -> Config:
    """The configuration of the certification; writes the one of the workdir, which no later call changes."""
    if str(out).startswith(SCHEMES):
        raise UserError("out must be a folder of this machine")
    if next((part for part in (out, *out.parents) if part.exists()), out).is_file():
        raise UserError(f"out must be a folder, and {out} is or lies in a file")
    config, path = default(), out / "config.json"
    config.data.update(data or {"name": "arrays", "split": "given"})
    config.model.head, config.model.encoder = CALLER, CALLER if classifier.has_encoder else "identity"
    if path.exists():
        held = config_to_dict(load_config(path))
        if any(held[name] != config_to_dict(config)[name] for name in ("model", "train")):
            raise UserError(f"{out} holds a training, or certificates of another kind of classifier: give another out")
    config.sigma = classifier.sigma
    settings = {name: classifier.settings[name] for name in ("arithmetic", "noise", "tile", "spmd", *FLAGS)}
    for name, value in (settings | fields).items():
        try:
            config.certify[name] = value
        except (TypeError, ValueError) as error:
            raise UserError(f"{name} has the wrong type: {value!r}") from error
    check_config(config)
    if not path.exists():
        plain = default()
        plain.data.update(config.data)
        plain.model.head, plain.model.encoder = config.model.head, config.model.encoder
        save_config(plain, path)
    return config


def _check_program(folder: Path, identity: ProgramIdentity, config: Config) -> None:
    """Raises UserError if a folder was made by another function with the same parameters.

    Another tile gives another program of the same function; it is refused elsewhere. Another version of JAX may do so
    too: then nobody can tell whether the function is the same.
    """
    path = folder / "certificates.json"
    if not path.exists():
        return
    stored = store.require_sealed(path)
    known = [entry["program"] for entry in stored.record if entry.get("program")]
    same = (identity.parameters, list(config.certify.tile)) == (
        stored.identity.checkpoint["digest"],
        stored.identity.tile,
    )
    if same and known and identity.program not in known:
        versions = {entry["versions"]["jax"] for entry in stored.record} - {jax.__version__}
        upgraded = (
            f" (or JAX {jax.__version__} writes it otherwise than {', '.join(sorted(versions))})" if versions else ""
        )
        raise UserError(
            f"{folder} holds certificates of another function of the same parameters{upgraded}: give the function that "
            "was used, or another name or out"
        )
