"""Metrics, audits and files beside a table are read, left out, or refused with one line."""

import contextlib
import hashlib
import json
import os
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lsrs_jax.auditing.table import read_audit, read_finished
from lsrs_jax.training.metrics import Metrics
from support.hostile import JSON, STRANGE, answer, examples, json_text, sealed
from support.samples import AUDIT, TABLE, reported


@examples(150)
@given(st.binary(max_size=60) | st.lists(JSON.map(json_text), max_size=3).map(lambda lines: "\n".join(lines).encode()))
@example(b'{"step": ' + b"[" * 100_000 + b"\n")
@example(b'{"step": 3, "loss": 1.0}\n{"step": 4}')
def test_only_whole_lines_with_a_step_are_kept_of_any_metrics(folder, content):
    path = folder / "metrics.jsonl"
    path.write_bytes(content + b'\n{"step": 7, "loss": 0.5}\n{"step": 8, "lo')
    Metrics(folder, 10**500, 10).close()
    kept = path.read_text().splitlines()
    assert kept[-1] == '{"step": 7, "loss": 0.5}'
    assert all(isinstance(json.loads(line)["step"], int) for line in kept)


@pytest.mark.parametrize("fails", ["import", "add_scalar", "close"])
def test_a_failing_tensorboard_loses_no_metrics(tmp_path, monkeypatch, capsys, fails):
    """tensorboardX raises a TypeError when it is imported beside some versions of protobuf."""
    wrong = "raise TypeError('Descriptors cannot be created directly')"
    bodies = {name: wrong if name == fails else "pass" for name in ("import", "add_scalar", "close")}
    methods = "".join(f"    def {name}(self, *_): {bodies[name]}\n" for name in ("add_scalar", "close"))
    text = f"{bodies['import']}\nclass SummaryWriter:\n    def __init__(self, folder): pass\n{methods}"
    (tmp_path / "tensorboardX.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorboardX", raising=False)
    with contextlib.closing(Metrics(tmp_path, 0, 10)) as metrics:
        metrics({"step": 1, "loss": 0.5})
        metrics({"step": 2, "loss": 0.25})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'
    out = capsys.readouterr().out
    assert out.count("note: no TensorBoard events (TypeError: Descriptors cannot be created directly)") == 1
    assert "step      2  loss 0.25" in out
    monkeypatch.delitem(sys.modules, "tensorboardX", raising=False)


@examples(200)
@given(st.sampled_from(STRANGE) | JSON, st.sampled_from(["radii", "derivation", None]))
@example(["a"], "radii")
@example([10**400], "radii")
@example("abc", "radii")
@example({"0.5": 1}, "radii")
@example([[0.5]], "radii")
def test_a_foreign_file_beside_a_table_says_nothing_or_is_refused_in_one_line(folder, value, where):
    home = folder / "peer"
    home.mkdir(exist_ok=True)
    (home / "certificates.tsv").write_text(TABLE)
    content = {"radii": {"derivation": {"radii": value}}, "derivation": {"derivation": value}, None: value}[where]
    (home / "certificates.json").write_text(json_text(content), encoding="utf-8", errors="surrogatepass")
    found = answer(reported, home)
    if found is None:  # the JSON is nested too deeply to be read
        return
    labels, notes = found
    assert labels == ["peer"]
    assert all("sampled to decide the radii" in note for note in notes)
    if notes:
        assert where == "radii"
        assert all(type(radius) in (int, float) and 0 <= radius <= 1e300 for radius in value)


@examples(200)
@given(
    st.integers(0, len(AUDIT)),
    st.integers(0, 20),
    st.text(max_size=4) | st.sampled_from(["\n", "\t", "nan", "9" * 400]),
)
@example(0, len(AUDIT), "")
def test_a_changed_audit_is_read_or_refused_in_one_line(folder, start, length, text):
    path = folder / "audit.tsv"
    path.write_text(AUDIT[:start] + text + AUDIT[start + length :], encoding="utf-8", errors="surrogatepass")
    found = answer(read_audit, path)
    if found is not None:
        assert len(np.unique(found.idx)) == len(found.idx)
        assert np.isfinite(found.radius).all()
        assert (found.distance >= 0).all()
        assert 0 <= found.robust_accuracy(0.1) <= 1


@examples(100)
@given(st.sampled_from(["certificates", "settings", "audit", "digest", None]), st.sampled_from(STRANGE) | JSON)
def test_facts_about_an_audit_are_its_own_or_refused_in_one_line(folder, field, new):
    home = folder / "audited"
    home.mkdir(exist_ok=True)
    (home / "audit.tsv").write_text(AUDIT)
    settings = {"images": 1, "fractions": [1.0], "restarts": 1, "steps": 1, "samples": 1, "votes": 1}
    facts = {"certificates": "00", "settings": settings, "audit": hashlib.sha256(AUDIT.encode()).hexdigest()}
    content = new if field is None else facts | {field: new}
    (home / "audit.json").write_text(sealed(content) if field in facts else json_text(content))
    found = answer(read_finished, home / "audit.tsv")
    assert found is None or (found[0] == new if field == "certificates" else field == "settings")


def test_radii_that_a_staged_certification_decided_are_noted(folder):
    home = folder / "staged"
    home.mkdir()
    (home / "certificates.tsv").write_text(TABLE)
    (home / "certificates.json").write_text('{"derivation": {"radii": [0.25, 1]}}')
    assert "radii 0.25, 1;" in reported(home)[1][-1]


@examples(60)
@given(st.text(min_size=1, max_size=8).filter(lambda name: "/" not in name and "\0" not in name and name.strip(".")))
@example("a|b")
@example("a\rb\x1b[2J")
@example(os.fsdecode(b"\xff"))
@example("\u2028")
def test_the_name_of_a_folder_breaks_neither_table_nor_terminal(tmp_path_factory, name):
    home = tmp_path_factory.mktemp("named")
    try:
        for run in ("x", name):
            (home / name / "certify" / run).mkdir(parents=True, exist_ok=True)
            (home / name / "certify" / run / "certificates.tsv").write_text(TABLE)
    except (OSError, ValueError):  # the file system does not allow this name
        return
    for label in reported(home / name)[0]:
        assert label.isprintable()
        assert not set(label) & set("|$\\`")
