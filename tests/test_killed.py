"""Commands that are killed and resumed, or that run beside a second one."""

import hashlib
import json
import signal
import time

import pytest

from lsrs_jax.runtime.files import locked
from support.commands import QUICK, fingerprint, finish, refused, run, start, truncate_checkpoint, without_time


def kill(process, seen, delay=0.0):
    """Sends SIGKILL `delay` seconds after `seen()` is true. Returns whether the process was still running."""
    while process.poll() is None and not seen():
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    code, _, err = finish(process)
    assert code in (-signal.SIGKILL, 0), err
    return code != 0


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["fixed", "staged"])
def test_a_killed_certification_resumes_to_the_same_bytes(trained, kind):
    """The run is killed when samples are on disk, its last line is cut, and other devices resume it."""
    whole, killed = (trained / "certify" / f"{name}_{kind}" for name in ("whole", "killed"))
    # A small tile keeps the run long enough to be killed in the middle.
    arguments = ["--config.certify.n=30001", "--config.certify.stop=40", "--config.certify.tile=(2, 8)"]
    arguments += [f"--workdir={trained}", f"--config.certify.schedule={kind}"]
    run("certify", *arguments, f"--config.certify.name={whole.name}")
    ledger, again = killed / "votes.0.tsv", [*arguments, f"--config.certify.name={killed.name}"]
    assert kill(start("certify", *again, devices=5), lambda: ledger.exists() and ledger.stat().st_size > 60)
    with ledger.open("r+b") as file:  # as if the last write had not reached the disk completely
        file.truncate(ledger.stat().st_size - 13)
    run("certify", *again, devices=2)
    assert without_time(killed / "certificates.tsv") == without_time(whole / "certificates.tsv")
    assert len(json.loads((killed / "certificates.json").read_text())["record"]) == 2


def final_parameters(workdir):
    metas = sorted((workdir / "checkpoints").glob("*/meta/metadata"), key=lambda path: int(path.parts[-3]))
    return json.loads(metas[-1].read_text())


def test_a_killed_training_resumes_to_the_same_parameters(tmp_path):
    arguments = [*QUICK, "--config.train.steps=240", "--config.train.checkpoint_every=60", "--config.data.crop=1"]
    arguments += ["--config.train.evaluate_every=240"]
    arguments += ["--config.train.loss=consistency", "--config.train.noises=2", "--config.train.ema=0.99"]
    run("train", *arguments, f"--workdir={tmp_path / 'whole'}")
    again = [*arguments, f"--workdir={tmp_path / 'killed'}"]
    assert kill(start("train", *again), lambda: [*(tmp_path / "killed" / "checkpoints").glob("[0-9]*")])
    run("train", *again)
    whole, killed = final_parameters(tmp_path / "whole"), final_parameters(tmp_path / "killed")
    assert whole["step"] == 240
    assert whole == killed
    metrics = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    losses = [[(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row] for lines in metrics]
    assert losses[0] == losses[1]
    assert "already trained" in run("train", *again)


def test_a_finished_training_is_checked_and_left_unchanged(copy):
    before = fingerprint(copy)
    out = run("train", *QUICK, "--config.certify.n=77", f"--workdir={copy}")
    assert "already trained to step 60" in out
    assert "config.json there keeps certify.n 1000, not 77" in out
    assert fingerprint(copy) == before
    run("certify", f"--workdir={copy}", "--config.certify.name=base", "--verify")
    truncate_checkpoint(copy)
    assert "restore it from a copy" in refused("train", *QUICK, f"--workdir={copy}")


def test_a_half_written_ledger_line_is_sampled_again(copy, certified):
    ledger = copy / "certify" / "base" / "votes.0.tsv"
    ledger.write_bytes(ledger.read_bytes()[:-9])
    run("certify", f"--workdir={copy}", "--config.certify.name=base")
    assert without_time(copy / "certify" / "base" / "certificates.tsv") == without_time(certified)


@pytest.mark.parametrize("attempts", [2, pytest.param(6, marks=pytest.mark.soak)])
def test_an_interrupted_change_of_alpha_never_mixes_tables(copy, attempts):
    """After a kill at any moment, certificates.json names the alpha of the table beside it, or no table."""
    folder = copy / "certify" / "base"
    for attempt in range(attempts):
        alpha = (0.05, 0.001)[attempt % 2]
        flags = [f"--config.certify.alpha={alpha}", f"--config.certify.stop={60 + 20 * attempt}"]
        before = (folder / "certificates.json").read_bytes()
        process = start("certify", f"--workdir={copy}", "--config.certify.name=base", *flags)
        kill(process, lambda old=before: (folder / "certificates.json").read_bytes() != old, 0.003 * attempt)
        derivation = json.loads((folder / "certificates.json").read_text())["derivation"]
        if derivation:
            digest = hashlib.sha256((folder / "certificates.tsv").read_bytes()).hexdigest()
            assert derivation["certificates"] == digest


def test_a_second_training_in_one_workdir_is_refused(tmp_path):
    workdir = tmp_path / "new"
    with locked(workdir / ".train.lock", "training"):
        assert "another process is training" in refused("train", *QUICK, f"--workdir={workdir}")
    assert [path.name for path in workdir.iterdir()] == [".train.lock"]
