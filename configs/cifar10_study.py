"""CIFAR-10: one network of 3 MFLOP, split after each of its blocks, for the studies in docs/results/cifar10.md.

  python -m lsrs_jax.train --config=configs/cifar10_study.py:split4 --workdir=runs/split4
  python -m lsrs_jax.certify --workdir=runs/split4

The network has six blocks of a 3x3 convolution and an activation. Variants:
  split<k>         the first k blocks are orthogonal and form the encoder, the other blocks form the head. split0 is
                   smoothed in input space (ISRS) without orthogonal layers; split6 has a linear head
  split<k>_input   the network of split<k>, smoothed in input space
  split<k>_haar    the encoder downsamples by Haar transforms
  margin           the network of split6, trained for its deterministic certificate
The data are those of configs/cifar10_small.py. Training takes minutes on two CPU cores; n = 10,000.
"""

from lsrs_jax.config import default

WIDTHS, STRIDES = (12, 12, 12, 12, 24, 24), (2, 1, 2, 1, 2, 1)


def get_config(variant="split4"):
    config = default()
    config.data.name = "cifar10"
    config.data.crop = 4
    config.data.flip = True
    config.sigma = 0.25
    config.model.encoder = config.model.head = "blocks"
    config.model.widths, config.model.strides = WIDTHS, STRIDES
    config.model.mean = (0.4914, 0.4822, 0.4465)
    config.train.loss = "consistency"
    config.train.noises = 2
    config.train.steps = 3000
    config.train.learning_rate = 2e-3
    config.train.weight_decay = 1e-4
    config.train.log_every = 200
    config.train.evaluate_every = 3000
    config.train.checkpoint_every = 1000
    config.certify.n = 10_000
    if variant == "margin":
        config.model.split, config.model.head = len(WIDTHS), "normalized"
        config.train.loss, config.train.noises = "margin", 1
        config.certify.certificate = "deterministic"
        return config
    split, _, change = variant.removeprefix("split").partition("_")
    if split not in map(str, range(len(WIDTHS) + 1)) or change not in ("", "input", "haar"):
        raise ValueError(
            f"unknown variant {variant!r}: split0 to split{len(WIDTHS)}, alone or with _input or _haar; or margin"
        )
    config.model.split = int(split)
    if change == "input":
        config.model.noise = "input"
    if change == "haar":
        config.model.encoder = "blocks_haar"
    if config.model.split == len(WIDTHS):
        config.model.head = "linear"
    return config
