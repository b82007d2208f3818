"""`certify --recast` finds votes that are not those of the network, where every file agrees with every other."""

import dataclasses
import json
import shutil
import types

import numpy as np
import pytest

from lsrs_jax import certify
from lsrs_jax.certification import resample, smoothed, store, target, verify
from lsrs_jax.certification.identity import arithmetic_facts
from lsrs_jax.config import config_from_dict
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing.arithmetic import make_arithmetic
from support.commands import QUICK, fingerprint, refused, run
from support.forging import reseal, rewrite

VOTES = 6  # column of a ledger


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("recast") / "run"
    run("train", *QUICK, f"--workdir={workdir}")
    run("certify", f"--workdir={workdir}")
    flags = ["--config.certify.name=staged", "--config.certify.schedule=staged", "--config.certify.noise=independent"]
    run("certify", f"--workdir={workdir}", *flags, "--config.certify.n=3000", "--config.certify.head_dtype=bfloat16")
    return workdir


@pytest.fixture
def copy(original, tmp_path):
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def cast(workdir, count=40, name="default"):
    """On eight devices, where the fixture certified on one."""
    folder = workdir / "certify" / name
    stored = store.read(folder / "certificates.json")
    resample.run(target.target_of_certificates(folder, stored, ""), stored, count)


def rederive(workdir, stored=None):
    """Makes table and digests follow from the ledger, as a forger would; `verify` is satisfied."""
    folder = workdir / "certify" / "default"
    if stored:
        (folder / "certificates.json").write_text(json.dumps(stored))
    reseal(folder)
    stored = json.loads((folder / "certificates.json").read_text())
    smoothed.from_counts(folder, config_from_dict(stored["config"]))
    verify.run(folder)


def test_honest_votes_are_the_same_again_and_nothing_is_written(copy, original, capsys):
    out = run("certify", f"--workdir={copy}", "--recast=7", devices=3)
    assert "verified: 40 certificates" in out
    assert "drawn again: 7,700 samples of 7 images; 0 differ" in out
    assert "if more than 34.9% of the table had samples of another origin, these" in out
    cast(copy, 1000, "staged")
    assert "of 40 images; 0 differ\nthese are all images of the table" in capsys.readouterr().out
    assert fingerprint(copy) == fingerprint(original)


def forged(fields):
    """All votes of a row for its strongest class."""
    pairs = [tuple(map(int, pair.split(":"))) for pair in fields[VOTES].split(",")]
    winner, total = max(pairs, key=lambda pair: pair[1])[0], sum(count for _, count in pairs)
    return [*fields[:VOTES], f"{winner}:{total}", *fields[VOTES + 1 :]]


def test_forged_votes_are_found_wherever_they_are_drawn(copy):
    path = copy / "certify" / "default" / "votes.0.tsv"
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    # One image alone, among those whose votes are not unanimous.
    several = [number for number, row in enumerate(rows, 1) if row[3] == "estimation" and row[VOTES].count(",") > 3]
    image = rows[several[0] - 1][0]
    for number, row in enumerate(rows, 1):
        if row[0] == image:
            rewrite(path, number, forged)
    rederive(copy)
    with pytest.raises(UserError, match=rf"samples for image {image} \d+ are not those of the network: class"):
        cast(copy)
    forge_everything(copy / "certify" / "default")
    rederive(copy)
    with pytest.raises(UserError, match="are not those of the network"):
        cast(copy, 20)


def forge_everything(folder):
    path = folder / "votes.0.tsv"
    for number in range(2, path.read_text().count("\n") + 1):
        rewrite(path, number, forged)


def test_an_honest_folder_does_not_answer_for_a_forged_one(copy):
    """Whose configuration carries the other's name."""
    folder = copy / "certify" / "default"
    shutil.copytree(folder, copy / "certify" / "honest")
    forge_everything(folder)
    stored = json.loads((folder / "certificates.json").read_text())
    stored["config"]["certify"]["name"] = "honest"
    rederive(copy, stored)
    with pytest.raises(UserError, match="are not those of the network"):
        cast(copy)


def test_a_folder_may_be_renamed(copy, capsys):
    (copy / "certify" / "default").rename(copy / "certify" / "mine")
    cast(copy, 2, "mine")
    assert "0 differ" in capsys.readouterr().out
    folder = copy / "certify" / "mine"
    # Where an audit looks and writes.
    assert target.target_of_certificates(folder, store.read(folder / "certificates.json"), "").folder == folder


