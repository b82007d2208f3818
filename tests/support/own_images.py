"""Images as users have them: noisy pictures whose brightness shows the class, in folders of classes."""

import numpy as np
from PIL import Image

NAMES = ("cat", "dog", "emu")


def shades(count, seed=0, shape=(8, 8, 3)):
    """Noisy images whose brightness shows the class, and labels; every class occurs."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = rng.normal(60 + 60 * labels[:, None, None, None], 20, (count, *shape))
    return np.clip(images, 0, 255).astype(np.uint8), labels


def write_folder(root, splits, names=NAMES, kind="png"):
    """Writes images as ``split/class/number.png``; the split "" stands for no folder of splits."""
    for split, (images, labels) in splits.items():
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            home = root / split / names[label]
            home.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.squeeze()).save(home / f"{number:03}.{kind}")
    return root


def by_class(images, labels):
    return [images[i] for i in np.argsort(labels, kind="stable")], np.sort(labels)
