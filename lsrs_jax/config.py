"""The fields of a configuration, their defaults and their limits."""

import difflib
import json

from ml_collections import ConfigDict

from lsrs_jax.errors import UserError
from lsrs_jax.files import read_json, write_atomic
from lsrs_jax.smoothing.partition import BOUNDS
from lsrs_jax.smoothing.schedule import SCHEDULES

LOSSES = ("gaussian", "consistency", "macer", "smoothadv", "smoothadv_consistency", "margin")
DTYPES = ("float32", "bfloat16")
CERTIFICATES = ("smoothed", "deterministic")
_MAY_CHANGE = (  # between the first start of a training and its resumption
    "certify",
    "data.dir",
    "data.split",
    "data.workers",
    "train.log_every",
    "train.evaluate_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)


_LARGEST_IMAGE = 4096


def default():
    """Every field there is. Experiments in ``configs/`` start from here; flags ``--config.<field>=`` override."""
    config = ConfigDict()
    config.seed = 0
    config.sigma = 0.5  # noise on the latent (or the image), for training and certification alike

    config.data = ConfigDict()
    config.data.name = "digits"
    config.data.dir = ""  # folder of tensorflow-datasets; $TFDS_DATA_DIR where empty
    config.data.train_split = "train"
    config.data.split = "test"  # evaluated and certified
    config.data.batch_size = 128
    config.data.crop = 0  # random shifts in pixels
    config.data.flip = False  # random horizontal flips
    config.data.size = (
        0  # photos of any size are cut to so many pixels across and down, and decoded when they are needed;
    )
    config.data.area = (0.08, 1.0)  # in training to a random part, with a share of the area from here to there,
    config.data.workers = 0  # by so many processes; 0: by threads. size=0: images of one size, in memory

    config.model = ConfigDict()
    config.model.encoder = "shallow"  # lsrs_jax.encoders.ENCODERS; "identity" is input-space smoothing
    config.model.method = "adaptive"  # lsrs_jax.orthogonal.FAMILIES: how orthogonal convolutions are built
    config.model.initializer = "identity"  # of the orthogonal convolutions, or "random"
    config.model.padding = "circular"  # of the orthogonal convolutions, or "zero"
    config.model.activation = "maxmin"  # lsrs_jax.models.ACTIVATIONS: after each of them
    config.model.head = "convnet"  # lsrs_jax.heads.HEADS
    config.model.widths = (12, 12, 48, 48)  # encoder and head "blocks": channels of the blocks of one network,
    config.model.strides = (2, 1, 2, 1)  # space-to-depth by so much in front of each of them,
    config.model.split = 2  # and how many belong to the encoder
    config.model.noise = "latent"  # "input": the same network smoothed in input space
    config.model.mean = (0.0,)  # input normalisation, per channel; 1/min(std) counts in the Lipschitz constant
    config.model.std = (1.0,)

    config.train = ConfigDict()
    config.train.steps = 1000
    # Under noise: "gaussian", "consistency", "macer", "smoothadv", "smoothadv_consistency" (lsrs_jax.training.losses);
    config.train.loss = "gaussian"  # "margin": without noise, for deterministic certificates
    config.train.noises = 1  # samples per image
    config.train.radius = 36 / 255  # margin: the radius asked for, with a temperature for the logits
    config.train.temperature = 0.25
    config.train.consistency = ConfigDict()
    config.train.consistency.weight = 10.0  # λ
    config.train.consistency.entropy = 0.5  # η
    config.train.macer = ConfigDict()
    config.train.macer.weight = 12.0  # λ
    config.train.macer.margin = 8.0  # γ
    config.train.macer.sharpness = 16.0  # β
    config.train.smoothadv = ConfigDict()
    config.train.smoothadv.radius = 0.25  # of the attack in the latent, with so many steps
    config.train.smoothadv.steps = 2
    config.train.ema = 0.0  # decay of the average of the parameters that is evaluated and certified; 0: the last ones
    config.train.shard_parameters = False  # over the devices, with the optimizer's state, for what outgrows one of them
    config.train.head_dtype = "float32"  # or "bfloat16", for accelerators; parameters stay in float32
    config.train.optimizer = "adam"  # or "sgd" (Nesterov momentum 0.9)
    config.train.learning_rate = 1e-3
    config.train.schedule = "cosine"  # or "constant"
    config.train.warmup_steps = 0
    config.train.weight_decay = 0.0  # decoupled, on the head's kernels only
    config.train.log_every = 50
    config.train.evaluate_every = 1000
    config.train.checkpoint_every = 1000
    config.train.keep_checkpoints = 2

    config.certify = ConfigDict()
    config.certify.name = "default"  # results go to <workdir>/certify/<name>
    config.certify.certificate = "smoothed"  # or "deterministic": the margin of a linear head, without noise
    config.certify.n0 = 100
    config.certify.n = 100_000
    config.certify.alpha = 0.001  # failure probability per image
    config.certify.bound = "binary"  # or "multiclass": upper bounds on the rivals as well
    config.certify.schedule = "fixed"  # n votes for every image; "staged": up to n, until its answer is settled
    config.certify.radii = ()  # staged: the radii to decide; none: the radius itself,
    config.certify.epsilon = 0.05  # to within so much of what n votes would give, in multiples of sigma / Lipschitz
    config.certify.start = 0  # images start, start + step, ... below stop
    config.certify.stop = 0  # an index of the split; 0: to the end
    config.certify.step = 1
    config.certify.arithmetic = "sound"  # integers on a grid; "float32": the classic, without that guarantee
    config.certify.noise = "shared"  # one draw for all images of a tile; "independent": one for each
    config.certify.head_dtype = "float32"  # or "bfloat16", for accelerators; the noise is drawn and added exactly
    config.certify.tile = (32, 8)  # images x noise samples of one compiled batch; larger on accelerators
    config.certify.spmd = "shard_map"  # or "pmap"
    return config


# Variant → fields, dotted: what every experiment with an orthogonal encoder can be compared with.
COMPARISONS = {
    "lsrs": {},
    "cayley": {"model.method": "cayley"},  # another family of convolutions
    "isrs": {"model.encoder": "identity"},  # no encoder: the head smoothed in input space
    "isrs_split": {"model.noise": "input"},  # the same network smoothed in input space
}


def choose(config, variant, variants=COMPARISONS):
    """Changes a configuration into one of its variants; raises ValueError, naming them, for another."""
    if variant not in variants:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(variants)}")
    config.update_from_flattened_dict(variants[variant])
    return config


