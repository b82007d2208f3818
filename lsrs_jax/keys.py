"""One place where random streams part, so that no key is used twice.

Every stream of the project is `threefry2x32` whatever ``jax_default_prng_impl`` says (``rbg`` gives other bits under
vmap and on other hardware) and begins with a domain. The bits also depend on ``jax_threefry_partitionable`` and on
``jax_enable_x64``; `pinned` fixes both while a stream is drawn.
"""

import contextlib

import jax

from lsrs_jax.errors import UserError

# Certification has an arbitrary large number: somebody else's training, which folds small ones (an epoch, a step) into
# the key of the same seed, stays apart from it.
DOMAINS = {"init": 1, "train": 2, "evaluate": 3, "certify": 0xE35A18C7, "probe": 5, "audit": 6}
IMPLEMENTATION = "threefry2x32"


def root_key(seed):
    """The key of a seed, from which every domain descends; nothing is drawn from it directly."""
    return jax.random.key(seed, impl=IMPLEMENTATION)


def domain_key(seed, domain):
    """The root key of one domain, ``jax.random.key`` of shape ()."""
    return jax.random.fold_in(root_key(seed), DOMAINS[domain])


def check_key(key):
    """A caller's key as a typed threefry key of shape (); raises UserError for any other."""
    if not isinstance(key, jax.Array) or not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise UserError("key must be a typed key: jax.random.key(seed, impl='threefry2x32')")
    if str(jax.random.key_impl(key)) != IMPLEMENTATION or key.shape != ():
        raise UserError(
            f"key must be one threefry2x32 key, got {jax.random.key_impl(key)} of shape {key.shape}: other generators "
            "do not give the same bits on another device layout; use jax.random.key(seed, impl='threefry2x32')"
        )
    return key


@contextlib.contextmanager
def pinned():
    """A context in which random bits and dtypes do not depend on the user's JAX flags."""
    with jax.enable_x64(False), jax.threefry_partitionable(True):
        yield
