"""`certify --recast` finds counts that are not those of the network, even if all files agree with each other."""

import collections
import dataclasses
import json
import shutil
import types

import numpy as np
import pytest

from lsrs_jax import certify
from lsrs_jax.certification import from_counts, resample, store, target, verify
from lsrs_jax.certification.identity import arithmetic_facts
from lsrs_jax.config import config_from_dict
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing.arithmetic import make_arithmetic
from support.commands import fingerprint, refused, run
from support.forging import reseal, rewrite

VOTES = 6  # index of the column `votes` of a ledger


@pytest.fixture(scope="module")
def original(trained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("recast") / "run"
    shutil.copytree(trained, workdir, ignore=shutil.ignore_patterns("certify"))
    run("certify", f"--workdir={workdir}")
    flags = ["--config.certify.name=staged", "--config.certify.schedule=staged", "--config.certify.noise=independent"]
    run("certify", f"--workdir={workdir}", *flags, "--config.certify.n=3000", "--config.certify.head_dtype=bfloat16")
    return workdir


@pytest.fixture
def copy(original, tmp_path):
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def draw_again(workdir, count=40, name="default"):
    """Re-samples `count` images on eight devices; the fixture certified on one."""
    folder = workdir / "certify" / name
    stored = store.read(folder / "certificates.json")
    verdict = verify.Verdict(0)
    resample.run(target.target_of_certificates(folder, stored, ""), stored, count, verdict)
    return verdict


def rederive(workdir, stored=None, name="default"):
    """Derives table and digests from the ledger, as a forger would, so that `verify` accepts the folder."""
    folder = workdir / "certify" / name
    if stored:
        (folder / "certificates.json").write_text(json.dumps(stored))
    reseal(folder)
    stored = json.loads((folder / "certificates.json").read_text())
    from_counts.derive(folder, config_from_dict(stored["config"]))
    verify.run(folder)


def test_honest_samples_are_the_same_again_and_nothing_is_written(copy, original, capsys):
    out = run("certify", f"--workdir={copy}", "--recast=7", devices=3)
    assert "verified: 40 certificates" in out
    assert "drawn again: 7,700 samples of 7 images (n0 included); 0 differ" in out
    assert "if more than 34.9% of the table had samples of another origin, these" in out
    draw_again(copy, 1000, "staged")
    assert "of 40 images (n0 included); 0 differ\nthese are all images of the table" in capsys.readouterr().out
    assert fingerprint(copy) == fingerprint(original)


def forged(fields):
    """The fields of a row, with all samples moved to its strongest class."""
    pairs = [tuple(map(int, pair.split(":"))) for pair in fields[VOTES].split(",")]
    winner, total = max(pairs, key=lambda pair: pair[1])[0], sum(count for _, count in pairs)
    return [*fields[:VOTES], f"{winner}:{total}", *fields[VOTES + 1 :]]


def test_forged_counts_are_found_in_one_image_and_in_all(copy):
    path = copy / "certify" / "default" / "votes.0.tsv"
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    # First only one image is forged, one whose samples do not all agree.
    several = [number for number, row in enumerate(rows, 1) if row[3] == "estimation" and row[VOTES].count(",") > 3]
    image = rows[several[0] - 1][0]
    for number, row in enumerate(rows, 1):
        if row[0] == image:
            rewrite(path, number, forged)
    rederive(copy)
    with pytest.raises(
        UserError,
        match=rf"image {image}: [\d,]+ of its first [\d,]+ \w+ samples are not from this network, and rounding",
    ):
        draw_again(copy)
    forge_everything(copy / "certify" / "default")
    rederive(copy)
    with pytest.raises(UserError, match="are not from this network"):
        draw_again(copy, 20)


def forge_everything(folder):
    path = folder / "votes.0.tsv"
    for number in range(2, path.read_text().count("\n") + 1):
        rewrite(path, number, forged)


@pytest.mark.parametrize("right", [True, False])
def test_samples_moved_to_an_earlier_look_are_found(copy, right):
    """The counts at the last look stay as they are, and the radius comes from the first one."""
    folder = copy / "certify" / "staged"
    path, first_look = folder / "votes.0.tsv", min(store.read(folder / "certificates.json").identity.stages)
    table = [line.split("\t") for line in (folder / "certificates.tsv").read_text().splitlines()[1:]]
    rows = list(enumerate((line.split("\t") for line in path.read_text().splitlines()), 1))
    candidates = {
        row[0]: int(max(row[VOTES].split(","), key=lambda p: int(p.split(":")[1])).split(":")[0])
        for _, row in rows
        if row[3] == "selection"
    }
    chosen = next(
        row[0]
        for row in table
        if (candidates[row[0]] == int(row[1])) == right and int(row[6]) > first_look and float(row[7]) < 0.9
    )
    candidate, early, late = candidates[chosen], [], []
    for number, row in rows:
        if row[0] == chosen and row[3] == "estimation":
            (early if int(row[5]) * 32 <= first_look else late).append(number)
    counts = {number: counts_in(rows[number - 1][1]) for number in early + late}
    for number in early:
        for other in [name for name in counts[number] if name != candidate]:
            for later in late:
                size = min(counts[number][other], counts[later][candidate])
                counts[number][other] -= size
                counts[number][candidate] += size
                counts[later][candidate] -= size
                counts[later][other] += size
    before = (folder / "certificates.tsv").read_text()
    for number, found in counts.items():
        pairs = ",".join(f"{name}:{count}" for name, count in sorted(found.items()) if count)
        rewrite(path, number, lambda fields, pairs=pairs: [*fields[:VOTES], pairs, *fields[VOTES + 1 :]])
    rederive(copy, name="staged")
    assert (folder / "certificates.tsv").read_text() != before
    with pytest.raises(
        UserError, match=rf"image {chosen}: \d+ of its first [\d,]+ estimation samples are not from this"
    ):
        draw_again(copy, name="staged")


def counts_in(fields):
    pairs = (pair.split(":") for pair in fields[VOTES].split(","))
    return collections.Counter({int(name): int(count) for name, count in pairs})


def test_an_honest_folder_does_not_answer_for_a_forged_one(copy):
    """The configuration of the forged folder has the name of the honest one."""
    folder = copy / "certify" / "default"
    shutil.copytree(folder, copy / "certify" / "honest")
    forge_everything(folder)
    stored = json.loads((folder / "certificates.json").read_text())
    stored["config"]["certify"]["name"] = "honest"
    rederive(copy, stored)
    with pytest.raises(UserError, match="are not from this network"):
        draw_again(copy)


def test_a_folder_may_be_renamed(copy, capsys):
    (copy / "certify" / "default").rename(copy / "certify" / "mine")
    draw_again(copy, 2, "mine")
    assert "0 differ" in capsys.readouterr().out
    folder = copy / "certify" / "mine"
    # An audit reads and writes in the renamed folder, too.
    assert target.target_of_certificates(folder, store.read(folder / "certificates.json"), "").folder == folder


def test_one_more_sample_for_every_candidate_is_found(copy):
    """Rounding could explain the difference for each single image, but not for all of them."""

    def one_more(fields):
        counts = {int(a): int(b) for a, b in (pair.split(":") for pair in fields[VOTES].split(","))}
        top, other = max(counts, key=counts.get), min(counts, key=counts.get)
        counts[top], counts[other] = counts[top] + (top != other), counts[other] - (top != other)
        changed = ",".join(f"{name}:{count}" for name, count in sorted(counts.items()) if count)
        return [*fields[:VOTES], changed, *fields[VOTES + 1 :]]

    folder = copy / "certify" / "default"
    rows = [line.split("\t") for line in (folder / "votes.0.tsv").read_text().splitlines()]
    first = {row[0]: number for number, row in reversed([*enumerate(rows, 1)]) if row[3] == "estimation"}
    for number in first.values():
        rewrite(folder / "votes.0.tsv", number, one_more)
    rederive(copy)
    with pytest.raises(
        UserError, match=r"the right classes lead their rivals by \d+ samples more than now, and rounding"
    ):
        draw_again(copy)


def test_images_that_were_left_out_are_counted(copy, capsys):
    folder = copy / "certify" / "default"
    lines = (folder / "votes.0.tsv").read_text().splitlines(keepends=True)
    (folder / "votes.0.tsv").write_text("".join(line for line in lines if not line.startswith(("3\t", "9\t"))))
    rederive(copy)
    draw_again(copy)
    assert "note: 2 of the 40 images that were to be certified are not in the table" in capsys.readouterr().out


def test_a_latent_of_fewer_numbers_than_the_encoders_is_found(copy):
    """With fewer numbers, the error budget would be smaller."""
    folder = copy / "certify" / "default"
    stored = json.loads((folder / "certificates.json").read_text())
    stored["lipschitz"]["output_shape"] = [1]
    stored["identity"]["arithmetic"] = arithmetic_facts(make_arithmetic("sound", stored["config"]["sigma"]), (1,))
    with pytest.raises(UserError, match=r"has latents of shape [\[(].*[\])], the certificates claim [\[(]1,?[\])]"):
        rederive(copy, stored)


def test_a_larger_sigma_than_that_of_the_samples_is_found(copy):
    folder = copy / "certify" / "default"
    stored = json.loads((folder / "certificates.json").read_text())
    stored["config"]["sigma"] = stored["identity"]["sigma"] = 0.75
    shape = stored["lipschitz"]["output_shape"]
    stored["identity"]["arithmetic"] = arithmetic_facts(make_arithmetic("sound", 0.75), shape)
    for line in range(2, (folder / "votes.0.tsv").read_text().count("\n") + 1):
        rewrite(folder / "votes.0.tsv", line, lambda fields: [*fields[:2], "0.001", *fields[3:]])
    rederive(copy, stored)
    with pytest.raises(UserError, match="are not from this network"):
        draw_again(copy)


def test_samples_under_the_noise_of_another_seed_are_found(copy):
    folder = copy / "certify" / "default"
    stored = json.loads((folder / "certificates.json").read_text())
    stored["config"]["certify"]["seed"] = stored["identity"]["seed"] = 7
    rederive(copy, stored)
    with pytest.raises(UserError, match="not of this checkpoint, sigma and seed"):
        draw_again(copy)


def test_a_slack_below_that_of_the_latent_is_found(copy):
    """The forged slack is plausible: it covers the rounding of a latent of zeros, and it is equal in all rows."""
    folder = copy / "certify" / "default"
    stored = json.loads((folder / "certificates.json").read_text())
    arithmetic = make_arithmetic("sound", stored["config"]["sigma"])
    least = float(arithmetic.slack(np.zeros((1, *stored["lipschitz"]["output_shape"])))[0])
    path = folder / "votes.0.tsv"
    honest = float(path.read_text().splitlines()[1].split("\t")[2])
    assert least < honest
    for line in range(2, path.read_text().count("\n") + 1):
        rewrite(path, line, lambda fields: [*fields[:2], repr(least), *fields[3:]])
    rederive(copy)
    with pytest.raises(UserError, match=f"has the slack {least} in the ledger, less than the {honest}"):
        draw_again(copy)


def test_on_another_kind_of_device_only_the_chosen_images_are_sampled(copy, monkeypatch, capsys):
    """Otherwise the large tile of an accelerator would cost a CPU much time. The noise stays the same."""
    folder, tiles, pipeline = copy / "certify" / "default", [], resample.Pipeline
    stored = store.read(folder / "certificates.json")

    def seen(reduced, *rest):
        tiles.append(reduced.config.certify.tile)
        return pipeline(reduced, *rest)

    monkeypatch.setattr(resample, "Pipeline", seen)
    written = json.loads((folder / "certificates.json").read_text())
    for platform, tile in ((stored.identity.platform, (32, 32)), ("gpu NVIDIA H200", (3, 32))):
        written["identity"]["platform"] = platform
        rederive(copy, written)
        draw_again(copy, 3)
        assert "drawn again: 3,300 samples of 3 images (n0 included); 0 differ" in capsys.readouterr().out
        assert tiles.pop() == tile


def test_what_cannot_be_sampled_again_is_refused(copy):
    folder = copy / "certify" / "default"
    for section, field, value, why in (
        ("data", "digest", "another", "images or labels of digits, split test, are not those certified"),
        ("data", "split", "train", "its data.split is 'train', that of its configuration 'test'"),
        ("model", "head", "linear", "its model.head is 'linear', that of its configuration 'mlp'"),
    ):
        stored = store.read(folder / "certificates.json")
        getattr(stored.identity, section)[field] = value
        with pytest.raises(UserError, match=why):
            target.target_of_certificates(folder, stored, "")
    stored = store.read(folder / "certificates.json")
    honest = target.target_of_certificates(folder, stored, "")
    stored = dataclasses.replace(stored, identity=dataclasses.replace(stored.identity, certificate="deterministic"))
    with pytest.raises(UserError, match="needs a linear head"):
        resample.run(honest, stored, 3, verify.Verdict(0))
    for flags, why in (
        (["--recast=0"], "at least 1, got '0'"),
        (["--recast=3", "--config.sigma=1.0"], "takes sigma from the certificates"),
        (["--recast=3", "--verify"], "not allowed with"),
    ):
        with pytest.raises(UserError, match=why):
            certify.run([f"--workdir={copy}", *flags])
    shutil.rmtree(copy / "checkpoints" / "60")
    assert "the checkpoint of step 60, which was certified, is not in" in refused(
        "certify", f"--workdir={copy}", "--recast=3"
    )


def test_every_image_is_equally_likely_to_be_chosen(copy, monkeypatch):
    """If an author could predict which images are chosen, the check would find nothing."""
    seen = []

    class Caught(Exception):
        pass

    class Pipeline:
        sampler = types.SimpleNamespace(keys=lambda key: {}, first_layer="integer")

        def __init__(self, *_):
            pass

        def encoded(self, indices, _):
            seen.append(indices)
            raise Caught

    monkeypatch.setattr(resample, "Pipeline", Pipeline)
    for _ in range(3):
        with pytest.raises(Caught):
            draw_again(copy, 10)
    assert len({tuple(indices) for indices in seen}) == 3
    assert all(len(set(indices)) == 10 for indices in seen)
