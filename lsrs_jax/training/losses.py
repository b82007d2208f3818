"""Losses: under the certification noise, and with a margin for deterministic certificates.

Under noise, every image gets `noises` Gaussian samples where certification puts them: on the latent, or on the image
under ISRS. Latents are computed once per image, so behind an encoder more samples cost only the head.

Every loss takes images float32 ``(B, H, W, C)`` in [0, 1], labels int32 ``(B,)``, the certification σ and one key, used
once, and returns ``(loss, accuracy)``: means over the batch (and the samples).
"""

import math

import jax
import jax.numpy as jnp
import optax


def of_config(config):
    """The loss that ``config.train.loss`` names, as a function ``(model, params, images, labels, key)``."""
    train, sigma, noises = config.train, config.sigma, config.train.noises
    agreement = train.consistency.weight, train.consistency.entropy
    attack = train.smoothadv.radius, train.smoothadv.steps
    losses = {
        "gaussian": lambda *batch: gaussian_cross_entropy(*batch, sigma, noises),
        "consistency": lambda *batch: consistency(*batch, sigma, noises, *agreement),
        "macer": lambda *batch: macer(
            *batch, sigma, noises, train.macer.weight, train.macer.margin, train.macer.sharpness
        ),
        "smoothadv": lambda *batch: smoothadv(*batch, sigma, noises, *attack),
        "smoothadv_consistency": lambda *batch: smoothadv_consistency(*batch, sigma, noises, *attack, *agreement),
        "margin": lambda *batch: margin_cross_entropy(*batch[:-1], train.radius, train.temperature),
    }
    return losses[train.loss]


def _noise(latents, sigma, key, noises):
    """σ times standard normals ``(B · noises, …)``; rows of one image lie side by side, so that a batch stays split
    over devices as it was."""
    return sigma * jax.random.normal(key, (len(latents) * noises, *latents.shape[1:]), latents.dtype)


def _logits(model, params, latents, noise):
    """``(B, noises, K)``."""
    noises = len(noise) // len(latents)
    logits = model.classify(params, jnp.repeat(latents, noises, axis=0) + noise)
    return logits.reshape(len(latents), noises, -1)


