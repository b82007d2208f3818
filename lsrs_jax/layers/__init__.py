"""Linen modules over `lsrs_jax.orthogonal`, each 1-Lipschitz unless its docstring says otherwise.

Each also has ``output_shape(input_shape)`` and ``materialize(params, input_shape)``, which returns the layer as a
`Plain`: a pure function, its float64 arrays, and the singular values proven on them. `lipschitz_report` proves the
constant of a network of these layers; `encoder_selectivity` measures what an encoder does to distances.
"""

from lsrs_jax.layers.activation import GroupSort, Householder, MaxMin
from lsrs_jax.layers.base import Layer, Plain
from lsrs_jax.layers.linear import Encoder, OrthogonalConv, OrthogonalDense
from lsrs_jax.layers.network import lipschitz_report, materialize_network
from lsrs_jax.layers.resize import AveragePool, Channels, DepthToSpace, Flatten, Haar, L2Pool, Normalize, SpaceToDepth
from lsrs_jax.layers.selectivity import Selectivity, encoder_selectivity

__all__ = [
    "AveragePool", "Channels", "DepthToSpace", "Encoder", "Flatten", "GroupSort", "Haar", "Householder",
    "L2Pool", "Layer", "MaxMin", "Normalize", "OrthogonalConv", "OrthogonalDense", "Plain", "Selectivity",
    "SpaceToDepth", "encoder_selectivity", "lipschitz_report", "materialize_network",
]  # fmt: skip
