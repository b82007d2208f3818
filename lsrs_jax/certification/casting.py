"""From the pixels of images to their votes: the encoder, what its rounding is charged, and the vote loop."""

import time

import numpy as np

from lsrs_jax import selfcheck
from lsrs_jax.errors import UserError
from lsrs_jax.keys import root_key
from lsrs_jax.materialize import Float64Encoder
from lsrs_jax.progress import Progress
from lsrs_jax.smoothing.sweep import Block
from lsrs_jax.smoothing.votes import Votes

_BLOCK_BYTES = 2**30  # latents of so many images are kept at a time
_CHARGE = 1e-12  # relative: what two machines may differ in the charge of an image
_LARGEST_RADIUS = 10.0  # in units of σ: no number of votes certifies more


def vote_loop(config, head, latent_shape):
    """The `Votes` of a configuration."""
    certify = config.certify
    return Votes(
        head,
        latent_shape,
        sigma=config.sigma,
        key=root_key(config.seed),
        arithmetic=certify.arithmetic,
        noise=certify.noise,
        tile=certify.tile,
        spmd=certify.spmd,
    )


class Caster:
    """Encoder and vote loop of a job, tried out on this platform.

    Args:
      job: `job.Job`.
      encoder, head: as ``job.model.for_certification`` gave them.

    Attributes:
      votes: `smoothing.votes.Votes`.
      report: `LipschitzReport` of the encoder.

    Raises:
      UserError: for a head of other classes than the data, or a platform that does not keep the charged bounds.
    """

    def __init__(self, job, encoder, head):
        self._job, self.report = job, encoder.report
        self.votes = vote_loop(job.config, head, encoder.report.output_shape)
        if self.votes.num_classes != job.dataset.num_classes:
            raise UserError(f"the head has {self.votes.num_classes} classes, the data {job.dataset.num_classes}")
        self._encode = Float64Encoder(encoder, job.config.certify.tile[0])
        selfcheck.check_noise(self.votes.arithmetic)
        selfcheck.check_encoder(encoder, self._encode)

    def blocks(self, indices, charged):
        """`Block` after `Block` of encoded images, as many at a time as memory should hold.

        Args:
          indices: of the images, in the dataset.
          charged: idx → the charge that an image's votes have already; those that are not there are charged anew.

        Raises:
          UserError: naming an image that was charged less than its latent is.
        """
        size = max(self._job.config.certify.tile[0], _BLOCK_BYTES // (4 * int(np.prod(self.votes.latent_shape))))
        for first in range(0, len(indices), size):
            yield self._block(indices[first : first + size], charged)

    def _block(self, indices, charged):
        dataset, batch, placed, slack = self._job.dataset, self._job.config.certify.tile[0], [], []
        progress, shown = Progress(len(indices)), time.monotonic()
        for start in range(0, len(indices), batch):
            images = dataset.pixels(indices[start : start + batch], np.float64)
            latents = self._encode(images)
            placed.append(self.votes.place(latents))
            # The rounding of the encoder at the image and at any other one that a certificate can reach.
            reach = np.linalg.norm(images.reshape(len(images), -1), axis=1)
            reach = reach + _LARGEST_RADIUS * self._job.config.sigma / self.report.constant
            slack += (self.votes.arithmetic.slack(latents) + 2 * self.report.rounding(reach)).tolist()
            if time.monotonic() - shown > 2:
                shown = time.monotonic()
                left = progress.left(start + len(images))
                print(f"{start + len(images):>6,} images encoded  {left} left", flush=True)
        slack = [
            self._charge(idx, charge, charged.get(idx, charge)) for idx, charge in zip(indices, slack, strict=True)
        ]
        return Block(indices, dataset.labels[indices].tolist(), slack, np.concatenate(placed))

    def _charge(self, idx, own, known):
        """An image's charge is fixed by its first row: another machine's encoder may differ in the last place."""
        if known < own * (1 - _CHARGE):
            raise UserError(
                f"{self._job.folder}: image {idx} is charged {known} in the ledger, less than the {own} of its latent: "
                "its radius is too large; certify again under another --config.certify.name"
            )
        return known
