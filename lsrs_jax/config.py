"""The fields of a configuration: the default, meaning and limit of each, and its value in a stored file without it."""

import difflib
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lsrs_jax.runtime.documents import first_difference, format_of, in_file, plain, read_json
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import write_atomic
from lsrs_jax.runtime.format import FORMAT
from lsrs_jax.runtime.types import Config
from lsrs_jax.smoothing.confidence import BOUNDS
from lsrs_jax.smoothing.schedule import SCHEDULES

LOSSES = ("gaussian", "consistency", "macer", "smoothadv", "smoothadv_consistency", "margin")
DTYPES = ("float32", "bfloat16")
CERTIFICATES = ("smoothed", "deterministic")
SEED_DERIVED, SEED_OF_TRAINING = -1, -2  # values of certify.seed

# These fields may change between the first start of a training and its resumption.
_MAY_CHANGE = (
    *("certify", "data.dir", "data.split", "data.workers"),
    *("train.log_every", "train.evaluate_every", "train.checkpoint_every", "train.keep_checkpoints"),
)


class Limit(NamedTuple):
    """What a value must be, in words and as a condition on the value and the whole configuration."""

    words: str
    holds: Callable[[Any, Any], bool]


class Field(NamedTuple):
    """One field of a configuration.

    `absent` is the value that a stored file without the field means: what the program did before the field existed.
    It is `REQUIRED` if every version has written the field; then a file without it is damaged.
    """

    default: Any  # for new runs
    absent: Any
    meaning: str
    limit: Limit | None = None  # None if the part of the program that reads the field checks it


REQUIRED = object()


def _at_least(least: float) -> Limit:
    return Limit(f"at least {least}", lambda value, _: least <= value < float("inf"))


def _between(least: float, most: float, words: str = "") -> Limit:
    return Limit(words or f"between {least} and {most}", lambda value, _: least <= value <= most)


def _one_of(*choices: str) -> Limit:
    return Limit(" or ".join(map(repr, choices)), lambda value, _: value in choices)


_PLAIN = re.compile(r"\w[\w.-]*")
_SEED = _between(0, 2**32 - 1, "between 0 and 2**32 - 1")
_NOISE_SEED = _between(SEED_OF_TRAINING, 2**32 - 1, "between 0 and 2**32 - 1, or -1 to derive it")
_SIGMA = _between(2.0**-60, 2.0**60, "a positive number (between 1e-18 and 1e18)")
_DATA = Limit("the name of a data set, as in 'cifar10'", lambda name, _: bool(_PLAIN.fullmatch(name.replace(":", ""))))
_CROP = Limit("at least 0, and 0 if data.size is given", lambda crop, c: crop >= 0 and not (crop and c.data.size))
_AREA = Limit("two shares, 0 < least <= most <= 1", lambda area, _: len(area) == 2 and 0 < area[0] <= area[1] <= 1)
_NOISES = Limit(
    "at least 1, with consistency at least 2", lambda n, c: n >= (2 if "consistency" in c.train.loss else 1)
)
_LOSS, _SCHEDULE = _one_of(*LOSSES), _one_of("cosine", "constant")
_WARMUP = Limit("at least 0 and below train.steps={train.steps}", lambda steps, c: 0 <= steps < c.train.steps)
_FOLDER = Limit("a plain folder name (letters, digits, . _ -)", lambda name, _: bool(_PLAIN.fullmatch(name)))
_SAMPLES = _between(1, 2**27, "between 1 and 2**27")
_RADII = Limit("numbers >= 0, such as (0.25, 0.5)", lambda radii, _: all(0 <= r < float("inf") for r in radii))
_KIND = _one_of(*CERTIFICATES)
_STOP = Limit("0 or above certify.start={certify.start}", lambda stop, c: stop == 0 or stop > c.certify.start)
_ARITHMETIC, _NOISE = _one_of("sound", "float32"), _one_of("shared", "independent")
_SPMD = _one_of("shard_map", "pmap")
_TILE = Limit("two numbers >= 1, not both 1", lambda tile, _: len(tile) == 2 and min(tile) >= 1 and max(tile) >= 2)
_ALPHA = Limit("strictly between 0 and 1", lambda alpha, _: 0 < alpha < 1)
_DECAY = Limit("at least 0 and below 1", lambda decay, _: 0 <= decay < 1)
_POSITIVE = Limit("a positive number", lambda value, _: 0 < value < float("inf"))

