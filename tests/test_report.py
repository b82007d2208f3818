import contextlib
import hashlib
import json
import re
import shutil
import sys
from functools import partial
from unittest.mock import ANY

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from lsrs_jax import report
from lsrs_jax.certification.table import read_table
from lsrs_jax.config import config_to_dict, default
from lsrs_jax.runtime import documents, files, signals
from lsrs_jax.runtime.errors import UserError
from support import ROOT
from support.commands import refused, run

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime"


def write_log(path, radii, start=0):
    lines = [HEADER, *(f"{start + i}\t1\t1\t{r}\t1\t0:00:01.5" for i, r in enumerate(radii))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_report_writes_table_and_pictures(tmp_path, capsys):
    write_log(tmp_path / "a" / "certify" / "default" / "certificates.tsv", [0.1, 0.6, 0.8, 1.2])
    log = write_log(tmp_path / "peer.tsv", [0.3, 0.6], start=2)
    report.run([str(tmp_path / "a"), f"Peer={log}", f"--out={tmp_path / 'out'}", "--radii=0,0.5,1"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| a | 4 of ? | 1.000 | 0.750 | 0.250 | 0.750 (class 1) | 0.000 | ? | 0.675 | ? | ? | - | 1.5 s |" in text
    assert "| Peer | 2 | 1.000 | 0.500 | 0.000 | 0.500 (class 1) | 0.000 | ? | 0.450 |" in text
    assert "- ACRs are comparable only at the same n and cap" in text
    assert "('a', 'Peer': n and cap unknown)" in text
    assert "Peer and a are certified on different images" in text
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "curve.svg").read_text()
    assert "| Peer | 2 |" in capsys.readouterr().out


def test_a_table_that_its_certificates_json_does_not_name_is_refused(tmp_path):
    path = write_log(tmp_path / "a" / "certify" / "full" / "certificates.tsv", [0.1, 0.6])
    derivation = {"certificates": hashlib.sha256(path.read_bytes()).hexdigest(), "votes": {}}
    beside = path.with_name("certificates.json")
    beside.write_text(json.dumps({"derivation": derivation}))
    assert report.load_runs([str(tmp_path / "a")])[0].label == "a"
    write_log(path, [0.1, 0.7])
    again = f"certify --workdir={tmp_path / 'a'} --config.certify.name=full"
    with pytest.raises(UserError, match=f"is not the table .*: python -m lsrs_jax.{again} --from-counts"):
        report.load_runs([str(tmp_path / "a")])
    documents.write_sealed(beside, {"derivation": None})  # interrupted before its table was written
    with pytest.raises(UserError, match=f"{again}$"):
        report.load_runs([str(path)])
    # Another name, other files.
    assert report.load_runs([str(path.rename(path.with_name("copy.tsv")))])[0].label == "copy"


def test_a_damaged_certificates_json_is_refused_and_a_missing_one_noted(tmp_path, capsys):
    """A table alone may come from anybody, so the report notes it."""
    path = write_log(tmp_path / "a" / "certify" / "full" / "certificates.tsv", [0.1, 9.75])
    beside = path.with_name("certificates.json")
    derivation = {"certificates": hashlib.sha256(path.read_bytes()).hexdigest(), "alpha": 0.05}
    documents.write_sealed(beside, {"derivation": derivation})
    whole = beside.read_text()
    assert report.notes(report.load_runs([str(tmp_path / "a")])) == []
    ours = json.dumps({"format": 1, "identity": {}, "lipschitz": {}, "dagest": "1", "derivation": derivation})
    for damaged in (whole[:-3], whole[:40], "", whole.replace("0.05", "0.01"), '{"digest": [1]}', "[" * 10**5, ours):
        beside.write_text(damaged)
        with pytest.raises(UserError, match=r"certificates.json is damaged \(.*\); restore it, or move it away"):
            report.load_runs([str(tmp_path / "a")])
    for named, note in ((derivation, "- a: unsealed: an old version wrote its certificates.json"), (None, None)):
        beside.write_text(json.dumps({"identity": {}, "lipschitz": {}, "derivation": named}))
        with contextlib.nullcontext() if note else pytest.raises(UserError, match="is not the table that"):
            report.run([str(tmp_path / "a"), f"--out={tmp_path / 'out'}"])
            assert note in capsys.readouterr().out
    for foreign in ("{}", "[1]", '{"alpha": 0.05}', None):
        beside.unlink() if foreign is None else beside.write_text(foreign)
        report.run([str(tmp_path / "a"), f"--out={tmp_path / 'out'}"])
        assert "- a: no certificates.json beside it names this table" in capsys.readouterr().out
    # A published log does not belong to a workdir, so there is no note.
    assert report.notes(report.load_runs([str(write_log(tmp_path / "log" / "certificates.tsv", [0.5]))])) == []


def test_entries_for_the_leaderboard(tmp_path):
    path = ROOT / "lsrs_jax" / "pretrained" / "digits"
    out = ["--out=" + str(tmp_path), "--radii=0,0.25,0.5"]
    run("report", str(path), *out, '--board=Digits:"A" & b')
    (quarter, half), table = (
        yaml.safe_load((tmp_path / "board.yml").read_text()),
        read_table(path / "certify" / "default" / "certificates.tsv"),
    )
    assert half["setting"] == r"Digits,&nbsp; \(\ell_2\), &nbsp; \(\epsilon=0.5\)"
    (entry,) = quarter["records"]
    assert set(entry) == {"score", "title", "link", "venue", "prob", "comment"}
    assert (entry["title"], entry["prob"]) == ('"A" & b', True)
    share = 100 * table.certified_accuracy(0.25)
    assert share - 0.01 < float(entry["score"].removesuffix("%")) <= share
    run("report", str(path), f"other={path}", *out, "--board=Digits:T")
    titles = [entry["title"] for entry in yaml.safe_load((tmp_path / "board.yml").read_text())[0]["records"]]
    assert titles == ["T (digits)", "T (other)"]
    assert "DATA:TITLE" in refused("report", str(path), *out, "--board=nothing")


def test_a_run_with_several_certifications_gives_several_rows(tmp_path):
    for name in ("full", "quick"):
        write_log(tmp_path / "a" / "certify" / name / "certificates.tsv", [0.5])
    assert [run.label for run in report.load_runs([str(tmp_path / "a")])] == ["a/full", "a/quick"]


def test_an_unfinished_certification_is_called_so_in_table_text_and_picture(tmp_path, capsys):
    path = write_log(tmp_path / "a" / "certify" / "half" / "certificates.tsv", [0.0] * 78)
    content = {"identity": {"images": 360, "schedule": "staged"}, "lipschitz": {}, "config": config_to_dict(default())}
    content["derivation"] = {"certificates": hashlib.sha256(path.read_bytes()).hexdigest()}
    documents.write_sealed(path.with_name("certificates.json"), content)
    report.run([str(tmp_path / "a"), f"--out={tmp_path / 'out'}"])
    for text in ((tmp_path / "out" / "report.md").read_text(), capsys.readouterr().out):
        assert "| a (not finished) | 78 of 360 | 1.000 |" in text
        assert "- a: 282 of the 360 images that were to be certified are not in its table: it is not finished" in text
        assert "staged sampling decides the images without a certificate first" in text
    assert "a (not finished, 78 of 360 images)" in (tmp_path / "out" / "curve.svg").read_text()
    content["identity"]["images"] = None  # as in format 1
    documents.write_sealed(path.with_name("certificates.json"), content)
    assert report.load_runs([str(tmp_path / "a")])[0].images == "78 of ?"
    content["identity"]["images"] = 78
    documents.write_sealed(path.with_name("certificates.json"), content)
    assert report.load_runs([str(tmp_path / "a")]) == [report.Run("a", ANY, None, [], kind=ANY)]


def test_the_worst_class_has_its_name_where_the_files_say_it(tmp_path):
    """Anything may stand in the file; a class that is called by its number is "class 1"."""
    path = write_log(tmp_path / "a" / "certificates.tsv", [0.1, 0.3])
    for names, shown in (
        (["cat", "a|dog"], "a_dog"),
        (["0", "1"], "class 1"),
        (["cat"], "class 1"),
        ("dog", "class 1"),
    ):
        content = {"identity": {"data": {"class_names": names}}, "lipschitz": {}}
        content["derivation"] = {"certificates": hashlib.sha256(path.read_bytes()).hexdigest()}
        documents.write_sealed(path.with_name("certificates.json"), content)
        report.run([str(path), f"--out={tmp_path / 'out'}", "--radii=0,0.2"])
        assert f"0.500 ({shown}) |" in (tmp_path / "out" / "report.md").read_text()


def test_samples_without_a_table_are_called_unfinished(certification, tmp_path):
    home = certification[0]
    shutil.copytree(home, tmp_path / "a" / "certify" / "whole")
    shutil.copytree(home, tmp_path / "a" / "certify" / "begun", ignore=shutil.ignore_patterns("certificates.*"))
    assert "beside it, begun holds samples but no certificates" in report.load_runs([str(tmp_path / "a")])[0].notes[-1]
    shutil.rmtree(tmp_path / "a" / "certify" / "whole")
    for path in (tmp_path / "a", tmp_path / "a" / "certify" / "begun"):
        with pytest.raises(UserError, match="begun holds samples but no certificates yet: it is not finished"):
            report.load_runs([str(path)])


def test_a_curve_that_cannot_be_drawn_leaves_the_table_and_a_note(tmp_path, monkeypatch, capsys):
    arguments = [str(write_log(tmp_path / "a.tsv", [0.5])), f"--out={tmp_path / 'out'}"]
    table = tmp_path / "out" / "report.md"

    def written():
        text, out = table.read_text(), capsys.readouterr().out
        assert "| a | 1 |" in text
        assert "| a | 1 |" in out
        table.unlink()
        return ("curve.svg" in text), next((line for line in out.splitlines() if "curve:" in line), "")

    report.run(arguments)
    assert written() == (True, f"curve: {tmp_path / 'out' / 'curve.png'}")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        report.run(arguments)
    old = f"; {tmp_path / 'out' / 'curve.png'} is of an earlier report"
    assert written() == (False, f"no curve: Matplotlib is not installed (pip install matplotlib){old}")
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda *_, **__: 1 / 0)
        report.run(arguments)
    assert written() == (False, f"no curve: Matplotlib failed (ZeroDivisionError: division by zero){old}")
    write = files.write_atomic
    for stop in (OSError(28, "No space left on device", "curve.png"), signals.Interrupted(15)):
        with monkeypatch.context() as patch:
            patch.setattr(files, "write_atomic", partial(write_only, table, write, stop))
            with pytest.raises(type(stop)):
                report.run(arguments)
        assert written()[0] is False


def write_only(allowed, write, error, path, content):
    if path != allowed:
        raise error
    write(path, content)


def test_a_missing_backend_and_an_ascii_terminal_lose_nothing(tmp_path):
    log, out = write_log(tmp_path / "a.tsv", [0.5]), tmp_path / "größe"
    backend = "module://matplotlib_inline_is_missing.backend_inline"
    shown = run("report", f"größe={log}", f"--out={out}", MPLBACKEND=backend, PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert r"| gr\xf6\xdfe | 1 |" in shown
    assert rf"curve: {tmp_path}/gr\xf6\xdfe/curve.png" in shown
    assert "| größe | 1 |" in (out / "report.md").read_text(encoding="utf-8")
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_name_that_the_font_lacks_is_drawn_and_noted(tmp_path, capsys):
    report.run([f"大きさ={write_log(tmp_path / 'a.tsv', [0.5])}", f"--out={tmp_path}"])
    assert "note: the font of the curve lacks some characters of the names" in capsys.readouterr().out


def test_bad_arguments_are_one_line(tmp_path):
    log = write_log(tmp_path / "x.tsv", [0.5])
    (tmp_path / "empty").mkdir()
    for arguments, why in (
        ([str(tmp_path / "nothing")], "no run at"),
        ([str(tmp_path / "empty")], "no certificates in"),
        ([str(log), str(log)], "two runs are called"),
        ([str(log), "--radii=a"], "numbers >= 0"),
        ([f"a|b={log}"], "bad name"),
        ([f"={log}"], "bad name"),
        ([str(log), "--radii=-1,0"], "numbers >= 0"),
        ([str(log), "--rradii=1"], "unrecognized arguments"),
    ):
        with pytest.raises(UserError, match=why):
            report.run([*arguments, f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("largest", [0.0, 1e-3, 0.3, 0.9, 2.4, 3.8, 60.0, 100.0, 1e300])
def test_the_radius_grid_is_readable_whatever_the_radii(tmp_path, largest):
    grid = report.radius_grid([report.Run("a", read_table(write_log(tmp_path / "x.tsv", [0.0, largest])))])
    assert grid[0] == 0
    assert grid[-1] <= largest
    assert len(grid) <= 13
    assert len(grid) >= 4 or largest == 0


def test_other_data_under_the_same_indices_is_noted(tmp_path):
    first, second = write_log(tmp_path / "x.tsv", [0.1, 0.2]), write_log(tmp_path / "y.tsv", [0.1, 0.2])
    second.write_text(second.read_text().replace("\t1\t1\t0.2", "\t2\t2\t0.2"))
    assert "different labels" in report.notes(report.load_runs([str(first), str(second)]))[0]
    assert [run.label for run in report.load_runs([str(write_log(tmp_path / "sigma_0.25", [0.5]))])] == ["sigma_0.25"]


def cohen_table(path):
    """``{sigma: {radius: percent}}`` of a published Markdown table, without its empty cells."""
    text = re.sub(r"<[^>]*>|\*", "", path.read_text())
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    radii = [re.search(r"r\s*=\s*([\d.]+)", cell) for cell in cells[0]]
    table = {}
    for row in cells[1:]:
        sigma = re.search(r"([\d.]+)", row[0])
        if sigma and "." in sigma[1]:
            pairs = zip(radii[-6:], row[1:7], strict=True)
            table[sigma[1]] = {float(r[1]): float(value) for r, value in pairs if r and value}
    return table


@pytest.mark.parametrize(("data", "network"), [("cifar10", "resnet110"), ("imagenet", "resnet50")])
def test_published_tables_are_reproduced(reference, data, network):
    """Recomputes every cell of Cohen's tables from the published logs."""
    published = cohen_table(reference / "cohen_tables" / "markdown" / f"vary_noise_{data}")
    compared = 0
    for sigma, cells in published.items():
        log = reference / "cohen_certify" / data / network / f"noise_{sigma}" / "test" / f"sigma_{sigma}"
        table = read_table(log)
        for radius, value in cells.items():
            assert table.certified_accuracy(radius) == pytest.approx(value, abs=0.00501), (sigma, radius)
            compared += 1
    assert compared >= 12


def test_published_averages(reference):
    table = read_table(reference / "consistency" / "cifar10" / "noise_0.25.tsv")
    assert len(table) == 10_000
    assert table.average_certified_radius == pytest.approx(0.552, abs=5e-4)
    assert np.isclose(table.certified_accuracy(0.5), 0.581, atol=5e-4)
