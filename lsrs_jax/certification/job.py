"""A trained classifier and the images to certify it on."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from lsrs_jax import checkpoint, models
from lsrs_jax import config as configuration
from lsrs_jax import data as datasets
from lsrs_jax.errors import UserError
from lsrs_jax.keys import pinned, root_key
from lsrs_jax.workdir import checkpoints


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
    dataset: datasets.Dataset | datasets.Photos
    indices: range
    model: models.Model
    params: Any
    meta: dict

    def identity(self, certificate):
        """What makes two certifications comparable, whatever the kind of `certificate`."""
        dataset = self.dataset
        return {
            "certificate": certificate,
            "classes": dataset.num_classes,
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


def restore(workdir, model, step=None):
    """`checkpoint.restore_model` for the parameters of a model."""
    with pinned():
        target = jax.eval_shape(model.init, root_key(0))
    return checkpoint.restore_model(workdir, target, step)


def _check_data(workdir, dataset):
    """Raises UserError for images of another shape than the training's, which convolutions would take, or classes."""
    trained = checkpoint.trained_on(workdir)
    found = {"input_shape": list(dataset.shape), "classes": dataset.num_classes}
    if trained and trained != found:
        raise UserError(
            f"the network in {workdir} was trained on images of shape {trained.get('input_shape')} in "
            f"{trained.get('classes')} classes, but those of {dataset.name} are of shape {found['input_shape']} in "
            f"{found['classes']}: certify another data.name, or train a network on this one"
        )


def load(workdir, config, step=None):
    """The `Job` of a configuration: its data, its network and a checkpoint of the workdir, the newest where None."""
    certify = config.certify
    dataset = datasets.of_config(config.data, config.data.split)
    indices = range(certify.start, min(certify.stop or len(dataset), len(dataset)), certify.step)
    if not len(indices):
        raise UserError(f"no image to certify: certify.start={certify.start} in a split of {len(dataset)}")
    _check_data(workdir, dataset)
    model = models.build(config.model, dataset.shape, dataset.num_classes)
    params, meta = restore(workdir, model, step)
    if step is None and meta["step"] < config.train.steps:
        print(f"note: the training stopped at step {meta['step']} of {config.train.steps}")
    return Job(config, workdir / "certify" / certify.name, dataset, indices, model, params, meta)


def of_certificates(place, stored, data_dir):
    """The `Job` that certificates are of: its network and its images must be those that were certified.

    Args:
      place: their folder, whatever name it had when they were made.
      stored: content of their certificates.json.
      data_dir: where the data lies now.

    Raises:
      UserError: for a network or images that are not there any more, or not what they were.
    """
    workdir, config, identity = place.parents[1], configuration.from_dict(stored["config"]), stored["identity"]
    config.data.dir, config.certify.name = data_dir, place.name
    step = identity["checkpoint"]["step"]
    if not (checkpoints(workdir) / str(step)).is_dir():
        raise UserError(
            f"the checkpoint of step {step}, which was certified, is not in {workdir}: restore it from a copy, or "
            "certify again under another --config.certify.name"
        )
    job = load(workdir, config, step)
    if job.meta["digest"] != identity["checkpoint"]["digest"]:
        raise UserError(f"the checkpoint of step {step} in {workdir} has other weights than those that were certified")
    found = job.identity(identity["certificate"])
    if found["data"]["digest"] != identity["data"].get("digest"):
        raise UserError(
            f"images or labels of {job.dataset.name}, split {job.dataset.split}, are not those that were certified"
        )
    difference = configuration.first_difference({name: identity.get(name) for name in found}, found, ("platform",))
    if difference:
        name, claimed, own = difference
        raise UserError(f"{place} contradicts itself: its {name} is {claimed!r}, that of its configuration {own!r}")
    return job
