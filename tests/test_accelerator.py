"""The script for accelerators: it resumes, it ends in time, and its published tables are those of its results."""

import json
import sys

import pytest
from conftest import ROOT

from lsrs_jax.errors import UserError

sys.path.insert(0, str(ROOT / "benchmarks"))
import accelerator
import precision
import throughput

RESULTS = ROOT / "docs" / "results" / "accelerator"


def test_the_page_shows_what_was_measured(capsys):
    accelerator.main(["render", f"--out={RESULTS}"])
    printed = capsys.readouterr().out
    assert printed.count("|---") >= 3
    assert printed.strip() in RESULTS.with_suffix(".md").read_text()


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
    with pytest.raises(UserError, match=r"1 pieces failed: precision\.bad"):
        accelerator.main(arguments)
    assert "precision: bad: no such device" in capsys.readouterr().err
    accelerator.main(arguments)
    assert calls == ["first", "bad", "last", "bad"]
    assert json.loads((tmp_path / "precision.bad.json").read_text())["result"] == {"name": "bad"}
    (tmp_path / "precision.last.json").unlink()
    with pytest.raises(UserError, match="the minutes are over; the same command goes on"):
        accelerator.main([*arguments, "--minutes=-1"])
    assert not (tmp_path / "precision.last.json").exists()


def test_a_command_ends_at_the_deadline_and_tells_why_one_failed(tmp_path):
    options = accelerator.parse(["run", f"--out={tmp_path}", "--minutes=0.02"])
    work = accelerator.Work(options)
    with pytest.raises(UserError, match="stopped at the deadline"):
        work.command("-c", "import time; time.sleep(60)")
    work = accelerator.Work(accelerator.parse(["run", f"--out={tmp_path}", "--minutes=1"]))
    with pytest.raises(UserError, match="out of paper"):
        work.command("-c", "import sys; print('first'); sys.exit('out of paper')")
    assert work.command("-c", "pass") > 0


def test_the_noise_of_this_platform_passes_and_another_sigma_does_not():
    found = precision.noise(2**22)
    assert found["p_value"] > 1e-4
    assert found["wrong_p_value"] < found["p_value"]
    assert found["draws"] == 2**22


def test_a_head_is_measured_in_the_vote_loop():
    name = "linear on 512"
    found = throughput.votes(name, "bfloat16", [(4, 4), (4, 8)], seconds=0.02)
    assert 2 * 512 * 10 <= found["flops"] < 2.1 * 512 * 10
    assert set(found["votes"]) == {"4x4", "4x8"}
    assert found["votes"][found["best"]] == max(found["votes"].values()) > 0
    assert found["noise_share"] > 0


def test_the_default_head_is_among_those_measured():
    function, shape = throughput.heads()[f"{throughput.DEFAULT} on 8x8x48"]
    assert shape == (8, 8, 48)
    assert function("float32") is not None


@pytest.mark.soak
def test_every_piece_at_tiny_size(tmp_path, capsys):
    accelerator.main(["run", f"--out={tmp_path}", "--tiny", "--sections=precision,throughput", "--minutes=30"])
    accelerator.main(["render", f"--out={tmp_path}"])
    assert "NO" not in capsys.readouterr().out
