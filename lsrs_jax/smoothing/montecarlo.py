"""Certification and prediction of any JAX function in one call."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from scipy import special

from lsrs_jax.arguments import array, numbers
from lsrs_jax.errors import UserError
from lsrs_jax.smoothing import confidence
from lsrs_jax.smoothing import schedule as schedules
from lsrs_jax.smoothing.radius import check_sigma
from lsrs_jax.smoothing.sweep import Block, Status, Sweep
from lsrs_jax.smoothing.tally import Plan, Tallies, chunks
from lsrs_jax.smoothing.votes import Votes


def certify(
    head,
    latents,
    *,
    sigma,
    key,
    n0=100,
    n=100_000,
    alpha=0.001,
    bound="binary",
    schedule="fixed",
    radii=None,
    epsilon=0.05,
    lipschitz=1.0,
    slack=0.0,
    arithmetic="sound",
    noise="shared",
    tile=(32, 8),
    spmd="shard_map",
    progress=None,
):
    """Certifies the smoothed classifier argmax_c P[head(z + δ) = c], δ ~ N(0, σ²I), at given latents.

    Args:
      head: any function latents ``(B, …)`` float32 → logits ``(B, K)`` with independent, deterministic rows: Flax,
        Equinox, NNX or plain JAX. With images as latents this is input-space smoothing.
      latents: ``(N, …)`` floating point. What an encoder in less than float64 rounded is not charged: give it as
        `slack`, or encode in float64.
      sigma: standard deviation of the noise, in units of the latents.
      key: a typed threefry key, ``jax.random.key(seed, impl="threefry2x32")``. Certification draws from a domain of its
        own, so the seed may be that of the training.
      n0: votes that choose the class.
      n: fresh votes that certify it; with ``schedule="staged"`` the most that a latent can get.
      alpha: failure probability per latent.
      bound: ``"binary"``, or ``"multiclass"`` for larger radii where no class has half of the votes.
      schedule: ``"fixed"``, or ``"staged"``: votes in growing looks until the answer is settled.
      radii: staged: the radii to decide (0, whether anything is certified, always counts). None: the radius itself.
      epsilon: staged without radii: to within how much of what n votes would give, in multiples of sigma/lipschitz.
      lipschitz: constant of whatever made the latents; radii are divided by it.
      slack: ℓ2 error of the latents to charge besides, in their units: one number, or one per latent.
      arithmetic: ``"sound"`` (integers on a grid; `noise.Sound`) or ``"float32"`` (the classic; `noise.Float32`).
      noise: ``"shared"`` by all latents, or ``"independent"``, which costs more random numbers.
      tile: ``(images, samples)`` evaluated at once; the counts of a run depend on ``samples`` (it numbers the noise)
        but not on the device count.
      spmd: ``"shard_map"`` or ``"pmap"``.
      progress: function of a line of text, such as ``print``; called every few seconds.

    Returns:
      `Certificates`; ``predict`` is −1 and ``radius`` 0 on abstention, radii are in units of the latents over
      `lipschitz`.

    Raises:
      UserError (a ValueError): one clear sentence for every rejected input.

    **Guarantee**: that of `certificates.from_counts`, with the charges of the arithmetic (`noise.Sound`: the grid and
    the total variation of the drawn noise) made. With shared noise each certificate holds with probability 1 − alpha,
    but failures of different latents are correlated.
    """
    latents = _check_latents(latents)
    slack = numbers("slack", slack)
    if not (np.isfinite(slack).all() and (slack >= 0).all() and slack.shape in ((), (len(latents),))):
        raise UserError("slack must be one number >= 0, or one per latent")
    radii = None if radii is None else tuple(np.ravel(numbers("radii", radii)).tolist())
    if progress is not None and not callable(progress):
        raise UserError(f"progress must be a function of a line of text, got {progress!r}")
    derivation = schedules.Derivation(sigma, alpha, bound, lipschitz, radii=radii, epsilon=epsilon)
    votes = Votes(
        head, latents.shape[1:], sigma=sigma, key=key, arithmetic=arithmetic, noise=noise, tile=tile, spmd=spmd
    )
    plan = schedules.plan(schedule, n0, n, votes.tile[1])
    derivation = dataclasses.replace(derivation, sigma=votes.arithmetic.sigma, tau=votes.tau)
    tallies, indices = Tallies(plan, votes.num_classes), list(range(len(latents)))
    placed = votes.place(latents)
    charges = votes.arithmetic.slack(latents) + slack
    block = Block(indices, [0] * len(latents), charges.tolist(), placed)
    status = Status(plan, len(latents), 0, progress or (lambda line: None))
    Sweep(votes, tallies, lambda found: derivation.settled(plan, found), status).run(block)
    return derivation.certificates(plan, [tallies.tallies[i] for i in indices])


def predict(
    head,
    latents,
    *,
    sigma,
    key,
    n=1000,
    alpha=0.001,
    arithmetic="sound",
    noise="shared",
    tile=(32, 8),
    spmd="shard_map",
):
    """The class of the smoothed classifier at given latents, or −1 (Cohen et al. 2019, PREDICT).

    Args:
      n: votes per latent, of noise that `certify` never draws.
      alpha: probability of a wrong class, per latent.
      head, latents, sigma, key, arithmetic, noise, tile, spmd: as in `certify`.

    Returns:
      int64 ``(N,)``: the class with the most votes, or −1 where the two-sided binomial test does not tell it from the
      second.

    Raises:
      UserError (a ValueError): one clear sentence for every rejected input.

    **Guarantee**: for each latent the class returned is that of the smoothed classifier with probability at least
    1 − alpha (the test of the two leaders at this level is valid although the votes chose them; Hung and Fithian 2019).
    """
    latents = _check_latents(latents)
    check_sigma(sigma)
    confidence.check_alpha(alpha)
    votes = Votes(
        head, latents.shape[1:], sigma=sigma, key=key, arithmetic=arithmetic, noise=noise, tile=tile, spmd=spmd
    )
    return classes(votes, latents, n, alpha)


def classes(votes, latents, n, alpha):
    """`predict` with a vote loop (`votes.Votes`) that is there already; latents are float64."""
    images, samples = votes.tile
    last, placed, counts = chunks(Plan(1, (n,), samples).n, samples), votes.place(latents), []
    for start in range(0, len(latents), images):
        part = placed[start : start + images]
        on_device = votes.put(part, range(start, start + len(part)))
        counts.append(votes.collect(votes.launch(on_device, "prediction", 0, last, n), len(part)))
    return _leaders(np.concatenate(counts), float(alpha), votes.tau)


def _leaders(counts, alpha, tau):
    """The class with the most votes where the second has significantly fewer, else −1.

    Of the votes for either of two equal classes, half are for each; τ can move that half by at most τ over the
    probability of the two together, which is bounded from below at a hundredth of the level, for all pairs of classes
    at once: which of them are compared, the votes themselves say.
    """
    rows, leader = np.arange(len(counts)), counts.argmax(axis=1)
    first, others = counts[rows, leader], counts.copy()
    others[rows, leader] = -1
    both = first + others.max(axis=1)
    if tau:
        together = confidence.lower(both, counts.sum(axis=1), alpha / 100 / math.comb(counts.shape[1], 2))
        half = 0.5 + tau / np.maximum(together - tau, 1e-300)
        level = 0.99 * alpha
    else:
        half, level = 0.5, alpha
    # P[at least `first` of `both`]
    certain = 2 * special.betainc(first, both - first + 1, np.minimum(half, 1.0)) <= level
    return np.where(certain, leader, -1)


def _check_latents(latents):
    latents = array("latents", latents)
    if latents.ndim < 2 or not latents.size:
        raise UserError(f"latents must have shape (N, ...) with N >= 1, got {latents.shape}")
    if not jnp.issubdtype(latents.dtype, jnp.floating):
        raise UserError(f"latents must be floating point, got {latents.dtype}")
    with np.errstate(over="ignore"):  # `Votes.place` refuses infinities
        return latents.astype(np.float64)
