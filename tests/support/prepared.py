"""Writes a tiny tensorflow-datasets set as array_record, without TensorFlow."""

import io
import json

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image


def _varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number, payload):
    return bytes([number << 3 | 2]) + _varint(len(payload)) + payload


def encoded(image, kind="png", **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, kind, **options)
    return file.getvalue()


def _example(image, label):
    """A tf.train.Example with an image and a label; the image is an array or the bytes of a file."""
    file = image if isinstance(image, bytes) else encoded(image)
    features = {
        b"image": _field(1, _field(1, file)),
        b"label": _field(3, _field(1, _varint(int(label)))),
    }
    entries = b"".join(_field(1, _field(1, name) + _field(2, value)) for name, value in features.items())
    return _field(1, entries)


def write(folder, name, splits, num_classes=3, file_format="array_record"):
    """Writes a set. `splits` maps names to (images, labels).

    The images are a uint8 array (N, H, W, C), or, for images of several sizes, a list of arrays or of files.
    """
    home = folder / name / "1.0.0"
    home.mkdir(parents=True)
    described = []
    for split, (images, labels) in splits.items():
        records = [_example(image, label) for image, label in zip(images, labels, strict=True)]
        writer = ArrayRecordWriter(str(home / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        described.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(sum(map(len, records))),
                "shardLengths": [str(len(records))],
            }
        )
    info = {"fileFormat": file_format, "name": name, "version": "1.0.0", "splits": described}
    (home / "dataset_info.json").write_text(json.dumps(info))
    sizes = (-1, -1, 3) if isinstance(images, list) else images.shape[1:]
    shape = {"dimensions": [str(size) for size in sizes]}
    prefix = "tensorflow_datasets.core.features"
    features = {
        "image": {"image": {"dtype": "uint8", "shape": shape}, "pythonClassName": f"{prefix}.image_feature.Image"},
        "label": {
            "classLabel": {"numClasses": str(num_classes)},
            "pythonClassName": f"{prefix}.class_label_feature.ClassLabel",
        },
    }
    content = {"featuresDict": {"features": features}, "pythonClassName": f"{prefix}.features_dict.FeaturesDict"}
    (home / "features.json").write_text(json.dumps(content))
    return home


def random_split(size, shape, num_classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (size, *shape), np.uint8), rng.integers(0, num_classes, size)


def photos(size, num_classes=3, seed=0):
    """Smooth pictures of many sizes whose colours show the class: ``(list of JPEG files, labels)``."""
    rng = np.random.default_rng(seed)
    files, labels = [], rng.integers(0, num_classes, size)
    for label in labels:
        height, width = rng.integers(24, 60, 2)
        down, across = np.mgrid[:height, :width] / 60
        waves = np.sin(6 * down + rng.uniform(0, 6)) * np.sin(6 * across + rng.uniform(0, 6))
        colour = np.linspace(0, 2, 3) * (label + 1) / num_classes
        image = 128 + 60 * waves[:, :, None] * colour + rng.normal(0, 4, (height, width, 3))
        files.append(encoded(np.clip(image, 0, 255).astype(np.uint8), "jpeg", quality=95))
    return files, labels
