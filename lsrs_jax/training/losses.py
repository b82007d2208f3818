"""Losses: under the certification noise, and with a margin for deterministic certificates.

Under noise, every image gets `noises` Gaussian samples where certification adds the noise: to the latent, or to the
image under ISRS. The latent is computed once per image, so behind an encoder more samples cost only the head.

Images lie in [0, 1], σ is that of the certification, and the key is used once. The mean over the batch (and the
samples) is returned as ``(loss, accuracy)``.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int

from lsrs_jax.models.heads import Images, Latents
from lsrs_jax.models.split import Model, Params
from lsrs_jax.runtime.types import Config

Labels = Int[jax.Array, " B"]
Samples = Float[jax.Array, "B noises K"]  # logits
Metrics = tuple[Float[jax.Array, ""], Float[jax.Array, ""]]  # loss, accuracy


def make_loss(config: Config) -> Callable[[Model, Params, Images, Labels, jax.Array], Metrics]:
    """The loss that ``config.train.loss`` names, as a function ``(model, params, images, labels, key)``."""
    train, noise = config.train, {"sigma": config.sigma, "noises": config.train.noises}
    agreement = {"weight": train.consistency.weight, "entropy": train.consistency.entropy}
    hinge = {"weight": train.macer.weight, "margin": train.macer.margin, "sharpness": train.macer.sharpness}
    attack = {"radius": train.smoothadv.radius, "steps": train.smoothadv.steps}
    limits = {"radius": train.radius, "temperature": train.temperature}
    losses: dict[str, Callable[..., Metrics]] = {
        "gaussian": functools.partial(gaussian_cross_entropy, **noise),
        "consistency": functools.partial(consistency, **noise, **agreement),
        "macer": functools.partial(macer, **noise, **hinge),
        "smoothadv": functools.partial(smoothadv, **noise, **attack),
        "smoothadv_consistency": functools.partial(smoothadv_consistency, **noise, **attack, **agreement),
        "margin": lambda *batch: margin_cross_entropy(*batch[:4], **limits),
    }
    return losses[train.loss]


def _noise(latents: Latents, sigma: float, key: jax.Array, noises: int) -> jax.Array:
    """Noise ``(B · noises, …)``. Rows of one image are neighbours, so that a divided batch stays divided as it is."""
    return sigma * jax.random.normal(key, (len(latents) * noises, *latents.shape[1:]), latents.dtype)


def _logits(model: Model, params: Params, latents: Latents, noise: jax.Array) -> Samples:
    noises = len(noise) // len(latents)
    logits = model.classify(params, jnp.repeat(latents, noises, axis=0) + noise)
    return logits.reshape(len(latents), noises, -1)


def _cross_entropy(logits: Samples, labels: Labels) -> jax.Array:
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.broadcast_to(labels[:, None], logits.shape[:2]))
    return each.mean()


def _accuracy(logits: Samples, labels: Labels) -> jax.Array:
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels[:, None])


def gaussian_cross_entropy(
    model: Model, params: Params, images: Images, labels: Labels, key: jax.Array, sigma: float, noises: int = 1
) -> Metrics:
    """Cross entropy of the base classifier under noise (Cohen et al. 2019, section 3.3)."""
    latents = model.encode(params, images)
    logits = _logits(model, params, latents, _noise(latents, sigma, key, noises))
    return _cross_entropy(logits, labels), _accuracy(logits, labels)


def consistency(
    model: Model,
    params: Params,
    images: Images,
    labels: Labels,
    key: jax.Array,
    sigma: float,
    noises: int,  # at least 2; the paper uses 2
    weight: float,  # λ of the mean KL divergence from the mean prediction to each sample's; the paper uses 10 and 20
    entropy: float,  # η of the entropy of the mean prediction; the paper uses 0.5
) -> Metrics:
    """Cross entropy, and predictions that agree under several samples (Jeong and Shin 2020, section 3)."""
    latents = model.encode(params, images)
    logits = _logits(model, params, latents, _noise(latents, sigma, key, noises))
    return _consistent(logits, labels, weight, entropy), _accuracy(logits, labels)


def _consistent(logits: Samples, labels: Labels, weight: float, entropy: float) -> jax.Array:
    """The loss of `consistency`."""
    each = jax.nn.log_softmax(logits)
    mean = jax.nn.logsumexp(each, axis=1, keepdims=True) - math.log(logits.shape[1])
    divergence = jnp.sum(jnp.exp(mean) * (mean - each), axis=-1).mean()
    uncertainty = -jnp.sum(jnp.exp(mean) * mean, axis=-1).mean()
    return _cross_entropy(logits, labels) + weight * divergence + entropy * uncertainty


def macer(
    model: Model,
    params: Params,
    images: Images,
    labels: Labels,
    key: jax.Array,
    sigma: float,
    noises: int,  # samples per image; the paper uses 16
    weight: float,  # λ of the hinge; the paper uses 12 at σ = 0.25
    margin: float,  # γ: the hinge asks for Φ⁻¹(p_A) − Φ⁻¹(p_B) up to this value; the paper uses 8
    sharpness: float,  # β, the inverse temperature of the softmax behind p_A and p_B; the paper uses 16
) -> Metrics:
    """Cross entropy of the mean prediction, and a hinge on the certified radius (MACER; Zhai et al. 2020, sec. 4)."""
    latents = model.encode(params, images)
    logits = _logits(model, params, latents, _noise(latents, sigma, key, noises))
    mean = jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=1) - math.log(noises)
    natural = -jnp.take_along_axis(mean, labels[:, None], axis=1).mean()
    soft = jax.nn.softmax(sharpness * logits).mean(axis=1)
    own = jax.nn.one_hot(labels, soft.shape[-1], dtype=bool)
    p_a, p_b = jnp.max(soft, axis=-1, where=own, initial=0.0), jnp.max(soft, axis=-1, where=~own, initial=0.0)
    # Beyond these values float32 has no quantile. The gradient is zero where the clip acts.
    p_a, p_b = jnp.clip(p_a, 1e-6, 1 - 1e-6), jnp.clip(p_b, 1e-6, 1 - 1e-6)
    gap = jax.scipy.special.ndtri(p_a) - jax.scipy.special.ndtri(p_b)
    hinge = jnp.where(p_a > p_b, jnp.maximum(margin - gap, 0.0), 0.0)
    return natural + weight * sigma / 2 * hinge.mean(), _accuracy(logits, labels)


def smoothadv(
    model: Model,
    params: Params,
    images: Images,
    labels: Labels,
    key: jax.Array,
    sigma: float,
    noises: int,
    radius: float,  # ℓ2, in the latent
    steps: int,  # of the attack
) -> Metrics:
    """Cross entropy at an adversarial latent of the smoothed classifier (SmoothAdv; Salman et al. 2019, section 3).

    The attack starts at the latent. Projected gradient steps of length 2·radius/steps increase −log of the true class's
    mean probability over the samples. The training gradient treats the perturbation as a constant and uses the same
    samples. The attack differentiates through the head only. Behind an encoder with Lipschitz constant L, the latent
    ball of L · radius contains every latent of the input ball of `radius`. Under ISRS the attack is on the image.
    """
    latents = model.encode(params, images)
    logits = _attacked(model, params, latents, labels, _noise(latents, sigma, key, noises), radius, steps)
    return _cross_entropy(logits, labels), _accuracy(logits, labels)


def smoothadv_consistency(
    model: Model,
    params: Params,
    images: Images,
    labels: Labels,
    key: jax.Array,
    sigma: float,
    noises: int,
    radius: float,
    steps: int,
    weight: float,
    entropy: float,
) -> Metrics:
    """The loss of `consistency` at the adversarial latent of `smoothadv` (Jeong and Shin 2020, section 4)."""
    latents = model.encode(params, images)
    logits = _attacked(model, params, latents, labels, _noise(latents, sigma, key, noises), radius, steps)
    return _consistent(logits, labels, weight, entropy), _accuracy(logits, labels)


def _attacked(
    model: Model, params: Params, latents: Latents, labels: Labels, noise: jax.Array, radius: float, steps: int
) -> Samples:
    fixed = jax.lax.stop_gradient((params, latents))

    def objective(shift: Latents) -> jax.Array:
        each = jax.nn.log_softmax(_logits(model, fixed[0], fixed[1] + shift, noise))
        mean = jax.nn.logsumexp(each, axis=1)
        return -jnp.take_along_axis(mean, labels[:, None], axis=1).sum()

    def norm(rows: Latents) -> Latents:
        return jnp.sqrt(jnp.sum(rows**2, axis=range(1, rows.ndim), keepdims=True))

    shift = jnp.zeros_like(latents)
    for _ in range(steps):
        gradient = jax.grad(objective)(shift)
        shift = shift + 2 * radius / steps * gradient / jnp.maximum(norm(gradient), 1e-20)
        shift = shift * jnp.minimum(1.0, radius / jnp.maximum(norm(shift), 1e-20))
    return _logits(model, params, latents + jax.lax.stop_gradient(shift), noise)


def margin_cross_entropy(
    model: Model, params: Params, images: Images, labels: Labels, radius: float, temperature: float
) -> Metrics:
    """Cross entropy without noise, of logits whose true class is handicapped (Prach and Lampert 2022, section 5).

    The handicap √2·radius is what an orthogonal head needs for a certified `radius` ≥ 0 (ℓ2, in the latent). The
    `temperature` > 0 divides the logits; a low one keeps the loss from asking for more than the radius.
    """
    logits = model.classify(params, model.encode(params, images))
    handicap = math.sqrt(2) * radius * jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    scaled = (logits - handicap) / temperature
    loss = temperature * optax.softmax_cross_entropy_with_integer_labels(scaled, labels).mean()
    return loss, jnp.mean(jnp.argmax(logits, axis=-1) == labels)
