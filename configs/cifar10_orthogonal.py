"""CIFAR-10: one deterministic 1-Lipschitz network per family of orthogonal convolutions, all with equal training time.

  python -m lsrs_jax.train --config=configs/cifar10_orthogonal.py:adaptive --workdir=runs/adaptive
  python -m lsrs_jax.certify --workdir=runs/adaptive

The network has eight orthogonal 3x3 convolutions in two stages and a linear head with normalised rows; there is no
noise. Variants: the families ``adaptive`` (default), ``paraunitary``, ``exponential`` and ``cayley``, which start at
the identity; ``FAMILY_random`` starts at random kernels; ``FAMILY_zero`` has zero padding (not for ``cayley``);
``FAMILY_householder`` has learnable reflections instead of MaxMin. The data are those of configs/cifar10_small.py.
Measured results: docs/results/orthogonal.md.
"""

from lsrs_jax.config import default

# The number of steps of 256 images that take five minutes on two cores (928, 932, 131 and 823 images/s).
_STEPS = {"adaptive": 1090, "paraunitary": 1090, "exponential": 153, "cayley": 965}
_CHANGES = {
    "": {},
    "random": {"initializer": "random"},
    "zero": {"padding": "zero"},
    "householder": {"activation": "householder"},
}


def get_config(variant="adaptive"):
    method, _, change = variant.partition("_")
    if method not in _STEPS or change not in _CHANGES or (method, change) == ("cayley", "zero"):
        raise ValueError(
            f"unknown variant {variant!r}: one of {', '.join(_STEPS)}, alone or with _random, _zero (not cayley) or "
            "_householder"
        )
    config = default()
    config.data.name = "cifar10"
    config.data.batch_size = 256
    config.data.crop = 4
    config.data.flip = True
    config.model.encoder = "deep"
    config.model.method = method
    config.model.head = "normalized"
    config.model.mean = (0.4914, 0.4822, 0.4465)
    config.model.update(_CHANGES[change])
    config.train.loss = "margin"
    config.train.steps = _STEPS[method]
    config.train.learning_rate = 5e-3
    config.train.log_every = 50
    config.train.evaluate_every = config.train.steps
    config.train.checkpoint_every = 200
    config.certify.certificate = "deterministic"
    return config
