"""The certified parameters of a head that is trained with batch normalisation."""

import contextlib
import functools

import jax
from jax.sharding import Mesh

from lsrs_jax.data import Dataset, training_batches
from lsrs_jax.models import batch_norm
from lsrs_jax.models.heads import Images
from lsrs_jax.models.split import Model, Params
from lsrs_jax.runtime.mesh import from_own_rows, own_rows, replicated, reshard
from lsrs_jax.runtime.rng import domain_key
from lsrs_jax.runtime.types import Config

_BATCHES = 64


class Folding:
    """Folds batch normalisation with the statistics of training images under noise, in the latent or on the image.

    They are the statistics of the training batches that would follow the last step, so every checkpoint uses the same
    images and the same noise, and no step of the training has used this noise.
    """

    def __init__(self, model: Model, config: Config, train_set: Dataset, mesh: Mesh) -> None:
        self._config, self._train_set, self._mesh = config, train_set, mesh
        trained = model.in_training

        @functools.partial(jax.jit, out_shardings=replicated(mesh))
        def statistics(params: Params, images: Images, key: jax.Array) -> Params:
            latents = trained.encode(params, images)
            noise = config.sigma * jax.random.normal(key, latents.shape, latents.dtype)
            return trained.statistics(params, latents + noise)

        self._statistics = statistics

    def __call__(self, params: Params) -> Params:
        """The parameters with which `Model.for_certification` and `Model.classify` work; all processes call this."""
        data, seed, first = self._config.data, self._config.seed, self._config.train.steps
        key, own = domain_key(seed, "train"), own_rows(self._mesh, data.batch_size)
        batches = training_batches(self._train_set, data, seed, first, first + _BATCHES, own)
        with contextlib.closing(batches):
            found = [
                jax.device_get(
                    self._statistics(params, from_own_rows(self._mesh, batch)[0], jax.random.fold_in(key, step))
                )
                for step, batch in enumerate(batches, first)
            ]
        everywhere = replicated(self._mesh)
        head = jax.device_get(reshard(params["head"], everywhere))
        return params | {"head": jax.device_put(batch_norm.fold(head, batch_norm.pooled(found)), everywhere)}
