"""A sweep: its grid, runs that fail, and kills in the middle."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from lsrs_jax import sweep
from lsrs_jax.config import save_config
from lsrs_jax.flags import config_from_flags
from lsrs_jax.runtime.children import Job, run_jobs
from support import ROOT
from support.commands import QUICK, ended, fingerprint, refused, run

TINY = [*QUICK, "--config.train.steps=40", "--config.train.checkpoint_every=10", "--config.certify.n=200"]
GRID = [*TINY, "--sigma=0.5,.25,0.50", "--variants=lsrs,isrs", "--seeds=2"]


def start(*arguments):
    """A sweep in a process group of its own."""
    command = [sys.executable, "-m", "lsrs_jax", "sweep", *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def finish(process):
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def report_of(folder):
    """The rows of a report without the time per image."""
    return [line.rsplit("|", 2)[0] for line in (folder / "report.md").read_text().splitlines() if "|" in line]


def test_the_runs_of_a_grid_and_their_names(tmp_path):
    out = run("sweep", *GRID, f"--out={tmp_path}", "--plan")
    names = [f"{v}-sigma{s}-seed{n}" for v in ("lsrs", "isrs") for s in (0.25, 0.5) for n in (0, 1)]
    assert [line.split() for line in out.splitlines()] == [[name, "new"] for name in names]
    assert not [*tmp_path.iterdir()]
    assert (
        run("sweep", "--config=digits:isrs", "--seeds=5,", "--plan", f"--out={tmp_path}")
        == "isrs-sigma0.5-seed5  new\n"
    )


def test_a_run_that_was_begun_with_other_settings_is_refused_before_anything_runs(tmp_path):
    workdir = tmp_path / "isrs-sigma0.5-seed1"
    begun = [*TINY, "--config.seed=1", "--config.train.steps=50"]
    begun[0] = "--config=configs/digits.py:isrs"
    workdir.mkdir()
    save_config(config_from_flags(begun), workdir / "config.json")
    line = refused("sweep", *GRID, f"--out={tmp_path}")
    assert f"{workdir} was begun with train.steps=50, not 40" in line
    line = refused("sweep", *GRID, "--config.train.steps=50", "--config.certify.n=300", f"--out={tmp_path}")
    assert f"{workdir} was begun with n=200, not 300" in line
    assert [path.name for path in tmp_path.iterdir()] == [workdir.name]
    assert f"{workdir} is the workdir of a training" in refused("sweep", *GRID, f"--out={workdir}")


def test_a_job_that_fails_keeps_no_other_from_ending(tmp_path):
    commands = [[["config", "nothing"], ["config"]], [["config"], ["config", "digits"]], [["config", "nothing2"]]]
    jobs = [Job(str(i), each, tmp_path / f"{i}.log") for i, each in enumerate(commands)]
    ended_jobs = []
    run_jobs(jobs, 2, lambda job, left: ended_jobs.append((job, left)))
    assert sorted(job.name for job, _ in ended_jobs) == ["0", "1", "2"]
    assert [job.failed for job in jobs] == [("config", 2), None, ("config", 2)]
    assert jobs[0].last_line.startswith("error: no configuration file 'nothing'")
    assert "certify.n = 10000" in jobs[1].log.read_text()
    assert ended_jobs[-1][1] == 0
    assert all(job.seconds > 0 for job in jobs)


def test_a_failed_run_is_named_and_the_others_are_reported(copy, tmp_path):
    """One run is finished already; the other cannot begin, because a file is in the way."""
    out = tmp_path / "sweep"
    first, second = (out / f"digits-sigma0.5-seed{seed}" for seed in (0, 1))
    out.mkdir()
    (copy / "certify" / "base").rename(copy / "certify" / "default")
    for other in set((copy / "certify").iterdir()) - {copy / "certify" / "default"}:  # of other tests
        shutil.rmtree(other)
    (copy / sweep.FINISHED).touch()
    copy.rename(first)
    second.mkdir()
    (second / "checkpoints").write_text("in the way")
    code, lines, err = ended("sweep", *QUICK, "--seeds=2", f"--out={out}")
    assert code == 1
    assert lines.startswith(f"2 runs in {out}, 1 of them finished\n2 of 2 runs: {second.name}: FAILED: ")
    assert "train ended with exit code 2: error: " in lines
    assert err == f"error: 1 of 2 runs failed: {second.name}\n"
    assert [row.split("|")[1].strip() for row in report_of(out / "report")[2:]] == [first.name]


def survivors(folder):
    """Processes other than sweeps whose command line names a folder."""
    found = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if f"={folder}/" in line]


def killed(arguments, out, pattern, group):
    """Kills a sweep, or its process group, when a file has appeared; waits until all of its processes are gone."""
    process = start(*arguments)
    while process.poll() is None and not [*out.glob(pattern)]:
        time.sleep(0.01)
    assert process.poll() is None
    if group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    finish(process)
    deadline = time.monotonic() + 60
    while survivors(out) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not survivors(out)


def reported(folder, names, arguments):
    """The report of runs that were not killed."""
    for name in names:
        flags = [flag for flag in arguments if flag.startswith("--config")]
        run("train", *flags, f"--config.seed={name[-1]}", f"--workdir={folder / name}")
        run("certify", f"--workdir={folder / name}")
    run("report", *(folder / name for name in names), f"--out={folder / 'report'}")
    return report_of(folder / "report")


def test_a_sweep_that_was_killed_gives_the_report_of_one_that_was_not(tmp_path):
    out, name = tmp_path / "killed", "digits-sigma0.5-seed0"
    arguments = [*TINY, f"--out={out}"]
    killed(arguments, out, f"{name}/checkpoints/[0-9]*", group=True)
    code, lines, err = finish(start(*arguments))
    assert (code, err) == (0, "")
    assert f"1 of 1 runs: {name}: certified accuracy 0." in lines
    assert report_of(out / "report") == reported(tmp_path / "whole", [name], arguments)
    before = fingerprint(out / name)
    assert "1 runs in" in run("sweep", *arguments)
    assert fingerprint(out / name) == before


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere children outlive a parent that is killed alone")
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_sweep_that_is_killed_again_and_again_gives_the_same_report(tmp_path, jobs):
    out, names = tmp_path / "killed", [f"digits-sigma0.5-seed{seed}" for seed in range(2)]
    arguments = [*TINY, "--config.certify.n=20000", "--seeds=2", f"--jobs={jobs}", f"--out={out}"]
    killed(arguments, out, f"{names[0]}/checkpoints/[0-9]*", group=True)
    killed(arguments, out, f"{names[0]}/certify/*/votes*", group=False)
    killed(arguments, out, f"{names[1]}/checkpoints/[0-9]*", group=False)
    killed(arguments, out, f"{names[1]}/certify/*/votes*", group=True)
    whole = tmp_path / "whole"  # with the same number of jobs, because the number of threads changes the rounding
    for words in (arguments, [*arguments[:-1], f"--out={whole}"]):
        code, _, err = finish(start(*words))
        assert code == 0, err
    assert report_of(out / "report") == report_of(whole / "report")
