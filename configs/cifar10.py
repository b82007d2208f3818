"""CIFAR-10 for one data-centre GPU: minutes of training, n = 100,000.

  python -m lsrs_jax.train --config=configs/cifar10.py --workdir=runs/cifar10 --config.data.dir=$TFDS_DATA_DIR
  python -m lsrs_jax.certify --workdir=runs/cifar10

Variants (``--config=configs/cifar10.py:VARIANT``):
  lsrs               default: five orthogonal blocks of up to 128 channels, noise on the 8x8x48 latent, a head with 18
                     of the 242 MFLOP of the network, trained with consistency regularisation
  isrs_split         the network of lsrs, smoothed in input space
  free               a network of the same shapes without orthogonal layers, smoothed in input space
  gaussian, macer    lsrs, trained with these losses
  smoothadv          lsrs, trained with consistency regularisation at adversarial latents
  isometric          two Haar transforms as the encoder, which keep every distance, and the head of lsrs; trained as
                     smoothadv
  lsrs_resnet, isometric_resnet
                     the encoder of lsrs or of isometric, with a ResNet of 112 MFLOP as the head
  isrs_resnet        a ResNet of 507 MFLOP, smoothed in input space. All three ResNets are trained with a stronger
                     weight decay and for 16,000 steps
  haar_resnet        one Haar transform, with a ResNet of 113 MFLOP with batch normalisation as the head; trained with
                     SGD and consistency regularisation at adversarial latents. Noise and attack grow in the first
                     steps, and in the last third of the steps an image gets four noise samples
  margin             the orthogonal blocks with a linear head, for deterministic certificates
  partial, latent, preprocessor
                     the splits of the public code that preceded LSRS, with larger heads
"""

from lsrs_jax.config import choose, default

WIDTHS, STRIDES, SPLIT = (128, 128, 128, 64, 48, 64, 64, 128), (2, 1, 1, 1, 2, 1, 1, 2), 5
SMALL_TILE = (64, 64)  # for heads that see the whole image, whose batches take more memory
RESNET = {"train.weight_decay": 0.05, "train.head_dtype": "bfloat16", "train.steps": 16_000}
VARIANTS = {
    "lsrs": {},
    "isrs_split": {"model.noise": "input", "certify.tile": SMALL_TILE},
    "free": {"model.split": 0, "certify.tile": SMALL_TILE},
    "isometric": {
        "model.widths": (0, 0, *WIDTHS[SPLIT:]),
        "model.strides": (2, 2, *STRIDES[SPLIT:]),
        "model.split": 2,
        "train.loss": "smoothadv_consistency",
        "train.smoothadv.radius": 0.5,
    },
    "lsrs_resnet": RESNET
    | {"model.widths": WIDTHS[:SPLIT], "model.strides": STRIDES[:SPLIT], "model.head": "resnet_latent"},
    "isometric_resnet": RESNET
    | {"model.widths": (0, 0), "model.strides": (2, 2), "model.split": 2, "model.head": "resnet_latent"},
    "isrs_resnet": RESNET
    | {"model.encoder": "identity", "model.head": "resnet10", "model.split": 0, "certify.tile": SMALL_TILE},
    "gaussian": {"train.loss": "gaussian", "train.noises": 1},
    "macer": {"train.loss": "macer", "train.noises": 16},
    "smoothadv": {"train.loss": "smoothadv_consistency", "train.smoothadv.radius": 0.5},
    "haar_resnet": {
        "data.batch_size": 512,
        "model.widths": (0,),
        "model.strides": (2,),
        "model.split": 1,
        "model.head": "resnet_fine",
        "model.head_norm": "batch",
        "train.loss": "smoothadv_consistency",
        "train.smoothadv.radius": 0.5,
        "train.smoothadv.warmup_steps": 1200,
        "train.consistency.weight": 20.0,
        "train.late_noises": 4,
        "train.sigma_start": 0.1,
        "train.sigma_steps": 600,
        "train.head_dtype": "bfloat16",
        "train.optimizer": "sgd",
        "train.learning_rate": 0.2,
        "train.warmup_steps": 1800,
        "train.weight_decay": 5e-4,
    },
    "margin": {
        "model.widths": WIDTHS[:SPLIT],
        "model.strides": STRIDES[:SPLIT],
        "model.head": "normalized",
        "train.loss": "margin",
        "train.noises": 1,
        "certify.certificate": "deterministic",
    },
    "partial": {"model.encoder": "partial", "model.head": "resnet18_tail"},
    "latent": {"model.encoder": "latent", "model.head": "linear", "certify.bound": "multiclass"},
    "preprocessor": {"model.encoder": "preprocessor", "model.head": "resnet18", "certify.tile": SMALL_TILE},
}


def get_config(variant="lsrs"):
    config = default()
    config.data.name = "cifar10"
    config.data.batch_size = 256
    config.data.crop = 4
    config.data.flip = True
    config.sigma = 0.25
    config.model.encoder, config.model.head = "blocks_haar", "blocks"
    config.model.widths, config.model.strides, config.model.split = WIDTHS, STRIDES, SPLIT
    config.model.mean = (0.4914, 0.4822, 0.4465)
    config.train.loss = "consistency"
    config.train.noises = 2
    config.train.steps = 12_000
    config.train.learning_rate = 2e-3
    config.train.weight_decay = 1e-4
    config.train.warmup_steps = 500
    config.train.ema = 0.999
    config.train.log_every = 100
    config.train.evaluate_every = 2000
    config.train.checkpoint_every = 1000
    config.certify.schedule = "staged"
    config.certify.step = 20
    config.certify.tile = (64, 512)
    return choose(config, variant, VARIANTS)