def _limits(config):
    """(field, condition, what it must be)."""
    data, train, certify = config.data, config.train, config.certify
    return [
        ("seed", 0 <= config.seed < 2**32, "between 0 and 2**32 - 1"),
        ("sigma", 2.0**-60 <= config.sigma <= 2.0**60, "a positive number (between 1e-18 and 1e18)"),
        ("data.name", _is_plain_name(data.name.replace(":", "")), "the name of a data set, as in 'cifar10'"),
        ("data.batch_size", data.batch_size >= 1, "at least 1"),
        ("data.crop", data.crop >= 0, "at least 0"),
        ("data.crop", not (data.size and data.crop), "0 where data.size is given: photos are cut by data.area"),
        ("data.size", 0 <= data.size <= _LARGEST_IMAGE, f"between 0 and {_LARGEST_IMAGE}"),
        (
            "data.area",
            len(data.area) == 2 and 0 < data.area[0] <= data.area[1] <= 1,
            "two shares, 0 < least <= most <= 1",
        ),
        ("data.workers", 0 <= data.workers <= 1024, "between 0 and 1024"),
        ("train.steps", train.steps >= 1, "at least 1"),
        ("train.loss", train.loss in LOSSES, " or ".join(map(repr, LOSSES))),
        (
            "train.noises",
            train.noises >= (2 if "consistency" in train.loss else 1),
            "at least 1, with consistency at least 2",
        ),
        ("train.radius", 0 <= train.radius < float("inf"), "at least 0"),
        ("train.temperature", 0 < train.temperature < float("inf"), "a positive number"),
        ("train.consistency.weight", 0 <= train.consistency.weight < float("inf"), "at least 0"),
        ("train.consistency.entropy", 0 <= train.consistency.entropy < float("inf"), "at least 0"),
        ("train.macer.weight", 0 <= train.macer.weight < float("inf"), "at least 0"),
        ("train.macer.margin", 0 < train.macer.margin < float("inf"), "a positive number"),
        ("train.macer.sharpness", 0 < train.macer.sharpness < float("inf"), "a positive number"),
        ("train.smoothadv.radius", 0 <= train.smoothadv.radius < float("inf"), "at least 0"),
        ("train.smoothadv.steps", train.smoothadv.steps >= 1, "at least 1"),
        ("train.ema", 0 <= train.ema < 1, "at least 0 and below 1"),
        ("train.head_dtype", train.head_dtype in DTYPES, " or ".join(map(repr, DTYPES))),
        ("train.optimizer", train.optimizer in ("adam", "sgd"), "'adam' or 'sgd'"),
        ("train.schedule", train.schedule in ("cosine", "constant"), "'cosine' or 'constant'"),
        ("train.learning_rate", 0 < train.learning_rate < float("inf"), "a positive number"),
        (
            "train.warmup_steps",
            0 <= train.warmup_steps < train.steps,
            f"at least 0 and below train.steps={train.steps}",
        ),
        ("train.weight_decay", 0 <= train.weight_decay < float("inf"), "at least 0"),
        ("train.log_every", train.log_every >= 1, "at least 1"),
        ("train.evaluate_every", train.evaluate_every >= 1, "at least 1"),
        ("train.checkpoint_every", train.checkpoint_every >= 1, "at least 1"),
        ("train.keep_checkpoints", train.keep_checkpoints >= 1, "at least 1"),
        ("certify.name", _is_plain_name(certify.name), "a plain folder name (letters, digits, . _ -)"),
        (
            "certify.certificate",
            certify.certificate in CERTIFICATES,
            "'smoothed' or 'deterministic'",
        ),
        ("certify.n0", 1 <= certify.n0 <= 2**27, "between 1 and 2**27"),
        ("certify.n", 1 <= certify.n <= 2**27, "between 1 and 2**27"),
        ("certify.alpha", 0 < certify.alpha < 1, "strictly between 0 and 1"),
        ("certify.bound", certify.bound in BOUNDS, " or ".join(map(repr, BOUNDS))),
        ("certify.schedule", certify.schedule in SCHEDULES, " or ".join(map(repr, SCHEDULES))),
        (
            "certify.radii",
            all(0 <= radius < float("inf") for radius in certify.radii),
            "numbers >= 0, such as (0.25, 0.5)",
        ),
        ("certify.epsilon", 0 < certify.epsilon < float("inf"), "a positive number"),
        ("certify.arithmetic", certify.arithmetic in ("sound", "float32"), "'sound' or 'float32'"),
        ("certify.noise", certify.noise in ("shared", "independent"), "'shared' or 'independent'"),
        ("certify.head_dtype", certify.head_dtype in DTYPES, " or ".join(map(repr, DTYPES))),
        ("certify.start", certify.start >= 0, "at least 0"),
        (
            "certify.stop",
            certify.stop == 0 or certify.stop > certify.start,
            f"0 or above certify.start={certify.start}",
        ),
        ("certify.step", certify.step >= 1, "at least 1"),
        (
            "certify.tile",
            len(certify.tile) == 2 and min(certify.tile) >= 1 and max(certify.tile) >= 2,
            "two numbers (images, samples) >= 1, not both 1",
        ),
        ("certify.spmd", certify.spmd in ("shard_map", "pmap"), "'shard_map' or 'pmap'"),
    ]


