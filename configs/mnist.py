"""MNIST (prepared by tensorflow-datasets as array_record): minutes on 2 CPU cores.

  python -m lsrs_jax.train --config=configs/mnist.py --workdir=runs/mnist --config.data.dir=$TFDS_DATA_DIR
  python -m lsrs_jax.certify --workdir=runs/mnist

Certifies every 20th test image with n = 10,000. Variants as in configs/digits.py: ``lsrs`` (default), ``cayley``,
``isrs``, ``isrs_split``. Measured results: docs/results/mnist.md.
"""

from lsrs_jax.config import choose, default


def get_config(variant="lsrs"):
    config = default()
    config.data.name = "mnist"
    config.data.batch_size = 256
    config.data.crop = 2
    config.sigma = 0.5
    config.model.encoder = "shallow"
    config.model.head = "convnet_small"
    config.train.steps = 2000
    config.train.learning_rate = 3e-3
    config.train.log_every = 100
    config.train.evaluate_every = 500
    config.train.checkpoint_every = 500
    config.certify.n = 10_000
    config.certify.step = 20
    return choose(config, variant)
