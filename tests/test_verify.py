"""`certify --verify` finds a single changed digit in any file and says where it is."""

import json
import random
import shutil

import numpy as np
import pytest

from lsrs_jax.certification import from_counts, verify
from lsrs_jax.certification.table import read_table
from lsrs_jax.config import config_from_dict
from lsrs_jax.layers.lipschitz import LayerBound, LipschitzReport
from lsrs_jax.runtime.errors import UserError
from support.commands import QUICK, fingerprint, refused, run
from support.forging import edit, reseal, rewrite


@pytest.fixture(scope="module")
def original(trained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("verify") / "run"
    shutil.copytree(trained, workdir, ignore=shutil.ignore_patterns("certify"))
    run("certify", f"--workdir={workdir}")
    flags = ["--config.certify.name=staged", "--config.certify.schedule=staged", "--config.certify.bound=multiclass"]
    run("certify", f"--workdir={workdir}", *flags, "--config.certify.n=3000")
    return workdir


@pytest.fixture
def copy(original, tmp_path):
    target = tmp_path / "run"
    shutil.copytree(original, target)
    return target


def check(workdir, name="default"):
    return verify.run(workdir / "certify" / name)[1]


def test_what_was_certified_is_verified_and_left_alone(original, copy):
    before = fingerprint(copy)
    out = run("certify", f"--workdir={copy}", "--verify")
    assert "verified: 40 certificates follow from the 44,000 samples (n0 included)" in out
    assert out.splitlines()[-1] == (
        "verdict: intact: 40 certificates; 40 of the 360 images of the split were to be certified (start 0, "
        "stop 40, step 1, which the author chose); checked: the digests in certificates.json, the configuration, every "
        "radius from its samples, the weights and their Lipschitz constant, that no image is missing; files cannot "
        "show: that the network gives these samples for these images and labels (--recast=N)"
    )
    assert "verified" in run("certify", f"--workdir={copy}", "--verify", "--config.certify.name=staged")
    assert fingerprint(copy) == before == fingerprint(original)


def test_another_derivation_is_verified_with_or_without_the_weights(copy):
    flags = ["--config.certify.schedule=staged", "--config.certify.n=3000", "--config.certify.name=staged"]
    run("certify", f"--workdir={copy}", "--from-counts", *flags, "--config.certify.alpha=0.05")
    assert check(copy, "staged").complete
    shutil.rmtree(copy / "checkpoints")
    verdict = check(copy, "staged")
    assert not verdict.complete
    (open_question,) = verdict.unchecked.values()
    assert open_question.startswith("the weights and the Lipschitz constant 1.0000000000")
    assert open_question.endswith("(the checkpoint of step 60 is not here)")


def test_samples_drawn_after_the_table_do_not_disturb_it(copy):
    folder = copy / "certify" / "default"
    early = {name: (folder / name).read_bytes() for name in ("certificates.tsv", "certificates.json")}
    run("certify", f"--workdir={copy}", "--config.certify.stop=50")
    for name, content in early.items():
        (folder / name).write_bytes(content)
    check(copy)


@pytest.mark.parametrize(("factor", "accepted"), [(1 + 3e-16, True), (1 - 3e-16, True), (1 + 1e-9, False)])
def test_the_last_digits_of_another_scipy_are_no_difference(copy, factor, accepted):
    table = read_table(path := copy / "certify" / "default" / "certificates.tsv")
    row = int(np.argmax(table.radius))
    changed = float(table.radius[row] * factor)
    assert changed != table.radius[row]
    edit(path, row + 2, "radius", repr(changed))
    reseal(path.parent)
    if accepted:
        assert check(copy).complete
    else:
        with pytest.raises(UserError, match=f"line {row + 2} .*radius is"):
            check(copy)


FILES = ["certificates.tsv", "certificates.json", "votes.0.tsv", "config.json"]


@pytest.mark.parametrize("file", FILES)
def test_one_changed_digit_is_found(copy, file):
    path, rng = (copy if file == "config.json" else copy / "certify" / "default") / file, random.Random(0)
    text = path.read_text()
    digits = [i for i, character in enumerate(text) if character.isdigit()]
    for position in [digits[0], digits[-1], *rng.sample(digits, 25)]:
        other = rng.choice([digit for digit in "0123456789" if digit != text[position]])
        path.write_text(text[:position] + other + text[position + 1 :])
        with pytest.raises(UserError) as error:
            check(copy)
        assert file in str(error.value), text[position - 20 : position + 20]
        assert "\n" not in str(error.value)
    path.write_text(text)
    check(copy)


@pytest.mark.parametrize(("old", "new"), [('"steps": 60', '"steps": 61'), ('"head": "mlp"', '"head": "linear"')])
def test_another_training_is_found_and_named(copy, old, new):
    path = copy / "config.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert "config.json has changed: " in refused("certify", f"--workdir={copy}", "--verify")


def test_other_weights_are_found(copy, original, tmp_path):
    other = tmp_path / "other"
    run("train", *QUICK, "--config.seed=5", f"--workdir={other}")
    shutil.rmtree(copy / "checkpoints")
    shutil.copytree(other / "checkpoints", copy / "checkpoints")
    with pytest.raises(UserError, match="is not the one that was certified"):
        check(copy)


def test_the_first_line_that_differs_is_named_even_under_new_digests(copy):
    folder = copy / "certify" / "default"
    path = folder / "certificates.tsv"
    edit(path, 12, "radius", "0.75")
    edit(path, 7, "p_a_lower", "0.99")
    reseal(folder)
    with pytest.raises(UserError, match=r"certificates.tsv line 7 \(image 5\): p_a_lower is '0.99', the ledger gives"):
        check(copy)


def test_rows_that_are_there_twice_are_refused_and_missing_ones_counted(copy, capsys):
    folder = copy / "certify" / "default"
    path = folder / "certificates.tsv"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text(whole + lines[1])
    reseal(folder)
    with pytest.raises(UserError, match=r"certificates.tsv line 42: image 0 is there twice"):
        check(copy)
    path.write_text("".join(lines[:1] + lines[5:]))
    reseal(folder)
    verdict = check(copy)
    assert (verdict.certificates, verdict.wanted, verdict.missing, verdict.complete) == (36, 40, 4, False)
    out = capsys.readouterr().out
    assert "verified: 36 certificates" in out
    assert "; 4 other images have their samples there and no certificate" in out


def test_a_changed_ledger_with_right_checksums_is_found(copy):
    folder = copy / "certify" / "default"
    # Only the seconds change, so the counts and the certificates stay the same.
    rewrite(folder / "votes.0.tsv", 3, lambda fields: [*fields[:-2], "0.123456", fields[-1]])
    with pytest.raises(UserError, match=r"votes.0.tsv has changed: its digest is not the one"):
        check(copy)


def test_too_small_a_slack_is_found_even_under_new_digests(copy):
    folder = copy / "certify" / "default"
    count = (folder / "votes.0.tsv").read_text().count("\n")
    for line in range(2, count + 1):
        rewrite(folder / "votes.0.tsv", line, lambda fields: [*fields[:2], "0.0001", *fields[3:]])
    reseal(folder)
    with pytest.raises(UserError, match=r"has the slack 0.0001, less than the rounding of its latent"):
        check(copy)


def test_another_consistent_constant_is_found_by_the_weights(copy):
    folder = copy / "certify" / "default"
    stored = json.loads((folder / "certificates.json").read_text())
    stored["lipschitz"]["layers"][0]["sigma_max"] = 0.5
    layers = tuple(LayerBound(**layer) for layer in stored["lipschitz"]["layers"])
    stored["lipschitz"]["constant"] = LipschitzReport(layers, (), ()).constant
    (folder / "certificates.json").write_text(json.dumps(stored))
    reseal(folder)
    config = config_from_dict(stored["config"])
    from_counts.derive(folder, config)  # the radii double, and all files agree
    with pytest.raises(UserError, match="the certificates claim"):
        check(copy)


@pytest.mark.parametrize(
    ("kind", "why"), [("deterministic", "it contradicts itself: identity.cert"), ("other", "of no certificate")]
)
def test_another_kind_is_found_even_under_new_digests(copy, kind, why):
    folder = copy / "certify" / "default"
    stored = json.loads((folder / "certificates.json").read_text())
    stored["identity"]["certificate"] = kind
    (folder / "certificates.json").write_text(json.dumps(stored))
    reseal(folder)
    with pytest.raises(UserError, match=why):
        check(copy)
    if kind == "deterministic":
        stored["config"]["certify"]["certificate"] = kind
        (folder / "certificates.json").write_text(json.dumps(stored))
        reseal(folder)
        with pytest.raises(UserError, match="deterministic certificates have the bound margin, and no ledger"):
            check(copy)


def test_a_dropped_line_of_the_ledger_is_found_even_under_new_digests(copy):
    folder = copy / "certify" / "default"
    lines = (folder / "votes.0.tsv").read_text().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if line.startswith("9\t"))
    (folder / "votes.0.tsv").write_text("".join(lines[:last] + lines[last + 1 :]))
    reseal(folder)
    with pytest.raises(UserError, match="line 11: the ledger has no certificate for an image '9'"):
        check(copy)


