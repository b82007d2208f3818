"""`lsrs_jax.load`: a trained network, from a workdir, a file, or this package, as a `SmoothedClassifier`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lsrs_jax import models
from lsrs_jax.api import model_file
from lsrs_jax.api.classifier import SmoothedClassifier
from lsrs_jax.config import load_config
from lsrs_jax.models.custom import allowing
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.rng import pinned
from lsrs_jax.runtime.types import Config
from lsrs_jax.smoothing.settings import FLAGS
from lsrs_jax.training.checkpoint import restore, trained_on

_PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"
MODEL_FILE = "model.safetensors"


def load(source: str | Path, *, step: int | None = None, allow_code: Sequence[str] = ()) -> SmoothedClassifier:
    """A trained network as a `SmoothedClassifier`, with its encoder, Lipschitz constant, sigma and class names.

    Args:
      source: a workdir of the command ``train``, a file or folder of ``export``, or the name of a pretrained network
        that comes with this package (`pretrained` lists them).
      step: the checkpoint of a workdir, by default the newest.
      allow_code: names of code that may be imported, for networks that are not part of this package: the
        ``package.module:Class`` or ``FILE.py:Class`` of ``model.head`` and ``model.encoder``.

    Nothing in the files is executed, and no other code is imported. Raises UserError if there is no such network, or if
    it is damaged.
    """
    allow_code = [allow_code] if isinstance(allow_code, str) else allow_code
    path = Path(source).expanduser()
    if not path.exists() and str(source) in pretrained():
        path = _PRETRAINED / str(source)
    if (path / MODEL_FILE).is_file():
        path = path / MODEL_FILE
    with pinned(), allowing(allow_code):
        if path.is_file():
            return _classifier(*model_file.read(path))
        if not path.is_dir():
            names = ", ".join(pretrained())
            raise UserError(f"no network at {source}: give a workdir, a file of the command export, or one of {names}")
        return _classifier(*read_workdir(path, step)[:4])


def pretrained() -> list[str]:
    """Names of the networks that come with this package."""
    return sorted(path.parent.name for path in _PRETRAINED.glob(f"*/{MODEL_FILE}"))


def read_workdir(workdir: Path, step: int | None = None) -> tuple[Config, models.Model, Any, tuple[str, ...], int]:
    """Configuration, model, parameters, class names and step of a checkpoint, by default the newest."""
    config = load_config(workdir / "config.json")
    trained = trained_on(workdir)
    if missing := [name for name in ("input_shape", "classes") if name not in trained]:
        raise UserError(f"the checkpoints in {workdir} are of an old version and do not name their {missing[0]}")
    classes = trained["classes"]
    names = tuple(trained.get("class_names") or map(str, range(classes)))
    model = models.build(config.model, tuple(trained["input_shape"]), classes)
    params, meta = restore(workdir, model, step)
    return config, model, params, names, meta["step"]


def _classifier(config: Config, model: models.Model, params: Any, class_names: tuple[str, ...]) -> SmoothedClassifier:
    certify = config.certify
    encoder, head = model.for_certification(params, certify.head_dtype)
    settings: dict[str, Any] = {name: certify[name] for name in ("arithmetic", "noise", "spmd", *FLAGS)}
    settings |= {"tile": tuple(certify.tile), "fallback": certify.fallback or None}
    given = encoder if encoder.report.layers else None
    made = SmoothedClassifier(head, sigma=config.sigma, encoder=given, class_names=class_names, **settings)
    made.takes_pixels = True
    return made
