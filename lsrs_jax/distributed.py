"""Meshes and shardings over the devices of this process."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "devices"


def local_mesh(devices=None):
    """A one-dimensional mesh over `devices` (all local ones by default), axis ``"devices"``."""
    return Mesh(np.asarray(devices or jax.local_devices()), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh):
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def split(mesh):
    """The leading axis is divided over the devices."""
    return NamedSharding(mesh, P(AXIS))
