"""Random keys. Every stream of the project has its own key domain, so that no key is used twice.

All streams are ``threefry2x32``, whatever ``jax_default_prng_impl`` says: ``rbg`` returns other bits under vmap and on
other hardware. The bits also depend on ``jax_threefry_partitionable`` and ``jax_enable_x64``; `pinned` sets both.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.format import KEY_DOMAINS, PRNG
from lsrs_jax.runtime.mesh import callers_mesh


def root_key(seed: int) -> jax.Array:
    """The key of a seed. The keys of all domains are derived from it; nothing is drawn from it directly."""
    return jax.random.key(seed, impl=PRNG)


def domain_key(seed: int, domain: str) -> jax.Array:
    """The key of one of `format.KEY_DOMAINS`, of shape ()."""
    return jax.random.fold_in(root_key(seed), KEY_DOMAINS[domain])


def check_key(key: Any) -> jax.Array:
    """Returns a caller's key; raises UserError unless it is one typed threefry key of shape ()."""
    typed = isinstance(key, jax.Array) and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    if typed and str(jax.random.key_impl(key)) == PRNG and key.shape == ():
        return key
    raise UserError(
        f"key must be one typed key, jax.random.key(seed, impl='threefry2x32'), got {key!r}: other generators do not "
        "return the same bits on another number of devices"
    )


@contextlib.contextmanager
def standard_flags() -> Iterator[None]:
    """A context with JAX's own rules for dtypes and shapes, with compilation, and without a mesh of the caller."""
    mesh = jax.set_mesh(None) if callers_mesh() else contextlib.nullcontext()
    with mesh, jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.disable_jit(False):
        yield


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """A context in which random bits, dtypes and devices do not depend on the user's JAX flags."""
    with standard_flags(), jax.enable_x64(False), jax.threefry_partitionable(True):
        yield
