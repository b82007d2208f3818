"""CIFAR-10 (prepared by tensorflow-datasets as array_record) at a budget of minutes on 2 CPU cores.

  python -m lsrs_jax.train --config=configs/cifar10_small.py --workdir=runs/cifar --config.data.dir=$TFDS_DATA_DIR
  python -m lsrs_jax.certify --workdir=runs/cifar

Certifies every 20th test image with n = 10,000; for n = 100,000 at a tenth of the votes add
--config.certify.n=100000 --config.certify.schedule=staged. Variants: ``lsrs`` (default; eight orthogonal convolutions,
noise on the 8x8x48 latent, a head of 1.6 of the network's 15 MFLOP), ``cayley``, ``isrs`` (the same head under noise on
the 32x32x3 image), ``isrs_split`` (the network of ``lsrs`` smoothed in input space). Measured results: README.md.
"""

from lsrs_jax.config import choose, default


def get_config(variant="lsrs"):
    config = default()
    config.data.name = "cifar10"
    config.data.crop = 4
    config.data.flip = True
    config.sigma = 0.25
    config.model.encoder = "deep"
    config.model.head = "convnet_light"
    config.model.mean = (0.4914, 0.4822, 0.4465)
    config.train.steps = 4000
    config.train.learning_rate = 2e-3
    config.train.weight_decay = 1e-4
    config.train.log_every = 200
    config.train.evaluate_every = 1000
    config.train.checkpoint_every = 1000
    config.certify.n = 10_000
    config.certify.step = 20
    return choose(config, variant)
