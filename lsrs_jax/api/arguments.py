"""Arguments of `SmoothedClassifier`: checks, and the forms in which the rest of the program takes them."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.progress import print_now
from lsrs_jax.runtime.rng import check_key
from lsrs_jax.runtime.validate import array


def are_batches(x: Any) -> bool:
    """Whether an argument gives batches: it can be iterated, and is neither an array nor a sequence."""
    return hasattr(x, "__iter__") and not any(hasattr(x, name) for name in ("__array__", "__getitem__", "__dlpack__"))


def check_pixels(inputs: Float[np.ndarray, "inputs *input"], pixels: bool) -> Float[np.ndarray, "inputs *input"]:
    """Returns inputs; raises UserError if they should be `pixels` in [0, 1] and are not."""
    if pixels and not (inputs.min() >= 0 and inputs.max() <= 1):
        found = f"{inputs.min():g} to {inputs.max():g}"
        raise UserError(f"this network takes pixels in [0, 1], got {found}: scale them, as pixels / 255")
    return inputs


def labels_of(labels: Any, inputs: int) -> np.ndarray | None:
    """A caller's labels; raises UserError unless there is one whole number per input."""
    if labels is None:
        return None
    found = array("labels", labels)
    if found.shape not in ((inputs,), (inputs, 1)):
        raise UserError(f"labels must have shape ({inputs},), one per input, got {found.shape}")
    if found.dtype.kind not in "iuf" or not np.isfinite(found).all() or (found != np.floor(found)).any():
        raise UserError(f"labels must be whole numbers, got {found.dtype}")
    return found.reshape(-1).astype(np.int64)


def seed_of(key: Any) -> int:
    """The seed of a key that a file can hold; that of no key is derived."""
    if key is None:
        from lsrs_jax.config import SEED_DERIVED  # loads much more

        return SEED_DERIVED
    high, low = map(int, np.asarray(jax.random.key_data(check_key(key))).tolist())
    if high:
        raise UserError("with out, the key must be jax.random.key(seed, impl='threefry2x32') with a seed below 2**32")
    return low


def reporter(progress: Any) -> Callable[[str], object]:
    """A function of a line: the caller's, or one that moves a bar to the number with which the line begins.

    True stands for a bar on a terminal and in a notebook, and lines elsewhere.
    """
    bar: Any = progress
    if isinstance(progress, type):
        raise UserError(f"progress must be a bar such as {progress.__name__}(total=len(x)), not its class")
    if progress is None or progress is False:
        return lambda line: None
    if progress is True:
        return print_now
    if not hasattr(progress, "update"):
        if callable(progress):
            return progress
        raise UserError(f"progress must be a function of a line of text, or a bar such as tqdm(...), got {progress!r}")

    def move(line: str) -> None:
        if found := re.match(r" *([0-9,]+) of ", line):
            bar.update(int(found[1].replace(",", "")) - bar.n)
            bar.set_postfix_str(line.partition("decided")[2].strip() or line.strip())

    return move
