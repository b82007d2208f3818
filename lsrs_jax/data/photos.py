"""Sets of image files. They are decoded into memory, or stay encoded and are cut to one size when they are read."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL
from jaxtyping import Float, Int32, UInt8
from numpy.typing import DTypeLike
from PIL import Image, features

from lsrs_jax.data.decode import decode, decoded_differently_before, silence_pillow
from lsrs_jax.data.images import Arrays, Dataset, Index, check_label
from lsrs_jax.runtime.errors import UserError

MARGIN = 8 / 7  # shorter side of a photo over the side of the square that is evaluated: 256 over 224 pixels
ASPECT = (3 / 4, 4 / 3)  # width over height of random crops
_PROBES = 8  # a split's digest contains the decoded pixels of this many photos
_LABELLED = 20_000  # a split of up to so many photos is read through when it is loaded
_COMPARED = 2000  # photos of a larger split that `sample_digest` reads
_TRIES = 10  # to place a random crop

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclasses.dataclass(frozen=True)
class Photos:
    """A `Dataset` of encoded images of any size, in the order of its source.

    An image is the central square of its photo, with 7/8 of the shorter side (ResNet's evaluation: the middle 224 of
    256 pixels), resampled to `size` with an antialiased triangle filter.
    """

    name: str
    version: str
    split: str
    source: Any  # picklable sequence of {"image": bytes of a file, "label": int}, with __getitems__; see `read_source`
    size: int  # H and W of an image
    channels: int  # 3, or 1 for greyscale
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(H, W, C)``."""
        return (self.size, self.size, self.channels)

    @functools.cached_property
    def _read_through(self) -> tuple[str, np.ndarray]:
        """``(SHA-256 of photos and labels as stored, labels)``."""
        total, labels, changed = hashlib.sha256(), [], False
        for start in range(0, len(self), 256):
            for example in self.source.__getitems__(list(range(start, min(start + 256, len(self))))):
                labels.append(self._label(example, len(labels)))
                total.update(len(example["image"]).to_bytes(8, "little") + example["image"])
                changed = changed or decoded_differently_before(example["image"])
        total.update(np.asarray(labels, np.int32).tobytes())
        # Old certificates of a split keep its digest only if the decoder still gives the pixels that they are about.
        total.update(b"decoder 2" * changed)
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
        total = hashlib.sha256(str((self._read_through[0], self.shape, len(self.class_names), decoder)).encode())
        total.update(self.read(np.arange(min(_PROBES, len(self))), np.float32)[0].tobytes())
        return total.hexdigest()

    def sample_digest(self) -> str:
        """A digest of photos and labels for a training: of 2,000 evenly spaced ones, if there are more than 20,000."""
        if len(self) <= _LABELLED:
            return self._read_through[0]
        total = hashlib.sha256()
        for index in np.linspace(0, len(self) - 1, _COMPARED).astype(int).tolist():
            example = self.source.__getitems__([index])[0]
            total.update(self._label(example, index).to_bytes(8, "little") + example["image"])
        return total.hexdigest()

    def read(self, index: Index, dtype: DTypeLike) -> tuple[Float[np.ndarray, "B H W C"], Int32[np.ndarray, " B"]]:
        """``(pixels, labels)`` of the images `index`, with pixels in [0, 1]; the rest of the split is not read."""
        silence_pillow()
        # Threads are enough: decoding and resampling release the interpreter lock.
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            cuts = list(pool.map(lambda i: self._cut(int(i), central_square), index))
        images, labels = (np.stack(column) for column in zip(*cuts, strict=True))
        return np.asarray(images, dtype) / np.asarray(255, dtype), labels.astype(np.int32)

    def random_view(
        self, index: int, rng: np.random.Generator, area: tuple[float, float], flip: bool
    ) -> tuple[UInt8[np.ndarray, "H W C"], int]:
        """A `random_box` of a photo ("Inception" augmentation) and its label; `flip` mirrors with probability 1/2."""
        image, label = self._cut(index, lambda width, height: random_box(width, height, rng, area))
        return image[:, ::-1] if flip and rng.random() < 0.5 else image, label

    def _cut(self, index: int, box_of: Callable[[int, int], Box]) -> tuple[np.ndarray, int]:
        example = self.source.__getitems__([index])[0]
        photo = _decoded(example, self.channels, index, self._where)
        cut = photo.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box_of(*photo.size))
        return np.asarray(cut).reshape(self.shape), self._label(example, index)

    def _label(self, example: dict[str, Any], index: int) -> int:
        return check_label(int(example["label"]), len(self.class_names), index, self._where)

    @property
    def _where(self) -> str:
        return _where(self.name, self.split)


def read_source(
    source: Any, size: int, channels: int, *, name: str, version: str, split: str, class_names: tuple[str, ...]
) -> Dataset:
    """A `Dataset` of image files: `Photos` if there is a `size`, and otherwise decoded into memory.

    `source` is a picklable sequence with ``__getitems__(indices)``, which returns dicts of ``image`` (the bytes of a
    file), ``label`` and optionally ``path``. Raises UserError for a file that cannot be decoded, for a label that is no
    class, and without a `size` also for images that differ in size.
    """
    silence_pillow()
    if size:
        photos = Photos(name, version, split, source, size, channels, class_names)
        if len(photos) <= _LABELLED:
            _ = photos.labels  # reads the split through, which checks its labels
        return photos
    where, images, labels = _where(name, split), np.empty(0), np.empty(len(source), np.int32)

    def decoded(numbered: list[tuple[int, dict[str, Any]]]) -> list[np.ndarray]:
        return [np.asarray(_decoded(example, channels, i, where)) for i, example in numbered]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(source), 1024):
            index = list(range(start, min(start + 1024, len(source))))
            examples = source.__getitems__(index)
            numbered = list(zip(index, examples, strict=True))
            # Groups, because handing a small image to a thread takes longer than decoding it.
            groups = pool.map(decoded, [numbered[first : first + 64] for first in range(0, len(numbered), 64)])
            for position, example, image in zip(index, examples, itertools.chain.from_iterable(groups), strict=True):
                if not position:
                    images = np.empty((len(source), *image.shape[:2], channels), np.uint8)
                if image.shape[:2] != images.shape[1:3]:
                    sizes = " and ".join("x".join(map(str, found.shape[:2])) for found in (images[0], image))
                    side = min(32, *images.shape[1:3], *image.shape[:2])
                    remedy = f"--config.data.size={side}, for example, cuts all of them to {side}x{side}"
                    raise UserError(f"images of {where} differ in size ({sizes}); {remedy}")
                images[position] = image.reshape(images.shape[1:])
                labels[position] = check_label(int(example["label"]), len(class_names), position, where)
    return Arrays(name, version, split, images, labels, class_names)


def _where(name: str, split: str) -> str:
    return f"the split {split!r} of {name}"


def _decoded(example: dict[str, Any], channels: int, index: int, where: str) -> Image.Image:
    try:
        return decode(example["image"], channels)
    except ValueError as error:
        path = example.get("path")
        file, remedy = (
            (path, "replace or remove it") if path else (f"image {index} of {where}", "prepare the set again")
        )
        raise UserError(f"{file} cannot be decoded ({error}): {remedy}") from error


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
