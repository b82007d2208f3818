"""The launch scripts, run with stubs of gcloud, srun and scontrol that record their arguments."""

import json
import os
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from support.commands import ROOT

LAUNCH = ROOT / "launch"
SLICE = {"TPU_NAME": "lsrs", "ZONE": "zone", "PROJECT": "project"}
RUN = {"CONFIG": "configs/digits.py:isrs", "WORKDIR": "gs://bucket/a run"}
STUB = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def stubs(tmp_path):
    """A function that runs a script with stubs on PATH and returns ``(code, stdout, stderr, calls)``."""
    folder, record = tmp_path / "stubs", tmp_path / "calls"
    folder.mkdir()
    for name in ("gcloud", "srun", "scontrol"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)

    def script(*command, cwd=ROOT, **environment):
        record.write_text("")
        settings = {name: value for name, value in os.environ.items() if name not in {**SLICE, **RUN}}
        settings |= {"PATH": f"{folder}:{os.environ['PATH']}", "RECORD": str(record), **environment}
        done = subprocess.run(
            list(map(str, command)), cwd=cwd, env=settings, capture_output=True, text=True, timeout=60
        )
        calls = [json.loads(line) for line in record.read_text().splitlines()]
        return done.returncode, done.stdout, done.stderr, calls

    return script


def test_the_scripts_are_clean():
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]
    assert len(scripts) >= 4
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


STEPS = {
    "create": ["create", "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"],
    "setup": ["TASK=setup EXTRA=tpu,gcs", "--worker=all"],
    "run": ["JAX_DISTRIBUTED=auto", "CONFIG=configs/digits.py:isrs", r"WORKDIR=gs://bucket/a\ run", r"tile=\(64\,64\)"],
    "status": ["describe", "tail -n 3 lsrs_jax.log"],
    "collect": ["rsync", "gs://bucket/a run/certify", "runs/lsrs/certify"],
    "delete": ["delete", "--quiet"],
}


@pytest.mark.parametrize("step", STEPS)
def test_a_dry_run_prints_what_a_step_asks_of_gcloud(stubs, step):
    flags = ["--config.certify.tile=(64,64)"] if step == "run" else []
    environment = {**SLICE, **RUN}
    code, out, err, calls = stubs(LAUNCH / "tpu_vm.sh", "--dry-run", step, *flags, **environment)
    assert (code, err, calls) == (0, "", [])
    printed = [shlex.split(line) for line in out.splitlines()]
    code, _, err, calls = stubs(LAUNCH / "tpu_vm.sh", step, *flags, **environment)
    shutil.rmtree(ROOT / "runs" / "lsrs", ignore_errors=True)
    assert (code, err) == (0, "")
    assert calls

    def plain(call):  # without the name of a temporary file
        return ["/tmp/archive" if word.startswith("/tmp/tmp.") else word for word in call]

    assert [plain(call) for call in printed if call[0] == "gcloud"] == [plain(call) for call in calls]
    text = "\n".join(" ".join(call) for call in calls)
    for part in STEPS[step]:
        assert part in text
    if step != "collect":
        assert all("--zone=zone" in call and "--project=project" in call for call in calls)


def test_what_runs_on_the_hosts_reads_back_as_it_was_given(stubs):
    _, _, _, calls = stubs(LAUNCH / "tpu_vm.sh", "run", "--config.sigma=0.5", "--config.x=a b", **SLICE, **RUN)
    command = next(word for word in calls[0] if word.startswith("--command=")).removeprefix("--command=")
    words = shlex.split(command)
    assert words[:2] == ["nohup", "env"]
    assert f"WORKDIR={RUN['WORKDIR']}" in words
    assert words[words.index("lsrs_jax/launch/host.sh") + 1 :][:2] == ["--config.sigma=0.5", "--config.x=a b"]


@pytest.mark.parametrize("kind", ["v4-8", "v5p-8", "v6e-16", "v5litepod-4"])
def test_every_kind_has_its_software(stubs, kind):
    code, _, _, calls = stubs(LAUNCH / "tpu_vm.sh", "create", **SLICE, TYPE=kind, SPOT="1")
    assert code == 0
    assert f"--accelerator-type={kind}" in calls[0]
    assert "--spot" in calls[0]


@pytest.mark.parametrize(
    ("command", "environment", "message"),
    [
        (["tpu_vm.sh", "create"], {"ZONE": "z", "PROJECT": "p"}, "TPU_NAME: name of the slice"),
        (["tpu_vm.sh", "create"], {"TPU_NAME": "n", "PROJECT": "p"}, "ZONE: where it is"),
        (["tpu_vm.sh", "create"], {"TPU_NAME": "n", "ZONE": "z"}, "PROJECT: who pays"),
        (["tpu_vm.sh", "create"], {**SLICE, "TYPE": "v9-8"}, "error: TYPE must be"),
        (["tpu_vm.sh", "start"], SLICE, "error: unknown step start"),
        (["tpu_vm.sh"], SLICE, "which step"),
        (["tpu_vm.sh", "run"], SLICE, "CONFIG: which experiment"),
        (["tpu_vm.sh", "run"], {**SLICE, "CONFIG": "c"}, "WORKDIR: a folder that all hosts see"),
        (["host.sh"], {"CONFIG": "c"}, "WORKDIR: folder for checkpoints"),
        (["host.sh"], {"WORKDIR": "w"}, "CONFIG: which experiment"),
        (["host.sh"], {**RUN, "TASK": "walk"}, "error: TASK must be"),
        (["local_pod.sh"], {}, "how many processes"),
        (["local_pod.sh", "1", "configs/digits.py"], {}, "error: the number of processes must be at least 2"),
        (["local_pod.sh", "2", "configs/digits.py"], {"WORKDIR": "configs"}, "error: configs exists"),
        (["slurm.sbatch"], {}, "SLURM_SUBMIT_DIR: submit this file with sbatch"),
    ],
)
def test_missing_settings_are_reported_before_any_call(stubs, command, environment, message):
    code, _, err, calls = stubs("bash", LAUNCH / command[0], *command[1:], **environment)
    assert code != 0
    assert message in err
    assert calls == []


