"""Attacks come close to the true boundary, and break certificates that claim too much."""

import hashlib
import json
import random
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsrs_jax
from lsrs_jax import audit, certify, layers, report, smoothing
from lsrs_jax.auditing import attacks
from lsrs_jax.auditing.auditor import Auditor
from lsrs_jax.auditing.table import Settings, read_audit
from lsrs_jax.certification import store, verify
from lsrs_jax.data import load_split
from lsrs_jax.layers.lipschitz import materialize
from lsrs_jax.orthogonal import spectrum
from lsrs_jax.runtime import documents
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.format import AUDIT_COLUMNS
from lsrs_jax.smoothing.sampler import Sampler
from support import threefry
from support.commands import ended, fingerprint, finish, full_disk, refused, run, start

SIGMA, SHAPE = 0.25, (4, 4, 3)
SETTINGS = Settings(images=0, fractions=(0.5, 1.0), restarts=2, steps=20, samples=16, votes=1000)


@pytest.fixture(scope="module")
def linear():
    """A linear two-class head behind an orthogonal encoder, and images with their distances to its boundary."""
    encoder = layers.Encoder((layers.OrthogonalConv(3, (3, 3), initializer="random"),))
    plain = materialize(encoder, encoder.init(threefry(1), jnp.zeros((1, *SHAPE))), SHAPE)
    weights = np.random.default_rng(2).standard_normal(48).astype(np.float32)

    def head(latents):
        score = latents.reshape(latents.shape[0], -1) @ weights
        return jnp.stack([jnp.zeros_like(score), score], axis=1)

    images = np.random.default_rng(3).normal(0, 0.3, (16, *SHAPE))
    score = np.asarray(plain.apply(plain.params, images)).reshape(16, -1) @ weights.astype(float)
    return plain, head, images, (score > 0).astype(int), np.abs(score) / np.linalg.norm(weights)


def auditor(linear, sigma=SIGMA):
    plain, head = linear[:2]
    sampler = Sampler(head, plain.report.output_shape, sigma=sigma, tile=(16, 16))
    return Auditor(plain, head, sampler, lipschitz=1.0, alpha=0.001, settings=SETTINGS, seed=0)


def test_the_nearest_flip_of_a_linear_classifier_is_its_boundary(linear):
    """Smoothing does not move a linear boundary: no point before it is a flip, and attacks find points close to it."""
    *_, images, classes, distance = linear
    found = auditor(linear)(images, np.full(16, -1), np.zeros(16), 0)
    clear = distance > 0.1  # closer to the boundary, `predict` abstains
    assert clear.sum() > 8
    np.testing.assert_array_equal(found.unperturbed[clear], classes[clear])
    assert (found.distance >= distance)[clear].all()
    ratio = found.distance[clear] / distance[clear]
    assert np.median(ratio) < 1.25
    assert ratio.max() < 1.6
    assert (found.pairs == 0).all()


def test_the_image_itself_counts_as_a_point_of_its_ball(linear):
    *_, images, classes, distance = linear
    found = auditor(linear)(images, 1 - classes, np.full(16, 1e-6), 0)
    clear = distance > 0.1
    assert (found.unperturbed == classes)[clear].all()
    assert (found.flips == found.pairs)[clear].all()
    assert (found.distance == 0)[clear].all()


def test_a_lipschitz_constant_understated_by_two_is_caught(linear):
    plain, head, images, classes, distance = linear
    latents = np.asarray(plain.apply(plain.params, images))
    common = {"sigma": SIGMA, "key": threefry(0), "n": 20_000}
    true, false = (smoothing.certify(head, latents, lipschitz=constant, **common) for constant in (1.0, 0.5))
    clear = (distance > 0.1) & (distance < 0.6)  # beyond 0.6, so few samples certify less than half of the distance
    assert clear.sum() > 8
    np.testing.assert_array_equal(true.predict[clear], classes[clear])
    attack = auditor(linear)
    found = attack(images, true.predict, true.radius, 0)
    assert (found.flips == 0).all()
    assert (found.undecided <= found.pairs).all()
    # The image, PGD at both fractions, and one point of each of the four attacks that search beyond the radius.
    assert (found.pairs >= 7)[true.predict >= 0].all()
    found = attack(images, false.predict, false.radius, 0)
    assert (found.flips > 0)[clear].all()
    assert (found.distance < false.radius)[clear].all()


