"""The fields of a configuration: default, meaning and limit of each, and what a stored file without it means."""

import difflib
import functools
import json
from collections.abc import Callable, Mapping
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

# What may change between the first start of a training and its resumption.
_MAY_CHANGE = (
    *("certify", "data.dir", "data.split", "data.workers"),
    *("train.log_every", "train.evaluate_every", "train.checkpoint_every", "train.keep_checkpoints"),
)


class Limit(NamedTuple):
    """What a value must be: a condition on it (and on the whole configuration), and the same in words."""

    words: str
    holds: Callable[[Any, Any], bool]


class Field(NamedTuple):
    """One field of a configuration.

    `absent` is the value that a stored file without the field means: what the program did before the field existed.
    It is `REQUIRED` where every version has written the field, so that a file without it is damaged.
    """

    default: Any  # for new runs
    absent: Any
    meaning: str
    limit: Limit | None = None  # None where the part of the program that reads the field checks it


REQUIRED = object()


def _at_least(least: float) -> Limit:
    return Limit(f"at least {least}", lambda value, _: least <= value < float("inf"))


def _between(least: int, most: int, words: str = "") -> Limit:
    return Limit(words or f"between {least} and {most}", lambda value, _: least <= value <= most)


def _one_of(*choices: str) -> Limit:
    return Limit(" or ".join(map(repr, choices)), lambda value, _: value in choices)


def _plain_name(name: str) -> bool:
    return bool(name) and name[0] not in ".-" and all(c.isalnum() or c in "._-" for c in name)


_SIGMA = Limit("a positive number (between 1e-18 and 1e18)", lambda sigma, _: 2.0**-60 <= sigma <= 2.0**60)
_DATA = Limit("the name of a data set, as in 'cifar10'", lambda name, _: _plain_name(name.replace(":", "")))
_CROP = Limit(
    "at least 0, and 0 where data.size is given: photos are cut by data.area",
    lambda crop, config: crop >= 0 and not (crop and config.data.size),
)
_AREA = Limit("two shares, 0 < least <= most <= 1", lambda area, _: len(area) == 2 and 0 < area[0] <= area[1] <= 1)
_NOISES = Limit(
    "at least 1, with consistency at least 2",
    lambda noises, config: noises >= (2 if "consistency" in config.train.loss else 1),
)
_WARMUP = Limit("at least 0 and below train.steps={train.steps}", lambda steps, c: 0 <= steps < c.train.steps)
_FOLDER = Limit("a plain folder name (letters, digits, . _ -)", lambda name, _: _plain_name(name))
_SAMPLES = _between(1, 2**27, "between 1 and 2**27")
_RADII = Limit("numbers >= 0, such as (0.25, 0.5)", lambda radii, _: all(0 <= r < float("inf") for r in radii))
_STOP = Limit("0 or above certify.start={certify.start}", lambda stop, c: stop == 0 or stop > c.certify.start)
_TILE = Limit(
    "two numbers (images, samples) >= 1, not both 1",
    lambda tile, _: len(tile) == 2 and min(tile) >= 1 and max(tile) >= 2,
)
_SHARE = Limit("strictly between 0 and 1", lambda alpha, _: 0 < alpha < 1)
_DECAY = Limit("at least 0 and below 1", lambda decay, _: 0 <= decay < 1)
_POSITIVE = Limit("a positive number", lambda value, _: 0 < value < float("inf"))

