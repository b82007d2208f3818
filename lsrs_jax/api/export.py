"""`SmoothedClassifier.predict` as a StableHLO program that runs without this package."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float, Int, UInt32

from lsrs_jax.runtime.errors import UserError, reason
from lsrs_jax.runtime.format import KEY_DOMAINS, NOISE_OFFSETS, PRNG, STREAMS
from lsrs_jax.runtime.validate import is_whole
from lsrs_jax.smoothing.confidence import check_alpha, is_ahead
from lsrs_jax.smoothing.discrete_gaussian import MAX_LATENT
from lsrs_jax.smoothing.sampler import Sampler, pinned_flags
from lsrs_jax.smoothing.schedule import block_count, make_schedule

if TYPE_CHECKING:
    from lsrs_jax.api.classifier import SmoothedClassifier


def export_predict(
    classifier: "SmoothedClassifier",
    input_shape: Sequence[int],
    *,
    batch: int = 1,
    n: int = 1000,
    alpha: float = 0.001,
    platforms: Sequence[str] | None = None,
) -> export.Exported:
    """A program ``(x, key data) → classes`` with the parameters inside; −1 where it abstains.

    Args:
      input_shape: shape of an input, without the batch.
      batch: inputs per call; x is float32 ``(batch, *input_shape)``.
      n, alpha: samples, and the probability of a wrong class, per input.
      platforms: such as ``("cpu", "cuda")``; by default the platform of this process.

    The second argument is ``jax.random.key_data`` of a key of two uint32. The caller draws a new one for every call:
    noise that an attacker knows beforehand protects nobody.

    **Guarantee**: that of `SmoothedClassifier.predict`; for the same key the classes are the same where the head's
    arithmetic is. Inputs that are not finite, or beyond the range of the grid, get −1.
    """
    if not is_whole(batch) or not 1 <= batch <= 2**20:
        raise UserError(f"batch must be a whole number from 1 on, got {batch!r}")
    check_alpha(alpha)
    make_schedule("fixed", 1, n, classifier.settings["tile"][1])
    encoder = classifier.encoder(input_shape)
    latent_shape = tuple(encoder.report.output_shape)
    sampler = classifier.sampler(latent_shape)
    own = export.default_export_platform()
    if sampler.first_layer and set(platforms or ()) - {own}:
        only = f"its integer first layer was checked on {own} only"
        raise UserError(f"the program is not for other platforms: {only}; give integer_first_layer=False")
    needed = _needed(n, sampler.num_classes, alpha, sampler.tau)
    counts_of = _counter(classifier, sampler, batch, n)
    spacing = sampler.arithmetic.identity.get("spacing")
    limit = MAX_LATENT * spacing if spacing else 2.0**120

    def predict(x: Float[Array, "batch *input"], key_data: UInt32[Array, "2"]) -> Int[Array, " batch"]:
        latents = encoder.apply(encoder.params, x.astype(jnp.float64))
        inside = (jnp.abs(latents) <= limit).reshape(batch, -1).all(axis=1)
        safe = jnp.where(inside.reshape(-1, *[1] * len(latent_shape)), latents, 0)
        on_grid = jnp.rint(safe / spacing).astype(jnp.int32) if spacing else safe.astype(jnp.float32)
        with jax.enable_x64(False):  # the head runs as it does in the sampling loop
            counts = counts_of(key_data, on_grid)
        rows, leader = jnp.arange(batch), jnp.argmax(counts, axis=1)
        first = counts[rows, leader]
        second = counts.at[rows, leader].set(-1).max(axis=1)
        certain = (first >= jnp.asarray(needed)[first + second]) & inside & (counts.sum(axis=1) == n)
        return jnp.where(certain, leader, -1).astype(jnp.int32)

    arguments = jax.ShapeDtypeStruct((batch, *input_shape), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.uint32)
    with pinned_flags(), jax.enable_x64(True):
        try:
            return export.export(jax.jit(predict), platforms=platforms)(*arguments)
        except Exception as error:  # whatever the caller's functions, or the exporter, raise
            raise UserError(f"this classifier cannot be exported ({reason(error)})") from error


def _counter(
    classifier: "SmoothedClassifier", sampler: Sampler, batch: int, n: int
) -> Callable[[Array, Array], Int[Array, "batch classes"]]:
    """A function of key data and quantized latents: the counts of predictions; rows with NaN count nowhere."""
    samples, classes, head = sampler.tile[1], sampler.num_classes, sampler.behind(classifier.head)
    offset, blocks = NOISE_OFFSETS[classifier.settings["noise"]], sampler.blocks

    def block(key: Array, prepared: Any, number: Array) -> Int[Array, "batch classes"]:
        tables = jnp.asarray(blocks.tables[0]), blocks.tables[1]
        noise = blocks.noise(key, jnp.arange(batch), number, tables)
        logits = head(blocks.rows(prepared, noise, tables))
        chosen = jnp.where(jnp.isnan(logits).any(axis=-1), classes, jnp.argmax(logits, axis=-1))
        valid = number * samples + jnp.arange(samples, dtype=jnp.int32) < n
        hits = chosen.reshape(batch, samples, 1) == jnp.arange(classes, dtype=chosen.dtype)
        return jnp.sum(hits & valid[:, None], axis=1, dtype=jnp.int32)

    def all_blocks(key_data: Array, latents: Array) -> Int[Array, "batch classes"]:
        key = jax.random.wrap_key_data(key_data, impl=PRNG)
        key = jax.random.fold_in(jax.random.fold_in(key, KEY_DOMAINS["certify"]), STREAMS["prediction"] + offset)

        prepared = blocks.prepared(latents, blocks.tables)

        def step(number: Array, total: Array) -> Array:
            return total + block(key, prepared, number)

        return jax.lax.fori_loop(0, block_count(n, samples), step, jnp.zeros((batch, classes), jnp.int32))

    return all_blocks


def _needed(n: int, classes: int, alpha: float, tau: float) -> Int[np.ndarray, " n+1"]:
    """For every number of samples of the two leading classes: how many the first needs, or n + 1 if no number does."""
    both = np.arange(n + 1)
    low, high = (both - 1) // 2, both + 1  # the answer lies in (low, high]
    while (wide := high - low > 1).any():
        middle = (low + high) // 2
        ahead = is_ahead(np.maximum(middle, 1), both, np.full(n + 1, n), classes, alpha, tau)
        high, low = np.where(wide & ahead, middle, high), np.where(wide & ~ahead, middle, low)
    return np.where(high > both, n + 1, high).astype(np.int32)
