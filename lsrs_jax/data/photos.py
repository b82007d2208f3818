"""Sets of photos of any size. They stay encoded, and are decoded and cropped to one size when they are read."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import math
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL
from jaxtyping import Float, Int32, UInt8
from numpy.typing import DTypeLike
from PIL import Image, features

from lsrs_jax.runtime.errors import UserError

MARGIN = 8 / 7  # shorter side of a photo over the side of the square that is evaluated: 256 over 224 pixels
ASPECT = (3 / 4, 4 / 3)  # width over height of random crops
_PROBES = 8  # a split's digest contains the decoded pixels of this many photos
_TRIES = 10  # to place a random crop

Index = np.ndarray | list[int]  # of images of a split
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclasses.dataclass(frozen=True)
class Photos:
    """One split, in the order of its source, with the interface of a `Dataset`.

    An image is the central square of its photo, with 7/8 of the shorter side (ResNet's evaluation: the middle 224 of
    256 pixels), resampled to `size` with an antialiased triangle filter. Name, version and split are part of a
    certificate's identity.
    """

    name: str
    version: str
    split: str
    source: Any  # picklable sequence of {"image": bytes of a JPEG or PNG, "label": int}, with __getitems__
    size: int  # H and W of an image
    channels: int  # 3, or 1 for greyscale
    num_classes: int

    def __len__(self) -> int:
        return len(self.source)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(H, W, C)``."""
        return (self.size, self.size, self.channels)

    @functools.cached_property
    def _read_through(self) -> tuple[str, np.ndarray]:
        """``(SHA-256 of photos and labels as stored, labels)``."""
        total, labels = hashlib.sha256(), []
        for start in range(0, len(self), 256):
            for example in self.source.__getitems__(list(range(start, min(start + 256, len(self))))):
                labels.append(example["label"])
                total.update(len(example["image"]).to_bytes(8, "little") + example["image"])
        total.update(np.asarray(labels, np.int32).tobytes())
        return total.hexdigest(), np.asarray(labels, np.int32)

    @property
    def labels(self) -> Int32[np.ndarray, " N"]:
        """All labels. The first access reads the whole split."""
        return self._read_through[1]

    def digest(self) -> str:
        """SHA-256 of photos and labels as stored, the images' shape, and the decoder.

        **Guarantee**: two splits with one digest hold the same images, if one version of Pillow and of its JPEG decoder
        gives the same pixels wherever it gives them for the first eight photos. Another version is another split.
        """
        decoder = (PIL.__version__, features.version("jpg"), features.version("libjpeg_turbo"))
        total = hashlib.sha256(str((self._read_through[0], self.shape, self.num_classes, decoder)).encode())
        total.update(self.pixels(np.arange(min(_PROBES, len(self))), np.float32).tobytes())
        return total.hexdigest()

    def read(self, index: Index, dtype: DTypeLike) -> tuple[Float[np.ndarray, "B H W C"], Int32[np.ndarray, " B"]]:
        """``(pixels, labels)`` of the images `index`; the rest of the split is not read."""
        silence_pillow()
        # Threads are enough: decoding and resampling release the interpreter lock.
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            cuts = list(pool.map(lambda i: self._cut(int(i), central_square), index))
        images, labels = (np.stack(column) for column in zip(*cuts, strict=True))
        return np.asarray(images, dtype) / np.asarray(255, dtype), labels.astype(np.int32)

    def pixels(self, index: Index, dtype: DTypeLike) -> Float[np.ndarray, "B H W C"]:
        """The images `index` scaled to [0, 1], the unit of every radius."""
        return self.read(index, dtype)[0]

    def random_view(
        self, index: int, rng: np.random.Generator, area: tuple[float, float], flip: bool
    ) -> tuple[UInt8[np.ndarray, "H W C"], int]:
        """A `random_box` of a photo ("Inception" augmentation) and its label; `flip` mirrors with probability 1/2."""
        image, label = self._cut(index, lambda width, height: random_box(width, height, rng, area))
        return image[:, ::-1] if flip and rng.random() < 0.5 else image, label

    def _cut(self, index: int, box_of: Callable[[int, int], Box]) -> tuple[np.ndarray, int]:
        example = self.source.__getitems__([index])[0]
        try:
            with Image.open(io.BytesIO(example["image"])) as opened:
                photo = opened.convert("RGB" if self.channels == 3 else "L")
        except Exception as error:  # decoders raise many types
            reason = re.sub(r"\s+<[^>]*>", "", str(error))  # without the addresses of objects
            image = f"image {index} of {self.name} {self.split}"
            raise UserError(f"{image} cannot be decoded ({reason}): prepare the set again") from error
        cut = photo.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box_of(*photo.size))
        return np.asarray(cut).reshape(self.shape), int(example["label"])


def central_square(width: int, height: int) -> Box:
    """The square that is evaluated."""
    side = min(width, height) / MARGIN
    return _central(width, height, side, side)


def random_box(width: int, height: int, rng: np.random.Generator, area: tuple[float, float]) -> Box:
    """A box whose share of the area is uniform in `area`, its aspect ratio log-uniform (Szegedy et al. 2015).

    A box that does not fit is drawn again. After ten tries, the result is the largest central box of an allowed ratio.
    """
    for _ in range(_TRIES):
        share = rng.uniform(*area) * width * height
        ratio = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        across, down = round(math.sqrt(share * ratio)), round(math.sqrt(share / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = int(rng.integers(width - across + 1)), int(rng.integers(height - down + 1))
            return (left, top, left + across, top + down)
    return _central(width, height, min(width, height * ASPECT[1]), min(height, width / ASPECT[0]))


def _central(width: int, height: int, across: float, down: float) -> Box:
    left, top = (width - across) / 2, (height - down) / 2
    return (left, top, left + across, top + down)


def silence_pillow() -> None:
    """Hides Pillow's warnings from now on. They are about metadata on which no pixel depends.

    They arise in threads, where `warnings.catch_warnings` is not safe.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
