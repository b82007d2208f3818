"""Process start-up, meshes and shardings over the devices of this process."""

import os
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "devices"


def cache_compilations():
    """Lets XLA keep compiled programs between runs, in $JAX_COMPILATION_CACHE_DIR or the user's cache folder.

    A resume then runs the very program that the first half ran, whatever an autotuner would choose today.
    """
    if not jax.config.jax_compilation_cache_dir:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "lsrs_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def local_mesh(devices=None):
    """A one-dimensional mesh over `devices` (all local ones by default), axis ``"devices"``."""
    return Mesh(np.asarray(devices or jax.local_devices()), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh):
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def split(mesh):
    """The leading axis is divided over the devices."""
    return NamedSharding(mesh, P(AXIS))