def test_a_vote_more_for_every_candidate_is_found(copy):
    """Each of them within what rounding may do to one image."""

    def one_more(fields):
        counts = {int(a): int(b) for a, b in (pair.split(":") for pair in fields[VOTES].split(","))}
        top, other = max(counts, key=counts.get), min(counts, key=counts.get)
        counts[top], counts[other] = counts[top] + (top != other), counts[other] - (top != other)
        votes = ",".join(f"{name}:{count}" for name, count in sorted(counts.items()) if count)
        return [*fields[:VOTES], votes, *fields[VOTES + 1 :]]

    folder = copy / "certify" / "default"
    rows = [line.split("\t") for line in (folder / "votes.0.tsv").read_text().splitlines()]
    first = {row[0]: number for number, row in reversed([*enumerate(rows, 1)]) if row[3] == "estimation"}
    for number in first.values():
        rewrite(folder / "votes.0.tsv", number, one_more)
    rederive(copy)
    with pytest.raises(UserError, match=r"lead their rivals by .* samples more than now, nearly all to"):
        cast(copy)


def test_images_that_were_left_out_are_counted(copy, capsys):
    folder = copy / "certify" / "default"
    lines = (folder / "votes.0.tsv").read_text().splitlines(keepends=True)
    (folder / "votes.0.tsv").write_text("".join(line for line in lines if not line.startswith(("3\t", "9\t"))))
    rederive(copy)
    cast(copy)
    assert "note: 2 of the 40 images that were to be certified are not in the table" in capsys.readouterr().out


def test_a_latent_of_fewer_numbers_than_the_encoders_is_found(copy):
    """Less has the slack for the law of the noise and the rounding of fewer numbers."""
    folder = copy / "certify" / "default"
    stored = json.loads((folder / "certificates.json").read_text())
    stored["lipschitz"]["output_shape"] = [1]
    stored["identity"]["arithmetic"] = arithmetic_facts(make_arithmetic("sound", stored["config"]["sigma"]), (1,))
    with pytest.raises(UserError, match=r"has latents of shape [\[(].*[\])], the certificates claim [\[(]1,?[\])]"):
        rederive(copy, stored)


def test_a_larger_sigma_than_that_of_the_votes_is_found(copy):
    folder = copy / "certify" / "default"
    stored = json.loads((folder / "certificates.json").read_text())
    stored["config"]["sigma"] = stored["identity"]["sigma"] = 0.75
    shape = stored["lipschitz"]["output_shape"]
    stored["identity"]["arithmetic"] = arithmetic_facts(make_arithmetic("sound", 0.75), shape)
    for line in range(2, (folder / "votes.0.tsv").read_text().count("\n") + 1):
        rewrite(folder / "votes.0.tsv", line, lambda fields: [*fields[:2], "0.001", *fields[3:]])
    rederive(copy, stored)
    with pytest.raises(UserError, match="are not those of the network"):
        cast(copy)


def test_votes_under_the_noise_of_another_seed_are_found(copy):
    folder = copy / "certify" / "default"
    stored = json.loads((folder / "certificates.json").read_text())
    stored["config"]["seed"] = stored["identity"]["seed"] = 7
    rederive(copy, stored)
    with pytest.raises(UserError, match="not of this checkpoint, sigma and seed"):
        cast(copy)


def test_votes_of_another_generator_are_refused(copy):
    folder = copy / "certify" / "default"
    stored = store.read(folder / "certificates.json")
    stored = dataclasses.replace(stored, identity=dataclasses.replace(stored.identity, prng="rbg"))
    with pytest.raises(UserError, match="another generator: prng 'rbg'"):
        resample.run(target.target_of_certificates(folder, stored, ""), stored, 3)


def test_a_charge_below_that_of_the_latent_is_found(copy):
    """One that could be: at least the rounding of some latent to the grid, and equal in all rows."""
    folder = copy / "certify" / "default"
    stored = json.loads((folder / "certificates.json").read_text())
    law = make_arithmetic("sound", stored["config"]["sigma"])
    least = float(law.slack(np.zeros((1, *stored["lipschitz"]["output_shape"])))[0])
    path = folder / "votes.0.tsv"
    honest = float(path.read_text().splitlines()[1].split("\t")[2])
    assert least < honest
    for line in range(2, path.read_text().count("\n") + 1):
        rewrite(path, line, lambda fields: [*fields[:2], repr(least), *fields[3:]])
    rederive(copy)
    with pytest.raises(UserError, match=f"has the slack {least} in the ledger, less than the {honest}"):
        cast(copy)


def image(votes, moved, selection=(100, 0, 0)):
    look = np.array([[votes - moved, moved, 0]])
    return types.SimpleNamespace(idx=5, counts={"selection": np.array(selection)}, looks=look)


