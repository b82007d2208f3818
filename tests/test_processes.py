"""Several processes of one run, on CPU devices over localhost: they give the results of one and stop together."""

import json
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from orbax.checkpoint import multihost

from lsrs_jax import cli
from lsrs_jax.certification.table import read_table
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import locked
from lsrs_jax.runtime.processes import Process, _arguments
from support.commands import (
    QUICK,
    finish,
    refused,
    run,
    run_together,
    start_together,
    without_time,
)

TABLE = "certify/default/certificates.tsv"
SMALL = ["--config.model.encoder=space_to_depth", "--config.model.head=linear"]


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def wait_for(condition, processes):
    while not condition():
        assert all(process.poll() is None for process in processes), [finish(process) for process in processes]
        time.sleep(0.02)


def checkpoints(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Switches most XLA optimizations off: of several processes, only the first uses the compilation cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A workdir that one process with four devices trained and certified."""
    workdir = tmp_path_factory.mktemp("alone")
    run("train", *QUICK, f"--workdir={workdir}", devices=4)
    run("certify", f"--workdir={workdir}", devices=4)
    return workdir


@pytest.mark.parametrize("sharded", [pytest.param(False, marks=pytest.mark.soak), True])
def test_the_losses_do_not_depend_on_the_number_of_processes(alone, tmp_path, sharded):
    flags = [f"--config.train.shard_parameters={sharded}"]
    out = run_together(2, "train", *QUICK, f"--workdir={tmp_path}", *flags, devices=2)
    assert "4 x cpu in 2 processes" in out
    np.testing.assert_allclose(losses(tmp_path), losses(alone), atol=1e-5, rtol=0)
    # A single process can read what they wrote, and go on after a checkpoint in the middle.
    shutil.rmtree(tmp_path / "checkpoints" / "60")
    assert "resuming after step 40\n" in run("train", *QUICK, *flags, f"--workdir={tmp_path}", devices=4)
    np.testing.assert_allclose(losses(tmp_path), losses(alone), atol=1e-5, rtol=0)
    run("certify", f"--workdir={tmp_path}", "--config.certify.stop=2")


def test_certificates_do_not_depend_on_the_number_of_processes(alone, tmp_path):
    workdir = tmp_path / "several"
    shutil.copytree(alone, workdir)
    shutil.rmtree(workdir / "certify")
    out = run_together(2, "certify", f"--workdir={workdir}", devices=2)
    assert "40 images: certified accuracy" in out
    assert without_time(workdir / TABLE) == without_time(alone / TABLE)
    ledgers = [workdir / "certify" / "default" / f"votes.{process}.tsv" for process in range(2)]
    assert all(path.read_text().count("\n") > 20 for path in ledgers)
    assert "verified: 40 certificates" in run("certify", f"--workdir={workdir}", "--verify")
    # Both ledgers are needed: their digests are checked, and both hold samples.
    content = ledgers[1].read_text()
    row = content.splitlines()[1].split("\t")
    ledgers[1].write_text(content.replace(row[-1], f"{int(row[-1], 16) ^ 1:08x}", 1))
    assert "votes.1.tsv line 2 is damaged" in refused("certify", f"--workdir={workdir}", "--verify")
    ledgers[1].unlink()
    assert "votes.1.tsv is missing" in refused("certify", f"--workdir={workdir}", "--verify")
    run("certify", f"--workdir={workdir}", devices=2)  # draws the lost samples again
    assert without_time(workdir / TABLE) == without_time(alone / TABLE)


@pytest.mark.soak
def test_processes_that_share_a_bucket_only(alone, tmp_path):
    remote = tmp_path / "remote"
    shutil.copytree(alone, remote)
    shutil.rmtree(remote / "certify")
    run_together(2, "certify", f"--workdir=file://{remote}", "--config.certify.stop=8")
    assert without_time(remote / TABLE) == without_time(alone / TABLE)[:9]
    assert (remote / "certify" / "default" / "votes.1.tsv").read_text().count("\n") > 4


@pytest.mark.soak
@pytest.mark.parametrize("counts", [(2, 1), (1, 2)])
def test_a_killed_certification_is_resumed_by_another_number_of_processes(alone, tmp_path, counts):
    workdir = tmp_path / "killed"
    shutil.copytree(alone, workdir)
    flags = [f"--workdir={workdir}", "--config.certify.name=whole", "--config.certify.n=20000"]
    flags += ["--config.certify.tile=(2,8)", "--config.certify.schedule=staged"]
    table = "certify/whole/certificates.tsv"
    run("certify", *flags, devices=2)
    whole = without_time(workdir / table)
    shutil.rmtree(workdir / "certify" / "whole")

    def ledger_bytes():
        return sum(path.stat().st_size for path in (workdir / "certify").glob("whole/votes.*.tsv"))

    processes = start_together(counts[0], "certify", *flags, devices=1)
    wait_for(lambda: ledger_bytes() > 800, processes)
    for process in processes:
        process.kill()
    for process in processes:
        finish(process)
    assert not (workdir / table).exists() or without_time(workdir / table) != whole
    run_together(counts[1], "certify", *flags, devices=1)
    assert without_time(workdir / table) == whole
    record = json.loads((workdir / "certify" / "whole" / "certificates.json").read_text())["record"]
    assert [entry["processes"] for entry in record] == list(counts)
    run("certify", f"--workdir={workdir}", "--config.certify.name=whole", "--verify")


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    flags = [*QUICK, *SMALL, "--config.train.steps=1000", "--config.train.checkpoint_every=1000"]
    flags += ["--config.train.evaluate_every=1000", f"--workdir={tmp_path}"]
    processes = start_together(2, "train", *flags, devices=2)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and losses(tmp_path), processes)
    processes[1].send_signal(signal.SIGTERM)
    ends = [finish(process) for process in processes]
    assert [code for code, _, _ in ends] == [143, 143], ends
    assert all("interrupted; the same command resumes" in err for _, _, err in ends)
    (step,) = checkpoints(tmp_path)
    assert 20 <= step < 1000
    assert f"resuming after step {step}\n" in run("train", *flags, devices=4)
    assert checkpoints(tmp_path)[-1] == 1000


def test_the_end_of_another_process_has_its_own_exit_code(monkeypatch, capsys):
    """What JAX does when a process ends is tested by the next test, which waits for it."""

    def lost(*_, **__):
        raise RuntimeError("a task has missed its heartbeats")

    monkeypatch.setattr(multihost, "sync_global_processes", lost)
    with pytest.raises(SystemExit) as end:
        cli.execute(lambda _: Process(0, 2).wait("the samples"))
    assert end.value.code == 75
    line = "error: another process of this run ended before the samples; the same command resumes\n"
    assert capsys.readouterr().err == line


@pytest.mark.soak
def test_a_signal_to_one_process_of_a_certification_is_no_error_of_the_others(alone, tmp_path):
    """Exit code 75 means that the same command can be tried again; 2 would mean that something must be fixed.

    The certification is then resumed by another number of processes.
    """
    workdir = tmp_path / "interrupted"
    shutil.copytree(alone, workdir)
    flags = [f"--workdir={workdir}", "--config.certify.n=25000", "--config.certify.tile=(2,8)"]
    flags.append("--config.certify.stop=16")
    run("certify", *flags, "--config.certify.name=whole", devices=2)
    folder = workdir / "certify" / "parts"
    flags.append("--config.certify.name=parts")
    processes = start_together(2, "certify", *flags, devices=1)
    wait_for(lambda: (folder / "votes.1.tsv").exists() and (folder / "votes.1.tsv").stat().st_size > 300, processes)
    processes[1].send_signal(signal.SIGTERM)
    ends = [finish(process) for process in processes]
    assert [code for code, _, _ in ends] == [75, 143], ends
    assert "error: another process of this run ended before the samples; the same command resumes" in ends[0][2]
    assert not (folder / "certificates.tsv").exists()
    run("certify", *flags, devices=3)
    whole = workdir / "certify" / "whole" / "certificates.tsv"
    assert without_time(folder / "certificates.tsv") == without_time(whole)
    record = json.loads((folder / "certificates.json").read_text())["record"]
    assert [entry["processes"] for entry in record] == [2, 1]
    run("certify", f"--workdir={workdir}", "--config.certify.name=parts", "--verify")


@pytest.mark.soak
def test_a_training_is_resumed_by_another_number_of_processes(alone, tmp_path):
    processes = start_together(2, "train", *QUICK, f"--workdir={tmp_path}", devices=2)
    wait_for(lambda: checkpoints(tmp_path), processes)
    processes[1].kill()
    processes[0].kill()
    for process in processes:
        finish(process)
    assert "resuming after step" in run("train", *QUICK, f"--workdir={tmp_path}", devices=4)
    np.testing.assert_allclose(losses(tmp_path), losses(alone), atol=1e-5, rtol=0)


def test_where_one_process_fails_all_end_with_one_line(tmp_path):
    """The first process cannot get the lock of the workdir, because another run trains in it."""
    with locked(tmp_path / ".train.lock", "training"):
        processes = start_together(2, "train", *QUICK, *SMALL, f"--workdir={tmp_path}")
        ends = [finish(process) for process in processes]
    assert [code for code, _, _ in ends] == [2, 2], ends
    assert "error: another process is training in" in ends[0][2]
    assert "error: process 0 of 2 failed at the start; its own output says why" in ends[1][2]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID must be set where JAX_NUM_PROCESSES is"),
        (
            {"JAX_COORDINATOR_ADDRESS": "x:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "the second from 0 on and below the first",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "nonsense", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            "JAX_COORDINATOR_ADDRESS must be host:port of process 0, got 'nonsense'",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "x:99999999", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            "JAX_COORDINATOR_ADDRESS must be host:port of process 0",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "x:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "must be whole numbers",
        ),
    ],
)
def test_bad_process_settings_are_refused(environment, message):
    with pytest.raises(UserError, match=message):
        _arguments(environment)


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "1", "TPU_WORKER_HOSTNAMES": "one"}, False),
        ({"SLURM_NTASKS": "4"}, False),  # in the batch script itself, outside srun
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "one,two"}, True),
        ({"JAX_DISTRIBUTED": "auto"}, True),
        ({"SLURM_STEP_NUM_TASKS": "4", "JAX_DISTRIBUTED": "off"}, False),
    ],
)
def test_processes_are_found_where_there_are_several(environment, several):
    assert (_arguments(environment) == {}) == several


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_four_processes_of_two_devices(tmp_path):
    """Four processes train and are killed, two resume, four certify; the certificates are those of one process."""
    flags = [*QUICK, "--config.train.steps=400", "--config.certify.n=20000", "--config.certify.stop=0"]
    one, four = tmp_path / "one", tmp_path / "four"
    run("train", *flags, f"--workdir={one}", devices=8)
    processes = start_together(4, "train", *flags, f"--workdir={four}", devices=2)
    wait_for(lambda: checkpoints(four), processes)
    for process in processes:
        process.kill()
        finish(process)
    run_together(2, "train", *flags, f"--workdir={four}", devices=4)
    np.testing.assert_allclose(losses(four)[:3], losses(one)[:3], atol=1e-5, rtol=0)
    # Sums in another order round differently. Training amplifies this: after 400 steps it changes the third digit.
    np.testing.assert_allclose(losses(four), losses(one), rtol=0.01)
    run_together(4, "certify", f"--workdir={four}", devices=2)
    alone = tmp_path / "alone"
    shutil.copytree(four, alone)
    shutil.rmtree(alone / "certify")
    run("certify", f"--workdir={alone}")
    assert without_time(alone / TABLE) == without_time(four / TABLE)
    assert read_table(four / TABLE).radius.max() > 0
