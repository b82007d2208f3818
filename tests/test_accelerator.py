"""The script for accelerators resumes, ends in time, and publishes tables that match its results."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest

from benchmarks import accelerator, precision, throughput
from lsrs_jax.runtime.errors import UserError
from support import ROOT


def test_pieces_are_made_once_and_a_failing_one_is_named(tmp_path, monkeypatch, capsys):
    calls = []

    def piece(name):
        calls.append(name)
        if name == "bad" and calls.count("bad") == 1:
            raise UserError("no such device")
        return {"name": name}

    names = ("first", "bad", "last")
    sections = {"precision": {name: lambda name=name: piece(name) for name in names}}
    monkeypatch.setattr(accelerator, "pieces", lambda work: sections)
    arguments = ["run", f"--out={tmp_path}", "--sections=precision"]
    with pytest.raises(UserError, match=r"failed: precision\.bad; the same command tries again"):
        accelerator.main(arguments)
    assert "precision: bad: no such device" in capsys.readouterr().err
    accelerator.main(arguments)
    assert calls == ["first", "bad", "last", "bad"]
    assert json.loads((tmp_path / "precision.bad.json").read_text())["result"] == {"name": "bad"}
    (tmp_path / "precision.last.json").unlink()
    with pytest.raises(UserError, match="the minutes are over; the same command resumes"):
        accelerator.main([*arguments, "--minutes=-1"])
    assert not (tmp_path / "precision.last.json").exists()


def test_the_data_flag_reaches_pieces_that_run_in_this_process(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "elsewhere")
    seen = {"table": {"one": lambda: os.environ["TFDS_DATA_DIR"]}}
    monkeypatch.setattr(accelerator, "pieces", lambda work: seen)
    (tmp_path / "data").mkdir()
    for flags, expected in (([], "elsewhere"), ([f"--data={tmp_path / 'data'}"], str(tmp_path / "data"))):
        out = tmp_path / str(len(flags))
        accelerator.main(["run", f"--out={out}", "--sections=table", *flags])
        assert json.loads((out / "table.one.json").read_text())["result"] == expected


def test_a_command_ends_at_the_deadline_and_tells_why_one_failed(tmp_path):
    options = accelerator.parse(["run", f"--out={tmp_path}", "--minutes=0.02"])
    work = accelerator.Work(options)
    with pytest.raises(UserError, match="stopped at the deadline"):
        work.command("-c", "import time; time.sleep(60)")
    work = accelerator.Work(accelerator.parse(["run", f"--out={tmp_path}", "--minutes=1"]))
    with pytest.raises(UserError, match="out of paper"):
        work.command("-c", "import sys; print('first'); sys.exit('out of paper')")
    assert work.command("-c", "pass") > 0
    work.command("-c", "print('kept')", path=tmp_path / "with a space")
    assert (tmp_path / "with a space").read_text() == "kept\n"


def test_a_command_has_time_to_save_at_the_deadline(tmp_path):
    script = """
import pathlib, signal, sys, time

def save(*_):
    time.sleep(0.5)
    print("saved")
    pathlib.Path(sys.argv[1]).write_text("whole")
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
time.sleep(60)
"""
    work = accelerator.Work(accelerator.parse(["run", f"--out={tmp_path}", "--minutes=0.05"]))
    with pytest.raises(accelerator.Deadline, match="stopped at the deadline") as stopped:
        work.command("-c", script, tmp_path / "saved")
    assert stopped.value.code == 75
    assert (tmp_path / "saved").read_text() == "whole"


def test_an_interrupted_script_ends_its_command(tmp_path):
    """If a training ran on after the script, the next call would start a second training in the same workdir."""
    script = """
import sys
from benchmarks import accelerator
from lsrs_jax import cli
work = accelerator.Work(accelerator.parse(["run", "--out=" + sys.argv[1]]))
saves = "import os, pathlib, signal, sys, time\\n"
saves += "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('saved').write_text('whole'), sys.exit(143)))\\n"
saves += "pathlib.Path('started').write_text(''); time.sleep(60)"
accelerator.ROOT = sys.argv[1]
sys.argv = sys.argv[:1]
cli.execute(lambda _: work.command("-c", saves))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        place = tmp_path / str(code)
        place.mkdir()
        words = [sys.executable, "-c", script, str(place)]
        process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not (place / "started").exists():
            time.sleep(0.05)
        process.send_signal(number)
        lines = process.communicate(timeout=60)[1].splitlines()
        assert (process.returncode, lines[-1]) == (code, "interrupted; the same command resumes")
        assert not any("Traceback" in line for line in lines)
        assert (place / "saved").read_text() == "whole"


def test_a_file_that_holds_no_result_is_named(tmp_path):
    for damaged in ("{", "[]", '{"result": {}}', '{"result": {}, "machine": {}}', '{"result": {}, "machine": 3}'):
        (tmp_path / "throughput.ceilings.json").write_text(damaged)
        with pytest.raises(UserError, match=r"throughput.ceilings.json holds no result .*; remove it"):
            accelerator.main(["render", f"--out={tmp_path}"])
    with pytest.raises(UserError, match=r"cannot write into --out="):
        accelerator.main(["run", f"--out={tmp_path / 'throughput.ceilings.json'}"])
    with pytest.raises(UserError, match=r"holds no results"):
        accelerator.main(["pack", f"--out={tmp_path / 'none'}"])