def _cross_entropy(logits, labels):
    """``(B, noises)``."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.broadcast_to(labels[:, None], logits.shape[:2]))


def _accuracy(logits, labels):
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels[:, None])


def gaussian_cross_entropy(model, params, images, labels, key, sigma, noises=1):
    """Cross entropy of the base classifier under noise (Cohen et al. 2019, section 3.3)."""
    latents = model.encode(params, images)
    logits = _logits(model, params, latents, _noise(latents, sigma, key, noises))
    return _cross_entropy(logits, labels).mean(), _accuracy(logits, labels)


def consistency(model, params, images, labels, key, sigma, noises, weight, entropy):
    """Cross entropy, and predictions that agree under several samples (Jeong and Shin 2020, section 3).

    Args:
      noises: at least 2; the paper takes 2.
      weight: λ of the mean KL divergence from the mean prediction to that of each sample; the paper takes 10 and 20.
      entropy: η of the entropy of the mean prediction; the paper takes 0.5.
    """
    latents = model.encode(params, images)
    logits = _logits(model, params, latents, _noise(latents, sigma, key, noises))
    return _consistent(logits, labels, weight, entropy), _accuracy(logits, labels)


def _consistent(logits, labels, weight, entropy):
    """The loss of `consistency` of logits ``(B, noises, K)``."""
    each = jax.nn.log_softmax(logits)
    mean = jax.nn.logsumexp(each, axis=1, keepdims=True) - math.log(logits.shape[1])
    divergence = jnp.sum(jnp.exp(mean) * (mean - each), axis=-1).mean()
    uncertainty = -jnp.sum(jnp.exp(mean) * mean, axis=-1).mean()
    return _cross_entropy(logits, labels).mean() + weight * divergence + entropy * uncertainty


def macer(model, params, images, labels, key, sigma, noises, weight, margin, sharpness):
    """Cross entropy of the mean prediction, and a hinge on the certified radius (MACER; Zhai et al. 2020, section 4).

    Args:
      noises: samples per image; the paper takes 16.
      weight: λ of the hinge; the paper takes 12 at σ = 0.25.
      margin: γ, the largest Φ⁻¹(p_A) − Φ⁻¹(p_B) that is still asked for; the paper takes 8.
      sharpness: β, the inverse temperature of the soft votes behind p_A and p_B; the paper takes 16.
    """
    latents = model.encode(params, images)
    logits = _logits(model, params, latents, _noise(latents, sigma, key, noises))
    mean = jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=1) - math.log(noises)
    natural = -jnp.take_along_axis(mean, labels[:, None], axis=1).mean()
    votes = jax.nn.softmax(sharpness * logits).mean(axis=1)
    own = jax.nn.one_hot(labels, votes.shape[-1], dtype=bool)
    p_a, p_b = jnp.max(votes, axis=-1, where=own, initial=0.0), jnp.max(votes, axis=-1, where=~own, initial=0.0)
    # Beyond these float32 has no quantile; there the clip takes the gradient away.
    p_a, p_b = jnp.clip(p_a, 1e-6, 1 - 1e-6), jnp.clip(p_b, 1e-6, 1 - 1e-6)
    gap = jax.scipy.special.ndtri(p_a) - jax.scipy.special.ndtri(p_b)
    hinge = jnp.where(p_a > p_b, jnp.maximum(margin - gap, 0.0), 0.0)
    return natural + weight * sigma / 2 * hinge.mean(), _accuracy(logits, labels)


def smoothadv(model, params, images, labels, key, sigma, noises, radius, steps):
    """Cross entropy at an adversarial latent of the smoothed classifier (SmoothAdv; Salman et al. 2019, section 3).

    Projected gradient steps of 2·radius/steps climb −log of the mean probability of the true class over the samples,
    from the latent itself; the training gradient then takes the perturbation as given and sees the same samples. The
    attack differentiates through the head only. Behind an encoder with Lipschitz constant L the latent ball of
    L · radius holds whatever an input ball of `radius` can become. Under ISRS the attack is on the image.

    Args:
      radius: ℓ2, in the latent.
      steps: of the attack.
    """
    logits = _attacked_logits(model, params, images, labels, key, sigma, noises, radius, steps)
    return _cross_entropy(logits, labels).mean(), _accuracy(logits, labels)


def smoothadv_consistency(model, params, images, labels, key, sigma, noises, radius, steps, weight, entropy):
    """The loss of `consistency` at the adversarial latent of `smoothadv` (Jeong and Shin 2020, section 4).

    Args:
      noises, weight, entropy: as in `consistency`.
      radius, steps: as in `smoothadv`.
    """
    logits = _attacked_logits(model, params, images, labels, key, sigma, noises, radius, steps)
    return _consistent(logits, labels, weight, entropy), _accuracy(logits, labels)


def _attacked_logits(model, params, images, labels, key, sigma, noises, radius, steps):
    """``(B, noises, K)``; see `smoothadv`."""
    latents = model.encode(params, images)
    noise = _noise(latents, sigma, key, noises)
    fixed = jax.lax.stop_gradient((params, latents))

    def objective(shift):
        each = jax.nn.log_softmax(_logits(model, fixed[0], fixed[1] + shift, noise))
        mean = jax.nn.logsumexp(each, axis=1)
        return -jnp.take_along_axis(mean, labels[:, None], axis=1).sum()

    def norm(rows):
        return jnp.sqrt(jnp.sum(rows**2, axis=range(1, rows.ndim), keepdims=True))

    shift = jnp.zeros_like(latents)
    for _ in range(steps):
        gradient = jax.grad(objective)(shift)
        shift = shift + 2 * radius / steps * gradient / jnp.maximum(norm(gradient), 1e-20)
        shift = shift * jnp.minimum(1.0, radius / jnp.maximum(norm(shift), 1e-20))
    return _logits(model, params, latents + jax.lax.stop_gradient(shift), noise)


def margin_cross_entropy(model, params, images, labels, radius, temperature):
    """Cross entropy without noise, of logits whose true class is handicapped (Prach and Lampert 2022, section 5).

    The handicap √2·radius is what an orthogonal head needs for a certified `radius` in the latent; a low temperature
    keeps the loss from asking for more than that.

    Args:
      radius: ℓ2 radius in the latent, ≥ 0.
      temperature: divides the logits, > 0.
    """
    logits = model.classify(params, model.encode(params, images))
    handicap = math.sqrt(2) * radius * jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    scaled = (logits - handicap) / temperature
    loss = temperature * optax.softmax_cross_entropy_with_integer_labels(scaled, labels).mean()
    return loss, jnp.mean(jnp.argmax(logits, axis=-1) == labels)
