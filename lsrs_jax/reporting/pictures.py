"""Small pictures of many images: sheets of them, as files that a browser shows."""

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lsrs_jax.data import Dataset

LOSSLESS = 1000  # images; more than these are stored as JPEG
SIDE = 64  # pixels; larger images are scaled down
_PIXELS = 10_000 * SIDE**2  # of all images together: more than 10,000 are scaled down further
_BYTES = 7_500_000  # of all sheets together; as base64 they have a third more
_QUALITIES = (88, 75, 60, 45, 30)  # of JPEG: the first with which the sheets fit into `_BYTES`
_BLOCK = 16  # pixels; JPEG compresses blocks of this size, so that an image never shares one with its neighbour
_COLUMNS, _ROWS = 20, 20  # of a sheet
_BATCH = 256  # images that are read at a time


class Sheets(NamedTuple):
    """Images in the order of their positions, row after row and sheet after sheet."""

    width: int  # of an image as it is shown, in pixels
    height: int
    pitch: tuple[int, int]  # distance between the left, and between the upper edges of neighbours, in pixels
    columns: int
    rows: int
    kind: str  # "png" or "jpeg"
    scaled: bool  # whether the images are larger in the data set
    files: list[bytes]


def make_sheets(parts: Sequence[tuple[Dataset, np.ndarray]]) -> list[Sheets]:
    """The sheets of some images of each data set: PNG without loss if they are at most `LOSSLESS` together."""
    total = sum(len(idx) for _, idx in parts)
    lossless = total <= LOSSLESS
    side = min(SIDE, math.isqrt(_PIXELS // max(total, 1)))
    drawn = [_draw(dataset, idx, side, 1 if lossless else _BLOCK) for dataset, idx in parts]
    kind, found = "png" if lossless else "jpeg", list[list[bytes]]()
    for quality in (None,) if lossless else _QUALITIES:
        found = [[_encode(sheet, quality) for sheet in sheets] for sheets, _, _ in drawn]
        if sum(len(file) for files in found for file in files) <= _BYTES:
            break
    return [
        Sheets(width, height, (sheets[0].shape[1] // _COLUMNS, sheets[0].shape[0] // _ROWS), _COLUMNS, _ROWS, kind,
               max(dataset.shape[:2]) > max(width, height), files)
        for (dataset, _), (sheets, width, height), files in zip(parts, drawn, found, strict=True)
    ]  # fmt: skip


def _draw(dataset: Dataset, idx: np.ndarray, side: int, block: int) -> tuple[list[np.ndarray], int, int]:
    """``(sheets, width, height)``: uint8 arrays with the images `idx`, at most `side` pixels wide and high.

    The cell of an image is a multiple of `block` pixels wide and high; its margin repeats the edge of the image.
    """
    height, width, channels = dataset.shape
    scale = min(1.0, side / max(height, width))
    height, width = max(1, round(scale * height)), max(1, round(scale * width))
    down, across = (-(-size // block) * block for size in (height, width))
    shape = (_ROWS * down, _COLUMNS * across) if channels != 3 else (_ROWS * down, _COLUMNS * across, 3)
    sheets = [np.zeros(shape, np.uint8) for _ in range(-(-len(idx) // (_ROWS * _COLUMNS)))]
    for start in range(0, len(idx), _BATCH):
        pixels = dataset.read(idx[start : start + _BATCH], np.float32)[0]
        for position, image in enumerate(pixels, start):
            cell = _resized(np.asarray(np.round(255 * image), np.uint8), height, width)
            margins = ((0, down - height), (0, across - width), (0, 0))[: cell.ndim]
            sheet, place = divmod(position, _ROWS * _COLUMNS)
            row, column = divmod(place, _COLUMNS)
            place = slice(row * down, (row + 1) * down), slice(column * across, (column + 1) * across)
            sheets[sheet][place] = np.pad(cell, margins, mode="edge")
    return sheets, width, height


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image of 3 channels, or in grey the mean of its channels; at this size."""
    from PIL import Image

    image = image if image.shape[2] == 3 else image.mean(axis=2).round().astype(np.uint8)
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def _encode(sheet: np.ndarray, quality: int | None) -> bytes:
    """A sheet as PNG, or as JPEG of this quality."""
    from PIL import Image

    content = io.BytesIO()
    if quality is None:
        Image.fromarray(sheet).save(content, "png", optimize=True)
    else:
        Image.fromarray(sheet).save(content, "jpeg", quality=quality, optimize=True)
    return content.getvalue()
