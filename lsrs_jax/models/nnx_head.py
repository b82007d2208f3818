"""A module of NNX as a module of Linen, whose parameters are a plain tree of arrays."""

from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from lsrs_jax.runtime.errors import UserError


class NnxModule(nn.Module):
    """An NNX class with its keyword arguments; it is called in eval mode, ``rngs`` comes from the parameters' key.

    Raises UserError for a class with state besides parameters, such as batch statistics: rows must be independent.
    """

    made: type
    arguments: tuple[tuple[str, Any], ...]

    def _make(self, key: jax.Array) -> nnx.Module:
        module = self.made(**dict(self.arguments), rngs=nnx.Rngs(key))
        module.eval()
        return module

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        abstract = nnx.eval_shape(lambda: self._make(jax.random.key(0)))
        graph, shapes, rest = nnx.split(abstract, nnx.Param, ...)
        kinds = {type(leaf).__name__ for leaf in jax.tree.leaves(rest, is_leaf=lambda x: isinstance(x, nnx.Variable))}
        if others := sorted(kinds - {"RngKey", "RngCount", "RngState"}):
            raise UserError(f"{self.made.__name__} has state besides its parameters ({', '.join(others)}): {_REMEDY}")
        values = self.param("nnx", lambda key: nnx.to_pure_dict(nnx.state(self._make(key), nnx.Param)))
        nnx.replace_by_pure_dict(shapes, values)
        unused = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), rest)
        return nnx.merge(graph, shapes, unused)(x)


_REMEDY = "normalise with GroupNorm or LayerNorm, because rows must be independent"
