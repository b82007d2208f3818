"""Packs CIFAR-10 into a file of some 40 MiB, and unpacks it into the npz file that `data.name=npz:FILE` reads.

  python -m benchmarks.cifar10_file pack runs/cifar10.packed --data=$TFDS_DATA_DIR
  python -m benchmarks.cifar10_file unpack runs/cifar10.packed runs/cifar10.npz

For machines to which few bytes can be sent. The labels of all splits and the pixels of `test_exact` are exact. The
images of `train` and `test` are JPEG (quality 93, full colour resolution), so results on them are of these copies.
"""

import argparse
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from lsrs_jax import cli
from lsrs_jax.data import load
from lsrs_jax.data.images import from_arrays
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import write_atomic

EXACT, COPIES = "test_exact", ("train", "test")
MOST = 48 * 2**20  # bytes; the repository travels in the same 64 MiB
ROW = 100  # images side by side in a JPEG; 32 pixels are four of its blocks, so they do not affect each other
QUALITY = 93


def jpeg(images):
    """Images (N, H, W, 3) in rows of `ROW` as one JPEG, an array of bytes; the last row is filled up with black."""
    count, height, width, channels = images.shape
    rows = -(-count // ROW)
    tiles = np.zeros((rows * ROW, height, width, channels), np.uint8)
    tiles[:count] = images
    sheet = tiles.reshape(rows, ROW, height, width, channels).swapaxes(1, 2).reshape(rows * height, ROW * width, -1)
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
    return np.frombuffer(file.getvalue(), np.uint8)


def images_of(encoded, count):
    """The inverse of `jpeg` for square images, up to what JPEG loses."""
    sheet = np.asarray(Image.open(io.BytesIO(encoded.tobytes())))
    side = sheet.shape[1] // ROW
    return sheet.reshape(-1, side, ROW, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)[:count]


def _seal(arrays):
    """SHA-256 of arrays with their names."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode() + arrays[name].tobytes())
    return total.hexdigest()


def pack(data_dir, path, splits=None):
    """Writes the packed file; returns the `digest` of `test_exact`, which a certification on it will record.

    `splits` maps a split to a slice of it, for a smaller file.
    """
    splits, arrays = splits or {}, {}
    for split in (*COPIES, EXACT):
        found = load("cifar10", splits.get(split, split), data_dir)
        pixels, labels = found.images, found.labels
        arrays[f"y_{split}"] = labels.astype(np.uint8)
        arrays[f"x_{split}" if split == EXACT else split] = pixels if split == EXACT else jpeg(pixels)
    arrays["class_names"] = np.array(found.class_names)
    file = io.BytesIO()
    np.savez(file, **arrays, seal=np.array(_seal(arrays)))
    if file.tell() > MOST:
        raise UserError(f"the packed file has {file.tell() / 2**20:.0f} MiB, more than {MOST / 2**20:.0f}")
    write_atomic(path, file.getvalue())
    return found.digest()


def unpack(path, target):
    """Writes the npz file; returns the digest of `test_exact`. Raises UserError for a file that arrived damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            arrays = {name: file[name] for name in file.files}
        seal = str(arrays.pop("seal"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no packed CIFAR-10 ({error}): make it with pack") from error
    if _seal(arrays) != seal:
        raise UserError(f"{path} was damaged: send it again")
    for split in COPIES:
        arrays[f"x_{split}"] = images_of(arrays.pop(split), len(arrays[f"y_{split}"]))
    file = io.BytesIO()
    np.savez(file, **arrays)
    write_atomic(target, file.getvalue())
    return from_arrays(arrays[f"x_{EXACT}"], arrays[f"y_{EXACT}"], arrays["class_names"].tolist()).digest()


def main(arguments):
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    packing, unpacking = commands.add_parser("pack"), commands.add_parser("unpack")
    for command in (packing, unpacking):
        command.add_argument("packed", type=Path)
    packing.add_argument("--data", default="", help="folder of tensorflow-datasets; $TFDS_DATA_DIR where left out")
    unpacking.add_argument("npz", type=Path)
    options = parser.parse_args(arguments)
    if options.what == "pack":
        digest = pack(options.data, options.packed)
        print(f"{options.packed}: {options.packed.stat().st_size / 2**20:.1f} MiB")
    else:
        digest = unpack(options.packed, options.npz)
    print(f"digest of {EXACT}: {digest}")


if __name__ == "__main__":
    cli.execute(main)
