"""Commands answer bad files and flags from strangers with one printable line."""

import contextlib
import json
import pickle
import sys
import warnings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lsrs_jax import certify, cli, report
from lsrs_jax.config import config_to_dict
from lsrs_jax.runtime.errors import UserError
from support.commands import refused
from support.executions import Payload
from support.hostile import changed, examples, json_text, sealed
from support.samples import CONFIG, with_field


@examples(100)
@given(st.text() | st.text(max_size=2).map(lambda text: text * 10**4))
@example("a\r\nb\u2028c\x1b[2J\udcff" * 1000)
def test_the_message_of_an_error_is_one_printable_line(text):
    message = str(UserError(f"no {text!s} here; try again"))
    assert message.isprintable()
    assert message.startswith("no ")
    assert message.endswith("here; try again")
    assert len(message) < 2100


def one_line(monkeypatch, capsys, run, arguments):
    """The line on stderr of a command that must end with exit code 2; like `commands.refused`, but in this process."""
    monkeypatch.setattr(sys, "argv", ["lsrs_jax", *map(str, arguments)])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(cli.signals, "handled", contextlib.nullcontext)
    capsys.readouterr()
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        cli.execute(run)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert error[:-1].isprintable()
    return error


def test_commands_answer_files_of_strangers_with_one_line_and_leave_them_alone(
    certification, tmp_path, monkeypatch, capsys
):
    home, config, stored, table = certification
    workdir = tmp_path / "run\nof a stranger"
    copied = workdir / "certify" / "default"
    copied.mkdir(parents=True)
    ledger = (home / "votes.0.tsv").read_bytes()
    good = {
        workdir / "config.json": json.dumps(config_to_dict(config)).encode(),
        copied / "certificates.json": json.dumps(stored).encode(),
        copied / "certificates.tsv": table,
        copied / "votes.0.tsv": ledger,
    }
    pickled = pickle.dumps(Payload(tmp_path / "canary"))
    bad = [
        (workdir / "config.json", b"[" * 100_000),
        (workdir / "config.json", json_text(changed(CONFIG, ("sigma",), 10**400)).encode()),
        (workdir / "config.json", pickled),
        (copied / "certificates.json", b"[" * 100_000),
        (copied / "certificates.json", sealed(changed(stored, ("identity", "arithmetic"), {})).encode()),
        (copied / "certificates.json", sealed(changed(stored, ("identity", "certificate"), "a\nb")).encode()),
        (copied / "certificates.json", pickled),
        (copied / "votes.0.tsv", ledger[:-9] + b"\xff" + ledger[-8:]),
        (copied / "votes.0.tsv", pickled),
    ]
    for path, content in bad:
        for name, text in (good | {path: content}).items():
            name.write_bytes(text)
        one_line(monkeypatch, capsys, certify.run, [f"--workdir={workdir}", "--from-counts"])
        assert {name: name.read_bytes() for name in good} == good | {path: content}
    for name, text in good.items():
        name.write_bytes(text)
    for flag in (
        "--config.certify.tile=(b'a', 3)",
        "--config.certify.radii=(" + "9" * 400 + ",)",
        "--config.x\ny=1",
        "z",
    ):
        one_line(monkeypatch, capsys, certify.run, [f"--workdir={workdir}", flag])
    for content in (pickled, b"\xff", with_field("time", "9" * 400 + ":00:00").encode(), b"idx\tlabel\n"):
        (copied / "certificates.tsv").write_bytes(content)
        one_line(monkeypatch, capsys, report.run, [copied, f"--out={tmp_path / 'report'}"])
    assert not (tmp_path / "report").exists()
    assert not (tmp_path / "canary").exists()


def test_a_process_answers_as_the_same_process_would(tmp_path):
    (tmp_path / "a\x1bb.tsv").write_text(with_field("radius", "\x1b[2J\u2028"))
    line = refused("report", tmp_path / "a\x1bb.tsv", f"--out={tmp_path / 'out'}")
    assert "line 2 cannot be read" in line
    assert line.isprintable()