FIELDS: dict[str, Field] = {
    "seed": Field(0, REQUIRED, "Seed of every random number.", _between(0, 2**32 - 1, "between 0 and 2**32 - 1")),
    "sigma": Field(0.5, REQUIRED, "Noise on the latent (or the image), in training and certification alike.", _SIGMA),
    "data.name": Field("digits", REQUIRED, "The embedded digits, or a data set of tensorflow-datasets.", _DATA),
    "data.dir": Field("", REQUIRED, "Folder of tensorflow-datasets; where empty, $TFDS_DATA_DIR."),
    "data.train_split": Field("train", REQUIRED, "Split on which the network is trained."),
    "data.split": Field("test", REQUIRED, "Split that is evaluated and certified."),
    "data.batch_size": Field(128, REQUIRED, "Images per training step.", _at_least(1)),
    "data.crop": Field(0, REQUIRED, "Training images are shifted at random by up to so many pixels.", _CROP),
    "data.flip": Field(False, REQUIRED, "Training images are mirrored at random."),
    "data.size": Field(0, 0, "Photos are cut to so many pixels; 0: images of one size, in memory.", _between(0, 4096)),
    "data.area": Field((0.08, 1.0), (0.08, 1.0), "Least and largest share of a photo that training sees.", _AREA),
    "data.workers": Field(0, 0, "Processes that decode photos; 0: threads.", _between(0, 1024)),
    "model.encoder": Field("shallow", REQUIRED, 'A name in models.encoders; "identity": input-space smoothing.'),
    "model.method": Field("adaptive", REQUIRED, "Family of orthogonal convolutions: a name in orthogonal.FAMILIES."),
    "model.initializer": Field("identity", "identity", 'Start of the orthogonal convolutions, or "random".'),
    "model.padding": Field("circular", "circular", 'Padding of the orthogonal convolutions, or "zero".'),
    "model.activation": Field("maxmin", "maxmin", 'Activation after an orthogonal convolution, or "householder".'),
    "model.head": Field("convnet", REQUIRED, "A name in models.heads."),
    "model.widths": Field((12, 12, 48, 48), (12, 12, 48, 48), 'Channels of the blocks of a network of "blocks".'),
    "model.strides": Field((2, 1, 2, 1), (2, 1, 2, 1), "Space-to-depth in front of each block."),
    "model.split": Field(2, 2, "How many of the blocks belong to the encoder."),
    "model.noise": Field("latent", REQUIRED, '"input": the same network smoothed in input space.'),
    "model.mean": Field((0.0,), REQUIRED, "Subtracted from the input, per channel."),
    "model.std": Field((1.0,), REQUIRED, "Divides the input; 1/min(std) counts in the Lipschitz constant."),
    "train.steps": Field(1000, REQUIRED, "Optimizer steps.", _at_least(1)),
    "train.loss": Field("gaussian", "gaussian", 'See training.losses; "margin": without noise.', _one_of(*LOSSES)),
    "train.noises": Field(1, 1, "Noise samples per image.", _NOISES),
    "train.radius": Field(36 / 255, 36 / 255, "Loss margin: the radius that is asked for.", _at_least(0)),
    "train.temperature": Field(0.25, 0.25, "Loss margin: divides the logits.", _POSITIVE),
    "train.consistency.weight": Field(10.0, 10.0, "λ of consistency.", _at_least(0)),
    "train.consistency.entropy": Field(0.5, 0.5, "η of consistency.", _at_least(0)),
    "train.macer.weight": Field(12.0, 12.0, "λ of MACER.", _at_least(0)),
    "train.macer.margin": Field(8.0, 8.0, "γ of MACER.", _POSITIVE),
    "train.macer.sharpness": Field(16.0, 16.0, "β of MACER.", _POSITIVE),
    "train.smoothadv.radius": Field(0.25, 0.25, "Radius of the attack in the latent.", _at_least(0)),
    "train.smoothadv.steps": Field(2, 2, "Gradient steps of the attack.", _at_least(1)),
    "train.ema": Field(0.0, 0.0, "Decay of the parameters' average, which is then certified; 0: none.", _DECAY),
    "train.shard_parameters": Field(False, False, "Divide parameters and optimizer state over the devices."),
    "train.head_dtype": Field("float32", "float32", "Dtype in which the head is trained.", _one_of(*DTYPES)),
    "train.optimizer": Field("adam", REQUIRED, "Adam, or SGD with Nesterov momentum 0.9.", _one_of("adam", "sgd")),
    "train.learning_rate": Field(1e-3, REQUIRED, "The highest learning rate.", _POSITIVE),
    "train.schedule": Field(
        "cosine", REQUIRED, "Course of the learning rate after the warm-up.", _one_of("cosine", "constant")
    ),
    "train.warmup_steps": Field(0, REQUIRED, "Steps in which the learning rate grows linearly.", _WARMUP),
    "train.weight_decay": Field(0.0, REQUIRED, "Decoupled weight decay of the head's kernels.", _at_least(0)),
    "train.log_every": Field(50, REQUIRED, "Steps between two lines of metrics.", _at_least(1)),
    "train.evaluate_every": Field(1000, REQUIRED, "Steps between two evaluations.", _at_least(1)),
    "train.checkpoint_every": Field(1000, REQUIRED, "Steps between two checkpoints.", _at_least(1)),
    "train.keep_checkpoints": Field(2, REQUIRED, "How many checkpoints are kept.", _at_least(1)),
    "certify.name": Field("default", REQUIRED, "Results go to <workdir>/certify/<name>.", _FOLDER),
    "certify.certificate": Field("smoothed", "smoothed", "Samples, or a linear head's margin.", _one_of(*CERTIFICATES)),
    "certify.n0": Field(100, REQUIRED, "Samples that select the class.", _SAMPLES),
    "certify.n": Field(100_000, REQUIRED, "Samples that certify it; at most, where staged.", _SAMPLES),
    "certify.alpha": Field(0.001, REQUIRED, "Failure probability per image.", _SHARE),
    "certify.bound": Field("binary", "binary", '"multiclass" bounds the rivals as well.', _one_of(*BOUNDS)),
    "certify.schedule": Field("fixed", "fixed", '"staged": until the answer is decided.', _one_of(*SCHEDULES)),
    "certify.radii": Field((), (), "Staged: the radii to decide; none: the radius itself.", _RADII),
    "certify.epsilon": Field(0.05, 0.05, "Staged without radii: precision, in multiples of sigma / L.", _POSITIVE),
    "certify.start": Field(0, REQUIRED, "Index of the first image to certify.", _at_least(0)),
    "certify.stop": Field(0, REQUIRED, "Index behind the last image to certify; 0: to the end.", _STOP),
    "certify.step": Field(1, REQUIRED, "Every how many images one is certified.", _at_least(1)),
    "certify.arithmetic": Field("sound", "float32", "Exact on a grid, or classic floats.", _one_of("sound", "float32")),
    "certify.noise": Field("shared", "shared", "Whether images share their noise.", _one_of("shared", "independent")),
    "certify.head_dtype": Field("float32", "float32", "Dtype in which the head is sampled.", _one_of(*DTYPES)),
    "certify.tile": Field((32, 8), REQUIRED, "Images and noise samples of one compiled batch.", _TILE),
    "certify.spmd": Field("shard_map", REQUIRED, "How devices divide the work.", _one_of("shard_map", "pmap")),
}

