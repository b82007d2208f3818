"""Runs commands in child processes, several at a time."""

import collections
import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_SECONDS_PER_POLL = 0.1
# A program that asks the kernel (prctl, PR_SET_PDEATHSIG) to kill it with its parent, and becomes the command.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclasses.dataclass
class Job:
    """Commands that run one after the other; each begins if the one before has succeeded.

    `log` receives what they print. `seconds` is the time since the first one began, when the last one has ended, and
    `failed` the command that failed with its exit code.
    """

    name: str
    commands: Sequence[Sequence[str]]  # arguments of ``lsrs``
    log: Path
    seconds: float = 0.0
    failed: tuple[str, int] | None = None

    @property
    def last_line(self) -> str:
        """The last line in the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


@dataclasses.dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    started: float
    number: int = 0  # of its command


def run_jobs(jobs: Sequence[Job], together: int, finished: Callable[[Job, float], object]) -> None:
    """Runs jobs, `together` at a time; calls `finished` after each, with the seconds that the others will still take.

    Every child gets an equal share of the cores and of a GPU's memory, also when fewer are left: the numbers that a
    training computes may depend on the number of its threads. If this process is interrupted, it ends its children in
    the way in which it was ended itself, and waits for them. On Linux they never outlive it, even if it is killed.
    """
    waiting, running, seconds = collections.deque(jobs), list[_Running](), list[float]()
    environment = _share(together)
    try:
        while waiting or running:
            while waiting and len(running) < together:
                job = waiting.popleft()
                job.log.parent.mkdir(parents=True, exist_ok=True)
                running.append(_Running(job, _start(job, 0, environment), time.monotonic()))
            time.sleep(_SECONDS_PER_POLL)
            for child in list(running):
                if (code := child.process.poll()) is None:
                    continue
                job, child.number = child.job, child.number + 1
                if code == 0 and child.number < len(job.commands):
                    child.process = _start(job, child.number, environment)
                    continue
                job.failed = (job.commands[child.number - 1][0], code) if code else None
                job.seconds = time.monotonic() - child.started
                seconds.append(job.seconds)
                running.remove(child)
                finished(job, _left(seconds, [other.started for other in running], len(waiting)) / together)
    finally:
        for child in running:
            with contextlib.suppress(ProcessLookupError):
                child.process.terminate()
        for child in running:
            child.process.wait()


def _left(seconds: Sequence[float], started: Sequence[float], waiting: int) -> float:
    """The work that is left, if the jobs that run or wait take as long as those that ended."""
    mean, now = sum(seconds) / len(seconds), time.monotonic()
    return mean * waiting + sum(max(mean - (now - start), 0.0) for start in started)


def _start(job: Job, number: int, environment: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "lsrs_jax", *job.commands[number]]
    if sys.platform == "linux":
        command = [sys.executable, "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
    with job.log.open("ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def _share(together: int) -> dict[str, str]:
    """The environment of one of `together` children: threads of XLA and of BLAS, and memory of a GPU."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = str(max(1, cores // together))
    own = {"NPROC": threads, "OMP_NUM_THREADS": threads, "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / together:.2f}"}
    return own | dict(os.environ) if together > 1 else dict(os.environ)
