"""One-dimensional meshes of devices, and how arrays lie on them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "devices"


def _mesh(devices: Sequence[Any]) -> Mesh:
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def local_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (all local ones by default), with the axis ``"devices"``."""
    return _mesh(devices or jax.local_devices())


def global_mesh() -> Mesh:
    """A mesh over the devices of all processes; those of one process are neighbours."""
    return _mesh(sorted(jax.devices(), key=lambda device: (device.process_index, device.id)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def split(mesh: Mesh) -> NamedSharding:
    """The leading axis is divided over the devices."""
    return NamedSharding(mesh, P(AXIS))


def sharded(mesh: Mesh, tree: Any) -> Any:
    """Shardings that divide each array along its longest axis that the devices divide; the others are replicated."""

    def sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size and size % mesh.size == 0]
        if not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*[None] * longest, AXIS))

    return jax.tree.map(sharding, tree)


def reshard(tree: Any, shardings: Any) -> Any:
    """Arrays moved to shardings (one for all, or a tree of them); every process must give the same arrays."""
    return jax.jit(lambda tree: tree, out_shardings=shardings)(tree)


def own_rows(mesh: Mesh, size: int) -> slice:
    """The rows of a batch of this size, divided over the mesh, that belong to this process."""
    own = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
    each = size // mesh.size
    return slice(own[0] * each, (own[-1] + 1) * each)


def from_own_rows(mesh: Mesh, tree: Any) -> Any:
    """Arrays divided over the mesh by their first axis, made of the rows that each process holds (`own_rows`)."""
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(split(mesh), rows), tree)
