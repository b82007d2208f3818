"""Certificates are derived from counts: other bounds need no new samples, and SciPy alone gives the same radii."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import yaml
from scipy import special, stats

import verify_certificates
from lsrs_jax import certify, data, models, report, smoothing
from lsrs_jax.certification.table import read_table
from lsrs_jax.config import load_config
from lsrs_jax.layers.lipschitz import Float64Encoder
from lsrs_jax.reporting.sampling import Sampling
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.rng import pinned, root_key
from lsrs_jax.smoothing import anytime
from lsrs_jax.smoothing.schedule import make_schedule
from lsrs_jax.training import checkpoint
from support.commands import QUICK, fingerprint, refused, run, without_time
from support.forging import reseal, rewrite


def recomputed(folder, alpha, looks):
    """p_A of each image from the rows of a ledger, with SciPy alone: the best bound of its looks, at alpha / looks."""
    selection, counts, found = {}, {}, {}
    for line in (folder / "votes.0.tsv").read_text().splitlines()[1:]:
        idx, _, _, stream, _, _, pairs, *_ = line.split("\t")
        table = (selection if stream == "selection" else counts).setdefault(int(idx), np.zeros(10, int))
        for pair in pairs.split(","):
            name, number = map(int, pair.split(":"))
            table[name] += number
        if stream == "estimation" and table.sum() in looks:
            k = table[selection[int(idx)].argmax()]
            p = stats.beta.ppf(alpha / len(looks), k, table.sum() - k + 1) if k else 0.0
            found.setdefault(int(idx), []).append(p)
    return {idx: max(values) for idx, values in found.items()}


def columns(path, *names):
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    return [[float(row[rows[0].index(name)]) for row in rows[1:]] for name in names]


STAGED = ["--config.certify.schedule=staged", "--config.certify.n=6000", "--config.certify.stop=60"]


def test_another_alpha_needs_no_new_samples(copy, certified):
    out = run("certify", f"--workdir={copy}", "--config.certify.name=base", "--config.certify.alpha=0.05")
    assert "40 of them done" in out
    assert "samples/s" not in out
    table = read_table(copy / "certify" / "base" / "certificates.tsv")
    before = read_table(certified)
    assert (table.radius >= before.radius).all()
    assert (table.radius > before.radius).any()


def test_derivation_settings_stay_until_another_flag_is_given(copy):
    path = copy / "certify" / "base" / "certificates.tsv"
    flags = [f"--workdir={copy}", "--config.certify.name=base"]
    run("certify", *flags, "--from-counts", "--config.certify.alpha=0.05", "--config.certify.bound=multiclass")
    derived = path.read_bytes()
    out = run("certify", *flags)
    assert "was derived with alpha 0.05, which holds unless --config.certify.alpha is given" in out
    assert path.read_bytes() == derived
    out = run("certify", *flags, "--config.certify.alpha=0.001")
    assert "alpha 0.001, multiclass bound" in out
    assert path.read_bytes() != derived


def test_a_staged_certification_and_what_can_be_derived_from_it(copy, tmp_path):
    flags = [f"--workdir={copy}", "--config.certify.name=staged", *STAGED, "--config.certify.radii=(0.1,0.3)"]
    out = run("certify", *flags)
    assert "looks from" in out
    assert "the largest radius is" in out
    looks = make_schedule("staged", 100, 6000, 32).looks
    folder = copy / "certify" / "staged"
    idx, n, p_a = columns(folder / "certificates.tsv", "idx", "n", "p_a_lower")
    assert len(idx) == 60
    assert set(n) <= set(looks)
    assert len(set(n)) > 1
    # Progress, summary and table have one number of samples per image; and the wait for the compiler is announced.
    assert re.findall(r"([\d,]+) samples (?:per|and .* per) image", out)[-2:] == [f"{np.mean(n):,.0f}"] * 2
    assert out.index("compiling encoder and head ...") < out.index("looks from")
    exact = recomputed(folder, 0.001, looks)
    np.testing.assert_allclose(p_a, [exact[i] for i in idx], rtol=1e-8)

    assert "sampled to decide the radii 0.1, 0.3" in run("report", folder, f"--out={tmp_path / 'report'}")

    # Other bounds follow from the same counts, without checkpoint and without data.
    shutil.rmtree(copy / "checkpoints")
    ledger = (folder / "votes.0.tsv").read_bytes()
    again = [*flags, "--from-counts", f"--config.data.dir={tmp_path}"]
    out = run("certify", *again, "--config.certify.alpha=0.05")
    assert "samples/s" not in out
    exact = recomputed(folder, 0.05, looks)
    np.testing.assert_allclose(columns(folder / "certificates.tsv", "p_a_lower")[0], [exact[i] for i in idx], rtol=1e-8)
    binary = read_table(folder / "certificates.tsv")
    out = run("certify", *again, "--config.certify.alpha=0.05", "--config.certify.bound=multiclass")
    several = read_table(folder / "certificates.tsv")
    assert several.average_certified_radius > binary.average_certified_radius
    derivation = json.loads((folder / "certificates.json").read_text())["derivation"]
    assert (derivation["alpha"], derivation["bound"]) == (0.05, "multiclass")
    assert (folder / "votes.0.tsv").read_bytes() == ledger


def test_an_anytime_certification_is_continued_derived_anew_and_verified_by_both_programs(copy, tmp_path):
    flags = [f"--workdir={copy}", "--config.certify.name=anytime", "--config.certify.schedule=anytime"]
    flags += ["--config.certify.n=2000", "--config.certify.radii=(0.1,0.3)"]
    run("certify", *flags, "--config.certify.stop=8")
    out = run("certify", *flags, "--config.certify.stop=30")
    assert "8 of them done" in out
    assert "anytime: the bounds hold at every number of samples, so the largest radius is" in out
    folder = copy / "certify" / "anytime"
    assert set(columns(folder / "certificates.tsv", "n")[0]) <= set(make_schedule("anytime", 100, 2000, 32).looks)
    before = read_table(folder / "certificates.tsv")
    for change in ([], ["--config.certify.alpha=0.05"], ["--config.certify.bound=multiclass"]):
        out = run("certify", *flags, "--config.certify.stop=30", "--from-counts", *change)
        assert "samples/s" not in out
        assert "verified: 30 certificates" in run(
            "certify", f"--workdir={copy}", "--verify", "--config.certify.name=anytime"
        )
        assert verify_certificates.main([str(folder)]) == 0
    assert read_table(folder / "certificates.tsv").average_certified_radius > before.average_certified_radius
    sampling = report.load_runs([str(folder)])[0].sampling
    sigma = json.loads((folder / "certificates.json").read_text())["identity"]["arithmetic"]["sigma"]
    most = sigma * special.ndtri(anytime.lower(2000, 2000, sampling.alpha, 2000))  # no alpha is split over the looks
    assert sampling.cap == pytest.approx(float(most), rel=1e-6)
    assert "sampled to decide the radii 0.1, 0.3" in run("report", folder, f"--out={tmp_path / 'report'}")


def test_interrupted_images_are_left_out_of_what_is_derived(copy, certified):
    ledger = copy / "certify" / "base" / "votes.0.tsv"
    lines = ledger.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not (line.startswith("7\t") and "estimation" in line)]
    assert len(kept) < len(lines)
    ledger.write_text("".join(kept))
    again = ["certify", f"--workdir={copy}", "--config.certify.name=base", "--from-counts"]
    assert "votes.0.tsv has changed" in refused(*again)
    reseal(ledger.parent)
    out = run("certify", f"--workdir={copy}", "--config.certify.name=base", "--from-counts")
    assert "1 images whose sampling was interrupted" in out
    assert 7 not in read_table(copy / "certify" / "base" / "certificates.tsv").idx
    run("certify", f"--workdir={copy}", "--config.certify.name=base")
    assert without_time(copy / "certify" / "base" / "certificates.tsv") == without_time(certified)


def test_the_whole_error_budget_reaches_the_certificates(tmp_path):
    """Recomputes radii from the ledger with SciPy alone, for an encoder that stretches by 2."""
    workdir = tmp_path / "run"
    run("train", *QUICK, "--config.model.std=(0.5,)", "--config.model.mean=(0.2,)", f"--workdir={workdir}")
    run("certify", f"--workdir={workdir}", "--config.certify.seed=0")
    folder = workdir / "certify" / "default"
    samples, slack = {}, {}
    for line in (folder / "votes.0.tsv").read_text().splitlines()[1:]:
        idx, _, own_slack, stream, _, _, pairs, *_ = line.split("\t")
        counts = samples.setdefault((int(idx), stream), np.zeros(10, int))
        for pair in pairs.split(","):
            name, number = pair.split(":")
            counts[int(name)] += int(number)
        slack[int(idx)] = float(own_slack)
    table = read_table(folder / "certificates.tsv")
    certified = 0
    for idx, predict, radius in zip(table.idx, table.predict, table.radius, strict=True):
        candidate = samples[idx, "selection"].argmax()
        k, n = samples[idx, "estimation"][candidate], samples[idx, "estimation"].sum()
        p = stats.beta.ppf(0.001, k, n - k + 1) if k else 0.0
        expected = (0.5 * stats.norm.ppf(p) - slack[idx]) / 2
        assert predict == (candidate if expected > 0 else -1)
        if expected > 0:
            assert radius < expected
            assert radius == pytest.approx(expected, rel=1e-6, abs=1e-8)
            certified += 1
    assert certified > 10
    lower = columns(folder / "certificates.tsv", "p_a_lower")[0]
    for idx, found in zip(table.idx, lower, strict=True):
        k = samples[idx, "estimation"][samples[idx, "selection"].argmax()]
        p = stats.beta.ppf(0.001, k, 1001 - k) if k else 0.0
        assert found == pytest.approx(max(p * (1 - 1e-10) - 64 * 2.0**-44, 0), abs=1e-14)
    # The slack covers the rounding of these latents to a grid of 2⁻¹⁵, and the samples come from the certification
    # domain of the seed.
    config = load_config(workdir / "config.json")
    model = models.build(config.model, (8, 8, 1), 10)
    with pinned():
        params, _ = checkpoint.restore_model(workdir, jax.eval_shape(model.init, root_key(0)))
    encoder, head = model.for_certification(params)
    latents = Float64Encoder(encoder, 5)(data.load("digits", "test").read(np.arange(40), np.float64)[0])
    moved = np.linalg.norm((np.rint(latents * 2**15) / 2**15 - latents).reshape(40, -1), axis=1)
    images = data.load("digits", "test").read(np.arange(40), np.float64)[0].reshape(40, -1)
    rounding = 2 * encoder.report.rounding(np.linalg.norm(images, axis=1) + 10 * 0.5 / encoder.report.constant)
    rest = np.array([slack[idx] for idx in range(40)]) - 8 * 2.0**-15 * (1 + 2.0**-50)
    np.testing.assert_allclose(rest, rounding, rtol=1e-3)
    assert 0 < moved.max() < 4 * 2.0**-15
    again = smoothing.certify(head, latents, sigma=0.5, key=root_key(0), n=1000, tile=config.certify.tile)
    np.testing.assert_array_equal(again.counts, [samples[idx, "estimation"] for idx in range(40)])


def test_a_resume_refuses_an_image_with_too_little_slack(copy):
    """A version with a smaller bound on rounding may have written such a ledger."""
    ledger = copy / "certify" / "base" / "votes.0.tsv"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(line for line in lines if not (line.startswith("7\t") and "estimation" in line)))
    reseal(ledger.parent)
    rows = ledger.read_text().splitlines()
    own = [number for number, row in enumerate(rows, 1) if row.startswith("7\t")]
    slack, arguments = float(rows[own[0] - 1].split("\t")[2]), [f"--workdir={copy}", "--config.certify.name=base"]

    def set_slack(share):
        for number in own:
            rewrite(ledger, number, lambda fields: [*fields[:2], repr(share * slack), *fields[3:]])
        reseal(ledger.parent)

    set_slack(1 - 1e-9)
    with pytest.raises(UserError, match=f"image 7 has the slack .* less than the {slack} of its latent"):
        certify.run(arguments)
    set_slack(1 - 1e-14)  # the difference between two machines
    certify.run(arguments)
    # The image is complete now, and it is not encoded again.
    own = [number for number, row in enumerate(ledger.read_text().splitlines(), 1) if row.startswith("7\t")]
    set_slack(0.0)
    for derived in ([], ["--from-counts"]):
        with pytest.raises(UserError, match=r"image 7 has the slack 0\.0, less than the rounding of its latent"):
            certify.run([*arguments, *derived])


SMOOTHED = ("--config.certify.name=smoothed", "--config.sigma=0.1")


@pytest.fixture(scope="module")
def margins(tmp_path_factory):
    """A 1-Lipschitz classifier with both kinds of certificates."""
    workdir = tmp_path_factory.mktemp("margins") / "run"
    run("train", *QUICK, "--config.train.loss=margin", "--config.model.head=normalized", f"--workdir={workdir}")
    run("certify", f"--workdir={workdir}", *SMOOTHED)
    flags = ["--config.certify.certificate=deterministic", "--config.certify.name=margin"]
    assert "no noise" in run("certify", f"--workdir={workdir}", *flags, devices=2)
    return workdir


def test_deterministic_and_smoothed_certificates_meet_in_one_report(margins, tmp_path):
    tables = {name: read_table(margins / "certify" / name / "certificates.tsv") for name in ("margin", "smoothed")}
    table = tables["margin"]
    np.testing.assert_array_equal(table.idx, tables["smoothed"].idx)
    assert (table.samples == 0).all()
    assert table.certified_accuracy(0) > 0.3
    provenance = json.loads((margins / "certify" / "margin" / "certificates.json").read_text())
    assert provenance["identity"]["certificate"] == "deterministic"
    assert len(provenance["lipschitz"]["layers"]) == 5
    assert provenance["derivation"]["bound"] == "margin"
    out = run("report", margins, f"--out={tmp_path / 'report'}")
    assert "| run/margin (no samples, no alpha) | 40 |" in out
    assert "| run/smoothed | 40 |" in out

    # Recomputes each radius from the trained functions: the smallest ratio of margin and distance of the weights.
    config = load_config(margins / "config.json")
    model = models.build(config.model, (8, 8, 1), 10)
    with pinned():
        params, _ = checkpoint.restore_model(margins, jax.eval_shape(model.init, root_key(0)))
    images = data.load("digits", "test").read(np.arange(40), np.float32)[0]
    logits = np.asarray(model.classify(params, model.encode(params, images)), np.float64)
    kernel = np.asarray(params["head"]["kernel"], np.float64)
    kernel /= np.linalg.norm(kernel, axis=0)
    for row, (predict, radius) in enumerate(zip(table.predict, table.radius, strict=True)):
        rivals = [j for j in range(10) if j != predict]
        distances = [np.linalg.norm(kernel[:, predict] - kernel[:, j]) for j in rivals]
        expected = min((logits[row, predict] - logits[row, j]) / d for j, d in zip(rivals, distances, strict=True))
        assert radius == pytest.approx(max(expected, 0), abs=2e-5)
        assert predict == logits[row].argmax()


def test_a_smoothed_run_with_a_linear_head_is_certified_by_its_margin_too(margins):
    """Image by image, the margin is at least the binary smoothed radius, for the same class."""
    folders = {name: margins / "certify" / name for name in ("margin", "smoothed", "smoothed-margin")}
    own, tables = folders["smoothed-margin"], {name: read_table(f / "certificates.tsv") for name, f in folders.items()}
    np.testing.assert_array_equal(tables["smoothed-margin"].radius, tables["margin"].radius)
    smoothed, margin = tables["smoothed"], tables["smoothed-margin"]
    certified = smoothed.predict >= 0
    assert certified.sum() > 10
    assert (margin.radius >= smoothed.radius).all()
    np.testing.assert_array_equal(margin.predict[certified], smoothed.predict[certified])
    before = fingerprint(own)
    for flags in (["--config.certify.stop=5"], []):  # both have their images already
        line = run("certify", f"--workdir={margins}", *SMOOTHED, *flags).splitlines()[-1]
        assert line.startswith(f"without noise (no samples, no alpha): {5 if flags else 40} images: certified accuracy")
        assert line.endswith(str(own / "certificates.tsv"))
    assert fingerprint(own) == before
    for name in ("smoothed", "smoothed-margin"):
        verdict = run("certify", f"--workdir={margins}", f"--config.certify.name={name}", "--verify").splitlines()[-1]
        assert verdict.startswith("verdict: intact: 40 certificates")
    shutil.move(own, margins / "kept")
    (own / "votes.0.tsv").parent.mkdir()
    shutil.copy(folders["smoothed"] / "votes.0.tsv", own / "votes.0.tsv")  # another certification has the name
    line = run("certify", f"--workdir={margins}", *SMOOTHED).splitlines()[-1]
    assert line.startswith("note: no certificates without noise: ")
    assert "holds another certification" in line
    shutil.rmtree(own)
    shutil.move(margins / "kept", own)


def test_rows_show_what_their_acr_depends_on_and_other_samples_are_noted(margins, tmp_path, capsys):
    """The certificates of one network: smoothed, without samples, and with another n."""
    home = shutil.copytree(margins, tmp_path / "net")
    shutil.rmtree(home / "certify" / "margin")
    report.run([str(home), f"--out={tmp_path / 'same'}", "--radii=0,0.05,0.1,0.2"])
    shown = capsys.readouterr().out
    runs = {run.label: run for run in report.load_runs([str(home)])}
    tables = {name: run.table for name, run in runs.items()}
    assert list(runs) == ["net/smoothed", "net/smoothed-margin"]
    own, margin = tables["net/smoothed"], tables["net/smoothed-margin"]
    cap = 0.1 * float(special.ndtri(0.001 ** (1 / 1000)))  # all of 1,000 samples agree, Clopper and Pearson
    assert runs["net/smoothed"].sampling == Sampling(1000, 0.001, pytest.approx(cap, rel=1e-6))
    assert runs["net/smoothed-margin"].sampling is None
    cells = [cell.strip() for line in shown.splitlines() for cell in line.split("|")[1:-1] if "net/" in line]
    shares = [own.correct[own.label == label] & (own.radius[own.label == label] >= 0.1) for label in set(own.label)]
    assert cells[6].startswith(f"{min(share.mean() for share in shares):.3f} (class ")
    assert cells[8:12] == ["0.04", f"{own.average_certified_radius:.3f}", f"{cap:.3f}", "1,000"]
    capped = np.where(margin.correct, np.minimum(margin.radius, cap), 0).mean()
    acr = f"{margin.average_certified_radius:.3f} ({capped:.3f} if capped at {cap:.3f})"
    assert cells[14] == "net/smoothed-margin (no samples, no alpha)"
    assert cells[22:26] == ["0", acr, "none", "0"]
    assert "comparable only" not in shown
    run("certify", f"--workdir={home}", "--config.certify.name=more", SMOOTHED[1], "--config.certify.n=2000")
    report.run([str(home), f"--out={tmp_path / 'other'}", "--board=Digits:T"])
    for text in (capsys.readouterr().out, (tmp_path / "other" / "board.yml").read_text()):
        assert "ACRs are comparable only at the same n and cap" in text
        assert re.search(r"'net/more': n 2,000, cap 0.\d+; 'net/smoothed': n 1,000, cap 0.\d+\)", text)
    board = yaml.safe_load((tmp_path / "other" / "board.yml").read_text())
    comments = {record["title"]: record["comment"] for record in board[0]["records"]}
    assert comments["T (net/more)"] == "40 images, 2,000 samples per image of at most 2,000, alpha 0.001"
    assert comments["T (net/more-margin)"] == "40 images"


def test_a_head_that_is_not_linear_has_no_certificates_without_noise(certified):
    assert not certified.parent.with_name("base-margin").exists()


def test_kinds_of_certificates_are_not_mixed(margins, copy, certified):
    deterministic = "--config.certify.certificate=deterministic"
    before = fingerprint(margins)
    for flags, why in (
        ([deterministic, "--config.certify.name=smoothed"], "certificate was 'smoothed' and is now 'deterministic'"),
        (["--config.certify.name=margin"], "certificate was 'deterministic' and is now 'smoothed'"),
    ):
        assert why in refused("certify", f"--workdir={margins}", *flags)
    fewer = ["--config.certify.name=margin", deterministic, "--config.certify.stop=5"]
    assert "35 images outside" in refused("certify", f"--workdir={margins}", *fewer)
    assert fingerprint(margins) == before
    assert "needs a linear head" in refused("certify", f"--workdir={copy}", deterministic, "--config.certify.name=x")
    assert not (copy / "certify" / "x").exists()
    shutil.copytree(copy / "certify" / "base", margins / "certify" / "y")
    (margins / "certify" / "y" / "certificates.json").unlink()
    assert "another certification" in refused(
        "certify", f"--workdir={margins}", deterministic, "--config.certify.name=y"
    )
