"""The page of a report without a browser: its numbers, its images, what it lacks, and that names stay text.

tests/browser opens it.
"""

import base64
import hashlib
import io
import os
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from lsrs_jax import report
from lsrs_jax.auditing.table import read_audit
from lsrs_jax.certification.table import read_table
from lsrs_jax.data import from_arrays, load
from lsrs_jax.reporting import gallery, page, pictures
from support import ROOT
from support.random_runs import HOSTILE, blocks, noise, write_data, write_run
from test_report import write_log

DIGITS = ROOT / "lsrs_jax" / "pretrained" / "digits"


@pytest.fixture(scope="module")
def runs(folder):
    """Two workdirs on one data set; their images overlap, and the first one is audited."""
    data = write_data(folder / "data.npz", *noise(60))
    write_run(folder / "a", data, range(0, 60, 2), audited=20)
    write_run(folder / "b", data, range(0, 60, 3), seed=1)
    return folder


def reported(out, *arguments):
    report.run([*map(str, arguments), f"--out={out}"])
    return blocks(out / "report.html")


def cut(facts, sheets, place):
    """The image at a place of the sheets, as the script of the page cuts it out."""
    sheet, within = divmod(place, facts["columns"] * facts["rows"])
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheets[sheet]))))
    across, down = facts["pitch"]
    top, left = down * (within // facts["columns"]), across * (within % facts["columns"])
    return pixels[top : top + facts["height"], left : left + facts["width"]]


def test_the_numbers_of_the_page_are_those_of_the_table_the_ledger_and_the_audit(runs, tmp_path, capsys):
    data, _ = reported(tmp_path, runs / "a", runs / "b", "--images", "--radii=0,0.1")
    shown = capsys.readouterr().out
    assert f"page: {tmp_path / 'report.html'}" in shown
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if line[0] == "|"]
    assert [data["header"], *([cell["text"] for cell in run["cells"]] for run in data["runs"])] == [rows[0], *rows[2:]]
    for run, name in zip(data["runs"], "ab", strict=True):
        home = runs / name / "certify" / "default"
        table, own = read_table(home / "certificates.tsv"), run["gallery"]
        for column in ("idx", "label", "predict", "radius"):
            assert own[column] == getattr(table, column).tolist()
        assert run["radii"] == sorted(table.radius[table.correct].tolist(), reverse=True)
        values = [cell["value"] for cell in run["cells"]]
        assert values[1:4] == [len(table), table.certified_accuracy(0), table.certified_accuracy(0.1)]
        assert (run["total"], run["samples"], run["n"]) == (len(table), table.samples.mean(), 100)
        assert own["samples"] == [100] * len(table)
        assert all(leading == sorted(leading, key=lambda pair: -pair[1]) for leading in own["votes"])
        # A smoothed certificate names the class with the most samples.
        top = np.array([leading[0][0] for leading in own["votes"]])
        np.testing.assert_array_equal(top[table.radius > 0], table.predict[table.radius > 0])
    audit, found = read_audit(runs / "a" / "certify" / "default" / "audit.tsv"), data["runs"][0]
    for r in (0, 0.2, 0.5):
        left = found["audit"]["never"] + sum(distance > r for distance in found["audit"]["distances"])
        assert left / found["audit"]["total"] == audit.robust_accuracy(r)
    nearest = dict(zip(audit.idx.tolist(), audit.distance.tolist(), strict=True))
    for idx, flip in zip(found["gallery"]["idx"], found["gallery"]["flips"], strict=True):
        assert (np.inf if flip is None else flip) == nearest.get(idx, -1)
    assert data["runs"][1]["gallery"]["flips"] is None


