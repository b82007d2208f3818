"""`SmoothedClassifier`: any JAX function as a certified classifier, in memory or with files."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lsrs_jax.api.arguments import are_batches, check_pixels, labels_of, reporter, seed_of
from lsrs_jax.api.batches import certificates, certify
from lsrs_jax.api.encoding import Encoding
from lsrs_jax.api.fallback import classes_of, fallback_of
from lsrs_jax.api.result import Prediction, Result, prediction, result_of
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing.api import Smoother, check_latents, check_slack
from lsrs_jax.smoothing.composition import leaders_of
from lsrs_jax.smoothing.counts import Counts
from lsrs_jax.smoothing.derivation import Certificates
from lsrs_jax.smoothing.first_layer import as_head
from lsrs_jax.smoothing.head_check import Head
from lsrs_jax.smoothing.head_identity import ProgramIdentity, head_identity
from lsrs_jax.smoothing.sampler import Sampler

if TYPE_CHECKING:
    from lsrs_jax.auditing.table import Audit
    from lsrs_jax.data.images import Arrays
    from lsrs_jax.layers.lipschitz import Materialized


class SmoothedClassifier:
    """The classifier x ↦ argmax_c P[head(encoder(x) + δ) = c], δ ~ N(0, σ²I), with certified radii in ℓ2.

    Args:
      head: any function latents ``(B, …)`` float32 → logits ``(B, K)`` with independent, deterministic rows: Flax,
        Equinox, NNX, plain JAX, or a network from `lsrs_jax.from_torch`. Make a new object when parameters change.
        A pair ``(lsrs_jax.smoothing.FirstLayer(kernel, bias), rest)`` is the head z ↦ rest(first layer of z).
      sigma: standard deviation of the noise, in units of the latents.
      encoder: function from inputs ``(B, …)`` to latents, in front of the noise; it runs once per input, in float64.
        None: the noise is on the input (Cohen et al. 2019). With a `layers.lipschitz.Materialized`, the constant is
        proven; otherwise it is a JAX function whose constant you claim as `lipschitz`.
      lipschitz: the encoder's Lipschitz constant in ℓ2, which a function must be given with; radii are divided by it.
        Without an encoder: the constant of the encoder that made the latents that you give, 1 by default.
      class_names: one per class; by default "0", "1", …
      arithmetic: ``"sound"`` (exact grid arithmetic) or ``"float32"`` (the classic).
      noise: ``"shared"`` by all inputs, or ``"independent"``, which costs more random numbers.
      tile: ``(inputs, samples)`` evaluated at once; single inputs are padded. Programs are compiled once per shape.
      spmd, devices: ``"shard_map"`` or ``"pmap"``, over the local devices to use, by default all of them.
      channels_last: on a CPU, run NCHW convolutions of the head as NHWC ones, which is faster and rounds differently.
      integer_first_layer: run the first layer of a pair with integer weights (`first_layer.IntegerLayer`), where that
        is exact and the noise shared; it then costs almost nothing per sample.
      fallback: a deterministic classifier that answers where no class has more than half of the probability: a workdir
        with a linear head, or a function from inputs to scores as `smoothing.compose` takes them, ``(B, K)`` in units
        of the inputs. That they are so is your claim, tried at some inputs; lower them by their rounding.
    """

    def __init__(
        self,
        head: Head,
        *,
        sigma: float,
        encoder: Any = None,
        lipschitz: float | None = None,
        class_names: Sequence[str] | None = None,
        arithmetic: str = "sound",
        noise: str = "shared",
        tile: Sequence[int] = (32, 8),
        spmd: str = "shard_map",
        devices: Sequence[Any] | None = None,
        channels_last: bool = True,
        integer_first_layer: bool = True,
        fallback: Any = None,
    ) -> None:
        head = as_head(head)
        if not callable(head):
            kind = type(head).__name__
            raise UserError(
                f"head must be a function of latents, got {kind}: for scikit-learn write z @ coef_.T + intercept_"
            )
        self.encoding, self.takes_pixels = Encoding(encoder, lipschitz), False
        settings = {"arithmetic": arithmetic, "noise": noise, "tile": tile, "spmd": spmd}
        settings |= {"channels_last": channels_last, "integer_first_layer": integer_first_layer, "devices": devices}
        self.smoother = Smoother(head, sigma=sigma, lipschitz=self.encoding.lipschitz, **settings)
        self.head, self.sigma, self.lipschitz = head, sigma, self.encoding.lipschitz
        self.class_names = None if class_names is None else tuple(map(str, class_names))
        self.settings: dict[str, Any] = {name: value for name, value in settings.items() if name != "devices"}
        self.settings["tile"] = tuple(tile)
        self.fallback = fallback_of(fallback)

    @property
    def has_encoder(self) -> bool:
        """Whether there is an encoder in front of the noise."""
        return bool(self.encoding)

    def encoder(self, shape: Sequence[int], low_precision: bool = True) -> "Materialized":
        """The encoder for inputs of this shape, with its Lipschitz constant; see `Encoding.materialized`."""
        return self.encoding.materialized(shape, low_precision)

    def sampler(self, latent_shape: Sequence[int], **flags: bool) -> Sampler:
        """The compiled `Sampler` for latents of this shape, without the batch axis; see `Smoother.sampler`."""
        return self.smoother.sampler(latent_shape, **flags)

    def certify(
        self,
        x: Any,
        labels: Any = None,
        *,
        out: str | Path | None = None,
        key: jax.Array | None = None,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        bound: str = "binary",
        schedule: str = "fixed",
        radii: Any = None,
        epsilon: float = 0.05,
        slack: Any = 0.0,
        counts: Counts | None = None,
        name: str = "default",
        progress: Any = None,
    ) -> Result:
        """Certifies inputs ``(N, …)``, floating point, in the units in which radii are wanted.

        Args:
          x: the inputs. Without an encoder these are the latents, and rounding by an encoder of your own below float64
            is not covered: give it as `slack`. Or an iterator (or a data loader) of batches of inputs, or of pairs
            ``(inputs, labels)``: one batch is in memory at a time, and by default the seed follows from the parameters
            and the shape (with `out`, from a token of the folder). `out` keeps digests of the inputs, refuses another
            one when the call is repeated, and does not encode decided inputs again.
          labels: ``(N,)`` whole numbers, for accuracies; needed for `out`.
          out: a folder that gets what the command ``certify`` writes, in ``<out>/certify/<name>``. The same call
            resumes after a kill. ``python -m lsrs_jax.certify --workdir=OUT`` with ``--verify`` or ``--from-counts``
            and ``python -m lsrs_jax.report OUT`` read it.
          key: a typed threefry key, ``jax.random.key(seed, impl="threefry2x32")``. By default the seed is derived from
            the digests of parameters and inputs.
          n0, n: samples that choose the class, and fresh ones that certify it (unless fixed: the most of an input).
          alpha: failure probability per input.
          bound: ``"binary"``, or ``"multiclass"`` for larger radii where no class has half of the samples.
          schedule: ``"fixed"``; or ``"staged"`` or ``"anytime"``: samples up to growing looks, until the answer is
            decided. ``"anytime"`` needs fewer samples; its bounds hold wherever the sampling stopped.
          radii: unless fixed: the radii to decide (and always 0, any certificate). None: the radius itself.
          epsilon: unless fixed, without radii: how far the radius may stay below that of n samples, in sigma/lipschitz.
          slack: ℓ2 error of the latents, in their units, which is subtracted too: one number, or one per input.
          counts: ``samples`` of earlier certificates of the same head, latents, key and schedule, to be continued.
          name: the name of the certification in `out`.
          progress: True (a bar or lines), ``print``, another function of a line, or a bar as ``tqdm(total=len(x))``.

        Raises UserError (a ValueError) for bad input, and for a folder with another head, input, label or setting.

        **Guarantee**: that of `derivation.from_counts`: for each input, with probability 1 − alpha, the smoothed
        classifier keeps the class within the radius. The grid (`arithmetic.GridArithmetic`), the total variation of the
        drawn noise, and the slack are subtracted. Assumed is that the head is the function that was compiled, with
        independent, deterministic rows (`head_check.check_head` says what it finds), and, of an encoder that is not
        proven (`layers.claimed`) and of a fallback's scores, the constants and the rounding. With shared noise,
        failures of different inputs are correlated. Counts of another head are refused if its logits differ somewhere.
        """
        sampling = {"n0": n0, "n": n, "alpha": alpha, "bound": bound, "schedule": schedule, "epsilon": epsilon}
        sampling |= {"radii": radii}
        say = None if progress is None else reporter(progress)
        if out is not None and self.fallback:
            raise UserError("out takes no fallback: the command certify writes such certificates (certify.fallback)")
        if are_batches(x):
            if labels is not None or counts is not None:
                raise UserError("batches bring their labels, as pairs (inputs, labels), and take no counts")
            return certify(self, x, out, key, slack, sampling | {"name": name}, say)
        inputs = check_pixels(check_latents(x, "x"), self.takes_pixels)
        own, slack = labels_of(labels, len(inputs)), check_slack(slack, len(inputs))
        if out is not None:
            if own is None or counts is not None:
                raise UserError("out needs labels" if own is None else "counts are for certificates without out")
            from lsrs_jax.api.folder import certify_arrays

            fields = sampling | {"name": name, "seed": seed_of(key)}
            return certify_arrays(self, inputs, own, slack, Path(out).expanduser(), fields, say)
        found = certificates(self, inputs, own, key, slack, say, 0, sampling, counts)
        decided = () if radii is None or schedule == "fixed" else tuple(map(float, radii))
        return result_of(found, own, self.class_names, self.sigma, decided)

    def predict(
        self, x: Any, *, key: jax.Array, n: int = 1000, alpha: float = 0.001, details: bool = False
    ) -> Int[np.ndarray, " inputs"] | Prediction:
        """The class of the smoothed classifier at inputs ``(N, …)``, or −1 (Cohen et al. 2019, PREDICT).

        Args:
          key: as in `certify`, which never draws the noise of a prediction.
          n: samples per input.
          alpha: probability of a wrong class, per input.
          details: return a `Prediction`, with the counts and the reason of every abstention.

        Returns the class with the most samples, or −1 where the two-sided binomial test does not tell it from the
        second. With a fallback: `composition.composed_leaders`. Raises UserError (a ValueError) for every bad input.

        **Guarantee**: for each input the class returned is that of the smoothed classifier with probability at least
        1 − alpha. (The test of the two leading classes is valid at this level although the samples chose them; Hung and
        Fithian 2019.)
        """
        inputs = check_latents(x, "x")
        latents, _ = self.encoding.latents(inputs, np.inf, self.sigma, self.settings["tile"][0])
        counts = self.smoother.prediction_counts(latents, key, n, alpha)
        fallback = classes_of(self.fallback, inputs, counts.shape[1])
        classes = leaders_of(counts, fallback, float(alpha), self.sampler(latents.shape[1:]).tau)
        return prediction(classes, counts, self.fallback is not None) if details else classes

    def soft_logits(self, x: Any, key: jax.Array, samples: int) -> Float[Array, "inputs classes"]:
        """Log of the mean over noise of softmax(head(encoder(x) + δ)), differentiable in x (Salman et al. 2019).

        For attacks and thresholds: float32, with `samples` noise vectors for all inputs, without a fallback. No proof.
        """
        from lsrs_jax.auditing.attacks import Smoothed

        target = Smoothed(self.encoding.in_float32, self.head, self.sigma)
        return target.soft_logits(jnp.asarray(x, jnp.float32), key, samples)

    def audit(
        self,
        x: Any,
        labels: Any,
        *,
        certificates: Certificates | None = None,
        out: str | Path | None = None,
        name: str = "default",
        fractions: Sequence[float] = (0.25, 0.5, 0.75, 0.9, 1.0),
        restarts: int = 2,
        steps: int = 20,
        samples: int = 16,
        votes: int = 1000,
        alpha: float = 0.001,
        progress: Any = None,
    ) -> "Audit":
        """Attacks the smoothed classifier inside and beyond every certified radius, as the command ``audit`` does.

        Args:
          x, labels: as in `certify`.
          certificates: the result of `certify` for these inputs; without them, and without `out`, only the nearest
            flips are looked for.
          out, name: as in `certify`: attacks the certificates in that folder, at their alpha, and writes the audit
            beside them, where ``python -m lsrs_jax.report`` finds it.
          fractions, restarts, steps, samples, votes: see ``python -m lsrs_jax.audit --help``.
          alpha: probability of a wrong class of a prediction that judges an attack.
          progress: as in `certify`.

        Returns an `auditing.table.Audit`: ``flips`` counts points inside certified radii with another prediction (by
        chance a share alpha of the certificates may have some), ``distance`` is that of the nearest flip, and
        ``robust_accuracy(radius)`` bounds the robust accuracy from above.
        """
        from lsrs_jax.api import attacking
        from lsrs_jax.auditing.table import Attacked

        inputs, say = check_latents(x, "x"), reporter(progress)
        own = labels_of(labels, len(inputs))
        if own is None:
            raise UserError("audit needs labels")
        sizes = {"fractions": fractions, "restarts": restarts, "steps": steps, "samples": samples, "votes": votes}
        if out is not None:
            folder = Path(out).expanduser() / "certify" / name
            return attacking.attack_folder(self, inputs, own, folder, sizes, say)
        count = len(inputs)
        if certificates is not None and len(certificates) != count:
            raise UserError(
                f"there are {len(certificates)} certificates for {count} inputs: give those of these inputs"
            )
        predict = np.full(count, -1) if certificates is None else certificates.predict
        radius = np.zeros(count) if certificates is None else certificates.radius
        table = Attacked(np.arange(count), own, predict, radius)
        return attacking.attack(self, inputs, table, sizes, alpha, say)

    def export(
        self,
        path: str | Path,
        input_shape: Sequence[int],
        *,
        batch: int = 1,
        n: int = 1000,
        alpha: float = 0.001,
        platforms: Sequence[str] | None = None,
    ) -> Path:
        """Writes `predict` as a StableHLO program, which runs without this package; see `export.export_predict`.

        To run it::

            program = jax.export.deserialize(pathlib.Path(path).read_bytes())
            classes = program.call(x, jax.random.key_data(jax.random.key(seed, impl="threefry2x32")))
        """
        if self.fallback:
            raise UserError("export writes the votes alone: export a classifier without fallback")
        from lsrs_jax.api.export import export_predict
        from lsrs_jax.runtime.files import write_atomic

        program = export_predict(self, input_shape, batch=batch, n=n, alpha=alpha, platforms=platforms)
        write_atomic(path := Path(path).expanduser(), bytes(program.serialize()))
        return path

    def names_of_classes(self, labels: np.ndarray, shape: Sequence[int]) -> tuple[str, ...]:
        """The names of the classes; raises UserError unless they and the labels of such inputs fit the head."""
        classes = self.sampler(self._latent_shape(shape)).num_classes
        names = self.class_names or tuple(map(str, range(classes)))
        if len(names) != classes:
            raise UserError(f"the head has {classes} classes, and class_names has {len(names)}")
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        for row in wrong[:1]:
            raise UserError(f"input {row} has the label {labels[row]}, but labels go from 0 to {classes - 1}")
        return names

    def dataset(self, inputs: np.ndarray, labels: np.ndarray) -> "Arrays":
        """Inputs and labels as a data set; raises UserError unless the labels fit the head."""
        from lsrs_jax.data.images import Arrays

        names = self.names_of_classes(labels, inputs.shape[1:])
        return Arrays("arrays", "", "given", inputs, labels.astype(np.int32), names, max_value=1)

    def _latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.encoder(shape).report.output_shape) if self.has_encoder else tuple(shape)

    def identity(self, shape: Sequence[int], low_precision: bool = True) -> ProgramIdentity:
        """What identifies encoder and head, for inputs of this shape, between sessions."""
        head = head_identity(self.head, (math.prod(self.settings["tile"]), *self._latent_shape(shape)))
        encoder = self.encoding.identity(shape, low_precision)
        return head.with_encoder(encoder) if encoder else head

    def require_current(self, shape: Sequence[int]) -> None:
        """Raises UserError if the head or its parameters have changed since it was compiled for this shape."""
        if not isinstance(getattr(self.head, "digest", None), str):  # else JAX does not see the parameters
            sampler = self.sampler(self._latent_shape(shape))
            if not sampler.is_current(self.head):
                raise UserError("the head has changed since this object compiled it: make a new SmoothedClassifier")
