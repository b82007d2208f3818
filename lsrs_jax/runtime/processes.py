"""The processes of one run: how they find each other, and how they wait for each other.

Functions that need JAX import it themselves, because ledgers are also read where JAX is not installed.
"""

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lsrs_jax.runtime import cache
from lsrs_jax.runtime.errors import OthersLost, UserError, first_line
from lsrs_jax.runtime.signals import Interrupted

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_meetings = itertools.count()


@dataclasses.dataclass(frozen=True)
class Process:
    """This process of a run: number `index` of `count`."""

    index: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """True for the one process that prints and writes the files that exist once."""
        return self.index == 0

    def wait(self, what: str) -> None:
        """Waits until every process has called this, for at most a week. Raises OthersLost if another one has ended."""
        if self.count == 1:
            return
        from orbax.checkpoint import multihost

        name = f"{what} {next(_meetings)}"  # no barrier is used twice
        try:
            multihost.sync_global_processes(name, timeout=7 * 24 * 3600, processes=set(range(self.count)))
        except RuntimeError as error:
            raise OthersLost(f"another process of this run ended before {what}; the same command resumes") from error

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A block that all processes run. If it fails in one of them, the others raise a UserError that names it."""
        error, failed = None, np.zeros(0, int)
        try:
            yield
        except (UserError, OSError) as own:
            error = own
        if self.count > 1:
            from jax.experimental import multihost_utils

            self.wait(what)
            failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(error is not None)))
        if error:
            raise error
        if len(failed):
            raise UserError(f"process {failed[0]} of {self.count} failed at {what}; its own output says why")


ALONE = Process()


@contextlib.contextmanager
def started() -> Iterator[Process]:
    """Joins the processes that the environment names, before JAX is used; yields the `Process` of this one.

    The processes find each other by ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID``; else by what ``srun`` or ``mpirun`` tell each of them; else, with ``JAX_DISTRIBUTED=auto`` or
    several names in ``TPU_WORKER_HOSTNAMES``, by what JAX finds (Cloud TPU pods). With ``JAX_DISTRIBUTED=off`` a
    process runs alone. All processes except the first print errors only. Raises UserError if the environment
    contradicts itself or JAX finds no device, and OthersLost if the processes do not find each other.
    """
    import jax

    arguments = _arguments(os.environ)
    if arguments is None:
        check_platform()
        yield ALONE
        return
    # JAX's preemption service would take over the signals that the module `signals` handles.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        # A process that is silent for 30 seconds counts as lost, and all others end.
        jax.distributed.initialize(**arguments, initialization_timeout=600, heartbeat_timeout_seconds=30)
    except (RuntimeError, ValueError) as error:
        lost = OthersLost if isinstance(error, RuntimeError) else UserError
        remedy = f"check {', '.join(_EXPLICIT)} in all of them"
        raise lost(f"this process did not find the others of its run ({str(error)[:200]}); {remedy}") from error
    process = Process(jax.process_index(), jax.process_count())
    if not process.leads:
        sys.stdout = open(os.devnull, "w", errors="replace")  # noqa: SIM115 (until the process ends)
    try:
        yield process
    except Interrupted as stop:
        if stop.agreed:
            jax.distributed.shutdown()
        raise
    jax.distributed.shutdown()  # a process that ends without this call counts as lost


def check_platform() -> None:
    """Raises UserError if JAX finds no device."""
    import jax

    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # an AssertionError if a plugin is not completely installed
        remedy = "check JAX_PLATFORMS and the driver; JAX_PLATFORMS=cpu works everywhere"
        raise UserError(f"JAX cannot start ({str(error)[:300].strip() or first_line(error)}): {remedy}") from error


def _arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None if this process runs alone."""
    missing = [name for name in _EXPLICIT if not environment.get(name)]
    if environment.get("JAX_DISTRIBUTED") == "off":
        return None
    if len(missing) == len(_EXPLICIT):
        counts = {environment.get(name, "") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")}
        pod = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        return {} if counts - {"", "1"} or pod or environment.get("JAX_DISTRIBUTED") == "auto" else None
    if missing:
        given = ", ".join(name for name in _EXPLICIT if name not in missing)
        raise UserError(f"{', '.join(missing)} must be set where {given} is")
    address, number, rank = (environment[name] for name in _EXPLICIT)
    try:
        count, index = int(number), int(rank)
    except ValueError:
        count = index = -1
    if not 0 <= index < count:
        words = "must be whole numbers, the second from 0 on and below the first"
        raise UserError(f"{_EXPLICIT[1]}={number} and {_EXPLICIT[2]}={rank} {words}")
    if count == 1:
        return None
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 2**16):
        raise UserError(f"{_EXPLICIT[0]} must be host:port of process 0, got {address!r}")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def cache_compilations() -> None:
    """Lets XLA keep compiled programs between runs, in $JAX_COMPILATION_CACHE_DIR or the user's cache folder.

    A resumed run then executes exactly the program of its first half, even if an autotuner would choose another one.
    What a kill or a full disk has cut off there is compiled again, without a warning. The user's cache folder also
    keeps the tables of `runtime.cache`.
    """
    import jax

    from lsrs_jax.runtime.logs import ignore_warnings

    ignore_warnings("Error (reading|writing) persistent compilation cache entry")
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lsrs_jax"
    cache.folder = home / "tables"
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(home))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def devices() -> str:
    """``4 x cpu in 2 processes``, for the log."""
    import jax

    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {jax.default_backend()}{processes}"