# Variant → fields, dotted: what every experiment with an orthogonal encoder can be compared with.
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
        inner = fields
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = field.default
    return ConfigDict(fields)


def choose(config: Config, variant: str, variants: Mapping[str, Mapping[str, Any]] = COMPARISONS) -> Config:
    """Changes a configuration into one of its variants; raises ValueError, naming them, for another."""
    if variant not in variants:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(variants)}")
    config.update_from_flattened_dict(variants[variant])
    return config


def check_config(config: Config) -> Config:
    """Raises UserError, naming the field, for a value outside its limit; returns the config."""
    for name, field in FIELDS.items():
        value = functools.reduce(lambda section, part: section[part], name.split("."), config)
        if field.limit and not field.limit.holds(value, config):
            words = field.limit.words.format(**config)
            raise UserError(f"config field {name} must be {words}, got {value!r}")
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain types, as they come back from JSON, with the format number."""
    if "format" in config:
        raise UserError("unknown config field 'format': the program writes it itself")
    return {"format": FORMAT} | plain(config.to_dict())


def config_from_dict(values: Any) -> Config:
    """The configuration of `config_to_dict`, of this format or an older one.

    Raises:
      UserError: for a newer format, an unknown field, a field that every version has written and that is missing, or a
        wrong type.
    """
    if not isinstance(values, dict):
        raise UserError("a configuration holds fields; restore it, or train again into a new workdir")
    format_of(values)
    config = default()
    _update(config, {name: value for name, value in values.items() if name != "format"}, "")
    return config.lock()


def upgrade_section(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A stored section with what its missing fields mean; see `Field.absent`."""
    names = [name for name in FIELDS if name.startswith(prefix)]
    missing = {name.removeprefix(prefix): FIELDS[name].absent for name in names if FIELDS[name].absent is not REQUIRED}
    return plain(missing) | values


