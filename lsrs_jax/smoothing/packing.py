"""Fills the slots that a batch of few images leaves free with later sample blocks of the same images. NumPy only."""

import numpy as np
from jaxtyping import Int

_FREE = np.int32(2**30)  # a block that no stream reaches


class Packing:
    """How the slots of a batch are shared by `images` images: slot i belongs to image ``i % images``.

    In one step of the loop, all images go through the same `blocks` blocks, from the next one on; slot i has block
    ``lanes[i]`` of them. Slots that are left over have a block that is never counted.

    **Guarantee**: a packed launch of the blocks [first, stop) counts the samples that a plain one counts. Noise depends
    on the key, the image and the block number alone; a step of a device has the blocks s, s + 1, …, s + blocks − 1, and
    the next step begins after them, so that each block of [first, stop) is in one lane of one step, and blocks beyond
    `stop` count nowhere. The head receives batches of the same shape, whose rows are the same numbers in other rows.
    Assumed is that the head gives a row the same logits there, and that its two programs round alike: `Sampler`
    compares their counts in the first step of a packed launch, and not again.
    """

    def __init__(self, slots: int, images: int, blocks: int) -> None:
        self.slots, self.images, self.blocks = slots, images, max(1, min(slots // images, blocks))
        lanes = np.arange(slots, dtype=np.int32) // images
        self.lanes = np.where(lanes < self.blocks, lanes, _FREE).astype(np.int32)

    def summed(self, counts: Int[np.ndarray, "slots columns"]) -> Int[np.ndarray, "images columns"]:
        """The counts per image, of those per slot."""
        found = np.zeros((self.images, counts.shape[1]), counts.dtype)
        np.add.at(found, np.arange(self.slots) % self.images, counts)
        return found


class Waste:
    """Decides when a second program is worth its compilation: once that time has been spent on free slots.

    Whatever follows, no more than twice the time of the better choice is lost.
    """

    def __init__(self) -> None:
        self._seconds = 0.0

    def add(self, seconds: float, packing: Packing) -> None:
        """Counts a plain launch that took so long and could have been packed."""
        self._seconds += seconds * (1 - 1 / packing.blocks)

    def left(self, seconds: float) -> float:
        """How many more seconds may be wasted until a compilation that takes `seconds` pays."""
        return max(0.0, seconds - self._seconds)
