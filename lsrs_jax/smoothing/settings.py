"""The settings of a `sampler.Sampler`."""

from typing import Any

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.format import NOISE_OFFSETS
from lsrs_jax.runtime.validate import choice
from lsrs_jax.smoothing.arithmetic import ARITHMETICS
from lsrs_jax.smoothing.derivation import check_sigma

SPMD = ("shard_map", "pmap")
FLAGS = ("channels_last", "integer_first_layer")  # bools that choose the program of the head


def check_settings(sigma: Any, arithmetic: Any, noise: Any, tile: Any, spmd: Any, **flags: Any) -> None:
    """Raises UserError for settings of a `Sampler` that are wrong for latents of any shape."""
    check_sigma(sigma)
    choice("arithmetic", arithmetic, ARITHMETICS)
    whole = isinstance(tile, tuple | list) and all(type(size) is int and size >= 1 for size in tile)
    if not whole or len(tile) != 2 or tile[0] * tile[1] < 2:
        raise UserError(f"tile must be two whole numbers (images, samples) with a product of 2 or more, got {tile!r}")
    choice("spmd", spmd, SPMD)
    choice("noise", noise, NOISE_OFFSETS)
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise UserError(f"{name} must be True or False, got {value!r}")