def test_the_decision_based_attack_finds_the_boundary(linear):
    """It starts from another image, without the help of PGD."""
    plain, head, images, classes, distance = linear
    target = attacks.Smoothed(lambda x: plain.apply(jax.tree.map(jnp.float32, plain.params), x), head, SIGMA)
    x, y = jnp.asarray(images, jnp.float32), jnp.asarray(classes)
    starts = x[jnp.asarray([int(np.flatnonzero(classes != own)[0]) for own in classes])]
    size = {"directions": 32, "samples": 64}
    found = {
        n: np.asarray(jax.jit(lambda n=n: attacks.decision(target, x, y, starts, threefry(4), iterations=n, **size))())
        for n in (0, 20)
    }
    far, near = (np.linalg.norm((found[n] - images).reshape(16, -1), axis=1) / distance for n in (0, 20))
    assert np.median(near[distance > 0.1]) < 1.8
    assert np.median(near[distance > 0.1]) < 0.7 * np.median(far[distance > 0.1])


def test_pgd_stays_in_its_ball_and_lowers_the_probability(linear):
    plain, head, images, classes, _ = linear
    target = attacks.Smoothed(lambda x: plain.apply(jax.tree.map(jnp.float32, plain.params), x), head, SIGMA)
    x, y, radius = jnp.asarray(images, jnp.float32), jnp.asarray(classes), jnp.linspace(0.05, 0.4, 16)
    points = attacks.pgd(target, x, y, radius, threefry(5), steps=10, samples=16)
    norm = np.linalg.norm(np.asarray(points - x).reshape(16, -1), axis=1)
    assert (norm <= radius * (1 + 1e-5)).all()
    before, after = (target.log_probability(z, y, threefry(6), 64) for z in (x, points))
    assert (after < before).all()


FLAGS = ["--images=24", "--steps=4", "--samples=4", "--restarts=1", "--fractions=0.5,1", "--votes=400"]