@pytest.mark.parametrize(
    ("allowed", "votes", "dtype"),
    [
        (1, 20, "float32"),
        (1, 1000, "float32"),
        (5, 100_000, "float32"),
        (3, 20, "bfloat16"),
        (16, 1000, "bfloat16"),
        (159, 100_000, "bfloat16"),
    ],
)
def test_a_few_votes_may_move_by_rounding_and_no_more(allowed, votes, dtype):
    assert resample._compare(image(votes, 0), image(votes, 0), dtype) == (0, 0)
    assert resample._compare(image(votes, 0), image(votes, allowed), dtype) == (allowed, 2 * allowed)
    with pytest.raises(ValueError, match=f"image 5 {allowed + 1} are not those of the network: class 0 has {votes:,}"):
        resample._compare(image(votes, 0), image(votes, allowed + 1), dtype)
    # Few selection votes have an allowance of their own, however many there are for estimation.
    with pytest.raises(ValueError, match="of the 100 selection samples for image 5 100 are not"):
        resample._compare(image(votes, 0, (0, 100, 0)), image(votes, 0), dtype)


def test_another_kind_of_device_may_shift_the_logits_of_an_image_in_bfloat16():
    """Most seen between an H200 and a CPU, of 192 images: 34 of 1,024 votes and 117 of 4,096."""
    for votes, seen, allowed in ((1024, 34, 68), (4096, 117, 237)):
        with pytest.raises(ValueError, match="are not those of the network"):
            resample._compare(image(votes, 0), image(votes, seen), "bfloat16")
        assert resample._compare(image(votes, 0), image(votes, seen), "bfloat16", elsewhere=True).moved == seen
        resample._compare(image(votes, 0), image(votes, allowed), "bfloat16", elsewhere=True)
        with pytest.raises(ValueError, match=f"{allowed + 1} are not those of the network"):
            resample._compare(image(votes, 0), image(votes, allowed + 1), "bfloat16", elsewhere=True)
    with pytest.raises(ValueError, match="are not those of the network"):
        resample._compare(image(1024, 0), image(1024, 34), "float32", elsewhere=True)


def test_on_another_kind_of_device_no_rows_are_cast_for_images_that_were_not_drawn(copy, monkeypatch, capsys):
    """What a large tile of an accelerator would cost a CPU; the votes stay those of the noise that was drawn."""
    folder, tiles, pipeline = copy / "certify" / "default", [], resample.Pipeline
    stored = store.read(folder / "certificates.json")

    def seen(reduced, *rest):
        tiles.append(reduced.config.certify.tile)
        return pipeline(reduced, *rest)

    monkeypatch.setattr(resample, "Pipeline", seen)
    for platform, tile in ((stored.identity.platform, (32, 32)), ("gpu NVIDIA H200", (3, 32))):
        stored = dataclasses.replace(stored, identity=dataclasses.replace(stored.identity, platform=platform))
        resample.run(target.target_of_certificates(folder, stored, ""), stored, 3)
        assert "drawn again: 3,300 samples of 3 images; 0 differ" in capsys.readouterr().out
        assert tiles.pop() == tile


def test_a_vote_taken_from_the_rival_alone_counts_as_surplus():
    """What a multi-class bound would reward."""
    forged, cast = image(1000, 90), image(1000, 91)
    forged.looks, cast.looks = np.array([[900, 90, 10]]), np.array([[900, 91, 9]])
    assert resample._compare(forged, cast, "float32") == (1, 1)


@pytest.mark.parametrize("dtype", resample._TURNED)
def test_votes_may_turn_to_either_side_and_not_to_one(dtype):
    """A share of 10^5 votes of each of 40 images, the candidate's and others' alike; and all of them to one class."""
    votes, rng = 100_000, np.random.default_rng(0)
    turned = rng.binomial(votes, resample._TURNED[dtype], (2000, 40))
    net = 2 * rng.binomial(turned, 0.5) - turned
    assert (np.abs(net) <= resample.allowance(votes, dtype)).mean() > 0.999

    def refused(surplus):
        together = resample._together([resample._Difference(abs(votes), votes) for votes in surplus])
        return together[0] > resample._TOGETHER * together[1]

    assert not any(map(refused, net))
    assert all(map(refused, np.abs(net) + 1))
    assert not refused([resample.allowance(votes, dtype)])


def test_what_cannot_be_cast_again_is_refused(copy):
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
    with pytest.raises(UserError, match="they come from no samples"):
        resample.run(honest, stored, 3)
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


def test_every_image_is_as_likely_to_be_drawn(copy, monkeypatch):
    """A draw that its author could predict would find nothing."""
    seen = []

    class Caught(Exception):
        pass

    class Pipeline:
        sampler = types.SimpleNamespace(keys=lambda key: {})

        def __init__(self, *_):
            pass

        def encoded(self, indices, _):
            seen.append(indices)
            raise Caught

    monkeypatch.setattr(resample, "Pipeline", Pipeline)
    for _ in range(3):
        with pytest.raises(Caught):
            cast(copy, 10)
    assert len({tuple(indices) for indices in seen}) == 3
    assert all(len(set(indices)) == 10 for indices in seen)
