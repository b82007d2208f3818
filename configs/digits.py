"""The 8x8 handwritten digits of scikit-learn: seconds of training; `make demo` uses them.

  python -m lsrs_jax.train --config=configs/digits.py --workdir=runs/digits
  python -m lsrs_jax.certify --workdir=runs/digits

Variants: ``lsrs`` (default; two orthogonal convolutions, noise on the latent), ``cayley`` (the same with another
family), ``isrs`` (no encoder: the head smoothed in input space), ``isrs_split`` (the network of ``lsrs`` smoothed in
input space).

Trained under noise and attack: ``margin_attacked`` (``lsrs`` with a linear head: its deterministic certificates need no
samples, and are at least its smoothed ones; docs/howto/deterministic.md). At sigma 0.25, those of `make demo`:
``split2`` and ``split4`` (the first two blocks of four, or all, are orthogonal and lie in front of the noise;
``split4`` has a linear head), ``split4_input`` (the network of ``split4``, noise on the image), ``mlp_input`` (an MLP,
noise on the image).
"""

from lsrs_jax.config import COMPARISONS, choose, default

ATTACKED = {"train.loss": "smoothadv_consistency", "train.smoothadv.radius": 0.5, "train.noises": 2}
DEMO = ATTACKED | {"sigma": 0.25}
BLOCKS = DEMO | {
    "model.encoder": "blocks",
    "model.head": "blocks",
    "model.widths": (4, 4, 16, 16),
    "model.strides": (2, 1, 2, 1),
}
VARIANTS = COMPARISONS | {
    "margin_attacked": ATTACKED | {"model.head": "linear"},
    "split2": BLOCKS | {"model.split": 2},
    "split4": BLOCKS | {"model.split": 4, "model.head": "linear"},
    "split4_input": BLOCKS | {"model.split": 4, "model.head": "linear", "model.noise": "input"},
    "mlp_input": DEMO | {"model.encoder": "identity"},
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
