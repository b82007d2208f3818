"""After any interruption, the same command gives the same parameters and certificates as an undisturbed run."""

import collections
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lsrs_jax import cli
from lsrs_jax.runtime import signals
from lsrs_jax.training.metrics import Metrics
from support.commands import QUICK, ROOT, ended, finish, full_disk, run, start, without_time

TRAIN = [*QUICK, "--config.train.steps=400", "--config.train.checkpoint_every=100", "--config.train.evaluate_every=400"]
CERTIFY = ["--config.certify.n=30001", "--config.certify.stop=48", "--config.certify.tile=(2,8)"]
CERTIFY += ["--config.certify.schedule=staged"]


ARGUMENTS = {"train": TRAIN, "certify": CERTIFY}


def launch(command, workdir, prefix=()):
    return start(command, *ARGUMENTS[command], f"--workdir={workdir}", devices=2, prefix=prefix)


def complete(command, workdir):
    """Runs a command to its end, in this process."""
    run(command, *ARGUMENTS[command], f"--workdir={workdir}", devices=2)


def refused(process):
    """The exit code of a process that must succeed or be refused with one line."""
    code, _, err = finish(process)
    assert code in (0, 2), (code, err)
    if code == 2:
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
    return code


# The messages of the command, and of its imports.
INTERRUPTED = ("interrupted; the same command resumes\n", "interrupted before anything was done\n")


# Each fault runs a command in a workdir and disturbs it, most at the moment for which `wait(process)` waits. It returns
# whether it disturbed the command.


def signalled(number):
    def fault(command, workdir, rng, wait):
        process = launch(command, workdir)
        wait(process)
        process.send_signal(number)
        code, _, err = finish(process)
        # Before the package is imported, a signal has the effect that it has on any Python program.
        assert code in (0, -number, 128 + number, 1 if number == signal.SIGINT else 0), (code, err)
        if code == 128 + number:
            assert err in INTERRUPTED, err
        return code != 0

    return fault


def disk_is_full(command, workdir, rng, wait):
    """No file may grow beyond some size."""
    largest = max((path.stat().st_size for path in workdir.rglob("*.tsv")), default=0)
    size = rng.choice([rng.randrange(2000), largest + rng.randrange(20_000), 300_000])
    return refused(launch(command, workdir, full_disk(size))) == 2