FIELDS: dict[str, Field] = {
    "seed": Field(0, REQUIRED, "Parameters, batches and noise of the training follow from this seed.", _SEED),
    "sigma": Field(0.5, REQUIRED, "The noise has this standard deviation, in training and certification.", _SIGMA),
    "data.name": Field("digits", REQUIRED, "The set is the embedded digits or one of tensorflow-datasets.", _DATA),
    "data.dir": Field("", REQUIRED, "This folder holds tensorflow-datasets; if empty, $TFDS_DATA_DIR does."),
    "data.train_split": Field("train", REQUIRED, "The network is trained on this split."),
    "data.split": Field("test", REQUIRED, "This split is evaluated and certified."),
    "data.batch_size": Field(128, REQUIRED, "A training step uses this many images.", _at_least(1)),
    "data.crop": Field(0, REQUIRED, "Training images are shifted at random by at most this many pixels.", _CROP),
    "data.flip": Field(False, REQUIRED, "If true, half of the training images are mirrored, at random."),
    "data.size": Field(0, 0, "Photos are cut to this side in pixels; 0 is for images of one size.", _between(0, 4096)),
    "data.area": Field((0.08, 1.0), (0.08, 1.0), "Training sees a share of each photo between these two.", _AREA),
    "data.workers": Field(0, 0, "This many processes decode photos; with 0, threads do.", _between(0, 1024)),
    "model.encoder": Field("shallow", REQUIRED, 'models.encoders lists the names; "identity" means no encoder.'),
    "model.method": Field("adaptive", REQUIRED, "Orthogonal convolutions are of this family in orthogonal.FAMILIES."),
    "model.initializer": Field("identity", "identity", 'Orthogonal convolutions start as the "identity" or "random".'),
    "model.padding": Field("circular", "circular", 'Orthogonal convolutions have "circular" or "zero" padding.'),
    "model.activation": Field("maxmin", "maxmin", '"maxmin" or "householder" follows an orthogonal convolution.'),
    "model.head": Field("convnet", REQUIRED, "The head has this name in models.heads."),
    "model.widths": Field((12, 12, 48, 48), (12, 12, 48, 48), 'A network of "blocks" has these numbers of channels.'),
    "model.strides": Field((2, 1, 2, 1), (2, 1, 2, 1), "Space-to-depth in front of each block has this stride."),
    "model.split": Field(2, 2, "The encoder consists of this many blocks, the head of the others."),
    "model.noise": Field("latent", REQUIRED, 'Noise is added to the "latent", or to the "input" of the same network.'),
    "model.mean": Field((0.0,), REQUIRED, "These numbers, one per channel, are subtracted from the input."),
    "model.std": Field((1.0,), REQUIRED, "These numbers divide the input; the Lipschitz constant contains 1/min(std)."),
    "train.steps": Field(1000, REQUIRED, "The optimizer takes this many steps.", _at_least(1)),
    "train.loss": Field("gaussian", "gaussian", "This is the loss; training.losses explains each.", _LOSS),
    "train.noises": Field(1, 1, "Each image gets this many noise samples in a step.", _NOISES),
    "train.radius": Field(36 / 255, 36 / 255, 'The loss "margin" asks for this radius.', _at_least(0)),
    "train.temperature": Field(0.25, 0.25, 'The loss "margin" divides the logits by this number.', _POSITIVE),
    "train.consistency.weight": Field(10.0, 10.0, "λ weights the consistency loss.", _at_least(0)),
    "train.consistency.entropy": Field(0.5, 0.5, "η weights the entropy in the consistency loss.", _at_least(0)),
    "train.macer.weight": Field(12.0, 12.0, "λ weights the radius loss of MACER.", _at_least(0)),
    "train.macer.margin": Field(8.0, 8.0, "γ is the margin in the hinge of MACER.", _POSITIVE),
    "train.macer.sharpness": Field(16.0, 16.0, "β multiplies the logits in the radius loss of MACER.", _POSITIVE),
    "train.smoothadv.radius": Field(0.25, 0.25, "The attack moves the latent by at most this distance.", _at_least(0)),
    "train.smoothadv.steps": Field(2, 2, "The attack takes this many gradient steps.", _at_least(1)),
    "train.ema": Field(0.0, 0.0, "The certified parameters are averages with this decay; 0 means no average.", _DECAY),
    "train.shard_parameters": Field(False, False, "If true, devices divide parameters and optimizer state."),
    "train.head_dtype": Field("float32", "float32", "The head is trained in this dtype.", _one_of(*DTYPES)),
    "train.optimizer": Field(
        "adam", REQUIRED, 'The optimizer is "adam", or "sgd" with Nesterov momentum 0.9.', _one_of("adam", "sgd")
    ),
    "train.learning_rate": Field(1e-3, REQUIRED, "This is the highest learning rate.", _POSITIVE),
    "train.schedule": Field("cosine", REQUIRED, "The learning rate follows this curve after the warm-up.", _SCHEDULE),
    "train.warmup_steps": Field(0, REQUIRED, "The learning rate first grows linearly for this many steps.", _WARMUP),
    "train.weight_decay": Field(0.0, REQUIRED, "The head's kernels have this decoupled weight decay.", _at_least(0)),
    "train.log_every": Field(50, REQUIRED, "This many steps lie between two lines of metrics.", _at_least(1)),
    "train.evaluate_every": Field(1000, REQUIRED, "This many steps lie between two evaluations.", _at_least(1)),
    "train.checkpoint_every": Field(1000, REQUIRED, "This many steps lie between two checkpoints.", _at_least(1)),
    "train.keep_checkpoints": Field(2, REQUIRED, "This many of the newest checkpoints are kept.", _at_least(1)),
    "certify.name": Field("default", REQUIRED, "Results go to the folder <workdir>/certify/<name>.", _FOLDER),
    "certify.certificate": Field(
        "smoothed", "smoothed", 'Certificates are "smoothed", or "deterministic" for a linear head.', _KIND
    ),
    "certify.n0": Field(100, REQUIRED, "This many samples select the class.", _SAMPLES),
    "certify.n": Field(100_000, REQUIRED, "This many samples certify the class, or fewer if staged.", _SAMPLES),
    "certify.alpha": Field(0.001, REQUIRED, "The certificate of an image fails with at most this probability.", _ALPHA),
    "certify.bound": Field(
        "binary", "binary", 'p_B is 1 - p_A ("binary"), or a bound of the rivals ("multiclass").', _one_of(*BOUNDS)
    ),
    "certify.schedule": Field(
        "fixed", "fixed", 'All images get n samples ("fixed"), or stop when decided ("staged").', _one_of(*SCHEDULES)
    ),
    "certify.radii": Field(
        (), (), "Staged sampling stops when it is known which of these radii are certified.", _RADII
    ),
    "certify.epsilon": Field(
        0.05, 0.05, "Without radii, staged sampling stops at this precision, in sigma / L.", _POSITIVE
    ),
    "certify.start": Field(0, REQUIRED, "The first certified image has this index.", _at_least(0)),
    "certify.stop": Field(0, REQUIRED, "Certification ends before this index; 0 means the end of the split.", _STOP),
    "certify.step": Field(1, REQUIRED, "One of this many images is certified.", _at_least(1)),
    "certify.seed": Field(
        SEED_DERIVED,
        SEED_OF_TRAINING,
        "The noise has this seed; -1 derives it from parameters and images, -2 takes the field seed.",
        _NOISE_SEED,
    ),
    "certify.arithmetic": Field(
        "sound", "float32", 'Noise is added exactly on a grid ("sound"), or in "float32".', _ARITHMETIC
    ),
    "certify.noise": Field("shared", "shared", 'If "shared", all images get the same noise.', _NOISE),
    "certify.head_dtype": Field("float32", "float32", "The head is sampled in this dtype.", _one_of(*DTYPES)),
    "certify.tile": Field((32, 8), REQUIRED, "A compiled batch has these numbers of images and samples.", _TILE),
    "certify.spmd": Field("shard_map", REQUIRED, "This function of JAX divides the work over devices.", _SPMD),
}

