"""Show what is in a data set: splits, shape, classes with counts, range of the pixels, and a picture of some images.

  python -m lsrs_jax.show_data digits
  python -m lsrs_jax.show_data folder:PATH --out=sheet.png
  python -m lsrs_jax.show_data npz:FILE --config.data.layout=NCHW

NAME is a value of data.name. The picture (by default data.png) shows some images of every class with its name, as the
network will see them. Look at it before you train.
"""

if __name__ == "__main__":
    from lsrs_jax.cli import main

    main("show_data")

import io
from pathlib import Path
from typing import Any

import numpy as np

from lsrs_jax import cli
from lsrs_jax.config import default
from lsrs_jax.data import Dataset, load_split
from lsrs_jax.flags import config_from_flags
from lsrs_jax.runtime import files
from lsrs_jax.runtime.errors import UserError

_CLASSES, _PER_CLASS, _SIDE = 20, 10, 64  # of the picture: rows, columns, and least size of an image in pixels
_LISTED = 40  # classes
_MEASURED = 2000  # images whose pixels are looked at


def run(arguments: list[str]) -> None:
    """The command; see the module's docstring."""
    fields = ("data.dir", "data.train_split", "data.split", "data.size", "data.layout", "data.label_column")
    parser = cli.parser("show_data", __doc__, fields, "NAME [--out=FILE.png] [--config.data.FIELD=VALUE ...]")
    parser.add_argument("name", metavar="NAME", help="digits, folder:PATH, npz:PATH, hf:NAME, or a tfds name")
    parser.add_argument("--out", type=Path, default=Path("data.png"), help="the picture; default: data.png")
    options, rest = parser.parse_known_args(arguments)
    out = options.out.expanduser()
    if out.suffix.lower() not in (".png", ".jpg", ".webp"):
        raise UserError(f"--out must be a file that ends with .png, .jpg or .webp, got {str(options.out)!r}")
    experiment = any(flag.startswith("--config=") for flag in rest)
    config = config_from_flags([*rest, f"--config.data.name={options.name}"], None if experiment else default())
    splits = [load_split(config.data, split) for split in dict.fromkeys((config.data.train_split, config.data.split))]
    picture = io.BytesIO()
    _sheet(splits[0]).save(picture, out.suffix[1:].lower().replace("jpg", "jpeg"))
    files.write_atomic(out, picture.getvalue())
    for dataset in splits:
        _describe(dataset)
    print(f"picture of {splits[0].split}: {out}")


def _describe(dataset: Dataset) -> None:
    """Prints a split."""
    labels, names = dataset.labels, dataset.class_names
    some = np.linspace(0, len(dataset) - 1, min(len(dataset), _MEASURED)).astype(int)
    pixels = np.concatenate([dataset.read(part, np.float32)[0] for part in np.array_split(some, -(-len(some) // 100))])
    print(f"{dataset.split}: {len(dataset):,} images of shape {dataset.shape}, {len(names)} classes")
    mean = ", ".join(f"{value:.3f}" for value in pixels.mean(axis=(0, 1, 2)))
    print(f"  pixels from {pixels.min():.3f} to {pixels.max():.3f}; mean per channel {mean}")
    counts = np.bincount(labels, minlength=len(names))
    for label in range(min(len(names), _LISTED)):
        print(f"  {label:>4} {names[label]:<24} {counts[label]:>8,}")
    if len(names) > _LISTED:
        print(
            f"  and {len(names) - _LISTED} more classes, with {counts[_LISTED:].min():,} to {counts[_LISTED:].max():,}"
        )
    if empty := [names[label] for label in np.flatnonzero(counts == 0)]:
        print(f"  note: no image of {', '.join(empty[:10])}{', …' if len(empty) > 10 else ''}")


def _sheet(dataset: Dataset) -> Any:
    """A picture of some images of every class: one row per class, with its name."""
    from PIL import Image, ImageDraw, ImageFont

    height, width, channels = dataset.shape
    scale = max(1, -(-_SIDE // max(height, width)))
    labels, names = dataset.labels, dataset.class_names
    shown = np.unique(labels)[:_CLASSES].tolist()
    cell_height, cell_width, margin = scale * height + 4, scale * width + 4, 150
    sheet = Image.new("RGB", (margin + _PER_CLASS * cell_width, len(shown) * cell_height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for row, label in enumerate(shown):
        text = names[label] if names[label] == str(label) else f"{label}: {names[label]}"
        draw.text((6, row * cell_height + cell_height // 2 - 8), text[:20], fill="black", font=font)
        for column, image in enumerate(dataset.read(np.flatnonzero(labels == label)[:_PER_CLASS], np.float32)[0]):
            values = np.asarray(np.round(image * 255), np.uint8)
            cell = Image.fromarray(values if channels == 3 else values.mean(axis=2).astype(np.uint8))
            cell = cell.resize((scale * width, scale * height), Image.Resampling.NEAREST)
            sheet.paste(cell.convert("RGB"), (margin + column * cell_width + 2, row * cell_height + 2))
    return sheet
