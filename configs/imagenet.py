"""ImageNet at 224x224, with a network of the size of a ResNet-50.

  python -m lsrs_jax.train --config=configs/imagenet.py --workdir=runs/imagenet --config.data.dir=$TFDS_DATA_DIR --plan
  python -m lsrs_jax.train --config=configs/imagenet.py --workdir=runs/imagenet --config.data.dir=$TFDS_DATA_DIR
  python -m lsrs_jax.certify --workdir=runs/imagenet

tensorflow-datasets has prepared the data as array_record. Set data.workers to the number of cores; --plan shows which
data.batch_size fits into memory. Variants:
  lsrs          default: twelve orthogonal blocks with Haar strides, noise on the 14x14x192 latent (a quarter of the
                numbers of the image), and the last stage of a ResNet-50 as the head
  isrs_split    the network of lsrs, smoothed in input space
  isrs          a ResNet-50 with group normalisation, smoothed in input space
  smoke, smoke_isrs
                lsrs and isrs for a few steps and samples, to try whether they run on a machine
"""

from lsrs_jax.config import choose, default

WIDTHS = (0, 48, 48, 48, 192, 192, 192, 192, 192, 192, 192, 192, 192)
STRIDES = (2, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 2)
_RESNET50 = {"model.encoder": "identity", "model.head": "resnet50"}
_SMOKE = {
    "data.batch_size": 8,
    "data.split": "validation[:8]",
    "train.head_dtype": "float32",  # on a CPU
    "certify.head_dtype": "float32",
    "train.steps": 4,
    "train.warmup_steps": 1,
    "train.log_every": 1,
    "train.evaluate_every": 4,
    "train.checkpoint_every": 4,
    "certify.n0": 16,
    "certify.n": 64,
    "certify.schedule": "fixed",
    "certify.step": 2,
    "certify.tile": (4, 8),
}
VARIANTS = {
    "lsrs": {},
    "isrs_split": {"model.noise": "input"},
    "isrs": _RESNET50,
    "smoke": _SMOKE,
    "smoke_isrs": _RESNET50 | _SMOKE,
}


def get_config(variant="lsrs"):
    config = default()
    config.data.name = "imagenet2012"
    config.data.size = 224
    config.data.flip = True
    config.data.batch_size = 256
    config.data.split = "validation"
    config.data.workers = 8
    config.sigma = 0.5
    config.model.encoder, config.model.head = "blocks_haar", "resnet50_tail"
    config.model.widths, config.model.strides, config.model.split = WIDTHS, STRIDES, len(WIDTHS)
    config.model.mean = (0.485, 0.456, 0.406)
    config.train.loss = "consistency"
    config.train.noises = 2
    config.train.head_dtype = "bfloat16"
    config.train.steps = 450_000
    config.train.learning_rate = 1e-3
    config.train.warmup_steps = 5000
    config.train.weight_decay = 1e-4
    config.train.ema = 0.9999
    config.train.log_every = 100
    config.train.evaluate_every = 25_000
    config.train.checkpoint_every = 5000
    config.certify.schedule = "staged"
    config.certify.bound = "multiclass"
    config.certify.head_dtype = "bfloat16"
    config.certify.step = 100
    config.certify.tile = (64, 16)
    return choose(config, variant, VARIANTS)