def read_only(command, workdir, rng, wait):
    """Nothing in the workdir may be written."""
    if os.getuid() == 0 and not shutil.which("setpriv"):
        return False
    folders = [workdir, *(path for path in workdir.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    # Without these capabilities, root cannot write everywhere.
    prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    try:
        code = refused(launch(command, workdir, prefix))
        assert code == 2 or command == "train"  # a finished training has nothing to write
        return code == 2
    finally:
        for folder in folders:
            folder.chmod(0o755)


def second_process(command, workdir, rng, wait):
    first = launch(command, workdir)
    wait(first)
    second = launch(command, workdir)
    codes = [refused(process) for process in (first, second)]
    assert 0 in codes
    return 2 in codes


ITEMS = {"train": ("model", "train"), "certify": ("model",)}  # the items of a checkpoint that each command reads


def corrupt_checkpoint(command, workdir, rng, wait):
    """Changes bytes of the largest file of the newest checkpoint, and restores them after the run."""
    steps = sorted(
        (workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name) if path.name.isdigit() else 0
    )
    files = (
        [
            path
            for item in ITEMS[command]
            for path in (steps[-1] / item).rglob("*")
            if path.is_file() and path.stat().st_size
        ]
        if steps
        else []
    )
    if not files:
        return False
    path = max(files, key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    for _ in range(20):
        place = rng.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :])
        # A finished training reads only the steps of its checkpoints.
    code = refused(launch(command, workdir))
    if path.exists():  # a training that did not read the damaged bytes succeeds and drops old checkpoints
        path.write_bytes(content)
    return code == 2


def torn_line(command, workdir, rng, wait):
    """Kills the command and cuts the end off its append-only file, as a power cut may do."""
    killed = signalled(signal.SIGKILL)(command, workdir, rng, wait)
    name = {"train": "metrics.jsonl", "certify": "votes.0.tsv"}[command]
    for path in workdir.rglob(name):
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.truncate(max(0, size - rng.randrange(1, 200)))
    return killed


FAULTS = {
    "SIGKILL": signalled(signal.SIGKILL),
    "SIGTERM": signalled(signal.SIGTERM),
    "SIGINT": signalled(signal.SIGINT),
    "full disk": disk_is_full,
    "read-only": read_only,
    "second process": second_process,
    "corrupt checkpoint": corrupt_checkpoint,
    "torn line": torn_line,
}


@pytest.fixture(scope="module")
def home():
    """A folder that other users can enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def undisturbed(home):
    """The workdir of an undisturbed run."""
    for command in ARGUMENTS:
        complete(command, home / "whole")
    return home / "whole"


def parameters(workdir):
    metas = sorted((workdir / "checkpoints").glob("*/meta/metadata"), key=lambda path: int(path.parts[-3]))
    return json.loads(metas[-1].read_text())


def after_the_next_line(command, workdir):
    """A function that waits until a process of the command has written a result."""

    def size():
        files = workdir.glob("metrics.jsonl" if command == "train" else "certify/default/votes.0.tsv")
        return sum(path.stat().st_size for path in files)

    def wait(process):
        before = size()
        while process.poll() is None and size() <= max(before, 100):
            time.sleep(0.01)

    return wait


def campaign(whole, workdir, faults, rng, moment):
    """Runs a training and a certification with their faults, then to the end; returns the faults that disturbed.

    ``moment(command, name)`` is the function with which a fault waits.
    """
    workdir.mkdir()
    disturbed = []
    for command in ("train", "certify"):
        for name in faults[command]:
            if FAULTS[name](command, workdir, rng, moment(command, name)):
                disturbed.append(name)
        complete(command, workdir)
    assert parameters(workdir) == parameters(whole)
    table = "certify/default/certificates.tsv"
    assert without_time(workdir / table) == without_time(whole / table)
    run("certify", f"--workdir={workdir}", "--verify")
    return disturbed


def test_every_fault_ends_in_the_same_parameters_and_certificates(undisturbed, home):
    """Every kind of fault at a moment at which it disturbs; the two processes start together."""
    faults = {
        "train": ["full disk", "SIGINT", "torn line", "second process"],
        "certify": ["SIGKILL", "corrupt checkpoint", "read-only", "SIGTERM"],
    }
    workdir, names = home / "faults", [name for command in faults for name in faults[command]]
    assert set(names) == set(FAULTS)

    def moment(command, name):
        return (lambda _: None) if name == "second process" else after_the_next_line(command, workdir)

    assert campaign(undisturbed, workdir, faults, random.Random(0), moment) == names


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_fault_campaign(undisturbed, home):
    rng, counts, rounds = random.Random(1), collections.Counter(), 0
    seconds = {}
    for command in ARGUMENTS:
        start = time.monotonic()
        assert refused(launch(command, home / "timed")) == 0
        seconds[command] = time.monotonic() - start

    def any_moment(command, _):
        return lambda process: time.sleep(rng.uniform(0, seconds[command]))

    while sum(counts.values()) < 100:
        faults = {command: rng.choices(list(FAULTS), k=5) for command in ("train", "certify")}
        counts.update(campaign(undisturbed, home / f"round{rounds}", faults, rng, any_moment))
        shutil.rmtree(home / f"round{rounds}")
        rounds += 1
    print(
        f"\n{sum(counts.values())} faults in {rounds} workdirs, all of them resumed to the same bytes: {dict(counts)}"
    )
    assert set(counts) == set(FAULTS)


def test_a_deferred_signal_waits_for_the_end_of_the_block_and_hides_no_error():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    done = []

    def interrupted():
        with signals.deferred() as waiting:
            done.append(waiting())
            with signals.deferred():
                os.kill(os.getpid(), signal.SIGTERM)
                done.append(waiting())
            done.append("outer")

    def at_once():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        done.append("never")

    def failing():
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            raise OSError("full")

    try:
        with signals.handled(), pytest.raises(signals.Interrupted) as stopped:
            interrupted()
        assert stopped.value.code == 143
        with signals.handled():
            with pytest.raises(signals.Interrupted) as stopped:
                at_once()
            assert stopped.value.code == 130
            # A finalizer may have dropped the exception, so it is raised once more.
            with pytest.raises(signals.Interrupted), signals.deferred():
                done.append("again")
            with signals.deferred() as waiting:
                done.append(waiting())
        with signals.handled():
            with pytest.raises(OSError, match="full"):
                failing()
            with pytest.raises(signals.Interrupted), signals.deferred():
                pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert done == [False, True, "outer", "again", False]


IMPORTING = """
import gc, os, runpy, sys

class Interrupting:
    def find_spec(name, path, target=None):
        # Sends the signal at the first import of a library. Python reports and drops an exception in a callback of
        # the garbage collector, for example in JAX's callback.
        if name.partition(".")[0] not in {{"lsrs_jax", *sys.stdlib_module_names}}:
            sys.meta_path.remove(Interrupting)
            gc.callbacks.append(lambda *_: os.kill(os.getpid(), {number}))
            gc.collect()
            gc.callbacks.clear()
            print("went on", flush=True)
            os._exit(0)

sys.meta_path.insert(0, Interrupting)
module, name, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name=name, alter_sys=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_of_a_command_is_not_lost(number):
    def python(*words):
        script = IMPORTING.format(number=int(number))
        return subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True)

    for words in (
        *((f"lsrs_jax.{module}", "__main__") for module, _ in cli.COMMANDS.values()),
        ("lsrs_jax", "__main__", "certify"),
    ):
        done = python(*words)
        assert done.returncode == 128 + number, words
        assert re.fullmatch(r"([a-z-]+: loading JAX \.\.\.\n)?", done.stdout), words
        assert done.stderr == "interrupted before anything was done\n"
    # A program that imports the package keeps its own signal handlers.
    for module in ("lsrs_jax.certify", "lsrs_jax.report"):
        done = python(module, module)
        assert "before anything was done" not in done.stderr
        assert (done.stdout == "went on\n") == (number == signal.SIGINT)


