"""Certification of any JAX function in one call."""

import numpy as np

from lsrs_jax.errors import UserError
from lsrs_jax.smoothing import confidence
from lsrs_jax.smoothing.certificates import from_counts
from lsrs_jax.smoothing.radius import check_lipschitz, check_sigma, float32_slack, sampled_sigma
from lsrs_jax.smoothing.votes import Votes, chunks


def certify(
    head,
    latents,
    *,
    sigma,
    key,
    n0=100,
    n=100_000,
    alpha=0.001,
    lipschitz=1.0,
    slack=0.0,
    tile=(16, 16),
    spmd="shard_map",
):
    """Certifies the smoothed classifier argmax_c P[head(z + δ) = c], δ ~ N(0, σ²I), at given latents.

    Args:
      head: any function latents ``(B, …)`` float32 → logits ``(B, K)`` with independent, deterministic rows: Flax,
        Equinox, NNX or plain JAX. With images as latents this is input-space smoothing.
      latents: ``(N, …)`` floating point. Their rounding to float32 is charged to the radius; what an encoder in
        less than float64 did before is not: give it as `slack`, or encode in float64.
      sigma: standard deviation of the noise, in units of the latents.
      key: a typed threefry key, ``jax.random.key(seed, impl="threefry2x32")``. Certification draws from a domain of its
        own, so the seed may be that of the training.
      n0: votes that choose the class.
      n: fresh votes that certify it.
      alpha: failure probability per latent.
      lipschitz: constant of whatever made the latents; radii are divided by it.
      slack: ℓ2 error of the latents to charge besides, in their units: one number, or one per latent.
      tile: ``(images, samples)`` evaluated at once; the counts of a run depend on ``samples`` (it numbers the noise)
        but not on the device count.
      spmd: ``"shard_map"`` or ``"pmap"``.

    Returns:
      `Certificates`; ``predict`` is −1 and ``radius`` 0 on abstention.

    Raises:
      UserError (a ValueError): one clear sentence for every rejected input.

    **Guarantee**: see `certificates.from_counts` and `radius.certified_radius`; the noise is shared across latents,
    so each holds with probability 1 − alpha but failures of different latents are correlated. float32 arithmetic:
    see `radius.float32_slack` for what is charged and what is not.
    """
    check_sigma(sigma)
    check_lipschitz(lipschitz)
    slack = np.asarray(slack, np.float64)
    if not (np.isfinite(slack).all() and (slack >= 0).all() and slack.shape in ((), (len(latents),))):
        raise UserError("slack must be one number >= 0, or one per latent")
    confidence.check_alpha(alpha)
    latents = np.asarray(latents)
    if latents.ndim < 2 or not latents.size:
        raise UserError(f"latents must have shape (N, ...) with N >= 1, got {latents.shape}")
    if not np.issubdtype(latents.dtype, np.floating):
        raise UserError(f"latents must be floating point, got {latents.dtype}")
    latents = latents.astype(np.float64)
    plan = {"selection": n0, "estimation": n}
    for name, votes in zip(("n0", "n"), plan.values(), strict=True):
        if not isinstance(votes, int | np.integer) or isinstance(votes, bool) or votes < 1:
            raise UserError(f"{name} must be a whole number of at least 1, got {votes!r}")
    loop = Votes(head, latents.shape[1:], sigma=sigma, key=key, tile=tile, spmd=spmd)
    counts = {purpose: [] for purpose in plan}
    for start in range(0, len(latents), tile[0]):
        part = latents[start : start + tile[0]]
        on_device = loop.put(part)
        running = {p: loop.launch(on_device, p, 0, chunks(votes, tile[1]), votes) for p, votes in plan.items()}
        for purpose, votes in running.items():
            counts[purpose].append(loop.collect(votes, len(part)))
    selection, estimation = (np.concatenate(counts[purpose]) for purpose in plan)
    return from_counts(
        selection,
        estimation,
        sigma=sampled_sigma(sigma),
        alpha=alpha,
        lipschitz=lipschitz,
        slack=float32_slack(latents, sigma) + slack,
    )
