"""The target of a certification: a classifier and images of a data set."""

import abc
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lsrs_jax import models
from lsrs_jax.certification import OTHER_NAME
from lsrs_jax.certification.identity import Identity
from lsrs_jax.certification.inputs import Inputs
from lsrs_jax.certification.store import Stored
from lsrs_jax.config import CALLER, chosen_images
from lsrs_jax.data import Dataset, load_split
from lsrs_jax.data.images import other_class
from lsrs_jax.layers.lipschitz import Materialized
from lsrs_jax.models.torch_head import check_dtype
from lsrs_jax.runtime import documents
from lsrs_jax.runtime.errors import NotHere, UserError
from lsrs_jax.runtime.format import FORMAT
from lsrs_jax.runtime.types import Config
from lsrs_jax.runtime.workdir import checkpoints
from lsrs_jax.smoothing.counts import ImageCounts
from lsrs_jax.smoothing.head_check import Head
from lsrs_jax.smoothing.sampler import Sampler
from lsrs_jax.training.checkpoint import restore, trained_on


def make_sampler(config: Config, head: Head, latent_shape: Sequence[int], **flags: bool) -> Sampler:
    """The `Sampler` of a configuration."""
    settings = {name: config.certify[name] for name in ("arithmetic", "noise", "tile", "spmd")}
    return Sampler(head, latent_shape, sigma=config.sigma, **flags, **settings)


@dataclasses.dataclass(frozen=True)
class Target(abc.ABC):
    """The images to certify and the folder of the results; a subclass has the classifier."""

    config: Config
    folder: Path  # <workdir>/certify/<name>
    dataset: Dataset  # the whole split
    indices: range  # the images to certify
    meta: dict[str, Any]  # step and digest of the parameters

    @abc.abstractmethod
    def encoder(self) -> Materialized:
        """The encoder, with its Lipschitz constant."""

    @abc.abstractmethod
    def sampler(self, **flags: bool) -> Sampler:
        """The compiled sampler of the head; `flags` are values of `settings.FLAGS`."""

    def inputs(self) -> Inputs | None:
        """What inputs.tsv says of images that come in batches; None where the data set knows all of its images."""
        return None

    def arriving(self) -> Iterator[range]:
        """The images to certify, one portion that can be read after another."""
        yield self.indices

    def slack(self, indices: list[int]) -> np.ndarray:
        """ℓ2 errors of the latents of some images, which are subtracted besides the rounding of the encoder."""
        return np.zeros(len(indices))

    def check_slack(self, images: Iterable[ImageCounts]) -> None:
        """Raises UserError for an image with less slack in the ledgers than `slack` gives."""
        for image in images:
            if image.slack < (asked := float(self.slack([image.idx])[0])):
                less = f"image {image.idx} has the slack {image.slack} there, less than the {asked} that is given now"
                raise UserError(f"{self.folder}: {less}; {OTHER_NAME}")

    def identity(self, certificate: str) -> Identity:
        """The `Identity` of this run, without the facts of the sampling."""
        dataset = self.dataset
        return Identity(
            certificate=certificate,
            classes=len(dataset.class_names),
            checkpoint={name: self.meta[name] for name in ("step", "digest")},
            data={name: getattr(dataset, name) for name in ("name", "version", "split")}
            | {"digest": dataset.digest(), "class_names": list(dataset.class_names)},
            model=documents.plain(self.config.model.to_dict()) | {"input_shape": list(dataset.shape)},
            platform=f"{jax.default_backend()} {jax.local_devices()[0].device_kind}",
            images=len(dataset),
            format=FORMAT,
        )


@dataclasses.dataclass(frozen=True)
class TrainedTarget(Target):
    """A `Target` with a network of this project."""

    model: models.Model
    params: Any

    @functools.cached_property
    def parts(self) -> tuple[Materialized, Head]:
        """Encoder and head, as `Model.for_certification` makes them."""
        return self.model.for_certification(self.params, self.config.certify.head_dtype)

    def encoder(self) -> Materialized:
        return self.parts[0]

    def sampler(self, **flags: bool) -> Sampler:
        return make_sampler(self.config, self.parts[1], self.parts[0].report.output_shape, **flags)


