"""Sets of images of one size, in memory."""

import dataclasses
import hashlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split, in the order of its source.

    Attributes:
      name, version, split: what it is; part of a certificate's identity.
      images: uint8 ``(N, H, W, C)``.
      labels: int32 ``(N,)``, in ``[0, num_classes)``.
      num_classes: K.
      max_value: pixel value that stands for 1.0 (255; the digits use 16).
    """

    name: str
    version: str
    split: str
    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    max_value: int = 255

    def __len__(self):
        return len(self.labels)

    @property
    def shape(self):
        """``(H, W, C)``."""
        return self.images.shape[1:]

    def digest(self):
        """SHA-256 over images and labels: what a certificate was made from, whatever its name and version say."""
        total = hashlib.sha256(str((self.images.shape, self.max_value, self.num_classes)).encode())
        total.update(np.ascontiguousarray(self.images).tobytes())
        total.update(np.ascontiguousarray(self.labels, np.int32).tobytes())
        return total.hexdigest()

    def read(self, index, dtype):
        """``(pixels, labels)`` of `index`."""
        return self.pixels(index, dtype), self.labels[index]

    def pixels(self, index, dtype):
        """Images of `index` scaled to [0, 1], the unit of every radius."""
        return self.scaled(self.images[index], dtype)

    def scaled(self, images, dtype):
        """Images of this set, as stored, scaled to [0, 1]."""
        return np.asarray(images, dtype) / np.asarray(self.max_value, dtype)
