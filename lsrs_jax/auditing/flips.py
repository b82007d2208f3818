"""Reads and writes the points of the nearest flips of an audit: ``flips/<idx>.npy`` beside audit.tsv, one per batch.

Each file is named after the first image of its batch, and is an array with the fields `idx`, `predict` (the class
there) and `point` (float32). No digest covers the files. A reader accepts a point only at the distance from its image
that audit.tsv names.
"""

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int
from numpy.lib.format import open_memmap
from numpy.typing import DTypeLike

from lsrs_jax.runtime.errors import UserError, first_line
from lsrs_jax.runtime.files import write_atomic

_FOLDER = "flips"
_ROUNDING = 1e-4  # by which a distance may differ, relative to 1 + distance; far above what float32 changes


def _kind(shape: tuple[int, ...]) -> np.dtype:
    return np.dtype([("idx", "<i8"), ("predict", "<i8"), ("point", "<f4", shape)])


def write(
    folder: Path,
    idx: Int[np.ndarray, " rows"],
    distance: Float[np.ndarray, " rows"],
    predict: Int[np.ndarray, " rows"],
    point: Float32[np.ndarray, "rows *image"],
) -> None:
    """Writes the nearest flips of a batch into the folder of its audit: those whose distance is finite."""
    flipped = np.isfinite(distance)
    if flipped.any():
        points = np.empty(flipped.sum(), _kind(point.shape[1:]))
        points["idx"], points["predict"], points["point"] = idx[flipped], predict[flipped], point[flipped]
        content = io.BytesIO()
        np.save(content, points)
        write_atomic(folder / _FOLDER / f"{idx[0]}.npy", content.getvalue())


def check_absent(folder: Path) -> None:
    """Raises UserError if the folder of a new audit holds the flips of another one."""
    home = folder / _FOLDER
    if os.path.lexists(home) and (not home.is_dir() or any(home.iterdir())):
        raise UserError(f"{home} is of an earlier audit; move it away too, and give the same command again")


class Flips:
    """The nearest flips beside an audit, read when they are needed. `predict` has the class at each, by image.

    `distance` is the one of the audit, by image, `shape` that of an image, and `read` returns the float64 images with
    some idx. Points at another distance are left out. Raises UserError if a file cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        distance: Mapping[int, float],
        shape: tuple[int, ...],
        read: Callable[[Int[np.ndarray, " rows"]], Float[np.ndarray, "rows *image"]],
    ) -> None:
        self.shape, self.predict = shape, dict[int, int]()
        self._places: dict[int, tuple[Path, int]] = {}
        flipped = [i for i, far in distance.items() if np.isfinite(far)]
        for path in sorted((folder / _FOLDER).glob("*.npy")):
            points = self._open(path)
            rows = np.flatnonzero(np.isin(points["idx"], flipped))
            if not len(rows):
                continue
            idx = points["idx"][rows]
            away = np.linalg.norm((points["point"][rows] - read(idx)).reshape(len(rows), -1), axis=1)
            wanted = np.array([distance[i] for i in idx.tolist()])
            for place in np.flatnonzero(np.abs(away - wanted) <= _ROUNDING * (1 + wanted)).tolist():
                i, row = int(idx[place]), int(rows[place])
                self.predict[i], self._places[i] = int(points["predict"][row]), (path, row)

    def _open(self, path: Path) -> np.ndarray:
        try:
            if not path.is_file():
                raise ValueError("it is not a file")
            points = open_memmap(path, mode="r")
            if points.ndim != 1 or points.dtype != _kind(self.shape):
                raise ValueError("it holds something else")
        except Exception as error:  # a damaged header raises many types
            raise UserError(f"{path} cannot be read as points of an audit ({first_line(error)})") from error
        return points

    def read(self, index: np.ndarray, dtype: DTypeLike) -> tuple[Float[np.ndarray, "rows *image"], np.ndarray]:
        """``(points, classes there)`` of the images `index`, which are keys of `predict`."""
        found = np.empty((len(index), *self.shape), dtype)
        rows = dict[Path, list[tuple[int, int]]]()  # few files are open at a time
        for number, i in enumerate(index.tolist()):
            path, row = self._places[i]
            rows.setdefault(path, []).append((number, row))
        for path, some in rows.items():
            numbers, places = map(list, zip(*some, strict=True))
            found[numbers] = self._open(path)["point"][places]
        return found, np.array([self.predict[i] for i in index.tolist()])
