"""Training losses: under the noise of certification, and with a margin for deterministic certificates.

Under noise, every image gets `noises` Gaussian samples at the place where certification adds the noise: the latent, or
the image under ISRS. The latent is computed once per image. Images lie in [0, 1], σ is that of the certification, and
every call needs a fresh key. A loss is the mean over the batch (and the samples).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from lsrs_jax.models.heads import Images, Latents
from lsrs_jax.models.split import Model, Params
from lsrs_jax.runtime.types import Config

Labels = Int[jax.Array, " B"]
Samples = Float[jax.Array, "B noises K"]  # logits
Scalar = Float[jax.Array, ""]
Step = jax.Array | np.ndarray | int  # number of the training step, from 0
Metrics = tuple[Scalar, Scalar]  # loss, accuracy


def make_loss(
    config: Config, noises: int | None = None
) -> Callable[[Model, Params, Images, Labels, jax.Array, Step], Metrics]:
    """The loss of ``config.train.loss`` as a function ``(model, params, images, labels, key, step)`` → `Metrics`.

    `noises` is the number of noise samples per image, by default ``config.train.noises``.
    """
    train = config.train
    if train.loss == "margin":
        return lambda *batch: margin_cross_entropy(*batch[:4], radius=train.radius, temperature=train.temperature)
    agreement = functools.partial(consistency, **train.consistency)
    losses: dict[str, Callable[[Samples, Labels], Scalar]] = {
        "gaussian": cross_entropy,
        "smoothadv": cross_entropy,
        "consistency": agreement,
        "smoothadv_consistency": agreement,
        "macer": functools.partial(macer, sigma=config.sigma, **train.macer),
    }
    loss, attack = losses[train.loss], train.smoothadv if train.loss.startswith("smoothadv") else None

    def under_noise(
        model: Model, params: Params, images: Images, labels: Labels, key: jax.Array, step: Step
    ) -> Metrics:
        sigma, options = _growing(train.sigma_start, config.sigma, train.sigma_steps, step), {}
        if attack:
            radius = _growing(0.0, attack.radius, attack.warmup_steps, step)
            options = {"radius": radius, "steps": attack.steps}
        logits = sample(model, params, images, labels, key, sigma, noises or train.noises, **options)
        return loss(logits, labels), accuracy(logits, labels)

    return under_noise


def _growing(start: float, end: float, steps: int, step: Step) -> Scalar | float:
    """`end` from step `steps` on, before that on the line from `start`."""
    return start + (end - start) * jnp.minimum(step / steps, 1.0) if steps else end


def _noisy_logits(model: Model, params: Params, latents: Latents, noise: jax.Array) -> Samples:
    noises = len(noise) // len(latents)
    logits = model.classify(params, jnp.repeat(latents, noises, axis=0) + noise)
    return logits.reshape(len(latents), noises, -1)


def sample(
    model: Model,
    params: Params,
    images: Images,
    labels: Labels,
    key: jax.Array,
    sigma: Scalar | float,
    noises: int = 1,
    radius: Scalar | float = 0.0,  # of the attack: ℓ2, in the latent
    steps: int = 0,  # of the attack; 0: no attack
) -> Samples:
    """Logits of noisy latents, around the latent of the image or, after an attack, around an adversarial latent.

    The attack (SmoothAdv; Salman et al. 2019, section 3) starts at the latent. Projected gradient steps of length
    2·radius/steps increase −log of the true class's mean probability over the samples. It differentiates through the
    head only. The training gradient treats the perturbation as a constant and uses the same samples. Behind an encoder
    with Lipschitz constant L, the latent ball of L · radius contains every latent of the input ball of `radius`. Under
    ISRS the attack is on the image.
    """
    latents = model.encode(params, images)
    # Rows of one image are neighbours: a batch that is divided over devices stays divided in the same way.
    noise = sigma * jax.random.normal(key, (len(latents) * noises, *latents.shape[1:]), latents.dtype)
    if not steps:
        return _noisy_logits(model, params, latents, noise)
    fixed = jax.lax.stop_gradient((params, latents))

    def objective(shift: Latents) -> jax.Array:
        each = jax.nn.log_softmax(_noisy_logits(model, fixed[0], fixed[1] + shift, noise))
        return -jnp.take_along_axis(jax.nn.logsumexp(each, axis=1), labels[:, None], axis=1).sum()

    def norm(rows: Latents) -> Latents:
        return jnp.sqrt(jnp.sum(rows**2, axis=range(1, rows.ndim), keepdims=True))

    shift = jnp.zeros_like(latents)
    for _ in range(steps):
        gradient = jax.grad(objective)(shift)
        shift = shift + 2 * radius / steps * gradient / jnp.maximum(norm(gradient), 1e-20)
        shift = shift * jnp.minimum(1.0, radius / jnp.maximum(norm(shift), 1e-20))
    return _noisy_logits(model, params, latents + jax.lax.stop_gradient(shift), noise)


def accuracy(logits: Samples, labels: Labels) -> Scalar:
    """Accuracy of the base classifier under noise."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels[:, None])