def load_target(
    workdir: Path, config: Config, step: int | None = None, dataset: Dataset | None = None
) -> TrainedTarget:
    """The `TrainedTarget` of a configuration, with a checkpoint of the workdir, the newest by default.

    Raises UserError for images of another shape than those of the training, or for other classes.
    """
    _refuse_caller(config, workdir)
    certify = config.certify
    step = step or certify.checkpoint or None
    dataset = load_split(config.data, config.data.split) if dataset is None else dataset
    indices = chosen_images(config, len(dataset)) or range(0)
    if not indices:
        raise UserError(f"no image to certify: --config.certify.start={certify.start} in a split of {len(dataset)}")
    check_images(workdir, trained_on(workdir), dataset)
    model = models.build(config.model, dataset.shape, len(dataset.class_names))
    check_dtype(model.head, "certify.head_dtype", certify.head_dtype)
    params, meta = restore(workdir, model, step)
    if step is None and meta["step"] < config.train.steps:
        print(f"note: the training stopped at step {meta['step']} of {config.train.steps}")
    return TrainedTarget(config, workdir / "certify" / certify.name, dataset, indices, meta, model, params)


def _refuse_caller(config: Config, folder: Path) -> None:
    if config.model.head != CALLER:
        return
    if config.data.name != "arrays":
        raise UserError(f"{folder} is of a PyTorch checkpoint, which is not in it: certify-torch continues it")
    raise UserError(
        f"{folder} is of a classifier that was given in Python: give it to SmoothedClassifier again, whose "
        "certify(..., out=...) and audit(..., out=...) continue there"
    )


def check_images(workdir: Path, trained: dict[str, Any], dataset: Dataset) -> None:
    """Raises UserError unless the images have the shape and the classes of the training.

    Convolutions take images of another shape without an error. `trained` comes from `checkpoint.trained_on`, and is
    incomplete in checkpoints of older versions.
    """
    names = list(dataset.class_names)
    remedy = "certify other images with --config.data.name, or train a network on these"
    if dataset.name == "npz":
        remedy = "give the file an array class_names, or certify another set"
    found = {"input_shape": list(dataset.shape), "classes": len(names)}
    if any(trained[name] != found[name] for name in found if name in trained):
        was = f"trained on images of shape {trained.get('input_shape')} in {trained.get('classes')} classes"
        now = f"{dataset.name} has the shape {found['input_shape']} and {found['classes']} classes"
        raise UserError(f"the network in {workdir} was {was}, but {now}: {remedy}")
    if difference := other_class(trained.get("class_names", names), names):
        raise UserError(f"in the training of {workdir} {difference} in {dataset.name}: {remedy}")


def target_of_certificates(folder: Path, stored: Stored, data_dir: str) -> TrainedTarget:
    """The `TrainedTarget` of the certificates in a folder.

    The folder may have been renamed since; the data is in `data_dir` now, or if that is empty, where it was. Raises
    UserError if network or images are missing or have changed.
    """
    workdir, config, identity = folder.parents[1], stored.settings.copy_and_resolve_references(), stored.identity
    _refuse_caller(config, folder)
    config.data.dir, config.certify.name = data_dir or config.data.dir, folder.name
    step = identity.checkpoint["step"]
    if not (checkpoints(workdir) / str(step)).is_dir():
        checkpoint = f"the checkpoint of step {step}, which was certified,"
        raise NotHere(f"{checkpoint} is not in {workdir}: restore it, or {OTHER_NAME}")
    try:
        dataset = load_split(config.data, config.data.split)
    except UserError as error:
        raise NotHere(str(error)) from error
    target = load_target(workdir, config, step, dataset)
    if target.meta["digest"] != identity.checkpoint["digest"]:
        raise UserError(f"the weights in the checkpoint of step {step} in {workdir} are not the certified ones")
    found = target.identity(identity.certificate)
    if found.data["digest"] != identity.data.get("digest"):
        raise UserError("images or labels of {name}, split {split}, are not those certified".format(**found.data))
    found = found.begun_as(identity)
    claims = dataclasses.replace(found, **{name: getattr(identity, name) for name in found.to_dict()})
    if difference := claims.difference(found, ("platform",)):
        name, claimed, own = difference
        raise UserError(f"{folder} contradicts itself: its {name} is {claimed!r}, that of its configuration {own!r}")
    return target
