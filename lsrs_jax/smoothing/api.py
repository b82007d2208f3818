"""Certification and prediction of any JAX function: `Smoother`, or `certify` and `predict` in one call."""

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.rng import check_key
from lsrs_jax.runtime.validate import array, numbers
from lsrs_jax.smoothing import confidence
from lsrs_jax.smoothing.composition import Answers, Composed
from lsrs_jax.smoothing.counts import Counts
from lsrs_jax.smoothing.derivation import Certificates, Derivation, check_lipschitz
from lsrs_jax.smoothing.engine import Engine, Images
from lsrs_jax.smoothing.head_check import Head
from lsrs_jax.smoothing.sampler import Sampler
from lsrs_jax.smoothing.schedule import make_schedule
from lsrs_jax.smoothing.settings import FLAGS, check_settings
from lsrs_jax.smoothing.status import Status

# The last classifier of `certify` or `predict`; one only, because its programs and its head take memory.
_LATEST: "list[Smoother]" = []
_LOCK = threading.Lock()


class Smoother:
    """The classifier argmax_c P[head(z + δ) = c], δ ~ N(0, σ²I), compiled once per shape of its inputs.

    Args:
      head: any function latents ``(B, …)`` float32 → logits ``(B, K)`` with independent, deterministic rows: Flax,
        Equinox, NNX or plain JAX. With images as latents this is input-space smoothing. Make a new object when the
        parameters change.
      sigma: standard deviation of the noise, in units of the latents.
      lipschitz: Lipschitz constant of the encoder that made the latents; radii are divided by it.
      arithmetic: ``"sound"`` (exact grid arithmetic, `arithmetic.GridArithmetic`) or ``"float32"`` (the classic).
      noise: ``"shared"`` by all latents, or ``"independent"``, which costs more random numbers.
      tile: ``(images, samples)`` evaluated at once. The counts depend on ``samples``, which numbers the noise, but not
        on the number of devices.
      spmd: ``"shard_map"`` or ``"pmap"``.
      devices: the local devices to use; all of them by default.
      integer_first_layer: for a head given as ``(FirstLayer, rest)``, run the first layer as a
        `first_layer.IntegerLayer`, exactly and almost without cost per sample. It is off with other arithmetic than
        ``"sound"``, with independent noise, and on devices that are not exact; `Sampler.first_layer` says what runs.
      channels_last: on a CPU, convolutions of images in another order than NHWC and HWIO, such as Equinox's, are
        computed in that order, which is many times faster. Logits are the same up to rounding; other heads and devices
        are not affected. `Sampler.program` says whether it happened.
    """

    def __init__(
        self,
        head: Head,
        *,
        sigma: float,
        lipschitz: float = 1.0,
        arithmetic: str = "sound",
        noise: str = "shared",
        tile: Sequence[int] = (32, 8),
        spmd: str = "shard_map",
        devices: Sequence[Any] | None = None,
        channels_last: bool = True,
        integer_first_layer: bool = True,
    ) -> None:
        self._flags = dict(zip(FLAGS, (channels_last, integer_first_layer), strict=True))
        check_settings(sigma, arithmetic, noise, tile, spmd, **self._flags)
        check_lipschitz(lipschitz)
        self.sigma, self.lipschitz, self._head, self._lock = sigma, lipschitz, head, threading.Lock()
        self._settings: dict[str, Any] = {"arithmetic": arithmetic, "noise": noise, "tile": tuple(tile), "spmd": spmd}
        self._settings |= {"sigma": sigma, "devices": devices}
        self._samplers: dict[tuple[Any, ...], Sampler] = {}

    def take_over(self, other: "Smoother") -> None:
        """Takes over the compiled programs of a classifier of the same head and settings."""
        if self._head is other._head and (self._settings, self._flags) == (other._settings, other._flags):
            current = {shape: sampler for shape, sampler in other._samplers.items() if sampler.is_current(self._head)}
            self._samplers = current

    def sampler(self, latent_shape: Sequence[int], **flags: bool) -> Sampler:
        """The compiled `Sampler` for latents of this shape, without the batch axis.

        `flags` are those of `settings.FLAGS` that are to differ from this object's.
        """
        chosen = self._flags | flags
        made = tuple(latent_shape), *chosen.values()
        with self._lock:
            if made not in self._samplers:
                self._samplers[made] = Sampler(self._head, made[0], **{**self._settings, **chosen})
            return self._samplers[made]

    def sampler_said(self, latent_shape: Sequence[int], say: Callable[[str], object]) -> Sampler:
        """`sampler`, and a line to `say` if it must be compiled first."""
        if (tuple(latent_shape), *self._flags.values()) not in self._samplers:
            say("compiling the head ...")
        return self.sampler(latent_shape)

    def certify(
        self,
        x: Any,
        *,
        key: jax.Array,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        bound: str = "binary",
        schedule: str = "fixed",
        radii: Any = None,
        epsilon: float = 0.05,
        slack: Any = 0.0,
        counts: Counts | None = None,
        progress: Callable[[str], object] | None = None,
        fallback: Answers | None = None,
        first: int = 0,
    ) -> Certificates:
        """Certifies latents ``(N, …)``, floating point, with the indices `first`, `first` + 1, …

        The arguments are those of `lsrs_jax.SmoothedClassifier.certify`. The key is needed, and `progress` is a
        function of a line of text, called every few seconds. With the answers of a `fallback` at the latents, by their
        positions, the certificates are those of `composition.Composed`.

        Returns `Certificates` with all counts in ``samples``. Raises UserError (a ValueError) for every bad input.

        **Guarantee**: that of `derivation.from_counts`; the grid and the total variation of the drawn noise are
        subtracted (`arithmetic.GridArithmetic`). With shared noise each certificate holds with probability 1 − alpha,
        but failures of different latents are correlated. Counts of another head are refused, if its logits differ at
        some random latents.
        """
        latents = check_latents(x)
        slack = check_slack(slack, len(latents))
        radii = None if radii is None else tuple(np.ravel(numbers("radii", radii)).tolist())
        if progress is not None and not callable(progress):
            raise UserError(f"progress must be a function of a line of text, got {progress!r}")
        settings: dict[str, Any] = {"lipschitz": self.lipschitz, "radii": radii, "epsilon": epsilon}
        derivation = Derivation(self.sigma, alpha, bound, **settings)
        if fallback is not None:
            derivation = Composed(self.sigma, alpha, bound, **settings, answers=fallback)
        looks = make_schedule(schedule, n0, n, self._settings["tile"][1])
        check_key(key)
        say = progress or (lambda line: None)
        sampler = self.sampler_said(latents.shape[1:], say)
        quantized, indices = sampler.quantize(latents), range(first, first + len(latents))
        slacks = (sampler.arithmetic.slack(latents) + slack).tolist()
        facts = (sampler.head_digest, sampler.arithmetic.identity, self._settings["noise"], float(self.sigma))
        facts += () if sampler.program == "plain" else (sampler.program,)
        drawn_from = repr(((*facts, quantized.shape, slacks), jax.random.key_data(key).tolist())).encode()
        origin = hashlib.sha256(drawn_from + quantized.tobytes()).hexdigest()
        samples = Counts(looks, sampler.num_classes, origin)
        if counts is not None:
            if not isinstance(counts, Counts):
                raise UserError(f"counts are `samples` of earlier certificates, got {type(counts).__name__}")
            if (counts.schedule, counts.num_classes, counts.origin) != (looks, sampler.num_classes, origin):
                raise UserError("counts are of another head, latents, slack, key, noise or schedule; leave them out")
            samples.images |= counts.images
        derivation = dataclasses.replace(derivation, sigma=sampler.arithmetic.sigma, tau=sampler.tau)
        status = Status(looks, len(latents), say, derivation.decided)
        engine = Engine(sampler, key, samples, lambda images: derivation.decided(looks, images), status)
        engine.run(Images(indices, [0] * len(latents), slacks, quantized))
        status.show()
        found = derivation.certificates(looks, [samples.images[i] for i in indices])
        return dataclasses.replace(found, samples=samples)

    def predict(self, x: Any, *, key: jax.Array, n: int = 1000, alpha: float = 0.001) -> Int[np.ndarray, " images"]:
        """The class of the smoothed classifier at latents ``(N, …)``, or −1 (Cohen et al. 2019, PREDICT).

        Args:
          key: as in `certify`, which never draws the noise of a prediction.
          n: samples per latent.
          alpha: probability of a wrong class, per latent.

        Returns the class with the most samples, or −1 where the two-sided binomial test does not tell it from the
        second. Raises UserError (a ValueError) for every bad input.

        **Guarantee**: for each latent the class returned is that of the smoothed classifier with probability at least
        1 − alpha. (The test of the two leading classes is valid at this level although the samples chose them; Hung and
        Fithian 2019.)
        """
        latents = check_latents(x)
        counts = self.prediction_counts(latents, key, n, alpha)
        return confidence.leaders(counts, float(alpha), self.sampler(latents.shape[1:]).tau)

    def prediction_counts(
        self, latents: Float[np.ndarray, "images *latent"], key: jax.Array, n: int, alpha: float
    ) -> Int[np.ndarray, "images classes"]:
        """Counts of n samples for predictions at level alpha, for float64 latents."""
        confidence.check_alpha(alpha)
        make_schedule("fixed", 1, n, self._settings["tile"][1])
        return self.sampler(latents.shape[1:]).prediction_counts(latents, check_key(key), n)


