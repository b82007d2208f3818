"""Sets of photos of any size: encoded where they lie, decoded and cut to one size when they are read."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import math
import os
import re
from typing import Any

import numpy as np
import PIL
from PIL import Image, features

from lsrs_jax.errors import UserError

MARGIN = 8 / 7  # of the shorter side over the central square that is evaluated: 256 over 224 pixels
ASPECT = (3 / 4, 4 / 3)  # width over height of random crops
_PROBES = 8  # photos whose decoded pixels are part of a split's digest
_TRIES = 10  # to place a random crop


@dataclasses.dataclass(frozen=True)
class Photos:
    """One split, in the order of its source; stands where a `Dataset` does.

    An image is the central square of its photo, 7/8 of the shorter side (ResNet's evaluation: 256 pixels, of which the
    middle 224), resampled to `size` with an antialiased triangle filter.

    Attributes:
      name, version, split: what it is; part of a certificate's identity.
      source: sequence of ``{"image": bytes of a JPEG or PNG, "label": int}``, with ``__getitems__``; picklable.
      size: H and W of an image.
      channels: 3, or 1 for greyscale.
      num_classes: K.
    """

    name: str
    version: str
    split: str
    source: Any
    size: int
    channels: int
    num_classes: int

    def __len__(self):
        return len(self.source)

    @property
    def shape(self):
        """``(H, W, C)``."""
        return (self.size, self.size, self.channels)

    @functools.cached_property
    def _read_through(self):
        """``(SHA-256 over photos and labels as stored, labels)``."""
        total, labels = hashlib.sha256(), np.empty(len(self), np.int32)
        for start in range(0, len(self), 256):
            found = self.source.__getitems__(list(range(start, min(start + 256, len(self)))))
            labels[start : start + len(found)] = [example["label"] for example in found]
            for example in found:
                total.update(len(example["image"]).to_bytes(8, "little") + example["image"])
        total.update(labels.tobytes())
        return total.hexdigest(), labels

    @property
    def labels(self):
        """int32 ``(N,)``. Reads the whole split, once."""
        return self._read_through[1]

    def digest(self):
        """SHA-256 over photos and labels as stored, the images' shape, and the decoder.

        **Guarantee**: two splits of one digest hold the same images, if one version of Pillow and of its JPEG decoder
        gives the same pixels wherever it gives them for the first eight photos. Another version is another split.
        """
        decoder = (PIL.__version__, features.version("jpg"), features.version("libjpeg_turbo"))
        total = hashlib.sha256(str((self._read_through[0], self.shape, self.num_classes, decoder)).encode())
        total.update(self.pixels(np.arange(min(_PROBES, len(self))), np.float32).tobytes())
        return total.hexdigest()

    def read(self, index, dtype):
        """``(pixels, labels)`` of `index`, without reading the rest of the split."""
        # Decoding and resampling leave the interpreter free.
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            cuts = list(pool.map(lambda i: self._cut(int(i), central_square), index))
        images, labels = (np.stack(column) for column in zip(*cuts, strict=True))
        return np.asarray(images, dtype) / np.asarray(255, dtype), labels.astype(np.int32)

    def pixels(self, index, dtype):
        """Images of `index` scaled to [0, 1], the unit of every radius."""
        return self.read(index, dtype)[0]

    def random_view(self, index, rng, area, flip):
        """``(uint8 (H, W, C), label)``: a random part of a photo, at random mirrored: "Inception" augmentation.

        Args:
          rng: `numpy.random.Generator`.
          area: ``(least, most)`` share of the photo's area.
          flip: whether to mirror half of them.
        """
        image, label = self._cut(index, lambda width, height: random_box(width, height, rng, area))
        return image[:, ::-1] if flip and rng.random() < 0.5 else image, label

    def _cut(self, index, box_of):
        example = self.source.__getitems__([index])[0]
        try:
            with Image.open(io.BytesIO(example["image"])) as opened:
                photo = opened.convert("RGB" if self.channels == 3 else "L")
        except Exception as error:  # decoders raise what they like
            reason = re.sub(r" <[^>]*>", "", " ".join(str(error).split()))
            raise UserError(
                f"image {index} of {self.name} {self.split} cannot be decoded ({reason}): prepare the set again"
            ) from error
        cut = photo.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box_of(*photo.size))
        return np.asarray(cut).reshape(self.shape), int(example["label"])


def central_square(width, height):
    """``(left, top, right, bottom)`` of the square that is evaluated."""
    side = min(width, height) / MARGIN
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)


def random_box(width, height, rng, area):
    """``(left, top, right, bottom)`` of a part with a random share of the area and aspect ratio (Szegedy et al. 2015).

    The ratio is log-uniform; a part that does not fit is drawn again, ten times at most, then it is the largest central
    one of an allowed ratio.
    """
    for _ in range(_TRIES):
        share = rng.uniform(*area) * width * height
        ratio = math.exp(rng.uniform(*map(math.log, ASPECT)))
        across, down = round(math.sqrt(share * ratio)), round(math.sqrt(share / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = int(rng.integers(width - across + 1)), int(rng.integers(height - down + 1))
            return (left, top, left + across, top + down)
    across, down = min(width, height * ASPECT[1]), min(height, width / ASPECT[0])
    left, top = (width - across) / 2, (height - down) / 2
    return (left, top, left + across, top + down)