def test_an_unfinished_training_is_finished_before_the_whole_set(tmp_path, random_cifar10, monkeypatch):
    """The script does not certify an unfinished training that an earlier session left behind."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(random_cifar10))
    work = accelerator.Work(accelerator.parse(["run", f"--out={tmp_path}", "--tiny"]))
    run = accelerator.STUDIES["full"].rows["ISRS, free network: Gaussian augmentation"]
    place = accelerator.train(work, run)
    assert (place / "checkpoints" / "2").is_dir()
    shutil.rmtree(place / "checkpoints" / "2")
    accelerator.train(work, run)
    assert (place / "checkpoints" / "2").is_dir()
    times = (place / "metrics.jsonl").stat().st_mtime_ns
    accelerator.train(work, run)
    assert (place / "metrics.jsonl").stat().st_mtime_ns == times


def test_an_unknown_piece_is_named(tmp_path):
    with pytest.raises(UserError, match="section whole has no piece 'quick': radii-bfloat16, "):
        accelerator.main(["run", f"--out={tmp_path}", "--tiny", "--sections=whole.quick"])


def test_the_host_records_every_look_of_every_image():
    found = throughput.bookkeeping(20)
    assert 20 <= found["looks"] <= 20 * 19
    assert found["seconds"] > 0


def test_the_noise_of_this_platform_passes_and_another_sigma_does_not():
    found = precision.noise(2**22)
    assert found["p_value"] > 1e-4
    assert found["wrong_p_value"] < found["p_value"]
    assert found["draws"] == 2**22


def test_a_head_is_measured_in_the_sampling_loop_beside_its_ceiling():
    found = throughput.sampling("linear on 512", "bfloat16", (4, 8), 64, seconds=0.02)
    assert 2 * 512 * 10 <= found["flops"] < 2.1 * 512 * 10
    assert found["tile"] == (4, 8)
    assert found["votes"] > 0
    assert found["ceiling"] > 0


def test_heads_are_measured_as_they_are_certified():
    heads = throughput.heads()
    assert next(iter(heads)) == f"{throughput.DEFAULT}:lsrs on 8x8x48"
    assert heads[f"{throughput.DEFAULT}:isrs_resnet on 32x32x3"][1:] == ((32, 32, 3), (64, 64))
    for name in (f"{throughput.DEFAULT}:lsrs on 8x8x48", "linear on 512"):
        function, shape, tile = heads[name]
        assert tile == (64, 512)
        assert function("float32")(np.zeros((2, *shape), np.float32)).shape == (2, throughput.CLASSES)


@pytest.mark.soak
def test_every_piece_at_tiny_size(tmp_path, capsys):
    accelerator.main(["run", f"--out={tmp_path}", "--tiny", "--sections=precision,throughput", "--minutes=30"])
    accelerator.main(["render", f"--out={tmp_path}"])
    assert "NO" not in capsys.readouterr().out


@pytest.mark.soak
def test_the_whole_set_is_certified(tmp_path, random_cifar10, capsys, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "elsewhere")  # so that pytest restores it after the script has changed it
    arguments = [f"--out={tmp_path / 'out'}", "--sections=table,whole.radii-bfloat16,whole.fixed-float32"]
    accelerator.main(["run", *arguments, f"--data={random_cifar10}", "--tiny"])
    capsys.readouterr()
    accelerator.main(["render", *arguments])
    printed = capsys.readouterr().out
    assert ", at tiny size (cpu), " in printed
    assert "| radii-bfloat16 | 1 | " in printed
    assert "| fixed-float32 | 1 | " in printed
    assert "staged" not in printed
    with pytest.raises(UserError, match=r"holds results of .*, at tiny size: choose another --out"):
        accelerator.main(["run", *arguments])
    source = tmp_path / "out" / "runs" / "full-smoothadv" / "certify" / "test-radii-bfloat16"
    packed = tmp_path / "out" / "certificates" / "test-radii-bfloat16"
    assert gzip.decompress(packed.with_suffix(".tsv.gz").read_bytes()) == (source / "certificates.tsv").read_bytes()
    assert packed.with_suffix(".json").read_bytes() == (source / "certificates.json").read_bytes()


def test_results_are_packed_for_another_clone(tmp_path):
    machine = accelerator.load(accelerator.RESULTS)[1][0]
    arguments = ["pack", f"--out={tmp_path}"]
    (tmp_path / "certificates").mkdir()
    (tmp_path / "certificates" / "test-fixed.tsv.gz").write_bytes(b"table")
    for changed, why in (
        ({"tiny": True}, "holds no results to be kept"),
        ({"device": "abacus"}, "holds results of .*: move them away before you add others"),
        ({}, None),
    ):
        for name in ("whole.fixed-float32", "table.full-free-gaussian"):
            facts = {"machine": machine | changed, "seconds": 1, "result": {"images": 1}}
            (tmp_path / f"{name}.json").write_text(json.dumps(facts))
        if why:
            with pytest.raises(UserError, match=why):
                accelerator.main(arguments)
    accelerator.main(arguments)
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        archive.extractall(tmp_path / "clone", filter="data")
    results = tmp_path / "clone" / "docs" / "results"
    assert (results / "cifar10" / "full-free-gaussian" / "card.md").exists()
    assert json.loads((results / "accelerator" / "whole.fixed-float32.json").read_text())["result"]["images"] == 1
    assert (results / "accelerator" / "certificates" / "test-fixed.tsv.gz").read_bytes() == b"table"


def test_results_of_two_devices_are_not_mixed(tmp_path):
    facts = {"machine": {"device": "abacus"}, "seconds": 1, "result": {}}
    (tmp_path / "throughput.ceilings.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="holds results of abacus: choose another --out"):
        accelerator.main(["run", f"--out={tmp_path}"])
