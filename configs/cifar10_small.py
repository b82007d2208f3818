"""CIFAR-10 for two CPU cores: minutes of training.

  python -m lsrs_jax.train --config=configs/cifar10_small.py --workdir=runs/cifar --config.data.dir=$TFDS_DATA_DIR
  python -m lsrs_jax.certify --workdir=runs/cifar

tensorflow-datasets has prepared the data as array_record. The network has seven blocks and is trained with consistency
regularisation. The certification is staged: each image gets up to n = 100,000 samples, until its radius is known to
within 0.1 sigma. Variants (``--config=configs/cifar10_small.py:VARIANT``):
  lsrs          default: five orthogonal blocks, noise on the 8x8x24 latent, a head with 1.0 of the 5.4 MFLOP of the
                network
  isrs_split    the network of lsrs, smoothed in input space
  free          a network of the same shapes without orthogonal layers, smoothed in input space
  isometric     two Haar transforms as the encoder, which keep every distance, and a head of 1.0 MFLOP
  isrs_light    the network of isometric, smoothed in input space
  cayley        lsrs with another family of convolutions
  deep          eight orthogonal convolutions and a strided head with 2.1 of 16.8 MFLOP, trained with Gaussian
                augmentation, n = 10,000: the runs of docs/results/certify.md
Measured results: docs/results/cifar10.md.
"""

from lsrs_jax.config import choose, default

WIDTHS, STRIDES, SPLIT = (12, 12, 24, 24, 24, 24, 48), (2, 1, 2, 1, 1, 2, 1), 5
ISOMETRIC = {"model.widths": (0, 0, 8, 24, 48), "model.strides": (2, 2, 1, 2, 1), "model.split": 2}
VARIANTS = {
    "lsrs": {},
    "isrs_split": {"model.noise": "input"},
    "free": {"model.split": 0},
    "isometric": ISOMETRIC,
    "isrs_light": ISOMETRIC | {"model.noise": "input"},
    "cayley": {"model.method": "cayley"},
    "deep": {
        "model.encoder": "deep",
        "model.head": "convnet_light",
        "train.loss": "gaussian",
        "train.noises": 1,
        "certify.n": 10_000,
        "certify.schedule": "fixed",
        "certify.step": 20,
    },
}


def get_config(variant="lsrs"):
    config = default()
    config.data.name = "cifar10"
    config.data.crop = 4
    config.data.flip = True
    config.sigma = 0.25
    config.model.encoder, config.model.head = "blocks_haar", "blocks"
    config.model.widths, config.model.strides, config.model.split = WIDTHS, STRIDES, SPLIT
    config.model.mean = (0.4914, 0.4822, 0.4465)
    config.train.loss = "consistency"
    config.train.noises = 2
    config.train.steps = 4000
    config.train.learning_rate = 2e-3
    config.train.weight_decay = 1e-4
    config.train.log_every = 200
    config.train.evaluate_every = 1000
    config.train.checkpoint_every = 1000
    config.certify.schedule = "staged"
    config.certify.epsilon = 0.1
    return choose(config, variant, VARIANTS)