@pytest.mark.parametrize(
    ("section", "field", "value", "why"),
    [
        ("lipschitz", "constant", 0.5, "the Lipschitz constant is not the product"),
        ("identity", "sigma", 1.0, "were drawn with sigma 1.0, not 0.5"),
        ("derivation", "alpha", 0.05, "contradicts itself"),
    ],
)
def test_a_contradiction_is_found_even_under_new_digests(copy, section, field, value, why):
    folder = copy / "certify" / "default"
    stored = json.loads((folder / "certificates.json").read_text())
    stored[section][field] = value
    (folder / "certificates.json").write_text(json.dumps(stored))
    reseal(folder)
    with pytest.raises(UserError, match=why):
        check(copy)


def test_nothing_is_verified_where_nothing_was_certified(copy):
    assert "holds no certification to verify" in refused(
        "certify", f"--workdir={copy}", "--verify", "--config.certify.name=none"
    )
    (copy / "certify" / "default" / "certificates.tsv").unlink()
    assert "is missing" in refused("certify", f"--workdir={copy}", "--verify")
    assert "not allowed with" in refused("certify", f"--workdir={copy}", "--verify", "--from-counts")
    (copy / "certify" / "default" / "certificates.json").unlink()
    for flag in ("--verify", "--from-counts"):
        assert "has lost its certificates.json; restore it" in refused("certify", f"--workdir={copy}", flag)
