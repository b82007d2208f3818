"""Orthogonal matrices and convolutions as pure JAX functions; exact spectra in NumPy. No Flax here."""

from lsrs_jax.orthogonal.convolution import FAMILIES, ConvFamily, family
from lsrs_jax.orthogonal.matrix import METHODS, bjorck_step, cayley, expm_skew, exponential
from lsrs_jax.orthogonal.reshape import circular_conv, depth_to_space, maxmin, resize_channels, space_to_depth
from lsrs_jax.orthogonal.shape import ConvShape
from lsrs_jax.orthogonal.spectrum import (
    conv_singular_values,
    dense_singular_values,
    frequency_singular_values,
)

__all__ = [
    "FAMILIES",
    "METHODS",
    "ConvFamily",
    "ConvShape",
    "bjorck_step",
    "cayley",
    "circular_conv",
    "conv_singular_values",
    "dense_singular_values",
    "depth_to_space",
    "expm_skew",
    "exponential",
    "family",
    "frequency_singular_values",
    "maxmin",
    "resize_channels",
    "space_to_depth",
]