def certify(
    head: Head,
    latents: Any,
    *,
    sigma: float,
    key: jax.Array,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    bound: str = "binary",
    schedule: str = "fixed",
    radii: Any = None,
    epsilon: float = 0.05,
    lipschitz: float = 1.0,
    slack: Any = 0.0,
    arithmetic: str = "sound",
    noise: str = "shared",
    tile: Sequence[int] = (32, 8),
    spmd: str = "shard_map",
    channels_last: bool = True,
    integer_first_layer: bool = True,
    progress: Callable[[str], object] | None = None,
) -> Certificates:
    """Certificates of latents; takes the arguments of `lsrs_jax.SmoothedClassifier` and of its `certify`.

    A call with the same head object, settings and shape of latents as the call before compiles nothing. The head is
    traced anew, and compiled if it has become another function.
    """
    settings = {"lipschitz": lipschitz, "arithmetic": arithmetic, "noise": noise, "tile": tile, "spmd": spmd}
    settings |= {"channels_last": channels_last, "integer_first_layer": integer_first_layer}
    sampling = {"n0": n0, "n": n, "alpha": alpha, "bound": bound, "schedule": schedule, "radii": radii}
    sampling |= {"epsilon": epsilon, "slack": slack, "progress": progress}
    return _classifier(head, sigma=sigma, **settings).certify(latents, key=key, **sampling)


