"""The 8x8 handwritten digits of scikit-learn: seconds of training; `make demo` uses them.

  python -m lsrs_jax.train --config=configs/digits.py --workdir=runs/digits
  python -m lsrs_jax.certify --workdir=runs/digits

Variants: ``lsrs`` (default; two orthogonal convolutions, noise on the latent), ``cayley`` (the same with another
family), ``isrs`` (no encoder: the head smoothed in input space), ``isrs_split`` (the network of ``lsrs`` smoothed in
input space), ``margin_attacked`` (``lsrs`` with a linear head, trained under noise and attack: its deterministic
certificates need no samples, and are at least its smoothed ones; docs/howto/deterministic.md).
"""

from lsrs_jax.config import COMPARISONS, choose, default

VARIANTS = COMPARISONS | {
    "margin_attacked": {
        "model.head": "linear",
        "train.loss": "smoothadv_consistency",
        "train.smoothadv.radius": 0.5,
        "train.noises": 2,
    }
}


def get_config(variant="lsrs"):
    config = default()
    config.sigma = 0.5
    config.train.steps = 800
    config.train.learning_rate = 3e-3
    config.train.evaluate_every = 400
    config.train.checkpoint_every = 400
    config.certify.n = 10_000
    config.model.encoder = "shallow"
    config.model.head = "mlp"
    config.certify.tile = (32, 32)
    return choose(config, variant, VARIANTS)