def test_images_decode_to_their_pixels_and_are_embedded_once(runs, tmp_path):
    data, sheets = reported(tmp_path, runs / "a", f"digits={DIGITS}", runs / "b", "--images")
    images = np.load(runs / "data.npz")["x_test"]
    digits = load("digits", "test")
    assert [facts["name"] for facts in data["pictures"]] == ["npz", "digits", "nearest flips"]
    for run in data["runs"]:
        facts, own = data["pictures"][run["gallery"]["pictures"]], run["gallery"]
        assert facts["kind"] == "png"
        assert not facts["scaled"]
        for idx, place in list(zip(own["idx"], own["place"], strict=True))[::7]:
            found = cut(facts, sheets[own["pictures"]], place)
            pixels = images[idx] if facts["name"] == "npz" else np.round(digits.images[idx, :, :, 0] * (255 / 16))
            np.testing.assert_array_equal(found, pixels)
    union = {*range(0, 60, 2), *range(0, 60, 3)}
    assert max(max(run["gallery"]["place"]) for run in data["runs"] if run["label"] != "digits") == len(union) - 1


def test_nearest_flips_decode_to_their_points(runs, tmp_path):
    data, sheets = reported(tmp_path, runs / "a", runs / "b", "--images")
    own, other = (run["gallery"] for run in data["runs"])
    assert other["flipped"] is None
    facts, home = data["pictures"][own["flipped"]["pictures"]], runs / "a" / "certify" / "default"
    points = {int(row["idx"]): row["point"] for file in (home / "flips").iterdir() for row in np.load(file)}
    shown = zip(own["idx"], own["flips"], own["flipped"]["place"], own["flipped"]["predict"], strict=True)
    for idx, distance, place, predict in shown:
        assert (place >= 0) == (distance is not None and distance >= 0) == (predict == 2)
        if place >= 0:
            found = cut(facts, sheets[own["flipped"]["pictures"]], place)
            expected = points[idx].mean(axis=2) if found.ndim == 2 else points[idx]
            assert np.abs(found / 255 - expected.clip(0, 1)).max() < 0.51 / 255


def test_an_image_that_no_attack_flipped_has_no_point(runs, tmp_path):
    """Not even if the points of another audit are in the folder."""
    shutil.copytree(runs / "a", tmp_path / "a")
    home = tmp_path / "a" / "certify" / "default"
    (file,) = (home / "flips").iterdir()
    points, audit = np.load(file), read_audit(home / "audit.tsv")
    other = points[:2].copy()
    other["idx"] = [audit.idx[np.isinf(audit.distance)][0], 10**6]
    np.save(home / "flips" / "other.npy", other)
    data, _ = reported(tmp_path / "out", tmp_path / "a", "--images")
    own = data["runs"][0]["gallery"]
    assert own["flipped"]["place"][own["idx"].index(int(other["idx"][0]))] == -1
    assert sum(place >= 0 for place in own["flipped"]["place"]) == len(points)


def test_flips_that_are_large_without_loss_are_stored_as_jpeg():
    images, labels = noise(200, (64, 64, 3))
    (sheets,) = pictures.make_sheets([(from_arrays(images, labels, ["a", "b", "c"]), np.arange(200))], 1_000_000)
    assert sheets.kind == "jpeg"
    assert sum(map(len, sheets.files)) <= 1_000_000


def write_text(path):
    path.write_text("no array")


def write_objects(path):
    np.save(path, np.array([{"idx": 0}]))


def write_points_elsewhere(path):
    points = np.load(path)
    points["point"] += 0.5
    np.save(path, points)


def write_other_shapes(path):
    points = np.load(path)
    np.save(path, points[["idx", "predict"]])


def write_no_points(path):
    np.save(path, np.load(path)[:0])


def write_a_zip(path):
    with path.open("wb") as file:
        np.savez(file, np.zeros(3))


def write_a_header(path):
    path.write_bytes(path.read_bytes().replace(b"'shape': (", b"'shape': (("))


