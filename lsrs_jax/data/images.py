"""What a data set is, and data sets whose images are in memory."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float, Float32, Int32, UInt8
from numpy.typing import ArrayLike, DTypeLike

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.validate import array

Index = np.ndarray | list[int]  # of images of a split


class Dataset(Protocol):
    """One split of labelled images. Any object with these members can be trained on and certified.

    Name, version, split, class names and digest are part of a certificate's identity.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class, in the order of the labels."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """``(H, W, C)`` of every image."""
        ...

    @property
    def labels(self) -> Int32[np.ndarray, " N"]:
        """The labels of all images, from 0 to the number of classes - 1."""
        ...

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """A text that differs for any two splits that differ in an image or a label."""
        ...

    def read(self, index: Index, dtype: DTypeLike) -> tuple[Float[np.ndarray, "B H W C"], Int32[np.ndarray, " B"]]:
        """``(pixels, labels)`` of the images `index`, with pixels in [0, 1], the unit of every radius."""
        ...


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A `Dataset` in memory, in the order of its source."""

    name: str
    version: str
    split: str
    images: UInt8[np.ndarray, "N H W C"] | Float32[np.ndarray, "N H W C"]
    labels: Int32[np.ndarray, " N"]
    class_names: tuple[str, ...]
    max_value: int = 255  # the pixel value that stands for 1.0; it is 16 for the digits and 1 for floats

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(H, W, C)``."""
        return self.images.shape[1:]

    def digest(self) -> str:
        """SHA-256 of images and labels. It identifies the data, whatever name and version say."""
        total = hashlib.sha256(str((self.images.shape, self.max_value, len(self.class_names))).encode())
        total.update(np.ascontiguousarray(self.images).tobytes())
        total.update(np.ascontiguousarray(self.labels, np.int32).tobytes())
        return total.hexdigest()

    def read(self, index: Index, dtype: DTypeLike) -> tuple[Float[np.ndarray, "B H W C"], Int32[np.ndarray, " B"]]:
        """``(pixels, labels)`` of the images `index`, with pixels in [0, 1], the unit of every radius."""
        return np.asarray(self.images[index], dtype) / np.asarray(self.max_value, dtype), self.labels[index]


def numbered(classes: int) -> tuple[str, ...]:
    """The names of classes that have none: "0", "1", and so on."""
    return tuple(map(str, range(classes)))


def other_class(old: list[str], new: list[str]) -> str | None:
    """Says in one clause which class is the first to have another name; None if all names agree."""
    if old == new:
        return None
    if len(old) != len(new):
        return f"there were {len(old)} classes, and there are {len(new)}"
    label = next(label for label, name in enumerate(old) if new[label] != name)
    return f"class {label} was {old[label]!r}, and it is {new[label]!r}"


def check_label(label: int, classes: int, index: int, where: str) -> int:
    """Returns a label; raises UserError, which names the image and what the label means, if it is no class."""
    if 0 <= label < classes:
        return label
    hidden = " (-1 marks images whose label is not published; choose another split)" if label == -1 else ""
    raise UserError(f"image {index} of {where} has the label {label}, but labels go from 0 to {classes - 1}{hidden}")


def check_labels(labels: ArrayLike, classes: int, where: str) -> Int32[np.ndarray, " N"]:
    """The labels of a split as int32; raises UserError for the first one that is no class."""
    found = np.asarray(labels)
    wrong = np.flatnonzero((found < 0) | (found >= classes))
    if len(wrong):
        check_label(int(found[wrong[0]]), classes, int(wrong[0]), where)
    return found.astype(np.int32)


def from_arrays(
    images: ArrayLike,
    labels: ArrayLike,
    class_names: Sequence[str],
    *,
    name: str = "arrays",
    split: str = "train",
    layout: str = "NHWC",
) -> Arrays:
    """A `Dataset` from a caller's arrays.

    Args:
      images: uint8, or floating point in [0, 1], which is kept as float32; ``(N, H, W, C)`` or ``(N, C, H, W)``, as
        `layout` says, or ``(N, H, W)`` for grey images.
      labels: ``(N,)`` or ``(N, 1)``, whole numbers from 0 to the number of classes - 1.
      class_names: one per class.

    Raises UserError for anything else.
    """
    where = f"the split {split!r} of {name}"
    pixels, found = array(f"the images of {where}", images), array(f"the labels of {where}", labels)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    elif pixels.ndim == 4 and layout == "NCHW":
        pixels = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    if pixels.ndim != 4 or not pixels.size:
        raise UserError(f"the images of {where} must have the shape (N, H, W, C) or (N, H, W), got {np.shape(images)}")
    axis, other = (1, "NCHW") if layout == "NHWC" else (2, "NHWC")
    if pixels.shape[3] not in (1, 3) and pixels.shape[axis] in (1, 3):
        remedy = f"--config.data.layout={other} reads them the other way"
        raise UserError(f"the images of {where} have {pixels.shape[3]} channels of {pixels.shape[1:3]}: {remedy}")
    if np.issubdtype(pixels.dtype, np.floating):
        pixels, max_value = pixels.astype(np.float32), 1
        low, high = float(pixels.min()), float(pixels.max())
        if not 0 <= low <= high <= 1:
            raise UserError(
                f"the pixels of {where} lie between {low:g} and {high:g}: scale them to [0, 1], or to uint8"
            )
    elif pixels.dtype == np.uint8:
        max_value = 255
    else:
        raise UserError(f"the images of {where} are {pixels.dtype}: give uint8, or floating point in [0, 1]")
    if found.shape not in ((len(pixels),), (len(pixels), 1)):
        raise UserError(
            f"{where} has {len(pixels)} images, and labels of shape {found.shape}: give one label per image"
        )
    found = found.reshape(-1)
    if found.dtype.kind not in "iuf" or not np.isfinite(found).all() or (found != np.floor(found)).any():
        raise UserError(f"the labels of {where} must be whole numbers, got {found.dtype}")
    return Arrays(name, "", split, pixels, check_labels(found, len(class_names), where), tuple(class_names), max_value)
