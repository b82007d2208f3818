"""Image classification sets, in memory or as photos that are decoded when they are read; training batches."""

from lsrs_jax.data.batches import augment, batch_indices, training_batches
from lsrs_jax.data.images import Arrays, Dataset, from_arrays
from lsrs_jax.data.photos import Photos
from lsrs_jax.data.sources import load, load_split

__all__ = [
    "Arrays", "Dataset", "Photos", "augment", "batch_indices", "from_arrays", "load", "load_split", "training_batches",
]  # fmt: skip
