"""The processes of one run: how they find each other, and how they wait for each other.

Functions that need JAX import it themselves: ledgers are read where JAX is not installed.
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

from lsrs_jax.runtime.errors import OthersLost, UserError, first_line
from lsrs_jax.runtime.signals import Interrupted

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SECONDS_TO_MEET = 600  # until the last process has started
_HEARTBEAT_SECONDS = 30  # a process that is silent for so long is given up, and all others end
_WEEK = 7 * 24 * 3600
_meetings = itertools.count()


@dataclasses.dataclass(frozen=True)
class Process:
    """This process among those of its run: number `index` of `count`."""

    index: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the files that exist once, and prints."""
        return self.index == 0

    def wait(self, what: str) -> None:
        """Returns when every process has come to this line, after a week at the latest. No device takes part.

        Raises:
          OthersLost: where one of them has ended.
        """
        if self.count == 1:
            return
        from orbax.checkpoint import multihost

        name = f"{what} {next(_meetings)}"  # no barrier is used twice
        try:
            multihost.sync_global_processes(name, timeout=_WEEK, processes=set(range(self.count)))
        except RuntimeError as error:
            raise OthersLost(f"another process of this run ended before {what}; the same command resumes") from error

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A block that all processes run. Where one fails, all end: that one with its own error.

        Raises:
          UserError: in the processes that did not fail, naming one that did.
        """
        error = None
        try:
            yield
        except (UserError, OSError) as own:
            error = own
        failed = []
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

    Processes are found by ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID``; else by what ``srun`` or ``mpirun`` tell each of them; else, with ``JAX_DISTRIBUTED=auto`` or
    several names in ``TPU_WORKER_HOSTNAMES``, by what JAX finds (Cloud TPU pods). ``JAX_DISTRIBUTED=off`` keeps a
    process alone. All processes but the first print errors only. Raises UserError where the environment contradicts
    itself or JAX finds no device, and OthersLost where the processes do not find each other.
    """
    import jax

    arguments = _arguments(os.environ)
    if arguments is None:
        check_platform()
        yield ALONE
        return
    # The handler of this service would take the signals that `signals` handles.
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
    process = Process(jax.process_index(), jax.process_count())
    if not process.leads:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    try:
        yield process
    except Interrupted as stop:
        if stop.agreed:
            jax.distributed.shutdown()
        raise
    # A process that leaves without this call counts as lost.
    jax.distributed.shutdown()


def check_platform() -> None:
    """Raises UserError where JAX finds no device to work on."""
    import jax

    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # an AssertionError where a plugin is half installed
        line = " ".join(str(error).split())[:300] or first_line(error)
        raise UserError(
            f"JAX cannot start ({line}): check JAX_PLATFORMS and the driver; JAX_PLATFORMS=cpu works everywhere"
        ) from error


def _arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None where this process is alone."""
    given = [name for name in _EXPLICIT if environment.get(name)]
    if environment.get("JAX_DISTRIBUTED") == "off":
        return None
    if not given:
        several = [environment.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
        pod = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        many = any(number not in ("", "1") for number in several) or pod or environment.get("JAX_DISTRIBUTED") == "auto"
        return {} if many else None
    missing = [name for name in _EXPLICIT if name not in given]
    if missing:
        raise UserError(f"{', '.join(missing)} must be set where {', '.join(given)} is")
    address, number, rank = (environment[name] for name in _EXPLICIT)
    try:
        count, index = int(number), int(rank)
    except ValueError:
        count = index = -1
    if not 0 <= index < count:
        raise UserError(
            f"{_EXPLICIT[1]}={number} and {_EXPLICIT[2]}={rank} must be whole numbers, the second from 0 on and below "
            "the first"
        )
    if count == 1:
        return None
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 2**16):
        raise UserError(f"{_EXPLICIT[0]} must be host:port of process 0, got {address!r}")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def cache_compilations() -> None:
    """Lets XLA keep compiled programs between runs, in $JAX_COMPILATION_CACHE_DIR or the user's cache folder.

    A resumed run then executes the very program of its first half, whatever an autotuner would choose today.
    """
    import jax

    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "lsrs_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def devices() -> str:
    """``4 x cpu in 2 processes``, for the log."""
    import jax

    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {jax.default_backend()}{processes}"
