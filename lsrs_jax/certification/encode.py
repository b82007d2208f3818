"""From pixels to latents in memory: the encoder in float64, its rounding, and the sampler of a target."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lsrs_jax.certification.platform_check import check_encoder, check_noise
from lsrs_jax.certification.target import Target
from lsrs_jax.layers.lipschitz import Float64Encoder, Materialized
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.progress import Progress
from lsrs_jax.runtime.types import Config
from lsrs_jax.smoothing.engine import Images
from lsrs_jax.smoothing.head_check import Head
from lsrs_jax.smoothing.sampler import Sampler

_LATENT_BYTES = 2**30  # latents of so many images are kept in memory at a time
_SAME = 1e-12  # relative: how far the slack of an image may differ between two machines
_LARGEST_RADIUS = 10.0  # in units of σ: no number of samples certifies more


def make_sampler(config: Config, head: Head, latent_shape: Sequence[int]) -> Sampler:
    """The `Sampler` of a configuration."""
    settings = {name: config.certify[name] for name in ("arithmetic", "noise", "tile", "spmd")}
    return Sampler(head, latent_shape, sigma=config.sigma, **settings)


class Pipeline:
    """Encoder and sampler of a target, tried out on this platform.

    Args:
      encoder, head: from ``target.model.for_certification``.

    Attributes:
      sampler: of the head.
      report: `LipschitzReport` of the encoder.

    Raises:
      UserError: for a head of other classes than the data, or a platform whose errors exceed the error budget.
    """

    def __init__(self, target: Target, encoder: Materialized, head: Head) -> None:
        self._target, self.report = target, encoder.report
        self.sampler = make_sampler(target.config, head, encoder.report.output_shape)
        if self.sampler.num_classes != target.dataset.num_classes:
            raise UserError(f"the head has {self.sampler.num_classes} classes, the data {target.dataset.num_classes}")
        self._encode = Float64Encoder(encoder, target.config.certify.tile[0])
        check_noise(self.sampler.arithmetic)
        check_encoder(encoder, self._encode)

    def encoded(self, indices: list[int], known_slack: Mapping[int, float]) -> Iterator[Images]:
        """Encodes images, as many at a time as memory should hold.

        Args:
          known_slack: idx → the slack that the rows of an image have already.

        Raises:
          UserError: naming an image whose known slack is smaller than that of its latent.
        """
        batch = self._target.config.certify.tile[0]
        size = max(batch, _LATENT_BYTES // (4 * int(np.prod(self.sampler.latent_shape))))
        for first in range(0, len(indices), size):
            yield self._encoded(indices[first : first + size], batch, known_slack)

    def _encoded(self, indices: list[int], batch: int, known_slack: Mapping[int, float]) -> Images:
        dataset, latents, slack, progress = self._target.dataset, [], [], Progress(len(indices))
        for start in range(0, len(indices), batch):
            images = dataset.pixels(indices[start : start + batch], np.float64)
            encoded = self._encode(images)
            latents.append(self.sampler.quantize(encoded))
            # The rounding of the encoder at the image, and at any other one that a certificate can reach.
            reach = np.linalg.norm(images.reshape(len(images), -1), axis=1)
            reach = reach + _LARGEST_RADIUS * self._target.config.sigma / self.report.constant
            slack += (self.sampler.arithmetic.slack(encoded) + 2 * self.report.rounding(reach)).tolist()
            done = start + len(images)
            progress.show(done, lambda done=done: f"{done:>6,} images encoded")
        for position, idx in enumerate(indices):
            # The first row of an image fixes its slack: another machine's encoder may differ in the last digit.
            own, known = slack[position], known_slack.get(idx, slack[position])
            if known < own * (1 - _SAME):
                raise UserError(
                    f"{self._target.folder}: image {idx} is charged {known} in the ledger, less than the {own} of its "
                    "latent: its radius is too large; certify again under another --config.certify.name"
                )
            slack[position] = known
        return Images(indices, dataset.labels[indices].tolist(), slack, np.concatenate(latents))
