"""CIFAR-10 with small heads on two CPU cores: what a learned encoder in front of the noise is worth.

  python -m lsrs_jax.train --config=configs/cifar10_mlp.py --workdir=runs/mlp --config.data.dir=$TFDS_DATA_DIR
  python -m lsrs_jax.certify --workdir=runs/mlp

The default is a learned encoder of six orthogonal blocks, which runs once per image, with an MLP of one hidden layer on
its latent of 4x4x24 numbers. Training is adversarial in the latent with consistency regularisation; the certification
is staged, with up to n = 100,000 samples. A variant is ENCODER or ENCODER-HEAD:
  learned       six orthogonal blocks, latent 4x4x24
  lowpass       the coarse image after two Haar transforms, latent 8x8x3: it keeps what is smooth and drops the rest
  bands         the same with all bands of the second transform, latent 8x8x12
  haar          two Haar transforms, latent 8x8x48: an isometry, so that LSRS is ISRS in distribution
  identity      noise on the image (ISRS)
  mlp           one hidden layer of 512 (default)
  small         one hidden layer of 64
  linear        a linear head, which needs no samples: certify it with certify.certificate=deterministic
  conv          three convolutions with about 1 MFLOP
Measured results: docs/results/small_heads.md.
"""

from lsrs_jax.config import choose, default

ENCODERS = {
    "learned": {
        "model.encoder": "blocks_haar",
        "model.widths": (12, 12, 24, 24, 24, 24),
        "model.strides": (2, 1, 2, 1, 1, 2),
        "model.split": 6,
    },
    "lowpass": {"model.encoder": "lowpass"},
    "bands": {"model.encoder": "lowpass_bands"},
    "haar": {"model.encoder": "blocks_haar", "model.widths": (0, 0), "model.strides": (2, 2), "model.split": 2},
    "identity": {"model.encoder": "identity"},
}
HEADS = {
    "mlp": {"model.head": "mlp", "model.head_widths": (512,)},
    "small": {"model.head": "mlp", "model.head_widths": (64,)},
    "linear": {"model.head": "linear"},
    "conv": {"model.head": "convnet_small"},
}
VARIANTS = {
    encoder + ("" if head == "mlp" else f"-{head}"): layers | classifier
    for encoder, layers in ENCODERS.items()
    for head, classifier in HEADS.items()
}


def get_config(variant="learned"):
    config = default()
    config.data.name = "cifar10"
    config.data.crop = 4
    config.data.flip = True
    config.sigma = 0.25
    config.model.mean = (0.4914, 0.4822, 0.4465)
    config.train.loss = "smoothadv_consistency"
    config.train.smoothadv.radius = 0.5
    config.train.noises = 2
    config.train.steps = 10_000
    config.train.warmup_steps = 150
    config.train.learning_rate = 2e-3
    config.train.weight_decay = 1e-4
    config.train.log_every = 500
    config.train.evaluate_every = 2500
    config.train.checkpoint_every = 2500
    config.certify.schedule = "staged"
    config.certify.epsilon = 0.1
    config.certify.tile = (64, 8)
    return choose(config, variant, VARIANTS)
