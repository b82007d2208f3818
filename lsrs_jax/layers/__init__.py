"""Linen modules over `lsrs_jax.orthogonal`, each 1-Lipschitz unless its docstring says otherwise.

Every module has, beside ``__call__``, ``output_shape(input_shape)`` and ``materialize(params, input_shape)``, which
returns the same layer as a plain function of plain arrays with its singular values proven on those very arrays.
"""

from lsrs_jax.layers.activation import GroupSort, Householder, MaxMin
from lsrs_jax.layers.base import Layer, Plain
from lsrs_jax.layers.encoder import Encoder
from lsrs_jax.layers.linear import OrthogonalConv, OrthogonalDense
from lsrs_jax.layers.resize import AveragePool, Channels, DepthToSpace, Flatten, Haar, L2Pool, Normalize, SpaceToDepth

__all__ = [
    "AveragePool", "Channels", "DepthToSpace", "Encoder", "Flatten", "GroupSort", "Haar", "Householder",
    "L2Pool", "Layer", "MaxMin", "Normalize", "OrthogonalConv", "OrthogonalDense", "Plain", "SpaceToDepth",
]  # fmt: skip
