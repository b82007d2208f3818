"""Folders with a fallback: certify, resume, --from-counts, --verify, --recast, the audit, and what they refuse."""

import json
import shutil

import numpy as np
import pytest

import verify_certificates
from lsrs_jax.auditing.table import read_audit
from lsrs_jax.certification import fallback, store
from lsrs_jax.certification.table import read_table
from lsrs_jax.runtime import documents
from support.commands import QUICK, fingerprint, refused, run, without_time
from support.forging import reseal

COMPOSED = ["--config.certify.bound=multiclass", "--config.certify.n=2000", "--config.certify.stop=30"]
ANYTIME = ["--config.certify.name=anytime", "--config.certify.schedule=anytime"]
LINEAR = [*QUICK, "--config.model.head=normalized", "--config.train.loss=margin", "--config.train.radius=0.5"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A network with votes, certified with a fallback and without, and the fallback."""
    home = tmp_path_factory.mktemp("composed")
    run("train", *LINEAR, f"--workdir={home / 'linear'}")
    run("train", *QUICK, f"--workdir={home / 'net'}")
    out = run("certify", f"--workdir={home / 'net'}", *COMPOSED, f"--config.certify.fallback={home / 'linear'}")
    assert "30 images: certified accuracy" in out
    run("certify", f"--workdir={home / 'net'}", *COMPOSED, "--config.certify.name=votes")
    return home


@pytest.fixture
def home(originals, tmp_path):
    shutil.copytree(originals, tmp_path / "home")
    return tmp_path / "home"


def folder_of(home):
    return home / "net" / "certify" / "default"


def certify(home, *flags):
    given = f"--config.certify.fallback={home / 'linear'}"
    return run("certify", f"--workdir={home / 'net'}", *COMPOSED, given, *flags)


def test_the_fallback_answers_where_the_votes_abstain(originals):
    table = read_table(folder_of(originals) / "certificates.tsv")
    votes = read_table(originals / "net" / "certify" / "votes" / "certificates.tsv")
    answers = fallback.read(
        folder_of(originals), store.read_folder(folder_of(originals), "").derivation["fallback"], 10
    )
    classes = np.array([answers.by_image[idx][0] for idx in table.idx.tolist()])
    assert answers.by_image.keys() == set(range(30))
    assert table.abstention < votes.abstention
    assert (table.predict == classes)[votes.predict < 0].any()
    assert (table.predict != classes).any()  # where the votes decide, they win
    run("certify", f"--workdir={originals / 'linear'}", "--config.certify.certificate=deterministic")
    margins = read_table(originals / "linear" / "certify" / "default" / "certificates.tsv")
    np.testing.assert_array_equal(margins.predict[:30], classes)
    np.testing.assert_allclose(margins.radius[:30], [answers.by_image[idx][1] for idx in range(30)], rtol=1e-9)


def test_every_reader_accepts_the_folder_and_a_resume_keeps_it(home, capsys):
    folder = folder_of(home)
    verdict = json.loads(run("certify", f"--workdir={home / 'net'}", "--verify", "--json"))
    assert verdict["verdict"] == "intact"
    assert any("fallback.tsv" in text for text in verdict["beyond"])
    assert verify_certificates.main([str(folder)]) == 0
    assert "net/default (with a fallback)" in run("report", str(home / "net"), f"--out={home / 'report'}")
    before, rows = without_time(folder / "certificates.tsv"), (folder / fallback.FILE).read_text()
    certify(home)
    assert without_time(folder / "certificates.tsv") == before
    certify(home, "--config.certify.stop=40")
    assert without_time(folder / "certificates.tsv")[:31] == before
    assert (folder / fallback.FILE).read_text().startswith(rows)
    assert verify_certificates.main([str(folder)]) == 0
    out = run("certify", f"--workdir={home / 'net'}", "--from-counts", "--config.certify.alpha=0.1")
    assert "from the samples of 40 images" in out
    assert verify_certificates.main([str(folder)]) == 0
    found = json.loads(run("certify", f"--workdir={home / 'net'}", "--recast=5", "--json"))
    assert found["verdict"] == "intact"
    assert "the answers of the fallback at 5 images" in found["checked"]


def test_rows_that_an_interrupted_session_has_written_are_computed_again(home):
    folder = folder_of(home)
    with (folder / fallback.FILE).open("a") as file:
        file.write("30\t0\t0\t99.0\t1\t0.000000\t0\t1.0\t0.0\n31\t0")
    run("certify", f"--workdir={home / 'net'}", "--verify")
    certify(home, "--config.certify.stop=32")
    run("certify", f"--workdir={home / 'net'}", "--verify")
    assert "99.0" not in (folder / fallback.FILE).read_text()


def test_the_audit_attacks_the_composition_and_finds_no_flip(home):
    sizes = ["--images=12", "--restarts=1", "--steps=8", "--votes=500"]
    assert " 0 flips" in run("audit", f"--workdir={home / 'net'}", *sizes)
    audit = read_audit(folder_of(home) / "audit.tsv")
    assert audit.flips.sum() == 0
    assert np.isfinite(audit.distance).any()
    assert "audit.tsv and audit.json" in run("certify", f"--workdir={home / 'net'}", "--verify")


def changed(home, capsys, words):
    """Whether --verify and the program that stands alone refuse the folder."""
    assert words in refused("certify", f"--workdir={home / 'net'}", "--verify")
    assert verify_certificates.main([str(folder_of(home))]) == 2
    capsys.readouterr()


def test_samples_without_a_table_yet_give_no_certificates_of_the_votes_alone(home):
    folder = folder_of(home)
    before = without_time(folder / "certificates.tsv")
    stored = json.loads((folder / "certificates.json").read_text()) | {"derivation": None}
    (folder / "certificates.json").write_text(json.dumps(stored | {"digest": documents.digest(stored)}))
    (folder / "certificates.tsv").unlink()
    (folder / fallback.FILE).unlink()
    assert "has a fallback and no certificates yet" in refused("certify", f"--workdir={home / 'net'}", "--from-counts")
    certify(home)
    assert without_time(folder / "certificates.tsv") == before
    assert json.loads(run("certify", f"--workdir={home / 'net'}", "--verify", "--json"))["verdict"] == "intact"


def test_the_margin_beside_a_composition_is_a_run_of_its_own(home):
    named = "--config.certify.name=both"
    run("certify", f"--workdir={home / 'linear'}", *COMPOSED, f"--config.certify.fallback={home / 'linear'}", named)
    found = run("certify", f"--workdir={home / 'linear'}", "--verify", "--json", f"{named}-margin")
    assert json.loads(found)["verdict"] == "intact"


def test_a_changed_answer_is_found(home, capsys):
    folder = folder_of(home)
    path, text = folder / fallback.FILE, (folder / fallback.FILE).read_text()
    table = read_table(folder / "certificates.tsv")
    answers = fallback.read(folder, store.read_folder(folder, "").derivation["fallback"], 10)
    limited = next(i for i in range(30) if answers.by_image[i] == (table.predict[i], table.radius[i]))
    rows = [line.split("\t") for line in text.splitlines()]
    rows[1 + limited][3] = repr(2 * float(rows[1 + limited][3]))
    forged = "".join("\t".join(row) + "\n" for row in rows)
    path.write_text(forged)
    changed(home, capsys, "its digest is not the one")
    document = json.loads((folder / "certificates.json").read_text())
    document["derivation"]["fallback"] = fallback.Answers(forged, {}).digest()
    (folder / "certificates.json").write_text(json.dumps(document))
    reseal(folder)
    changed(home, capsys, "radius is")
    run("certify", f"--workdir={home / 'net'}", "--from-counts")  # the radii grow, and all files agree
    run("certify", f"--workdir={home / 'net'}", "--verify")
    assert "the fallback gives" in refused("certify", f"--workdir={home / 'net'}", "--recast=30")
    path.unlink()
    changed(home, capsys, "is missing")


def test_another_fallback_cannot_continue_a_folder(home, capsys):
    net, linear = f"--workdir={home / 'net'}", home / "linear"
    before = fingerprint(folder_of(home))
    run("train", *LINEAR, "--config.seed=3", f"--workdir={home / 'other'}")
    other = f"--config.certify.fallback={home / 'other'}"
    assert "is not the one of these certificates" in refused("certify", net, *COMPOSED, other)
    assert "certify.fallback named a fallback there" in refused("certify", net, *COMPOSED)
    name = "--config.certify.name=votes"
    given = f"--config.certify.fallback={linear}"
    assert "certify.fallback named none there" in refused("certify", net, *COMPOSED, name, given)
    assert "drawn with fallback True" in refused("certify", net, "--from-counts", "--config.certify.fallback=")
    assert fingerprint(folder_of(home)) == before
    linear.rename(home / "moved")
    assert "is not here" in refused("certify", net, "--recast=3", given)
    assert "is not here" in refused("audit", net, given)
    run("certify", net, "--recast=3", f"--config.certify.fallback={home / 'moved'}")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.certify.bound=binary"], "needs a bound of every rival"),
        (["--config.certify.certificate=deterministic"], "is for smoothed certificates"),
        (["--config.certify.fallback={home}/net"], "needs a linear head"),
        (["--config.certify.fallback={home}/nowhere"], "is not here"),
        (["--config.data.name=mnist", "--config.certify.fallback={home}/linear"], "mnist"),
    ],
)
def test_a_fallback_that_proves_nothing_is_refused_in_one_line(originals, flags, words):
    given = [f"--config.certify.fallback={originals / 'linear'}", "--config.certify.name=new"]
    flags = [flag.format(home=originals) for flag in flags]
    assert words in refused("certify", f"--workdir={originals / 'net'}", *COMPOSED, *given, *flags)


def test_a_composition_under_the_anytime_schedule_is_derived_alike_by_both_programs(home):
    run("certify", f"--workdir={home / 'net'}", *COMPOSED, f"--config.certify.fallback={home / 'linear'}", *ANYTIME)
    verdict = json.loads(run("certify", f"--workdir={home / 'net'}", "--verify", "--json", ANYTIME[0]))
    assert verdict["verdict"] == "intact"
    assert verify_certificates.main([str(home / "net" / "certify" / "anytime")]) == 0
