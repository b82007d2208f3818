"""From pixels to latents in memory: the encoder in float64, its rounding, and the sampler of a target."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from lsrs_jax.certification import OTHER_NAME
from lsrs_jax.certification.platform_check import check_encoder, check_noise
from lsrs_jax.certification.target import Target
from lsrs_jax.data import Dataset
from lsrs_jax.layers.lipschitz import Float64Encoder, LipschitzReport
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.progress import Progress, print_now
from lsrs_jax.smoothing.engine import Images

_LATENT_BYTES = 2**30  # memory for latents
_SAME = 1e-12  # relative: how far the slack of an image may differ between two machines
_LARGEST_RADIUS = 10.0  # in units of σ: no number of samples certifies more


def encode_batches(
    dataset: Dataset,
    indices: list[int] | np.ndarray,
    encode: Float64Encoder,
    batch: int,
    say: Callable[[str], object] = print_now,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encodes images batch after batch, with progress; yields latents in float64 and the ℓ2 norms of their images."""
    progress = Progress(len(indices), 0, say)
    for start in range(0, len(indices), batch):
        images = dataset.read(indices[start : start + batch], np.float64)[0]
        latents, done = encode(images), start + len(images)
        if start == 0:  # the first batch compiles
            progress = Progress(len(indices), done, say)
        progress.show(done, lambda done=done: f"encoding: {done:>6,} of {len(indices):,} images")
        yield latents, np.linalg.norm(images.reshape(len(images), -1), axis=1)


def encoder_slack(report: LipschitzReport, norms: np.ndarray, sigma: float) -> np.ndarray:
    """ℓ2 error of float64 latents: at images of these norms, and at any other image that a certificate can reach."""
    return 2 * report.rounding(norms + _LARGEST_RADIUS * sigma / report.constant)


class Pipeline:
    """Encoder and sampler of a target, tested on this platform; `say` receives lines of progress.

    `flags` are values of `settings.FLAGS`.

    Raises UserError if head and data differ in the number of classes, or if errors exceed the error budget.
    """

    def __init__(self, target: Target, flags: Mapping[str, bool], say: Callable[[str], object] = print_now) -> None:
        encoder, self._say = target.encoder(), say
        self.target, self.report, self._batch = target, encoder.report, target.config.certify.tile[0]
        self.sampler, self.flags = target.sampler(**flags), flags
        if self.sampler.num_classes != (classes := len(target.dataset.class_names)):
            raise UserError(f"the head has {self.sampler.num_classes} classes, the data {classes}")
        self._encode = Float64Encoder(encoder, self._batch)
        check_noise(self.sampler.arithmetic)
        check_encoder(encoder, self._encode)

    def encoded(self, indices: list[int], known_slack: Mapping[int, float]) -> Iterator[Images]:
        """Encodes images, as many at a time as fit into 1 GiB.

        `known_slack` maps idx to the slack in the ledger, for images that have rows there. Raises UserError for an
        image whose slack there is smaller than its latent needs.
        """
        dataset, arithmetic = self.target.dataset, self.sampler.arithmetic
        sigma = self.target.config.sigma
        size = max(self._batch, _LATENT_BYTES // (4 * int(np.prod(self.sampler.latent_shape))))
        for first in range(0, len(indices), size):
            chosen, latents, slack = indices[first : first + size], [], []
            for encoded, norms in encode_batches(dataset, chosen, self._encode, self._batch, self._say):
                latents.append(self.sampler.quantize(encoded))
                slack += (arithmetic.slack(encoded) + encoder_slack(self.report, norms, sigma)).tolist()
            slack = (self.target.slack(chosen) + slack).tolist()
            for position, (idx, own) in enumerate(zip(chosen, slack, strict=True)):
                # The first row of an image fixes its slack: another machine's encoder may differ in the last digit.
                known = slack[position] = known_slack.get(idx, own)
                if known < own * (1 - _SAME):
                    wrong = f"image {idx} has the slack {known} in the ledger, less than the {own} of its latent"
                    raise UserError(f"{self.target.folder}: {wrong}: its radius is too large; {OTHER_NAME}")
            yield Images(chosen, dataset.labels[chosen].tolist(), slack, np.concatenate(latents))
