"""Sets that are a folder of image files, with one subfolder per class."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lsrs_jax.data.decode import is_grey, silence_pillow
from lsrs_jax.data.images import Dataset
from lsrs_jax.data.photos import read_source
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.types import Config

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_SPLITS = {  # split -> the folders that may hold it; the first that exists does
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation"),
    "val": ("val", "valid", "validation"),
}


class _Files:
    """The examples of a split; a file is read when its example is."""

    def __init__(self, files: list[tuple[str, int]]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitems__(self, index: list[int]) -> list[dict[str, Any]]:
        found = [self._files[i] for i in index]
        return [{"image": Path(path).read_bytes(), "label": label, "path": path} for path, label in found]


def load_folder(data: Config, split: str) -> Dataset:
    """A split of the folder ``data.dir``, which has ``train/<class>/*.png`` and ``test/…``, or only ``<class>/*.png``.

    Classes are numbered in the order of their names. A folder without ``train`` has the splits train and test: a file
    belongs to test if a hash of ``data.share_seed`` and its path falls below ``data.test_share``, so that new files
    move no old one. Images are grey if all files of the set are. Raises UserError for a folder without images, a link
    that leaves it, and what `read_source` refuses.
    """
    root = Path(data.dir).expanduser()
    if not data.dir or not root.is_dir():
        raise UserError(f"--config.data.name=folder:PATH needs a folder of images, and {data.dir!r} is none")
    inside = _subfolders(root)
    homes = {name: home for name in _SPLITS if (home := _home(root, inside, name))}
    if homes:
        remedy = "put the classes directly into the folder, to divide them by --config.data.test_share"
        if split not in homes or "train" not in homes:
            missing = split if split not in homes else "train"
            raise UserError(
                f"{root} has no split {missing!r}, only {', '.join(homes)}: make a folder {missing}, or {remedy}"
            )
        names = sorted({name for home in set(homes.values()) for name in _subfolders(home)})
        listed = {home: _listed(root, home, names, said=home == homes[split]) for home in set(homes.values())}
        files, shown = listed[homes[split]], homes[split].name
    else:
        names, shown = inside, split
        if split not in ("train", "test"):
            raise UserError(f"{root} has no folder train, so its splits are train and test, not {split!r}")
        listed = {root: _listed(root, root, names, said=split == "train")}
        files = [(path, label) for path, label in listed[root] if _is_test(root, path, data) == (split == "test")]
        if listed[root] and not files:
            raise UserError(
                f"none of {len(listed[root])} images in {root} is in the split {split!r}: change data.test_share"
            )
    if not files:
        raise UserError(
            f"{homes.get(split, root)} has no images: give each class a folder, <class>/*.png (or jpg, webp)"
        )
    silence_pillow()
    everything = [path for found in listed.values() for path, _ in found]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        channels = 1 if all(pool.map(is_grey, map(Path, everything))) else 3
    return read_source(
        _Files(files), data.size, channels, name="folder", version="", split=shown, class_names=tuple(names)
    )


def _home(root: Path, inside: list[str], split: str) -> Path | None:
    """The folder of a split, if there is one; upper and lower case are the same."""
    found = {name.lower(): name for name in reversed(inside)}
    return next((root / found[name] for name in _SPLITS[split] if name in found), None)


def _subfolders(home: Path) -> list[str]:
    names = sorted(path.name for path in home.iterdir() if path.is_dir() and not path.name.startswith("."))
    for name in names:
        if not name.isprintable():
            raise UserError(f"the name of the folder {name!r} in {home} cannot be shown: rename it")
    return names


def _listed(root: Path, home: Path, names: list[str], said: bool) -> list[tuple[str, int]]:
    """``(path, label)`` of the image files of a folder of classes; if `said`, prints what it leaves out."""
    inside, found, left = os.path.realpath(root), [], []
    for label, name in enumerate(names):
        for path in sorted((home / name).rglob("*")):
            if any(part.startswith(".") for part in path.relative_to(home).parts) or (
                path.is_dir() and not path.is_symlink()
            ):
                continue
            target = os.path.realpath(path)
            if path.suffix.lower() not in SUFFIXES or not os.path.isfile(target):
                left.append(path)
            elif os.path.commonpath([inside, target]) != inside:
                raise UserError(f"{path} is a link to {target}, outside of {root}: copy the file there")
            else:
                found.append((str(path), label))
    if left and said:
        print(f"note: {len(left)} files in {home} are no images by their names, and left out: {left[0].name}, ...")
    return found


def _is_test(root: Path, path: str, data: Config) -> bool:
    """Whether a file of a folder that is not divided belongs to the split test."""
    place = hashlib.sha256(f"{data.share_seed} {Path(path).relative_to(root).as_posix()}".encode()).digest()
    return int.from_bytes(place[:8], "big") < data.test_share * 2**64