# Variant -> values of dotted fields: what every experiment with an orthogonal encoder can be compared with.
COMPARISONS = {
    "lsrs": {},
    "cayley": {"model.method": "cayley"},  # another family of convolutions
    "isrs": {"model.encoder": "identity"},  # no encoder: the head smoothed in input space
    "isrs_split": {"model.noise": "input"},  # the same network smoothed in input space
}


def default() -> Config:
    """The defaults of all fields. Experiments in ``configs/`` start here; flags ``--config.<field>=`` override."""
    fields: dict[str, Any] = {}
    for name, field in FIELDS.items():
        *sections, last = name.split(".")
        functools.reduce(lambda inner, section: inner.setdefault(section, {}), sections, fields)[last] = field.default
    return ConfigDict(fields)


def choose(config: Config, variant: str, variants: Mapping[str, Mapping[str, Any]] = COMPARISONS) -> Config:
    """Changes a configuration into one of its variants; raises ValueError, which lists them, for an unknown variant."""
    if variant not in variants:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(variants)}")
    config.update_from_flattened_dict(variants[variant])
    return config


def _section(config: Config, name: str) -> tuple[Any, str]:
    """The section of a dotted field, and the field's name inside it."""
    *sections, last = name.split(".")
    return functools.reduce(lambda section, part: section[part], sections, config), last


