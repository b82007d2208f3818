"""Shards that processes certify without knowing of each other, and the command `merge`, which joins them."""

import contextlib
import io
import json
import shutil

import pytest

import verify_certificates
from lsrs_jax.certification.ledger import digest
from lsrs_jax.certification.rows import crc_of
from lsrs_jax.runtime.documents import write_sealed
from support.commands import QUICK, ended, fingerprint, refused, run, without_time

FLAGS = ["--config.certify.schedule=staged", "--config.certify.radii=(0.1,0.3)", "--config.certify.stop=24"]
SMALL = ["--config.train.steps=20", "--config.model.encoder=space_to_depth", "--config.model.head=linear"]
FLAGS += ["--config.certify.n=4000", "--config.certify.step=2"]


def rows(folder):
    """The rows of all ledgers of a folder, without their times and checksums, as a set."""
    lines = [line for path in folder.glob("votes.*.tsv") for line in path.read_text().splitlines()[1:]]
    assert len(set(lines)) == len(lines)
    return {tuple(line.split("\t")[:7]) for line in lines}


def samples(folder):
    """The samples per image, stream and class: the number of blocks in a row depends on the speed of the machine."""
    found = {}
    for idx, label, slack, stream, _, _, votes in rows(folder):
        counts = found.setdefault((idx, label, slack, stream), {})
        for pair in votes.split(","):
            number, count = pair.split(":")
            counts[number] = counts.get(number, 0) + int(count)
    return found


