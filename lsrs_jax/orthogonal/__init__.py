"""Orthogonal matrices and convolutions as pure JAX functions, and their exact singular values in NumPy; no Flax."""

from lsrs_jax.orthogonal.activation import group_sort, householder, maxmin
from lsrs_jax.orthogonal.families import FAMILIES, ConvFamily, build_kernels, family
from lsrs_jax.orthogonal.families.family import convolve
from lsrs_jax.orthogonal.matrix import METHODS, bjorck, bjorck_step, cayley, expm_skew, exponential, gram_bound
from lsrs_jax.orthogonal.resize import average_pool, depth_to_space, haar, l2_pool, resize_channels, space_to_depth
from lsrs_jax.orthogonal.shape import ConvShape
from lsrs_jax.orthogonal.spectrum import Spectrum, conv_singular_values, dense_singular_values, kernel_spectrum

__all__ = [
    "FAMILIES", "METHODS", "ConvFamily", "ConvShape", "Spectrum", "average_pool", "bjorck", "bjorck_step",
    "build_kernels", "cayley", "conv_singular_values", "convolve", "dense_singular_values", "depth_to_space",
    "expm_skew", "exponential", "family", "gram_bound", "group_sort", "haar", "householder", "kernel_spectrum",
    "l2_pool", "maxmin", "resize_channels", "space_to_depth",
]  # fmt: skip