FIRST_FILE = """
import sys
from lsrs_jax import cli

def run(arguments):
    print("what says so", file=sys.stderr, flush=True)
    with open(sys.executable, "rb") as file:
        sys.exit(10 + file.fileno())

sys.modules["lsrs_jax.theirs"] = sys.modules["__main__"]
sys.orig_argv[1:] = ["-m", "lsrs_jax.theirs"]
cli.main("theirs")
"""


@pytest.mark.parametrize("closed", ["2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
def test_no_file_takes_the_place_of_a_closed_stream(closed):
    """Otherwise text for stderr would be written into the ledger."""
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, FIRST_FILE], cwd=ROOT)
    assert done.returncode > 12


@pytest.mark.parametrize("stream", ["2>&-", "2>/dev/full"])
def test_the_exit_code_is_right_where_stderr_cannot_be_written(stream):
    script = f'exec "$0" -m lsrs_jax.report nosuch {stream}'
    assert subprocess.run(["sh", "-c", script, sys.executable], cwd=ROOT).returncode == 2


UNSEEN = """
import os, signal, sys
from lsrs_jax import cli
from lsrs_jax.runtime import signals

class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

def run(arguments):
    with signals.reading():
        Last()
        print("went on", flush=True)

sys.modules["lsrs_jax.theirs"] = sys.modules["__main__"]
sys.orig_argv[1:] = ["-m", "lsrs_jax.theirs"]
cli.main("theirs")
"""


def test_a_signal_that_a_finalizer_dropped_is_raised_at_the_end():
    done = subprocess.run([sys.executable, "-c", UNSEEN], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "went on\n")
    assert done.stderr == "interrupted; the same command resumes\n"


def test_an_interrupted_reader_says_that_nothing_was_changed():
    with pytest.raises(signals.Interrupted) as stopped, signals.reading():
        raise signals.Interrupted(signal.SIGINT)
    assert stopped.value.left == "nothing was changed"
    assert signals.Interrupted(signal.SIGINT).left == "the same command resumes"


SLOW = """
import contextlib, sys, time
from lsrs_jax import cli
from lsrs_jax.runtime import signals

def run(arguments):
    try:
        with signals.deferred() if arguments == ["block"] else contextlib.nullcontext():
            print("ready", flush=True)
            time.sleep(60)
    finally:  # stands for the saving of a checkpoint
        print("served", flush=True)
        time.sleep(60)

sys.modules["lsrs_jax.theirs"] = sys.modules["__main__"]
sys.orig_argv[1:] = ["-m", "lsrs_jax.theirs"]
cli.main("theirs")
"""


