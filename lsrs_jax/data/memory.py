"""Sets of images of one size, in memory."""

import dataclasses
import hashlib

import numpy as np
from jaxtyping import Float, Int32, UInt8
from numpy.typing import DTypeLike

Index = np.ndarray | list[int]  # of images of a split


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split, in the order of its source. Name, version and split are part of a certificate's identity."""

    name: str
    version: str
    split: str
    images: UInt8[np.ndarray, "N H W C"]
    labels: Int32[np.ndarray, " N"]  # in [0, num_classes)
    num_classes: int
    max_value: int = 255  # pixel value that stands for 1.0; the digits use 16

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(H, W, C)``."""
        return self.images.shape[1:]

    def digest(self) -> str:
        """SHA-256 over images and labels: identifies the data whatever its name and version are."""
        total = hashlib.sha256(str((self.images.shape, self.max_value, self.num_classes)).encode())
        total.update(np.ascontiguousarray(self.images).tobytes())
        total.update(np.ascontiguousarray(self.labels, np.int32).tobytes())
        return total.hexdigest()

    def read(self, index: Index, dtype: DTypeLike) -> tuple[Float[np.ndarray, "B H W C"], Int32[np.ndarray, " B"]]:
        """``(pixels, labels)`` of the images `index`."""
        return self.pixels(index, dtype), self.labels[index]

    def pixels(self, index: Index, dtype: DTypeLike) -> Float[np.ndarray, "B H W C"]:
        """The images `index` scaled to [0, 1], the unit of every radius."""
        return self.scaled(self.images[index], dtype)

    def scaled(self, images: UInt8[np.ndarray, "B H W C"], dtype: DTypeLike) -> Float[np.ndarray, "B H W C"]:
        """Images as stored, scaled to [0, 1]."""
        return np.asarray(images, dtype) / np.asarray(self.max_value, dtype)
