"""Losses of noisy classification."""

import jax
import jax.numpy as jnp
import optax


def gaussian_cross_entropy(model, params, images, labels, sigma, key):
    """Cross entropy of the base classifier under one Gaussian sample per image (Cohen et al. 2019, section 3.3).

    The noise goes where certification puts it: on the latent, or on the image under ISRS.

    Args:
      images: float32 ``(B, H, W, C)`` in [0, 1].
      labels: int32 ``(B,)``.
      sigma: the certification σ.
      key: one key, used once.

    Returns:
      ``(loss, accuracy)``: means over the batch.
    """
    latents = model.encode(params, images)
    noise = jax.random.normal(key, latents.shape, latents.dtype)
    logits = model.classify(params, latents + sigma * noise)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, jnp.mean(jnp.argmax(logits, axis=-1) == labels)
