"""Decodes an image file to what a viewer shows. Every source of images uses it."""

import io
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_ORIENTATION = 0x0112  # the EXIF tag
_MOST_PIXELS = 89_478_485  # the limit at which Pillow warns: a small file can claim more than any memory holds
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L")
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")  # others can start programs
_PLAIN = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV")


def decode(file: bytes | Path, channels: int) -> Image.Image:
    """An image of 8 bits per channel, grey (mode L) if `channels` is 1, and RGB if it is 3.

    It is turned upright as its EXIF tag says. Palettes and CMYK become colours, 16 bits are scaled to 8, transparent
    pixels show white. Of an animation it is the first picture. Colour profiles are ignored. Raises ValueError, whose
    message is a reason, for a file that cannot be decoded, has other pixels, or is larger than 89 million pixels.
    """
    try:
        with _opened(file) as opened:
            if opened.width * opened.height > _MOST_PIXELS:
                raise ValueError(f"it has {opened.width}x{opened.height} pixels, more than {_MOST_PIXELS:,}")
            image = ImageOps.exif_transpose(opened)
            if image.mode in _SIXTEEN_BITS:
                image = Image.fromarray(((np.asarray(image, np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
            elif image.mode in _WITH_ALPHA or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            elif image.mode not in _PLAIN:
                raise ValueError(f"its pixels have the mode {image.mode}; save it as 8 or 16 bit grey, or as RGB")
            return image.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # decoders raise many types
        reason = re.sub(r"\s+<[^>]*>", "", str(error))  # without the addresses of objects
        raise ValueError(reason or type(error).__name__) from error


def _opened(file: bytes | Path) -> Image.Image:
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_FORMATS)


def is_grey(file: bytes | Path) -> bool:
    """Whether an image file has a single colour channel; reads only the header. False for a file that has none."""
    try:
        with _opened(file) as opened:
            return opened.mode in ("1", "L", "LA", "La", *_SIXTEEN_BITS)
    except Exception:
        return False


def decoded_differently_before(file: bytes) -> bool:
    """Whether the first versions, which only called `Image.convert`, gave other pixels than `decode` for this file."""
    try:
        with _opened(file) as opened:
            turned = opened.getexif().get(_ORIENTATION, 1) != 1
            return turned or opened.mode not in _PLAIN or "transparency" in opened.info
    except Exception:
        return False


def silence_pillow() -> None:
    """Hides Pillow's warnings from now on. They are about metadata on which no pixel depends.

    They arise in threads, where `warnings.catch_warnings` is not safe.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