def _update(config: Any, values: dict[str, Any], prefix: str) -> None:
    for key in values:
        if key not in config:
            raise _unknown(prefix, key, config)
    for key in config:
        name = f"{prefix}{key}"
        if isinstance(config[key], ConfigDict):
            inner = values.get(key, {})
            if not isinstance(inner, dict):
                raise UserError(f"config field {name} holds fields, got {inner!r}")
            _update(config[key], inner, f"{name}.")
            continue
        value = values.get(key, FIELDS[name].absent)
        if value is REQUIRED:
            raise UserError(f"config field {name} is missing, which every version has written; restore the file")
        if name == "certify.stop" and value is None:  # as the first version wrote "to the end"
            value = 0
        try:
            if value is None or isinstance(value, dict) or isinstance(value, bool) != isinstance(config[key], bool):
                raise TypeError("another type")
            config[key] = _elements(config[key], value) if isinstance(value, list) else value
        except (TypeError, OverflowError) as error:
            raise UserError(f"config field {name} has the wrong type: {value!r}") from error


def _unknown(prefix: str, key: str, section: Any) -> UserError:
    """The error for a field that a section, whose names begin with `prefix`, does not have."""
    near = [f"{prefix}{name}" for name in difflib.get_close_matches(key, list(section), 1)]
    near += [name for name in FIELDS if name.count(".") == 1 and name.endswith(f".{key}")]
    hint = f"did you mean {near[0]}?" if near else f"{prefix[:-1] or 'a configuration'} has {', '.join(section)}"
    return UserError(f"unknown config field {prefix + key!r}; {hint}")


def check_field(name: str) -> None:
    """Raises UserError unless a field of this name, dotted, takes a value."""
    section: Any = default()
    prefix = ""
    for part in name.split("."):
        if not isinstance(section, ConfigDict):
            raise UserError(f"config field {prefix[:-1]} is no section: it takes a value")
        if part not in section:
            raise _unknown(prefix, part, section)
        section, prefix = section[part], f"{prefix}{part}."
    if isinstance(section, ConfigDict):
        fields = ", ".join(prefix + field for field in section)
        raise UserError(f"config field {name} is a section: set one of {fields}")


def _elements(default: Any, values: list) -> tuple:
    """A tuple whose elements have the type of the default's; integers pass for floats."""
    kind = float if default == () else type(default[0]) if isinstance(default, tuple) else object
    allowed = (int, float) if kind is float else kind
    if not all(isinstance(value, allowed) and not isinstance(value, bool) for value in values):
        raise TypeError("elements of another type")
    return tuple(float(value) for value in values) if kind is float else tuple(values)


def save_config(config: Config, path: Path) -> None:
    """Writes a config as JSON; a file that means the same stays as it is."""
    if not (path.exists() and config_to_dict(load_config(path)) == config_to_dict(config)):
        write_atomic(path, json.dumps(config_to_dict(config), indent=2) + "\n")


def load_config(path: Path) -> Config:
    """Reads a config written by `save_config`, of this version or an older one."""
    try:
        return config_from_dict(read_json(path))
    except ValueError as error:
        if isinstance(error, UserError):
            raise in_file(path, error) from error
        raise UserError(f"{path} is not a stored configuration ({error}); train again into a new workdir") from error


def other_training(old: dict, new: dict) -> tuple[str, Any, Any] | None:
    """`first_difference` of two configurations as dicts, in what a trained model depends on."""
    return first_difference(old, new, _MAY_CHANGE)
