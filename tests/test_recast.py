"""`certify --recast` finds votes that are not those of the network, where every file agrees with every other."""

import json
import shutil

import numpy as np
import pytest
from commands import QUICK, fingerprint, refused, run
from forging import reseal, rewrite

from lsrs_jax import config as configuration
from lsrs_jax.certification import folder, job, recast, smoothed, verify
from lsrs_jax.errors import UserError
from lsrs_jax.smoothing.noise import arithmetic

VOTES = 6  # column of a ledger


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("recast") / "run"
    run("train", *QUICK, f"--workdir={workdir}")
    run("certify", f"--workdir={workdir}")
    flags = ["--config.certify.name=staged", "--config.certify.schedule=staged", "--config.certify.noise=independent"]
    run("certify", f"--workdir={workdir}", *flags, "--config.certify.n=3000", "--config.certify.head_dtype=bfloat16")
    flags = [*QUICK, "--config.model.head=normalized", "--config.train.loss=margin"]
    run("train", f"--workdir={workdir}_margin", *flags)
    run("certify", f"--workdir={workdir}_margin", "--config.certify.certificate=deterministic")
    return workdir


@pytest.fixture
def copy(original, tmp_path):
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def cast(workdir, count=40):
    stored = folder.read(workdir / "certify" / "default" / "certificates.json")
    recast.run(job.of_certificates(workdir, stored, ""), stored, count)


def rederive(workdir, stored=None):
    """Makes table and digests follow from the ledger, as a forger would; `verify` is satisfied."""
    place = workdir / "certify" / "default"
    if stored:
        (place / "certificates.json").write_text(json.dumps(stored))
    reseal(place)
    stored = json.loads((place / "certificates.json").read_text())
    smoothed.from_counts(place, configuration.from_dict(stored["config"]))
    verify.run(place)


@pytest.mark.parametrize("devices", [1, 3])
def test_honest_votes_are_the_same_again_and_nothing_is_written(copy, original, devices):
    out = run("certify", f"--workdir={copy}", "--recast=7", devices=devices)
    assert "verified: 40 certificates" in out
    assert "cast again: 7,700 votes of 7 images; 0 differ" in out
    assert "had more than 34.9% of the table another origin" in out
    out = run("certify", f"--workdir={copy}", "--recast=1000", "--config.certify.name=staged", devices=devices)
    assert "of 40 images; 0 differ\nthese are all images of the table" in out
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
    with pytest.raises(UserError, match=rf"votes for image {image} \d+ are not those of the network: class"):
        cast(copy)
    assert f"votes for image {image} " in refused("certify", f"--workdir={copy}", "--recast=40")
    for number in range(2, len(rows) + 1):
        rewrite(path, number, forged)
    rederive(copy)
    with pytest.raises(UserError, match="are not those of the network"):
        cast(copy, 20)


def test_a_larger_sigma_than_that_of_the_votes_is_found(copy):
    place = copy / "certify" / "default"
    stored = json.loads((place / "certificates.json").read_text())
    stored["config"]["sigma"] = stored["identity"]["sigma"] = 0.75
    shape = stored["lipschitz"]["output_shape"]
    stored["identity"]["arithmetic"] = smoothed._terms(arithmetic("sound", 0.75), shape)
    for line in range(2, (place / "votes.0.tsv").read_text().count("\n") + 1):
        rewrite(place / "votes.0.tsv", line, lambda fields: [*fields[:2], "0.001", *fields[3:]])
    rederive(copy, stored)
    with pytest.raises(UserError, match="are not those of the network"):
        cast(copy)


def test_votes_under_the_noise_of_another_seed_are_found(copy):
    place = copy / "certify" / "default"
    stored = json.loads((place / "certificates.json").read_text())
    stored["config"]["seed"] = stored["identity"]["seed"] = 7
    rederive(copy, stored)
    with pytest.raises(UserError, match="not of this checkpoint, sigma and seed"):
        cast(copy)


def test_a_charge_below_that_of_the_latent_is_found(copy):
    """One that could be: at least the rounding of some latent to the grid, and equal in all rows."""
    place = copy / "certify" / "default"
    stored = json.loads((place / "certificates.json").read_text())
    law = arithmetic("sound", stored["config"]["sigma"])
    least = float(law.slack(np.zeros((1, *stored["lipschitz"]["output_shape"])))[0])
    path = place / "votes.0.tsv"
    honest = float(path.read_text().splitlines()[1].split("\t")[2])
    assert least < honest
    for line in range(2, path.read_text().count("\n") + 1):
        rewrite(path, line, lambda fields: [*fields[:2], repr(least), *fields[3:]])
    rederive(copy)
    with pytest.raises(UserError, match=f"is charged {least} in the ledger, less than the {honest}"):
        cast(copy)


@pytest.mark.parametrize(
    ("share", "votes", "dtype"), [(3, 1000, "float32"), (10, 100_000, "float32"), (10, 1000, "bfloat16")]
)
def test_a_few_votes_may_move_by_rounding_and_no_more(share, votes, dtype):
    class Job:
        folder, config = "place", configuration.default()

    Job.config.certify.head_dtype = dtype
    none = np.zeros(3, np.int64)

    class Recorded:
        idx, counts, looks = 5, {"selection": none}, np.array([[votes, 0, 0]])

    class Again(Recorded):
        looks = np.array([[votes - share, share, 0]])

    assert recast._compare(Job, Recorded, Recorded) == 0
    assert recast._compare(Job, Recorded, Again) == share
    Again.looks = np.array([[votes - share - 1, share + 1, 0]])
    with pytest.raises(UserError, match=f"image 5 {share + 1} are not those of the network: class 0 has {votes:,}"):
        recast._compare(Job, Recorded, Again)


def test_what_cannot_be_cast_again_is_refused(copy, original):
    stored = folder.read(copy / "certify" / "default" / "certificates.json")
    stored["identity"]["data"]["digest"] = "another"
    with pytest.raises(UserError, match="images or labels of digits, split test, are not those that were certified"):
        job.of_certificates(copy, stored, "")
    margin = [f"--workdir={original}_margin", "--recast=3"]
    assert "they come from no votes" in refused("certify", *margin)
    assert "at least 1, got 0" in refused("certify", f"--workdir={copy}", "--recast=0")
    assert "takes sigma from the certificates" in refused(
        "certify", f"--workdir={copy}", "--recast=3", "--config.sigma=1.0"
    )
    shutil.rmtree(copy / "checkpoints" / "60")
    assert "the checkpoint of step 60, which was certified, is not in" in refused(
        "certify", f"--workdir={copy}", "--recast=3"
    )


def test_every_image_is_as_likely_to_be_drawn(copy, monkeypatch):
    """A draw that its author could predict would find nothing."""
    seen = []

    class Caught(Exception):
        pass

    class Caster:
        votes = None

        def __init__(self, *_):
            pass

        def blocks(self, indices, _):
            seen.append(indices)
            raise Caught

    monkeypatch.setattr(recast, "Caster", Caster)
    for _ in range(3):
        with pytest.raises(Caught):
            cast(copy, 10)
    assert len({tuple(indices) for indices in seen}) == 3
    assert all(len(set(indices)) == 10 for indices in seen)
