"""Processes of one run: how they find and wait for each other, and meshes and shardings over their devices."""

import contextlib
import dataclasses
import itertools
import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import multihost

from lsrs_jax.errors import OthersLost, UserError
from lsrs_jax.interrupt import Interrupted

AXIS = "devices"
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SECONDS_TO_MEET = 600  # until the last process has started
_HEARTBEAT_SECONDS = 30  # without a sign of life a process is given up, and all others end
_WEEK = 7 * 24 * 3600


@dataclasses.dataclass(frozen=True)
class Place:
    """Which of the processes of a run this one is.

    Attributes:
      index: of this process.
      count: of processes.
    """

    index: int = 0
    count: int = 1

    @property
    def leads(self):
        """Whether this process writes what exists once, and talks."""
        return self.index == 0

    def wait(self, what):
        """Returns when every process has come to this line, a week later at the latest. No device takes part.

        Raises:
          OthersLost: where one of them has ended.
        """
        if self.count > 1:
            name = f"{what} {next(_meetings)}"  # no barrier is used twice
            try:
                multihost.sync_global_processes(name, timeout=_WEEK, processes=set(range(self.count)))
            except RuntimeError as error:
                raise OthersLost(
                    f"another process of this run ended before {what}; the same command resumes"
                ) from error

    @contextlib.contextmanager
    def together(self, what):
        """A piece of work of every process: where one fails, all end, that one with its own error.

        Raises:
          UserError: in the processes that did not fail, naming those that did.
        """
        error = None
        try:
            yield
        except (UserError, OSError) as own:
            error = own
        if self.count == 1:
            if error:
                raise error
            return
        self.wait(what)
        failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(error is not None)))
        if error:
            raise error
        if len(failed):
            raise UserError(f"process {failed[0]} of {self.count} failed at {what}; what it says is in its own output")


ALONE = Place()
_meetings = itertools.count()


@contextlib.contextmanager
def started():
    """Joins the processes that the environment names, before JAX is used; yields the `Place` of this one.

    Processes are found by ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID``; else by what ``srun`` or ``mpirun`` tell every one of theirs; else, with
    ``JAX_DISTRIBUTED=auto`` or several names in ``TPU_WORKER_HOSTNAMES``, by whatever JAX finds (Cloud TPU pods).
    ``JAX_DISTRIBUTED=off`` keeps a process alone. All but the first print nothing but errors.

    Raises:
      UserError: where the environment contradicts itself, or JAX finds no device.
      OthersLost: where they do not find each other.
    """
    arguments = _arguments(os.environ)
    if arguments is None:
        check_platform()
        yield ALONE
        return
    # Its handler would take the signals that `interrupt` waits for.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **arguments, initialization_timeout=_SECONDS_TO_MEET, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        lost = OthersLost if isinstance(error, RuntimeError) else UserError
        raise lost(
            f"this process did not find the others of its run ({line}); check {', '.join(_EXPLICIT)} in all of them"
        ) from error
    place = Place(jax.process_index(), jax.process_count())
    if not place.leads:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    try:
        yield place
    except Interrupted as stop:
        if stop.agreed:
            jax.distributed.shutdown()
        raise
    # Who leaves without a word counts as lost.
    jax.distributed.shutdown()


def check_platform():
    """Raises UserError where JAX finds no device to work on."""
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # the second where a plugin is half installed
        line = " ".join(str(error).split())[:300]
        raise UserError(
            f"JAX cannot start ({line or type(error).__name__}): check JAX_PLATFORMS and the driver; JAX_PLATFORMS=cpu "
            "works everywhere"
        ) from error


def _arguments(environment):
    """Those of `jax.distributed.initialize`; None where this process is alone."""
    given = [name for name in _EXPLICIT if environment.get(name)]
    if environment.get("JAX_DISTRIBUTED") == "off":
        return None
    if given:
        missing = [name for name in _EXPLICIT if name not in given]
        if missing:
            raise UserError(f"{', '.join(missing)} must be set where {', '.join(given)} is")
        try:
            count, index = int(environment[_EXPLICIT[1]]), int(environment[_EXPLICIT[2]])
        except ValueError:
            count = index = -1
        if not 0 <= index < count:
            raise UserError(
                f"{_EXPLICIT[1]}={environment[_EXPLICIT[1]]} and {_EXPLICIT[2]}={environment[_EXPLICIT[2]]} must be "
                "whole numbers, the second from 0 on and below the first"
            )
        if count == 1:
            return None
        host, _, port = environment[_EXPLICIT[0]].rpartition(":")
        if not (host and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 2**16):
            raise UserError(f"{_EXPLICIT[0]} must be host:port of process 0, got {environment[_EXPLICIT[0]]!r}")
        return {"coordinator_address": environment[_EXPLICIT[0]], "num_processes": count, "process_id": index}
    several = [environment.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    pod = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    if any(number not in ("", "1") for number in several) or pod or environment.get("JAX_DISTRIBUTED") == "auto":
        return {}
    return None


def cache_compilations():
    """Lets XLA keep compiled programs between runs, in $JAX_COMPILATION_CACHE_DIR or the user's cache folder.

    A resume then runs the very program that the first half ran, whatever an autotuner would choose today.
    """
    if not jax.config.jax_compilation_cache_dir:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "lsrs_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def devices():
    """``4 x cpu in 2 processes``, for the log."""
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {jax.default_backend()}{processes}"


def _mesh(devices):
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def local_mesh(devices=None):
    """A one-dimensional mesh over `devices` (all local ones by default), axis ``"devices"``."""
    return _mesh(devices or jax.local_devices())


def global_mesh():
    """A one-dimensional mesh over the devices of all processes, those of each process side by side."""
    return _mesh(sorted(jax.devices(), key=lambda device: (device.process_index, device.id)))


def replicated(mesh):
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def split(mesh):
    """The leading axis is divided over the devices."""
    return NamedSharding(mesh, P(AXIS))


def sharded(mesh, tree):
    """Shardings that divide each array along its longest axis that the devices divide; the others are replicated."""

    def of(leaf):
        axes = [axis for axis, size in enumerate(leaf.shape) if size and size % mesh.size == 0]
        if not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*[None] * longest, AXIS))

    return jax.tree.map(of, tree)


def placed(tree, shardings):
    """Arrays as these shardings say (one for all, or a tree of them); every process must hold, or give, the same."""
    return jax.jit(lambda tree: tree, out_shardings=shardings)(tree)


def own_rows(mesh, size):
    """The rows of a batch of this size, divided over the mesh, that belong to this process: a slice."""
    own = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
    each = size // mesh.size
    return slice(own[0] * each, (own[-1] + 1) * each)


def joined(mesh, tree):
    """Arrays divided over the mesh by their first axis, from the rows that each process holds (`own_rows`)."""
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(split(mesh), rows), tree)