THEIRS = """
import jax, numpy, sys, types
from lsrs_jax import cli

sys.modules["lsrs_jax.theirs"] = types.SimpleNamespace(run=lambda _: {})
sys.orig_argv[1:] = ["-m", "lsrs_jax.theirs"]
cli.main("theirs")
"""
OUT_OF_MEMORY = ["jax.jit(lambda: jax.numpy.zeros(2**44))()", "numpy.ones(2**48)"]
OUT_OF_MEMORY += ["(_ for _ in ()).throw(jax.errors.JaxRuntimeError('INTERNAL: Out of memory allocating 9 bytes.'))"]


@pytest.mark.parametrize("array", OUT_OF_MEMORY)
def test_out_of_memory_is_one_line(array):
    done = subprocess.run([sys.executable, "-c", THEIRS.format(array)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: out of memory (")
    assert "give a training a smaller --config.data.batch_size, a certification" in done.stderr
    assert done.stderr.count("\n") == 1


def test_other_errors_are_not_reported_as_out_of_memory():
    script = THEIRS.format("(_ for _ in ()).throw(RuntimeError('else'))")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "RuntimeError: else" in done.stderr
    assert "memory" not in done.stderr


def test_a_second_signal_ends_the_command_immediately_with_one_line():
    cases = [(where, second) for where in ("block", "end") for second in (signal.SIGTERM, signal.SIGINT)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", SLOW, where], cwd=ROOT, **pipes) for where, _ in cases]
    for process, (where, second) in zip(running, cases, strict=True):
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        if where == "end":
            assert process.stdout.readline() == "served\n"
        process.send_signal(second)  # counts as an echo of the first signal
    time.sleep(6 * signals._ECHO)  # a busy machine may handle the first signal late
    assert [process.poll() for process in running] == [None] * 4
    for process, (where, second) in zip(running, cases, strict=True):
        for _ in range(5):  # if the first was handled that late, this one counts as an echo
            process.send_signal(second)
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, err = process.communicate(timeout=6)
                break
        ended = "interrupted twice, ended immediately; the same command resumes\n"
        assert (process.returncode, err) == (128 + second, ended), where


def test_sigterm_saves_the_step_it_came_in(home):
    workdir = home / "terminated"
    flags = [flag.replace("checkpoint_every=100", "checkpoint_every=100000") for flag in TRAIN]
    process = start("train", *flags, f"--workdir={workdir}", devices=2)
    while process.poll() is None and "loss" not in (
        (workdir / "metrics.jsonl").read_text() if (workdir / "metrics.jsonl").exists() else ""
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert (code, err) == (143, "interrupted; the same command resumes\n")
    assert 20 <= parameters(workdir)["step"] < 400
    assert f"resuming after step {parameters(workdir)['step']}" in run(
        "train", *flags, f"--workdir={workdir}", devices=2
    )


@pytest.mark.parametrize("moved", [False, True])
def test_a_training_whose_folder_is_gone_ends_with_one_line(home, moved, monkeypatch):
    workdir, away, log = home / "gone", home / "away", Metrics.__call__

    def written(self, *row):
        log(self, *row)
        monkeypatch.undo()
        workdir.rename(away)
        if not moved:
            shutil.rmtree(away)

    monkeypatch.setattr(Metrics, "__call__", written)
    code, _, err = ended("train", *TRAIN, f"--workdir={workdir}", devices=2)
    assert code == 2, err
    assert err.startswith(f"error: {workdir} was removed or moved away while it was written; ")
    assert err.count("\n") == 1
    for folder in (workdir, away):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.soak
def test_a_full_disk_keeps_what_is_on_it(undisturbed, home):
    """The ledger never ends in half a line, and no row that was written is lost."""
    workdir = home / "full"
    shutil.copytree(undisturbed, workdir)
    shutil.rmtree(workdir / "certify")
    process = launch("certify", workdir, full_disk(9000))
    code, _, err = finish(process)
    assert code == 2
    assert "File too large" in err
    assert "make room, and give the same command again" in err
    ledger = workdir / "certify" / "default" / "votes.0.tsv"
    if ledger.exists():
        assert ledger.read_bytes()[-1:] in (b"", b"\n")
    complete("certify", workdir)
    table = "certify/default/certificates.tsv"
    assert without_time(workdir / table) == without_time(undisturbed / table)