def cross_entropy(logits: Samples, labels: Labels) -> Scalar:
    """Cross entropy of the base classifier under noise (Cohen et al. 2019, section 3.3)."""
    repeated = jnp.broadcast_to(labels[:, None], logits.shape[:2])
    return optax.softmax_cross_entropy_with_integer_labels(logits, repeated).mean()


def consistency(logits: Samples, labels: Labels, weight: float, entropy: float) -> Scalar:
    """Cross entropy, and predictions that agree under several samples (Jeong and Shin 2020, sections 3 and 4).

    `weight` λ multiplies the mean KL divergence from the mean prediction to each sample's (10 and 20 in the paper),
    `entropy` η the entropy of the mean prediction (0.5 in the paper). The paper uses 2 samples.
    """
    each = jax.nn.log_softmax(logits)
    mean = jax.nn.logsumexp(each, axis=1, keepdims=True) - math.log(logits.shape[1])
    divergence = jnp.sum(jnp.exp(mean) * (mean - each), axis=-1).mean()
    uncertainty = -jnp.sum(jnp.exp(mean) * mean, axis=-1).mean()
    return cross_entropy(logits, labels) + weight * divergence + entropy * uncertainty


def macer(logits: Samples, labels: Labels, sigma: float, weight: float, margin: float, sharpness: float) -> Scalar:
    """Cross entropy of the mean prediction, and a hinge on the certified radius (MACER; Zhai et al. 2020, sec. 4).

    `weight` λ multiplies the hinge (12 in the paper at σ = 0.25), which asks for Φ⁻¹(p_A) − Φ⁻¹(p_B) up to `margin` γ
    (8). `sharpness` β is the inverse temperature of the softmax behind p_A and p_B (16). The paper uses 16 samples.
    """
    mean = jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=1) - math.log(logits.shape[1])
    natural = -jnp.take_along_axis(mean, labels[:, None], axis=1).mean()
    soft = jax.nn.softmax(sharpness * logits).mean(axis=1)
    own = jax.nn.one_hot(labels, soft.shape[-1], dtype=bool)
    p_a, p_b = (jnp.max(soft, axis=-1, where=where, initial=0.0) for where in (own, ~own))
    # Beyond these values float32 has no quantile. The gradient is zero where the clip acts.
    p_a, p_b = jnp.clip(p_a, 1e-6, 1 - 1e-6), jnp.clip(p_b, 1e-6, 1 - 1e-6)
    gap = jax.scipy.special.ndtri(p_a) - jax.scipy.special.ndtri(p_b)
    hinge = jnp.where(p_a > p_b, jnp.maximum(margin - gap, 0.0), 0.0)
    return natural + weight * sigma / 2 * hinge.mean()


def margin_cross_entropy(
    model: Model, params: Params, images: Images, labels: Labels, radius: float, temperature: float
) -> Metrics:
    """Cross entropy without noise, after √2·radius was subtracted from the true logit (Prach and Lampert 2022, sec. 5).

    An orthogonal head needs this lead for a certified `radius` ≥ 0 (ℓ2, in the latent). The logits are divided by
    `temperature` > 0. A low temperature keeps the loss from asking for more than the radius.
    """
    logits = model.classify(params, model.encode(params, images))
    lead = math.sqrt(2) * radius * jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    scaled = (logits - lead) / temperature
    loss = temperature * optax.softmax_cross_entropy_with_integer_labels(scaled, labels).mean()
    return loss, jnp.mean(jnp.argmax(logits, axis=-1) == labels)