@pytest.fixture(scope="module")
def certified(trained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("audit") / "run"
    shutil.copytree(trained, workdir, ignore=shutil.ignore_patterns("certify"))
    run("certify", f"--workdir={workdir}", "--config.certify.tile=(8,32)")
    return workdir


@pytest.fixture(scope="module")
def audited(certified, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("audited") / "run"
    shutil.copytree(certified, workdir)
    out = run("audit", f"--workdir={workdir}", *FLAGS)
    assert ": 0 flips" in out
    return workdir


def test_an_audit_finds_no_flip_and_the_report_shows_its_curve(audited, tmp_path):
    found = read_audit(audited / "certify" / "default" / "audit.tsv")
    assert len(found.idx) == 24
    assert (found.pairs[found.predict >= 0] >= 7).all()
    assert (found.pairs[found.predict < 0] == 0).all()
    assert (found.distance >= found.radius).all()
    assert np.isfinite(found.distance[found.correct]).mean() > 0.5
    # The accuracy under attack falls with the radius.
    accuracies = [found.robust_accuracy(radius) for radius in (0, 0.2, 0.5, 1, 2)]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] > accuracies[-1]
    out = run("report", f"LSRS={audited}", f"--out={tmp_path}")
    assert f"0 flips, {found.undecided.sum()} undecided (`predict` abstained)" in out
    assert "24 of its 40 images" in out
    assert "LSRS, under attack (24 images)" in (tmp_path / "curve.svg").read_text()


def test_the_points_of_the_flips_have_their_distance_and_their_answer(audited):
    home = audited / "certify" / "default"
    found = read_audit(home / "audit.tsv")
    data = store.read(home / "certificates.json").settings.data
    points = np.sort(np.concatenate([np.load(file) for file in (home / "flips").iterdir()]), order="idx")
    order = np.argsort(found.idx)
    order = order[np.isfinite(found.distance[order])]
    assert (points["idx"] == found.idx[order]).all()
    images = load_split(data, data.split).read(points["idx"], np.float64)[0]
    away = np.linalg.norm((points["point"] - images).reshape(len(order), -1), axis=1)
    np.testing.assert_allclose(away, found.distance[order], rtol=1e-5)
    assert (points["predict"] != found.predict[order]).all()
    again = lsrs_jax.load(audited).predict(points["point"].astype(np.float64), key=threefry(7))
    assert (again >= 0).mean() > 0.5
    assert (again[again >= 0] == points["predict"][again >= 0]).mean() > 0.9


def test_a_table_that_changed_has_no_audit(audited, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(audited, copy)
    run("certify", f"--workdir={copy}", "--from-counts", "--config.certify.alpha=0.05", "--config.certify.tile=(8,32)")
    again = rf"another table, not of certificates.tsv .*audit --workdir={copy} --config.certify.name=default"
    with pytest.raises(UserError, match=again):
        report.load_runs([str(copy)])
    with pytest.raises(UserError, match=r"other certificates or settings \(certificates was"):
        audit.run([f"--workdir={copy}", *FLAGS])
    path = copy / "certify" / "default" / "certificates.tsv"
    path.write_text(path.read_text().replace("\t3\t", "\t4\t", 1))
    with pytest.raises(UserError, match="is not the one its"):
        audit.run([f"--workdir={copy}", *FLAGS])
    stored = json.loads(path.with_name("certificates.json").read_text())
    documents.write_sealed(path.with_name("certificates.json"), stored | {"derivation": None})
    with pytest.raises(UserError, match="holds samples but no certificates yet; let certify finish"):
        audit.run([f"--workdir={copy}", *FLAGS])


def test_verify_looks_at_the_audit_too(audited, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(audited, copy)
    path = copy / "certify" / "default" / "audit.tsv"
    verify = ["certify", f"--workdir={copy}", "--verify"]
    assert "audit.tsv and audit.json (24 images, 0 flips)" in run(*verify)
    whole = path.read_text()
    path.write_text(whole.replace("\t0\t", "\t1\t", 1))
    assert f"{path} has changed: its digest is not the one in audit.json" in refused(*verify)
    path.write_text(whole)
    run("certify", f"--workdir={copy}", "--from-counts", "--config.certify.alpha=0.05", "--config.certify.tile=(8,32)")
    code, out, _ = ended(*verify)
    assert code == 3
    assert "could not be checked: the audit, which is of another table" in out
    path.unlink()
    code, out, _ = ended(*verify)
    assert code == 3
    assert "could not be checked: the audit (audit.json has no audit.tsv beside it)" in out


def forge_audit(folder, change_rows=None, **settings):
    """Changes audit.tsv and the settings in audit.json, and renews the digests of both."""
    path = folder / "audit.tsv"
    if change_rows:
        rows = [line.split("\t") for line in path.read_text().splitlines()]
        change_rows(rows)
        path.write_text("".join("\t".join(row) + "\n" for row in rows))
    stored = json.loads((folder / "audit.json").read_text())
    stored["settings"] |= settings
    stored["audit"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "audit.json").write_text(json.dumps(stored | {"digest": documents.digest(stored)}))


def test_an_audit_of_other_images_classes_or_radii_is_refused(audited, tmp_path):
    shutil.copytree(audited, tmp_path / "run")
    folder = tmp_path / "run" / "certify" / "default"
    shutil.copytree(folder, tmp_path / "kept")
    for change, why in (
        (lambda rows: rows[1].__setitem__(0, "99999"), "is not the audit of its settings: 1 images are missing, and 1"),
        (lambda rows: rows.pop(), "1 images are missing, and 0 were not asked for"),
        (lambda rows: rows[2].__setitem__(1, "11"), "has the label 11, the table"),
        (lambda rows: rows[2].__setitem__(2, "11"), "has the predict 11, the table"),
        (lambda rows: rows[2].__setitem__(3, "7.5"), r"has the radius 7.5, the table"),
    ):
        forge_audit(folder, change)
        with pytest.raises(UserError, match=why):
            verify.run(folder)
        shutil.copytree(tmp_path / "kept", folder, dirs_exist_ok=True)
    for settings in ({"images": 40}, {"images": "many"}, {"restarts": 0}, {"fractions": None}, {"votes": True}):
        forge_audit(folder, **settings)
        with pytest.raises(UserError, match=r"settings"):
            verify.run(folder)
        shutil.copytree(tmp_path / "kept", folder, dirs_exist_ok=True)
    assert any("audit.tsv and audit.json" in line for line in verify.run(folder)[1].checked)


@pytest.mark.soak
def test_a_killed_audit_resumes_to_the_same_table(audited, certified, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(certified, copy)
    path = copy / "certify" / "default" / "audit.tsv"
    process = start("audit", f"--workdir={copy}", *FLAGS)
    while process.poll() is None and not (path.exists() and path.read_text().count("\n") > 1):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    finish(process)
    lines = path.read_text().splitlines(keepends=True)
    facts = path.with_suffix(".json")
    # As if the audit was still running, in case it was finished before the kill.
    documents.write_sealed(facts, json.loads(facts.read_text()) | {"audit": None})
    path.write_text("".join(lines[:6]) + "7\t3\t")  # the file ends in the middle of a batch and of a line
    assert 6 < len(lines) <= 25
    run("audit", f"--workdir={copy}", *FLAGS)
    assert path.read_bytes() == (audited / "certify" / "default" / "audit.tsv").read_bytes()
    out = run("audit", f"--workdir={copy}", *FLAGS)
    assert " 0 of them to attack" in out


def test_undecided_points_do_not_count_against_the_certificates(audited, tmp_path):
    """With so few samples `predict` abstains on many images, and robust accuracy stays an upper bound."""
    copy = tmp_path / "run"
    shutil.copytree(audited, copy)
    run(
        "certify",
        f"--workdir={copy}",
        "--from-counts",
        "--config.certify.tile=(8,32)",
        "--config.certify.bound=multiclass",
    )
    for name in ("audit.tsv", "audit.json"):
        (copy / "certify" / "default" / name).unlink()
    assert "is of an earlier audit; move it away too" in refused("audit", f"--workdir={copy}", "--votes=40")
    shutil.rmtree(copy / "certify" / "default" / "flips")
    out = run("audit", f"--workdir={copy}", "--steps=1", "--samples=2", "--restarts=1", "--fractions=1", "--votes=40")
    (found,) = report.load_runs([str(copy)])
    idle = read_audit(copy / "certify" / "default" / "audit.tsv")
    assert len(idle.idx) == len(found.table)
    assert f"0 flips, {idle.undecided.sum()} undecided" in out
    assert 0 < idle.undecided.sum() < idle.pairs.sum()
    assert (idle.undecided[idle.predict < 0] == 0).all()
    for radius in np.linspace(0, found.table.radius.max(), 30):
        assert found.audit.robust_accuracy(radius) >= found.table.certified_accuracy(radius + 1e-12)


def test_a_full_disk_leaves_whole_rows_and_no_image_twice(audited, certified, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(certified, copy)
    path = copy / "certify" / "default" / "audit.tsv"
    code, _, err = finish(start("audit", f"--workdir={copy}", *FLAGS, prefix=full_disk(900)))
    assert code == 2
    assert "make room, and give the same command again" in err
    assert path.read_bytes()[-1:] == b"\n"
    run("audit", f"--workdir={copy}", *FLAGS)
    assert path.read_bytes() == (audited / "certify" / "default" / "audit.tsv").read_bytes()
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
    with pytest.raises(UserError, match="names an image twice"):
        read_audit(path)


def test_an_audit_that_is_not_finished_is_left_out_of_the_report(audited, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(audited, copy)
    path = copy / "certify" / "default" / "audit.tsv"
    lines = path.read_text().splitlines(keepends=True)
    documents.write_sealed(
        path.with_suffix(".json"), json.loads(path.with_suffix(".json").read_text()) | {"audit": None}
    )
    for rows in (24, 8, 0):
        path.write_text("".join(lines[: 1 + rows]))
        (found,) = report.load_runs([str(copy)])
        assert found.audit is None
        assert "run: its audit is not finished and left out" in report.notes([found])[0]


@pytest.mark.parametrize("name", ["audit.tsv", "audit.json"])
def test_an_audit_that_has_changed_is_refused(audited, tmp_path, name):
    copy = tmp_path / "run"
    shutil.copytree(audited, copy)
    path = copy / "certify" / "default" / name
    text = path.read_text()
    digit = random.Random(0).choice([place for place, character in enumerate(text) if character in "12345678"])
    path.write_text(text[:digit] + str(int(text[digit]) + 1) + text[digit + 1 :])
    before = fingerprint(copy)
    for command in (lambda: report.load_runs([str(copy)]), lambda: audit.run([f"--workdir={copy}", *FLAGS])):
        with pytest.raises(UserError, match=rf"{name} (has changed|is damaged).*; restore it, or move .* audit again"):
            command()
    assert fingerprint(copy) == before
    if name == "audit.json":
        path.unlink()
        with pytest.raises(UserError, match=r"audit.tsv has no audit.json beside it; restore it"):
            report.load_runs([str(copy)])


def test_certificates_of_an_understated_constant_fail_the_command(certified, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "run"
    shutil.copytree(certified, copy)
    monkeypatch.setattr(spectrum, "upper_bound", lambda sigma: 0.63 * float(sigma))
    certify.run([f"--workdir={copy}", "--config.certify.name=false", "--config.certify.tile=(8,32)"])
    monkeypatch.undo()
    flags = ["--images=10", "--steps=20", "--samples=16", "--restarts=2", "--votes=1000"]
    with pytest.raises(SystemExit) as stop:
        audit.run([f"--workdir={copy}", "--config.certify.name=false", *flags])
    assert stop.value.code == 1
    assert "the certificates do not hold" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--fractions=0,1"], "numbers in \\(0, 1\\]"),
        (["--fractions=all"], "numbers in \\(0, 1\\]"),
        (["--restarts=0"], "restarts: must be a whole number from 1 to"),
        (["--config.certify.name=none"], "holds no certification to attack: run"),
        (["--config.model.head=linear"], "trained with model.head"),
        (["--config.certify.alpha=0.5"], "audit takes certify.alpha from the certificates"),
    ],
)
def test_bad_audits_are_refused(certified, flags, why):
    with pytest.raises(UserError, match=why):
        audit.run([f"--workdir={certified}", *flags])


@pytest.mark.parametrize(
    ("second", "said"), [("0.75", "lies at 0.7500 in the median"), ("inf", "was found for no more than half")]
)
def test_the_summary_says_where_the_nearest_flips_lie(tmp_path, capsys, second, said):
    rows = [f"{idx}\t3\t3\t0.5\t3\t12\t0\t2\t{flip}\tpgd\n" for idx, flip in enumerate(("0.75", second, second))]
    path = tmp_path / "audit.tsv"
    path.write_text("\t".join(AUDIT_COLUMNS) + "\n" + "".join(rows))
    audit._conclude(path)
    assert f"the nearest flip {said}" in capsys.readouterr().out
