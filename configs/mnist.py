"""MNIST for two CPU cores: minutes of training.

  python -m lsrs_jax.train --config=configs/mnist.py --workdir=runs/mnist --config.data.dir=$TFDS_DATA_DIR
  python -m lsrs_jax.certify --workdir=runs/mnist

tensorflow-datasets has prepared the data as array_record. Every 20th test image is certified, with n = 10,000. The
variants are ``lsrs`` (default), ``cayley``, ``isrs``, ``isrs_split``, as in configs/digits.py. Measured
results: docs/results/mnist.md.
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