def leave_a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (os.unlink, "no file beside its audit.tsv holds them"),
        (write_points_elsewhere, "no file beside its audit.tsv holds them"),
        (write_no_points, "no file beside its audit.tsv holds them"),
        (write_a_zip, "cannot be read"),
        (write_a_header, "cannot be read"),
        (write_text, "cannot be read"),
        (write_objects, "cannot be read"),
        (write_other_shapes, "it holds something else"),
        (leave_a_folder, "it is not a file"),
    ],
)
def test_flips_that_are_not_those_of_the_audit_are_left_out(runs, tmp_path, spoil, why):
    shutil.copytree(runs / "a", tmp_path / "a")
    (file,) = (tmp_path / "a" / "certify" / "default" / "flips").iterdir()
    spoil(file)
    data, _ = reported(tmp_path / "out", tmp_path / "a", "--images")
    assert data["runs"][0]["gallery"]["flipped"] is None
    assert data["runs"][0]["gallery"]["flips"]
    assert any("no pictures of the nearest flips of a" in note and why in note for note in data["lacking"])


def test_more_than_a_thousand_images_are_lossy_and_no_image_bleeds_into_its_neighbour():
    colours = np.random.default_rng(0).integers(0, 256, (1001, 1, 1, 3), dtype=np.uint8)
    images = np.broadcast_to(colours, (1001, 28, 28, 3))
    dataset = from_arrays(images, np.zeros(1001, int), ["one"])
    (sheets,) = pictures.make_sheets([(dataset, np.arange(1001))])
    assert sheets.kind == "jpeg"
    facts, files = sheets._asdict(), [base64.b64encode(file) for file in sheets.files]
    for place in range(0, 1001, 50):
        assert np.abs(cut(facts, files, place).astype(int) - colours[place]).max() <= 6
    (lossless,) = pictures.make_sheets([(dataset, np.arange(1000))])
    assert lossless.kind == "png"


def test_large_images_are_scaled_down():
    images = np.random.default_rng(0).integers(0, 256, (3, 100, 60, 1), dtype=np.uint8)
    (sheets,) = pictures.make_sheets([(from_arrays(images, np.zeros(3, int), ["one"]), np.arange(3))])
    assert (sheets.height, sheets.width, sheets.scaled) == (pictures.SIDE, 38, True)
    found = cut(sheets._asdict(), [base64.b64encode(file) for file in sheets.files], 2)
    assert abs(float(found.mean()) - images[2].mean()) < 3


def test_images_that_compress_badly_are_made_smaller():
    images, labels = noise(1200, (32, 32, 3))
    (sheets,) = pictures.make_sheets([(from_arrays(images, labels, ["a", "b", "c"]), np.arange(1200))], 300_000)
    assert sum(map(len, sheets.files)) <= 300_000
    assert (sheets.width, sheets.height, sheets.scaled) == (16, 16, True)


def test_a_page_of_ten_thousand_images_of_noise_stays_below_20_mb(tmp_path):
    data = write_data(tmp_path / "data.npz", *noise(10_000, (32, 32, 3)))
    write_run(tmp_path / "a", data, range(10_000), audited=5_000)
    content, sheets = reported(tmp_path / "out", tmp_path / "a", "--images")
    assert len(content["runs"][0]["gallery"]["idx"]) == 10_000
    assert len(sheets[0]) == 25
    assert sum(place >= 0 for place in content["runs"][0]["gallery"]["flipped"]["place"]) > 4_000
    assert (tmp_path / "out" / "report.html").stat().st_size < 20e6


def test_names_stay_text_whatever_they_are(runs, tmp_path):
    data, _ = reported(tmp_path, f"<b onclick>&={runs / 'a'}", "--images")
    assert data["runs"][0]["label"] == "<b onclick>&"
    assert data["pictures"][0]["classes"][2] == HOSTILE
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in ("</script><img", "<b onclick", "<!--"):
        assert name not in text
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert (text.count("<script"), len(scripts)) == (5, 3)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert re.findall("'sha256-([^']*)'", policy) == digests
    assert "default-src 'none'" in policy
    assert not re.search("connect-src (?!'none')|unsafe-eval|http|\\*", policy)


