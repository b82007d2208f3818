"""Image classification sets, in memory or as photos that are decoded when they are read; training batches."""

from lsrs_jax.data.batches import augment, batch_indices, training_batches
from lsrs_jax.data.photos import Photos
from lsrs_jax.data.sources import Dataset, ImageSet, load, load_split

__all__ = ["Dataset", "ImageSet", "Photos", "augment", "batch_indices", "load", "load_split", "training_batches"]
