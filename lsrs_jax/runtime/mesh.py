"""One-dimensional meshes of devices, and how arrays are placed on them."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "devices"


def local_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (by default those of this process), with the axis ``"devices"``."""
    return Mesh(np.asarray(devices or jax.local_devices()), (AXIS,), axis_types=(AxisType.Auto,))


def global_mesh() -> Mesh:
    """A mesh over the devices of all processes; the devices of one process are neighbours."""
    return local_mesh(sorted(jax.devices(), key=lambda device: (device.process_index, device.id)))


def callers_mesh() -> Mesh | None:
    """The mesh that ``jax.set_mesh`` has set; None without one, or while JAX traces a function."""
    if not jax.sharding.get_abstract_mesh().empty:
        with contextlib.suppress(ValueError):  # while a function is traced
            return jax.sharding.get_mesh()
    return None


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def split(mesh: Mesh) -> NamedSharding:
    """The leading axis is divided over the devices."""
    return NamedSharding(mesh, P(AXIS))


def on_the_first(arrays: Any) -> Any:
    """The copies of replicated arrays on the first device."""
    return jax.tree.map(lambda array: array.addressable_data(0), arrays)


def sharded(mesh: Mesh, tree: Any) -> Any:
    """Divides each array along its longest axis that is divisible by the number of devices; replicates the others."""

    def sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size and size % mesh.size == 0]
        if not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*[None] * longest, AXIS))

    return jax.tree.map(sharding, tree)


def reshard(tree: Any, shardings: Any) -> Any:
    """Moves arrays to shardings (one for all, or a tree of them); every process must give the same arrays."""
    return jax.jit(lambda tree: tree, out_shardings=shardings)(tree)


def own_rows(mesh: Mesh, size: int) -> slice:
    """The rows that belong to this process, of a batch of `size` rows that is divided over the mesh."""
    own = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
    each = size // mesh.size
    return slice(own[0] * each, (own[-1] + 1) * each)


def from_own_rows(mesh: Mesh, tree: Any) -> Any:
    """Builds arrays that are divided over the mesh by rows; every process gives its `own_rows`."""
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(split(mesh), rows), tree)