def _is_plain_name(name):
    return bool(name) and name[0] not in ".-" and all(c.isalnum() or c in "._-" for c in name)


def check(config):
    """Raises UserError, naming the field, for a value outside its limits; returns the config."""
    for field, holds, wanted in _limits(config):
        if not holds:
            value = config
            for part in field.split("."):
                value = value[part]
            raise UserError(f"config field {field} must be {wanted}, got {value!r}")
    return config


def to_dict(config):
    """Plain types, as they come back from JSON."""
    return json.loads(json.dumps(config.to_dict()))


def from_dict(values):
    """The inverse of `to_dict`; raises UserError for an unknown or missing field, or a wrong type."""
    if not isinstance(values, dict):
        raise UserError("a configuration holds fields; restore it, or train again into a new workdir")
    config = default()
    _update(config, values, "")
    return config.lock()


def _update(config, values, prefix):
    for key in config:
        if key not in values:
            raise UserError(f"config field {prefix}{key} is missing; was it written by another version?")
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in config:
            raise _unknown(prefix, key, config)
        if isinstance(config[key], ConfigDict):
            if not isinstance(value, dict):
                raise UserError(f"config field {name} holds fields, got {value!r}")
            _update(config[key], value, f"{name}.")
            continue
        try:
            if value is None or isinstance(value, dict) or isinstance(value, bool) != isinstance(config[key], bool):
                raise TypeError("another type")
            config[key] = _elements(config[key], value) if isinstance(value, list) else value
        except (TypeError, OverflowError) as error:
            raise UserError(f"config field {name} has the wrong type: {value!r}") from error