def content(folder):
    """certificates.json without what differs between two sessions."""
    document = json.loads((folder / "certificates.json").read_text())
    for name in ("digest", "record"):
        del document[name]
    for name in ("votes", "certificates"):
        del document["derivation"][name]
    return document


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A workdir with a certification by one process."""
    workdir = tmp_path_factory.mktemp("alone")
    run("train", *QUICK, *SMALL, f"--workdir={workdir}")
    run("certify", f"--workdir={workdir}", *FLAGS)
    return workdir


@pytest.fixture(scope="module")
def divided(alone, tmp_path_factory):
    """A workdir with two of three shards, and a copy of it with the third."""
    home = tmp_path_factory.mktemp("divided")
    for name in ("first", "second"):
        shutil.copytree(alone, home / name, ignore=lambda folder, names: {"certify"} & set(names))
    for index, name in enumerate(("first", "second", "first")):
        out = run("certify", f"--workdir={home / name}", *FLAGS, f"--shard={index}/3", devices=1 + (index == 2))
        assert "4 images: certified accuracy" in out
    return home / "first", home / "second"


@pytest.fixture
def copies(divided, tmp_path):
    return [shutil.copytree(workdir, tmp_path / workdir.name) for workdir in divided]


def test_merged_shards_are_what_one_process_writes(alone, copies):
    first, second = copies
    out = run("merge", f"--workdir={first}")
    assert "8 images: certified accuracy" in out
    assert "note: 4 of 12 images have no certificate yet: 2, 8, 14, 20\n" in out
    code, out, _ = ended("certify", f"--workdir={first}", "--verify")
    assert (code, "4 of these have none" in out) == (3, True)
    assert "note" not in run("merge", f"--workdir={first}", str(second))
    merged, whole = first / "certify" / "default", alone / "certify" / "default"
    assert samples(merged) == samples(whole)
    assert without_time(merged / "certificates.tsv") == without_time(whole / "certificates.tsv")
    assert content(merged) == content(whole)
    record = json.loads((merged / "certificates.json").read_text())["record"]
    assert [entry["shard"] for entry in record] == ["0/3", "2/3", "1/3"]
    # Every reader reads the folder.
    assert "12 certificates follow" in run("certify", f"--workdir={first}", "--verify")
    with contextlib.redirect_stdout(io.StringIO()) as report:
        assert verify_certificates.main([str(merged)]) == 0
    assert "12 certificates follow" in report.getvalue()
    run("certify", f"--workdir={first}", "--recast=4")
    assert "| 12 |" in run("report", str(first), f"--out={first / 'report'}")
    # Nothing is left to sample, and nothing to merge.
    ledger = (merged / "votes.0.tsv").read_bytes()
    assert "12 images, 12 of them done" in run("certify", f"--workdir={first}", *FLAGS)
    run("merge", f"--workdir={first}", str(second), str(first))
    assert (merged / "votes.0.tsv").read_bytes() == ledger
    assert json.loads((merged / "certificates.json").read_text())["record"] == record
    assert "12 images" in run("certify", f"--workdir={first}", "--from-counts", "--config.certify.alpha=0.01")


def test_a_shard_and_a_merge_resume_after_a_kill(alone, copies):
    first, second = copies
    shard, merged, whole = (
        first / "shards" / "default-0-of-3",
        first / "certify" / "default",
        alone / "certify" / "default",
    )
    lines = (shard / "votes.0.tsv").read_bytes().splitlines(keepends=True)
    (shard / "certificates.tsv").unlink()
    (shard / "votes.0.tsv").write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:9])
    run("certify", f"--workdir={first}", *FLAGS, "--shard=0/3")
    run("merge", f"--workdir={first}")
    old = {path: path.read_bytes() for path in merged.iterdir()}
    run("merge", f"--workdir={first}", str(second))
    # A kill leaves rows of which the table does not know yet, and perhaps a part of a row.
    ledger = (merged / "votes.0.tsv").read_bytes()
    for path, before in old.items():
        path.write_bytes(before)
    (merged / "votes.0.tsv").write_bytes(ledger[:-99])
    assert "8 certificates follow" in ended("certify", f"--workdir={first}", "--verify")[1]
    run("merge", f"--workdir={first}", str(second))
    assert samples(merged) == samples(whole)
    assert without_time(merged / "certificates.tsv") == without_time(whole / "certificates.tsv")


def test_what_does_not_belong_together_is_refused_and_changes_nothing(alone, copies):
    first, second = copies
    run("merge", f"--workdir={first}")
    before = fingerprint(first)

    def refusal(*parts):
        line = refused("merge", f"--workdir={first}", *map(str, parts))
        assert fingerprint(first) == before
        return line

    run("certify", f"--workdir={second}", *FLAGS, "--shard=0/2", "--config.certify.n0=50")
    assert "is of another run than" in (line := refusal(second / "shards" / "default-0-of-2"))
    assert "certify.n0 was 100 and is now 50" in line
    run("certify", f"--workdir={second}", *FLAGS, "--shard=0/12", "--config.certify.alpha=0.01")
    parts = [second / "shards" / f"default-{name}" for name in ("0-of-12", "1-of-3")]
    assert "certify.alpha is 0.01 in" in refusal(*parts)
    run("certify", f"--workdir={second}", *FLAGS, "--shard=0/12", "--config.certify.stop=22")
    assert "certify.stop is 24 in" in refusal(parts[0])
    # An image of another division into shards has the same samples, so nothing is new.
    votes = (first / "certify" / "default" / "votes.0.tsv").read_bytes()
    run("certify", f"--workdir={second}", *FLAGS, "--shard=0/12")
    run("merge", f"--workdir={first}", str(parts[0]))
    assert (first / "certify" / "default" / "votes.0.tsv").read_bytes() == votes
    before = fingerprint(first)
    forged = ledger_with_other_samples(parts[0] / "votes.0.tsv")
    assert forged in refusal(parts[0])


def ledger_with_other_samples(path):
    """Moves one sample of the first image from one class to another; returns what a merge says of it."""
    header, *lines = path.read_text().splitlines()
    name, run_name = lines[0].split("\t")[0], lines[0].split("\t")[8]
    cells = lines[0].split("\t")
    votes = dict(tuple(map(int, pair.split(":"))) for pair in cells[6].split(","))
    most, other = max(votes, key=votes.get), next(number for number in range(10) if number != max(votes, key=votes.get))
    votes[most], votes[other] = votes[most] - 1, votes.get(other, 0) + 1
    cells[6] = ",".join(f"{number}:{count}" for number, count in sorted(votes.items()))
    body = "\t".join([*cells[:8], run_name])
    path.write_text("\n".join([header, f"{body}\t{crc_of(body)}", *lines[1:]]) + "\n")
    document = json.loads((path.parent / "certificates.json").read_text())
    document["derivation"]["votes"] = {path.name: digest(path.read_bytes())}
    write_sealed(
        path.parent / "certificates.json", {key: document[key] for key in document if key not in ("digest", "format")}
    )
    return f"has other samples of image {name} than another part"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shard=3/3"], "i/N with 0 <= i < N"),
        (["--shard=0"], "i/N with 0 <= i < N"),
        (["--shard=0/3", "--verify"], "--shard is for sampling"),
        (["--shard=0/3", "--config.certify.certificate=deterministic"], "leave it out"),
        (["--shard=12/13", *FLAGS], "shard 12/13 has no image"),
    ],
)
def test_a_wrong_shard_is_refused(alone, flags, message):
    before = fingerprint(alone)
    assert message in refused("certify", f"--workdir={alone}", *flags)
    assert fingerprint(alone) == before


def test_a_workdir_without_shards_is_refused(alone, tmp_path):
    assert "holds no shard of 'default'" in refused("merge", f"--workdir={alone}")