def check_config(config: Config) -> Config:
    """Returns the configuration; raises UserError, which names the field, for a value outside its limit."""
    for name, field in FIELDS.items():
        section, last = _section(config, name)
        if field.limit and not field.limit.holds(section[last], config):
            words = field.limit.words.format(**config)
            raise UserError(f"config field {name} must be {words}, got {section[last]!r}")
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain types, as they come back from JSON, with the format number."""
    if "format" in config:
        raise UserError("unknown config field 'format': the program writes it itself")
    return {"format": FORMAT} | plain(config.to_dict())


def config_from_dict(values: Any) -> Config:
    """The configuration that `config_to_dict` has converted, in this format or an older one.

    Raises:
      UserError: for a newer format, an unknown field, a wrong type, or a missing field that every version has written.
    """
    if not isinstance(values, dict):
        raise UserError("a configuration holds fields; restore it, or train again into a new workdir")
    format_of(values)
    given = dict(_leaves({name: value for name, value in values.items() if name != "format"}))
    config = default()
    for name, field in FIELDS.items():
        value, (section, last) = given.get(name, field.absent), _section(config, name)
        if value is REQUIRED:
            raise UserError(f"config field {name} is missing, which every version has written; restore the file")
        if name == "certify.stop" and value is None:  # the first version wrote None for "to the end"
            value = 0
        try:
            if value is None or isinstance(value, bool) != isinstance(field.default, bool):
                raise TypeError("another type")
            section[last] = _elements(field.default, value) if isinstance(value, list) else value
        except (TypeError, OverflowError) as error:
            raise UserError(f"config field {name} has the wrong type: {value!r}") from error
    return config.lock()


def chosen_images(config: Config, images: int | None) -> range | None:
    """The images to certify in a split of this size; None if neither the size nor an end is known."""
    certify, images = config.certify, images or config.certify.stop
    return range(certify.start, min(certify.stop or images, images), certify.step) if images else None


def upgrade_section(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Adds to a stored section what its missing fields mean; see `Field.absent`."""
    names = [name for name in FIELDS if name.startswith(prefix)]
    missing = {name.removeprefix(prefix): FIELDS[name].absent for name in names if FIELDS[name].absent is not REQUIRED}
    return plain(missing) | values


