"""Losses: under the certification noise, and with a margin for deterministic certificates."""

import math

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


def margin_cross_entropy(model, params, images, labels, radius, temperature):
    """Cross entropy without noise, of logits whose true class is handicapped (Prach and Lampert 2022, section 5).

    The handicap √2·radius is what an orthogonal head needs for a certified `radius` in the latent; a low temperature
    keeps the loss from asking for more than that.

    Args:
      images, labels: as in `gaussian_cross_entropy`.
      radius: ℓ2 radius in the latent, ≥ 0.
      temperature: divides the logits, > 0.

    Returns:
      ``(loss, accuracy)``: means over the batch.
    """
    logits = model.classify(params, model.encode(params, images))
    handicap = math.sqrt(2) * radius * jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    scaled = (logits - handicap) / temperature
    loss = temperature * optax.softmax_cross_entropy_with_integer_labels(scaled, labels).mean()
    return loss, jnp.mean(jnp.argmax(logits, axis=-1) == labels)