def test_dry_run_may_stand_anywhere_and_unknown_words_are_refused(stubs):
    code, out, _, calls = stubs(LAUNCH / "tpu_vm.sh", "create", "--dry-run", **SLICE)
    assert (code, calls) == (0, [])
    assert "gcloud" in out
    code, _, err, calls = stubs(LAUNCH / "tpu_vm.sh", "delete", "--quietly", **SLICE)
    assert (code, calls) == (2, [])
    assert err == "error: delete takes nothing more, got --quietly\n"


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (143, True)])
def test_a_slurm_job_queues_again_when_it_was_interrupted(stubs, tmp_path, code, requeued):
    home = tmp_path / "checkout"
    (home / "launch").mkdir(parents=True)
    (home / "launch" / "host.sh").write_text('#!/bin/sh\n[ "$TASK" = setup ] && [ "$EXTRA" = cuda ]\n')
    (home / "launch" / "host.sh").chmod(0o755)
    settings = {**RUN, "SLURM_SUBMIT_DIR": str(home), "SLURM_JOB_ID": "7", "CODE": str(code)}
    ended, _, _, calls = stubs("bash", LAUNCH / "slurm.sbatch", "--config.seed=1", **settings)
    assert calls[0] == ["srun", "--kill-on-bad-exit=1", "launch/host.sh", "--config.seed=1"]
    assert calls[1:] == ([["scontrol", "requeue", "7"]] if requeued else [])
    assert ended == code


HOST = """#!/usr/bin/env python3
import os, signal, sys, time
with open(os.environ["RECORD"], "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if os.environ.get("SLEEP"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("ready", flush=True)
    time.sleep(30)
"""


@pytest.fixture
def host(tmp_path):
    """A function that starts host.sh in a checkout whose interpreter records its arguments, and the record's path."""
    home = tmp_path / "checkout"
    (home / ".venv" / "bin").mkdir(parents=True)
    (home / ".venv" / "ready").write_text("")
    (home / ".venv" / "bin" / "python").write_text(HOST)
    (home / ".venv" / "bin" / "python").chmod(0o755)
    shutil.copytree(LAUNCH, home / "launch")
    record = tmp_path / "record"
    record.write_text("")
    started = []

    def start(*flags, **environment):
        settings = {**os.environ, **RUN, "EXTRA": "", "RECORD": str(record), **environment}
        script = home / "launch" / "host.sh"
        process = subprocess.Popen([script, *flags], env=settings, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start, record
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("task", ["all", "train", "certify", "setup"])
def test_a_host_trains_and_certifies(host, task):
    start, record = host
    assert start("--config.seed=1", TASK=task).wait(timeout=60) == 0
    train = f"-m lsrs_jax.train --config={RUN['CONFIG']} --workdir={RUN['WORKDIR']} --config.seed=1"
    certify = f"-m lsrs_jax.certify --workdir={RUN['WORKDIR']}"
    expected = {"all": [train, certify], "train": [train], "certify": [certify], "setup": []}[task]
    assert record.read_text().splitlines() == expected


def test_a_host_passes_a_signal_on_and_ends_as_its_command(host):
    start, record = host
    process = start(SLEEP="1")
    assert process.stdout.readline() == "ready\n"
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)  # to the shell only
    assert process.wait(timeout=20) == 143
    assert time.monotonic() - begin < 20
    assert len(record.read_text().splitlines()) == 1  # an interrupted training is not certified


def test_the_job_for_kubernetes_is_whole():
    values = {
        "NAME": "lsrs",
        "HOSTS": "2",
        "CHIP": "nvidia.com/gpu",
        "CHIPS": "8",
        "EXTRA": "cuda,gcs",
        "LABEL": "cloud.google.com/gke-accelerator",
        "VALUE": "nvidia-h100-80gb",
        "REPOSITORY": "https://example.org/lsrs_jax",
        "FLAGS": "--config.seed=1",
        **RUN,
    }
    text = string.Template((LAUNCH / "gke_job.yaml").read_text()).substitute(values)
    service, job = yaml.safe_load_all(text)
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    spec = job["spec"]
    assert spec["completions"] == spec["parallelism"] == 2
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["JAX_COORDINATOR_ADDRESS"] == "lsrs-0.lsrs:12321"
    assert environment["JAX_NUM_PROCESSES"] == "2"
    assert environment["WORKDIR"] == RUN["WORKDIR"]
    assert "JAX_PROCESS_ID" in environment
    assert pod["subdomain"] == service["metadata"]["name"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert "exec lsrs_jax/launch/host.sh --config.seed=1" in container["args"][0]
