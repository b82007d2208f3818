"""The accuracy of a classifier under the noise with which it will be certified, from a few samples."""

import numpy as np

from lsrs_jax.runtime.rng import domain_key
from lsrs_jax.smoothing.engine import Images
from lsrs_jax.smoothing.sampler import Sampler

_IMAGES, _SAMPLES = 100, 32
_COLLAPSED = 0.5  # share of the accuracy that is left under noise


def accuracy_under_noise(sampler: Sampler, images: Images) -> str:
    """The accuracy of the base classifier on some images, with and without noise; says what to do if noise ruins it.

    The noise is not that of the certification.
    """
    labels, latents, key = np.array(images.labels[:_IMAGES]), images.latents[:_IMAGES], domain_key(0, "probe")
    hits, size = np.zeros(len(labels)), sampler.tile[0]
    for first in range(0, len(labels), size):
        part = slice(first, min(first + size, len(labels)))
        counts = sampler.one_batch(latents[part], key, "selection", _SAMPLES, images.idx[part])
        hits[part] = counts[np.arange(len(counts)), labels[part]] / _SAMPLES
    clean, noisy = float(np.mean(sampler.without_noise(latents) == labels)), float(hits.mean())
    sigma = sampler.arithmetic.sigma
    line = f"accuracy on {len(labels)} images: {clean:.2f} without noise, {noisy:.2f} under noise of sigma {sigma:g}"
    if noisy >= _COLLAPSED * clean:
        return line
    source = "train --config.train.start_from=WORKDIR, or torch:FILE for a PyTorch network"
    remedy = f"fine-tune it under this noise ({source}), or use a smaller sigma"
    return f"{line}\nnote: the noise ruins this classifier, so that few images will get a certificate: {remedy}"