def without_absent(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Leaves out of a section what `upgrade_section` would add: it stays the same when later versions add fields."""
    absent = upgrade_section({}, prefix)
    return {name: value for name, value in values.items() if name not in absent or absent[name] != value}


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``(dotted name, value)`` of every field in a nested dict; raises UserError for anything that is no field."""
    inside = sorted(name.removeprefix(prefix) for name in FIELDS if name.startswith(prefix))
    known = list(dict.fromkeys(name.partition(".")[0] for name in inside))
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in known:
            near = [f"{prefix}{other}" for other in difflib.get_close_matches(key, known, 1)]
            near += [other for other in FIELDS if other.count(".") == 1 and other.endswith(f".{key}")]
            hint = f"did you mean {near[0]}?" if near else f"{prefix[:-1] or 'a configuration'} has {', '.join(known)}"
            raise UserError(f"unknown config field {name!r}; {hint}")
        if name in FIELDS and isinstance(value, dict):
            raise UserError(f"config field {name} is no section: it takes a value")
        if name in FIELDS:
            yield name, value
        elif isinstance(value, dict):
            yield from _leaves(value, f"{name}.")
        else:
            fields = ", ".join(f"{prefix}{other}" for other in inside if other.startswith(f"{key}."))
            raise UserError(f"config field {name} is a section: set one of {fields}")


def check_field(name: str) -> None:
    """Raises UserError unless `name` is the dotted name of a field."""
    nested: Any = None
    for part in reversed(name.split(".")):
        nested = {part: nested}
    list(_leaves(nested))


def _elements(default: Any, values: list) -> tuple:
    """Converts a list to a tuple whose elements have the type of the default's elements; integers become floats."""
    kind = float if default == () else type(default[0]) if isinstance(default, tuple) else object
    allowed = (int, float) if kind is float else kind
    if not all(isinstance(value, allowed) and not isinstance(value, bool) for value in values):
        raise TypeError("elements of another type")
    return tuple(float(value) for value in values) if kind is float else tuple(values)


def save_config(config: Config, path: Path) -> None:
    """Writes a configuration as JSON; leaves a file with the same meaning as it is."""
    if not (path.exists() and config_to_dict(load_config(path)) == config_to_dict(config)):
        write_atomic(path, json.dumps(config_to_dict(config), indent=2) + "\n")


def load_config(path: Path) -> Config:
    """Reads a configuration that this version or an older one has written; raises UserError if it cannot be read."""
    try:
        return config_from_dict(read_json(path))
    except FileNotFoundError as error:
        if (path.parent / "checkpoints").exists():
            raise UserError(f"{path.parent} holds checkpoints but no config.json: restore it from a copy") from error
        remedy = f"run python -m lsrs_jax.train --workdir={path.parent} first"
        raise UserError(f"{path.parent} holds no training: {remedy}") from error
    except UserError as error:
        raise in_file(path, error) from error
    except ValueError as error:
        raise UserError(f"{path} is not a stored configuration ({error}); train again into a new workdir") from error


def other_training(old: dict, new: dict) -> tuple[str, Any, Any] | None:
    """The `first_difference` of two configurations, as dicts, in fields on which a trained model depends."""
    return first_difference(old, new, _MAY_CHANGE)
