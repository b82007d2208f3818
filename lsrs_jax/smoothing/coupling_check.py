"""Evaluates sample blocks again, with their noisy latents in other slots and among other companions. NumPy only."""

import math
import time
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing.head_check import allowance, differing

# A check evaluates four head batches: the block in order, permuted, and crowded, and once more in the sampling loop.
_BLOCKS_PER_CHECK = 400
_SECONDS_PER_CHECK = 0.25  # for small heads, of which the host takes longer to check a block than to draw many
_OTHERS = 32  # in a crowded batch, one row in so many is not a copy


class Evaluated(NamedTuple):
    """What a check evaluated of one sample block; the arrays may still be on the device."""

    sources: list[Int[np.ndarray, " rows"]]  # the row of the block that each slot of a batch held
    logits: list[Any]  # (rows, classes) per batch; the first batch is the block in order
    counts: Any  # of the block, by the sampling loop: one array (images, classes + 1) per device


class CouplingCheck:
    """Says which launches are checked, and refuses a head whose logits depend on slots and companions.

    **Guarantee**: the first launch of a sampler is checked, and then one launch per 400 blocks and device, at most four
    per second: the four head batches of a check are at most 1 % of the samples of a long run. A head is refused if, in
    the first block of a launch that is checked,

    - a row has other logits in another slot of the same batch,
    - a row has other logits in a batch in which copies of one row fill 31 of 32 slots, or
    - the sampling loop counts other classes than the logits say, except where the two largest logits nearly tie.

    This finds rows that compete with similar rows (a mixture of experts with limited capacity), statistics over the
    batch, dependence on the slot, random numbers drawn by a callback, and a loop that was traced from another function
    than the one that `head_check` tried. It does not find a dependence that the checked blocks do not show: one on rare
    companions, one that starts later, or one that moves logits by less than rounding may.
    """

    def __init__(self, tile: tuple[int, int], num_classes: int, tolerance: float, devices: int) -> None:
        self._tile, self._num_classes, self._tolerance = tile, num_classes, tolerance
        self._rng, self._interval, self._refusal = np.random.default_rng(0), _BLOCKS_PER_CHECK * devices, ""
        self._blocks, self._checked = math.inf, -math.inf  # blocks since the last check, and its time

    def due(self, blocks: int) -> bool:
        """Whether a launch of so many blocks is to be checked; raises UserError if the head was refused before."""
        if self._refusal:
            raise UserError(self._refusal)
        now = time.monotonic()
        found = self._blocks >= self._interval and now - self._checked >= _SECONDS_PER_CHECK
        self._blocks, self._checked = (blocks, now) if found else (self._blocks + blocks, self._checked)
        return found

    def sources(self) -> list[Int[np.ndarray, " rows"]]:
        """For every batch of a check, the row of the block that each slot holds: in order, permuted, crowded."""
        rows = self._tile[0] * self._tile[1]
        crowded = np.full(rows, self._rng.integers(rows))
        others = max(1, rows // _OTHERS)
        crowded[self._rng.permutation(rows)[:others]] = self._rng.permutation(rows)[:others]
        return [order.astype(np.int32) for order in (np.arange(rows), self._rng.permutation(rows), crowded)]

    def verify(self, evaluated: Evaluated) -> None:
        """Raises UserError if the evaluations of a block show that the head's rows are not independent."""
        plain, permuted, crowded = (np.asarray(logits, np.float32) for logits in evaluated.logits)
        allowed, rows = allowance(plain, self._tolerance), len(plain)
        for source, found in zip(evaluated.sources[1:], (permuted, crowded), strict=True):
            moved = np.flatnonzero(differing(plain[source], found, allowed[source]))
            if len(moved):
                row, slot = int(source[moved[0]]), int(moved[0])
                example = f"{self._name(row)} has other logits in row {slot} of a batch than in row {row}"
                if found is crowded:
                    example += f", among copies of {self._name(int(np.bincount(source).argmax()))}"
                self._refuse(
                    f"the head's rows depend on each other: {len(moved)} of {rows} noisy latents have other logits in "
                    f"another batch ({example}); a row may depend on its own latent alone: no statistics, scales or "
                    "capacity limits over the batch, and no randomness"
                )
        if moved := self._miscounted(plain, allowed, np.asarray(evaluated.counts)):
            self._refuse(
                f"the head is not the one that was checked: the sampling loop gives {moved} of {rows} noisy latents "
                "other classes; draw masks and weights when the head is made, not while JAX traces or calls it"
            )

    def _name(self, row: int) -> str:
        image, sample = divmod(row, self._tile[1])
        return f"sample {sample} of image {image}"

    def _miscounted(self, plain: Float[np.ndarray, "rows classes"], allowed: Any, counts: Any) -> int:
        """The number of rows of which the loop counted another class, beyond those whose largest logits nearly tie."""
        nan = np.isnan(plain).any(axis=1)
        classes = np.where(nan, self._num_classes, plain.argmax(axis=1)).reshape(self._tile)
        expected = (classes[:, :, None] == np.arange(self._num_classes + 1)).sum(axis=1)
        best = np.argpartition(plain, -2, axis=1)[:, -2:]
        largest, room = np.take_along_axis(plain, best, axis=1), np.take_along_axis(allowed, best, axis=1).sum(axis=1)
        with np.errstate(invalid="ignore"):  # two infinite logits
            tied = nan | (largest[:, 0] == largest[:, 1]) | (largest[:, 1] - largest[:, 0] <= room)
        counted = counts.reshape(-1, *expected.shape).sum(axis=0)
        moved = np.abs(counted - expected).sum(axis=1) // 2
        return int(np.maximum(0, moved - tied.reshape(self._tile).sum(axis=1)).sum())

    def _refuse(self, why: str) -> None:
        self._refusal = why
        raise UserError(why)
