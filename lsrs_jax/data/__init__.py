"""Image classification sets: small ones in memory, photos decoded when they are needed; the batches of a training."""

from lsrs_jax.data.batches import augment, batch_indices, training_batches
from lsrs_jax.data.memory import Dataset
from lsrs_jax.data.photos import Photos
from lsrs_jax.data.sources import load, of_config

__all__ = ["Dataset", "Photos", "augment", "batch_indices", "load", "of_config", "training_batches"]