def _unknown(prefix, key, section):
    """The error for a field that a section, whose names begin with `prefix`, does not have."""
    near = [f"{prefix}{name}" for name in difflib.get_close_matches(key, list(section), 1)]
    sections = {name: fields for name, fields in default().items() if isinstance(fields, ConfigDict)}
    near += [f"{name}.{key}" for name, fields in sections.items() if key in fields]
    hint = f"did you mean {near[0]}?" if near else f"{prefix[:-1] or 'a configuration'} has {', '.join(section)}"
    return UserError(f"unknown config field {prefix + key!r}; {hint}")


def check_field(name):
    """Raises UserError unless a field of this name, dotted, takes a value."""
    section, prefix = default(), ""
    for part in name.split("."):
        if not isinstance(section, ConfigDict):
            raise UserError(f"config field {prefix[:-1]} is no section: it takes a value")
        if part not in section:
            raise _unknown(prefix, part, section)
        section, prefix = section[part], f"{prefix}{part}."
    if isinstance(section, ConfigDict):
        raise UserError(
            f"config field {name} is a section: set one of {', '.join(prefix + field for field in section)}"
        )


def _elements(default, values):
    """A tuple whose elements have the type of the default's; integers pass for floats."""
    kind = float if default == () else type(default[0]) if isinstance(default, tuple) else object
    allowed = (int, float) if kind is float else kind
    if not all(isinstance(value, allowed) and not isinstance(value, bool) for value in values):
        raise TypeError("elements of another type")
    return tuple(kind(value) for value in values) if kind is float else tuple(values)


def save(config, path):
    """Writes the config as JSON."""
    write_atomic(path, json.dumps(to_dict(config), indent=2) + "\n")


def load(path):
    """Reads a config written by `save`."""
    try:
        return from_dict(read_json(path))
    except ValueError as error:
        if isinstance(error, UserError):
            raise UserError(f"{path}: {error}") from error
        raise UserError(f"{path} is not a stored configuration ({error}); train again into a new workdir") from error


def first_difference(old, new, ignore=()):
    """The first field, dotted, in which two nested dicts differ, with both values; None where they agree.

    `ignore` names fields or whole sections, dotted.
    """
    for name in sorted(set(old) | set(new)):
        if name in ignore:
            continue
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = [field[len(name) + 1 :] for field in ignore if field.startswith(f"{name}.")]
            found = first_difference(a, b, inner)
            if found:
                return (f"{name}.{found[0]}", *found[1:])
        elif a != b:
            return name, a, b
    return None


def other_training(old, new):
    """`first_difference` of two configurations as dicts, in what a trained model depends on."""
    return first_difference(old, new, _MAY_CHANGE)
