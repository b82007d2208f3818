"""The fields of a configuration: the default, meaning and limit of each, and its value in a stored file without it."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from lsrs_jax.smoothing.confidence import BOUNDS
from lsrs_jax.smoothing.schedule import SCHEDULES

LOSSES = ("gaussian", "consistency", "macer", "smoothadv", "smoothadv_consistency", "margin")
DTYPES = ("float32", "bfloat16")
CERTIFICATES = ("smoothed", "deterministic")
SOURCES = ("folder", "npz", "hf")  # values of data.name for sets that data.dir leads to
CALLER = "caller"  # value of model.encoder and model.head for functions given to `SmoothedClassifier`
TORCH = "torch:"  # with it begin values of model.head and train.start_from that are of PyTorch
SEED_DERIVED, SEED_OF_TRAINING = -1, -2  # values of certify.seed


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
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:\w[\w.-]*)?")
_DATA = Limit("the name of a data set, as in 'cifar10' or 'folder:PATH'", lambda name, _: bool(_NAME.fullmatch(name)))
_LOCAL = Limit("a folder of this machine, or torch:FILE", lambda path, _: "://" not in path)
_HERE = Limit("a folder of this machine", lambda path, _: "://" not in path)
_SHARE = Limit("strictly between 0 and 1", lambda share, _: 0 < share < 1)
_CROP = Limit(
    "at least 0, and 0 if data.size is given (--config.data.crop=0): then data.area says how training images are cut",
    lambda crop, c: crop >= 0 and not (crop and c.data.size),
)
_AREA = Limit("two shares, 0 < least <= most <= 1", lambda area, _: len(area) == 2 and 0 < area[0] <= area[1] <= 1)
_NOISES = Limit(
    "at least 1, with consistency at least 2", lambda n, c: n >= (2 if "consistency" in c.train.loss else 1)
)
_LATE = Limit("0, or at least train.noises={train.noises}", lambda noises, c: noises == 0 or noises >= c.train.noises)
_LOSS, _SCHEDULE = _one_of(*LOSSES), _one_of("cosine", "constant")
_WARMUP = Limit("at least 0 and below train.steps={train.steps}", lambda steps, c: 0 <= steps < c.train.steps)
_FOLDER = Limit("a plain folder name (letters, digits, . _ -)", lambda name, _: bool(_PLAIN.fullmatch(name)))
_WIDTHS = Limit(
    "one or more whole numbers from 1 to 2**20",
    lambda widths, _: widths and all(1 <= width <= 2**20 for width in widths),
)
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
    "data.name": Field(
        "digits",
        REQUIRED,
        "The set is digits, folder:PATH, npz:PATH, hf:NAME, or one of tensorflow-datasets.",
        _DATA,
    ),
    "data.dir": Field(
        "",
        REQUIRED,
        "This folder holds tensorflow-datasets ($TFDS_DATA_DIR if empty); or it is the PATH of folder, npz and hf.",
    ),
    "data.train_split": Field("train", REQUIRED, "The network is trained on this split."),
    "data.split": Field("test", REQUIRED, "This split is evaluated and certified."),
    "data.validation_split": Field("", "", "The training is evaluated on this split; on data.split if it is empty."),
    "data.batch_size": Field(128, REQUIRED, "A training step uses this many images.", _at_least(1)),
    "data.crop": Field(0, REQUIRED, "Training images are shifted at random by at most this many pixels.", _CROP),
    "data.flip": Field(False, REQUIRED, "If true, half of the training images are mirrored, at random."),
    "data.size": Field(0, 0, "Photos are cut to this side in pixels; 0 is for images of one size.", _between(0, 4096)),
    "data.area": Field((0.08, 1.0), (0.08, 1.0), "Training sees a share of each photo between these two.", _AREA),
    "data.test_share": Field(0.2, 0.2, "Without a split test, this share of the images is that split.", _SHARE),
    "data.share_seed": Field(0, 0, "This seed decides which images belong to that share.", _SEED),
    "data.layout": Field(
        "NHWC", "NHWC", 'The axes of arrays in an npz file are "NHWC" or "NCHW".', _one_of("NHWC", "NCHW")
    ),
    "data.image_column": Field("", "", "The images are in this feature or column; if empty, it is found."),
    "data.label_column": Field("", "", "The labels are in this feature or column; if empty, it is found."),
    "data.workers": Field(0, 0, "This many processes decode photos; with 0, threads do.", _between(0, 1024)),
    "model.encoder": Field(
        "shallow", REQUIRED, 'models.encoders lists the names, "identity" is none; or code, as for the head.'
    ),
    "model.method": Field("adaptive", REQUIRED, "Orthogonal convolutions are of this family in orthogonal.FAMILIES."),
    "model.initializer": Field("identity", "identity", 'Orthogonal convolutions start as the "identity" or "random".'),
    "model.padding": Field("circular", "circular", 'Orthogonal convolutions have "circular" or "zero" padding.'),
    "model.activation": Field("maxmin", "maxmin", '"maxmin" or "householder" follows an orthogonal convolution.'),
    "model.head": Field(
        "convnet",
        REQUIRED,
        "The head has this name in models.heads, or is package.module:Class, FILE.py:Class, or torch:NAME of PyTorch.",
    ),
    "model.head_args": Field("{}", "{}", "Code for the head gets these arguments, a JSON object."),
    "model.encoder_args": Field("{}", "{}", "Code for the encoder gets these arguments, a JSON object."),
    "model.head_digest": Field("", "", "The code of the head has this digest; train fills it in."),
    "model.encoder_digest": Field("", "", "The code of the encoder has this digest; train fills it in."),
    "model.widths": Field((12, 12, 48, 48), (12, 12, 48, 48), 'A network of "blocks" has these numbers of channels.'),
    "model.strides": Field((2, 1, 2, 1), (2, 1, 2, 1), "Space-to-depth in front of each block has this stride."),
    "model.split": Field(2, 2, "The encoder consists of this many blocks, the head of the others."),
    "model.head_widths": Field(
        (256, 256), (256, 256), 'The hidden layers of the head "mlp" have these widths.', _WIDTHS
    ),
    "model.head_norm": Field(
        "none",
        "none",
        'With "batch", the head is trained with batch normalisation, which checkpoints hold folded into its layers.',
        _one_of("none", "batch"),
    ),
    "model.noise": Field("latent", REQUIRED, 'Noise is added to the "latent", or to the "input" of the same network.'),
    "model.mean": Field((0.0,), REQUIRED, "These numbers, one per channel, are subtracted from the input."),
    "model.std": Field((1.0,), REQUIRED, "These numbers divide the input; the Lipschitz constant contains 1/min(std)."),
    "train.steps": Field(1000, REQUIRED, "The optimizer takes this many steps.", _between(1, 10**9)),
    "train.start_from": Field(
        "", "", "The parameters start as in this workdir's newest checkpoint, or in the file of torch:FILE.", _LOCAL
    ),
    "train.loss": Field("gaussian", "gaussian", "This is the loss; training.losses explains each.", _LOSS),
    "train.noises": Field(1, 1, "Each image gets this many noise samples in a step.", _NOISES),
    "train.late_noises": Field(
        0, 0, "In the last third of the steps each image gets this many noise samples; 0 means train.noises.", _LATE
    ),
    "train.sigma_start": Field(0.1, 0.1, "The noise has this standard deviation when its warm-up starts.", _SIGMA),
    "train.sigma_steps": Field(0, 0, "The noise first grows linearly to sigma for this many steps.", _at_least(0)),
    "train.radius": Field(36 / 255, 36 / 255, 'The loss "margin" asks for this radius.', _at_least(0)),
    "train.temperature": Field(0.25, 0.25, 'The loss "margin" divides the logits by this number.', _POSITIVE),
    "train.consistency.weight": Field(10.0, 10.0, "λ weights the consistency loss.", _at_least(0)),
    "train.consistency.entropy": Field(0.5, 0.5, "η weights the entropy in the consistency loss.", _at_least(0)),
    "train.macer.weight": Field(12.0, 12.0, "λ weights the radius loss of MACER.", _at_least(0)),
    "train.macer.margin": Field(8.0, 8.0, "γ is the margin in the hinge of MACER.", _POSITIVE),
    "train.macer.sharpness": Field(16.0, 16.0, "β multiplies the logits in the radius loss of MACER.", _POSITIVE),
    "train.smoothadv.radius": Field(0.25, 0.25, "The attack moves the latent by at most this distance.", _at_least(0)),
    "train.smoothadv.steps": Field(2, 2, "The attack takes this many gradient steps.", _at_least(1)),
    "train.smoothadv.warmup_steps": Field(
        0, 0, "The distance of the attack first grows linearly from 0 for this many steps.", _at_least(0)
    ),
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
    "certify.checkpoint": Field(0, 0, "The checkpoint of this step is certified; 0 means the newest.", _at_least(0)),
    "certify.certificate": Field(
        "smoothed", "smoothed", 'Certificates are "smoothed", or "deterministic" for a linear head.', _KIND
    ),
    "certify.n0": Field(100, REQUIRED, "This many samples select the class.", _SAMPLES),
    "certify.n": Field(
        100_000, REQUIRED, "This many samples certify the class, or fewer if staged or anytime.", _SAMPLES
    ),
    "certify.alpha": Field(0.001, REQUIRED, "The certificate of an image fails with at most this probability.", _ALPHA),
    "certify.bound": Field(
        "binary", "binary", 'p_B is 1 - p_A ("binary"), or a bound of the rivals ("multiclass").', _one_of(*BOUNDS)
    ),
    "certify.schedule": Field(
        "fixed",
        "fixed",
        'All images get n samples ("fixed"), or stop when decided ("staged", or "anytime").',
        _one_of(*SCHEDULES),
    ),
    "certify.fallback": Field(
        "", "", "The deterministic classifier of this workdir answers where the votes do not.", _HERE
    ),
    "certify.radii": Field(
        (), (), "Staged and anytime sampling stop when it is known which of these radii are certified.", _RADII
    ),
    "certify.epsilon": Field(
        0.05, 0.05, "Without radii, staged and anytime sampling stop at this precision, in sigma / L.", _POSITIVE
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
    "certify.channels_last": Field(
        True, False, "On a CPU, a head with NCHW convolutions runs with NHWC ones, which is faster."
    ),
    "certify.integer_first_layer": Field(
        True, False, "The first layer of a head has integer weights and costs almost nothing per sample."
    ),
    "certify.tile": Field((32, 8), REQUIRED, "A compiled batch has these numbers of images and samples.", _TILE),
    "certify.spmd": Field("shard_map", REQUIRED, "This function of JAX divides the work over devices.", _SPMD),
}
