"""Runs the commands in this process or, where a test needs it, in a process of their own."""

import contextlib
import hashlib
import importlib
import io
import logging
import os
import signal
import socket
import subprocess
import sys
import warnings

import jax
import pytest

from lsrs_jax import cli
from support import ROOT

QUICK = [
    "--config=configs/digits.py",
    "--config.train.steps=60",
    "--config.train.log_every=20",
    "--config.train.evaluate_every=60",
    "--config.train.checkpoint_every=20",
    "--config.certify.n=1000",
    "--config.certify.stop=40",
]


def full_disk(size):
    """A prefix for a command that limits the size of every file to this many bytes."""
    code = "import os, resource, sys; n = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)); "
    return [sys.executable, "-c", code + "os.execv(sys.argv[2], sys.argv[2:])", str(size)]


def start(command, *arguments, devices=1, prefix=(), **environment):
    settings = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", f"lsrs_jax.{command}", *map(str, arguments)],
        cwd=ROOT,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_together(count, command, *arguments, devices=1, **environment):
    """Starts the `count` processes of one run; they communicate over localhost."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    settings = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), **environment}
    return [
        start(command, *arguments, devices=devices, JAX_PROCESS_ID=str(index), **settings) for index in range(count)
    ]


def run_together(count, command, *arguments, **settings):
    """Runs several processes that must all succeed; returns the stdout of the first."""
    ends = [finish(process) for process in start_together(count, command, *arguments, **settings)]
    assert [code for code, _, _ in ends] == [0] * count, "\n".join(err for _, _, err in ends)
    return ends[0][1]


def finish(process):
    """Waits for a process; returns (exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def run(command, *arguments, devices=1, **settings):
    """Stdout of a command that must succeed; see `ended`."""
    code, out, err = ended(command, *arguments, devices=devices, **settings)
    assert code == 0, err
    return out


def refused(command, *arguments, devices=1, **settings):
    """The one line on stderr of a command that must exit with 2; see `ended`."""
    code, _, err = ended(command, *arguments, devices=devices, **settings)
    lines = err.strip().splitlines()
    assert code == 2, (code, err)
    assert len(lines) == 1, err
    assert lines[0].startswith("error: "), err
    return lines[0]


def ended(command, *arguments, devices=1, process=False, **settings):
    """(exit code, stdout, stderr) of a command.

    It runs in this process unless `process` is true, or an environment or a prefix is given.
    """
    if process or settings:
        return finish(start(command, *arguments, devices=devices, **settings))
    out, err, code = io.StringIO(), io.StringIO(), 0
    with as_a_process(command, arguments, devices), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.execute(importlib.import_module(f"lsrs_jax.{command}").run)
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def as_a_process(command, arguments, count):
    """Gives a command its arguments, the repository as working directory, and `count` devices; undoes all changes."""
    hook, logger = sys.unraisablehook, logging.getLogger("asyncio")
    level, handlers = logger.level, {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(ROOT), warnings.catch_warnings():
        # The warning filters of Python, not those of pytest.
        warnings.simplefilter("default")
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        patch.delitem(sys.modules, "config_config", raising=False)  # the configuration of the command before
        patch.setattr(sys, "argv", [f"lsrs_jax.{command}", *map(str, arguments)])
        for name, own in (("devices", jax.devices), ("local_devices", jax.local_devices)):
            patch.setattr(jax, name, lambda *args, own=own, **named: own(*args, **named)[:count])
        for name in ("device_count", "local_device_count"):
            patch.setattr(jax, name, lambda *_: count)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            sys.unraisablehook = hook
            logger.setLevel(level)


def fingerprint(folder):
    """The digest of every file below a folder, by its path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def without_time(path):
    """The rows of a certificates.tsv without the time column."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    column = rows[0].index("time")
    return [row[:column] + row[column + 1 :] for row in rows]


def truncate_checkpoint(workdir):
    """Cuts every file of the newest model in half."""
    newest = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    for path in (newest / "model").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