def test_a_file_name_that_is_no_text_is_written(tmp_path):
    log = write_log(tmp_path / os.fsdecode(b"\xff.tsv"), [0.5])
    data, _ = reported(tmp_path / "out", log)
    assert data["runs"][0]["total"] == 1


def lacking(out, capsys, *arguments):
    """The notes about what a page lacks, which are also printed."""
    data, sheets = reported(out, *arguments)
    shown = capsys.readouterr().out
    assert all(f"note: {note}" in shown for note in data["lacking"])
    assert [run["gallery"] is None for run in data["runs"]] == [not sheets] * len(data["runs"])
    return data["lacking"]


def test_without_data_there_is_no_gallery_and_a_note(runs, tmp_path, capsys):
    out, home = tmp_path / "out", tmp_path / "a"
    assert lacking(out, capsys, runs / "a") == ["no images of a: those of npz are put into the page with --images."]
    assert lacking(out, capsys, DIGITS) == []
    log = [write_log(tmp_path / f"{name}.tsv", [0.5]) for name in "xy"]
    (note,) = lacking(out, capsys, *log, "--images")
    assert note == "no images of x, y: nothing beside the table says which images it is about."
    shutil.copytree(runs / "a", home)
    (home / "certify" / "default" / "certificates.json").unlink()
    assert "nothing beside the table" in lacking(out, capsys, home, "--images")[0]
    old = ROOT / "docs" / "results" / "cifar10" / "split4"
    assert "does not say where the images are" in lacking(out, capsys, old, "--images")[0]
    data = write_data(tmp_path / "data.npz", *noise(60, seed=1))
    write_run(tmp_path / "c", data, range(9))
    write_data(data, *noise(60, seed=2))
    assert "does not hold the certified images" in lacking(out, capsys, tmp_path / "c", "--images")[0]
    data.unlink()
    assert str(data) in lacking(out, capsys, tmp_path / "c", "--images")[0]


def test_without_its_samples_a_gallery_has_no_votes(runs, tmp_path, capsys):
    shutil.copytree(runs / "b", tmp_path / "b")
    (tmp_path / "b" / "certify" / "default" / "votes.0.tsv").unlink()
    (note,) = lacking(tmp_path / "out", capsys, tmp_path / "b", "--images")
    assert note.startswith("no votes of b: ")
    assert blocks(tmp_path / "out" / "report.html")[0]["runs"][0]["gallery"]["votes"] is None


def test_of_very_many_images_the_page_shows_a_part_and_never_too_much_accuracy(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "_MOST", 15)
    monkeypatch.setattr(page, "_MOST", 7)
    data, _ = reported(tmp_path, runs / "a", "--images")
    table = read_table(runs / "a" / "certify" / "default" / "certificates.tsv")
    (run,) = data["runs"]
    assert (run["every"], run["gallery"]["every"]) == (5, 2)
    assert run["gallery"]["idx"] == table.idx[::2].tolist()
    for r in np.linspace(0, 1, 50):
        shown = 5 * sum(radius >= r for radius in run["radii"]) / run["total"]
        assert shown <= table.certified_accuracy(r) < shown + 5 / len(table)


def test_without_plotly_the_page_has_its_table_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    notes = lacking(tmp_path, capsys, DIGITS)
    assert notes == ["no charts in the page: Plotly is not installed (pip install plotly)."]
    assert (tmp_path / "report.html").stat().st_size < 200_000


def test_a_page_that_cannot_be_made_is_one_line_and_leaves_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "build", lambda *_: 1 / 0)
    report.run([str(write_log(tmp_path / "a.tsv", [0.5])), f"--out={tmp_path}"])
    assert capsys.readouterr().out.splitlines()[-1] == "no page: ZeroDivisionError: division by zero"
    assert "curve.svg" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "curve.png").exists()
    assert not (tmp_path / "report.html").exists()