def predict(
    head: Head,
    latents: Any,
    *,
    sigma: float,
    key: jax.Array,
    n: int = 1000,
    alpha: float = 0.001,
    arithmetic: str = "sound",
    noise: str = "shared",
    tile: Sequence[int] = (32, 8),
    spmd: str = "shard_map",
    channels_last: bool = True,
    integer_first_layer: bool = True,
) -> Int[np.ndarray, " images"]:
    """Predictions for latents, as `lsrs_jax.SmoothedClassifier.predict`; compiles as `certify` does."""
    settings = {"arithmetic": arithmetic, "noise": noise, "tile": tile, "spmd": spmd}
    settings |= {"channels_last": channels_last, "integer_first_layer": integer_first_layer}
    return _classifier(head, sigma=sigma, **settings).predict(latents, key=key, n=n, alpha=alpha)


def _classifier(head: Head, **settings: Any) -> Smoother:
    """A classifier with the compiled programs of the one before, if head and settings are still the same."""
    made = Smoother(head, **settings)
    with _LOCK:
        for before in _LATEST:
            made.take_over(before)
        _LATEST[:] = [made]
    return made


def check_slack(slack: Any, latents: int) -> Float[np.ndarray, "..."]:
    """A caller's slack; raises UserError unless it is one finite number >= 0, or one per latent."""
    slack = numbers("slack", slack)
    if not (np.isfinite(slack).all() and (slack >= 0).all() and slack.shape in ((), (latents,))):
        raise UserError("slack must be one number >= 0, or one per latent")
    return slack


def check_latents(latents: Any, name: str = "latents") -> Float[np.ndarray, "images *latent"]:
    """A caller's latents as float64; raises UserError for anything that is no batch of floating-point arrays."""
    latents = array(name, latents)
    if latents.ndim < 2 or not latents.size:
        raise UserError(f"{name} must have shape (N, ...) with N >= 1, got {latents.shape}")
    if not jnp.issubdtype(latents.dtype, jnp.floating):
        remedy = "; divide pixels by 255" if latents.dtype == np.uint8 else ""
        raise UserError(f"{name} must be floating point, got {latents.dtype}{remedy}")
    with np.errstate(over="ignore"):  # `Sampler.quantize` refuses infinities
        return latents.astype(np.float64)
