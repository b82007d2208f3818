"""Small pictures of many images: sheets of them, as files that a browser shows."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

LOSSLESS = 1000  # images; more than these are stored as JPEG
SIDE = 64  # pixels; larger images are scaled down
BYTES = 7_500_000  # of all sheets together, if they are JPEG; as base64 they have a third more
_QUALITIES = (88, 70, 50, 30)  # of JPEG: the first with which the sheets are small enough
_BLOCK = 8  # pixels; JPEG compresses blocks of this size, so that an image never shares one with its neighbour
_COLUMNS, _ROWS = 20, 20  # of a sheet
_BATCH = 256  # images that are read at a time


class Source(Protocol):
    """Images by their number: a data set, or the flips of an audit."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self, index: np.ndarray, dtype: Any) -> tuple[np.ndarray, Any]: ...


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


def make_sheets(parts: Sequence[tuple[Source, np.ndarray]], most: int | None = None) -> list[Sheets]:
    """The sheets of some images of each source: PNG without loss if they are at most `LOSSLESS` together.

    Otherwise JPEG of at most `BYTES`; images that do not fit with the lowest quality are made smaller. With `most`,
    either has at most so many bytes.
    """
    if sum(len(idx) for _, idx in parts) <= LOSSLESS:
        found = [_encoded(*_draw(*part, SIDE, 1), None) for part in parts]
        if most is None or _size(found) <= most:
            return found
    side, most = SIDE, BYTES if most is None else most
    while True:
        drawn = [_draw(*part, side, _BLOCK) for part in parts]
        for quality in _QUALITIES:
            found = [_encoded(*sheets, quality) for sheets in drawn]
            if side == 1 or _size(found) <= most:
                return found
        side //= 2


def _size(found: Sequence[Sheets]) -> int:
    return sum(len(file) for sheets in found for file in sheets.files)


def _draw(source: Source, idx: np.ndarray, side: int, block: int) -> tuple[Sheets, list[np.ndarray]]:
    """The sheets as uint8 arrays, with the images `idx` at most `side` pixels wide and high; no files yet.

    The cell of an image is a multiple of `block` pixels wide and high; its margin repeats the edge of the image.
    """
    height, width, channels = source.shape
    scale = min(1.0, side / max(height, width))
    height, width = max(1, round(scale * height)), max(1, round(scale * width))
    down, across = (-(-size // block) * block for size in (height, width))
    shape = (_ROWS * down, _COLUMNS * across) if channels != 3 else (_ROWS * down, _COLUMNS * across, 3)
    sheets = [np.zeros(shape, np.uint8) for _ in range(-(-len(idx) // (_ROWS * _COLUMNS)))]
    for start in range(0, len(idx), _BATCH):
        pixels = source.read(idx[start : start + _BATCH], np.float32)[0]
        for position, image in enumerate(pixels, start):
            cell = _resized(np.asarray(np.round(255 * image.clip(0, 1)), np.uint8), height, width)
            margins = ((0, down - height), (0, across - width), (0, 0))[: cell.ndim]
            sheet, place = divmod(position, _ROWS * _COLUMNS)
            row, column = divmod(place, _COLUMNS)
            place = slice(row * down, (row + 1) * down), slice(column * across, (column + 1) * across)
            sheets[sheet][place] = np.pad(cell, margins, mode="edge")
    scaled = (height, width) != tuple(source.shape[:2])
    return Sheets(width, height, (across, down), _COLUMNS, _ROWS, "png" if block == 1 else "jpeg", scaled, []), sheets


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image of 3 channels, or in grey the mean of its channels; at this size."""
    from PIL import Image

    image = image if image.shape[2] == 3 else image.mean(axis=2).round().astype(np.uint8)
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def _encoded(sheets: Sheets, arrays: Sequence[np.ndarray], quality: int | None) -> Sheets:
    """The sheets with files of these arrays: PNG, or JPEG of this quality."""
    from PIL import Image

    files = []
    for array in arrays:
        content = io.BytesIO()
        # Colours of less resolution than the brightness would be smoothed over the edges of the images. Without
        # `optimize`: with it, Pillow fails to write noise as JPEG, for which its buffer is too small.
        options = {"optimize": True} if quality is None else {"quality": quality, "subsampling": "4:4:4"}
        Image.fromarray(array).save(content, sheets.kind, **options)
        files.append(content.getvalue())
    return sheets._replace(files=files)
