"""Folders that contradict themselves, old formats, and odd things in the place of files: refused, or named."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import zlib

import pytest

import verify_certificates
from lsrs_jax.certification import identity, store, target
from lsrs_jax.runtime.errors import UserError
from support.commands import ended, fingerprint, refused, run
from support.forging import (
    draw_again,
    folder_of,
    rederive,
    renew_digests,
    reseal_after,
    verified,
)

CONTRADICTIONS = {
    "name of the data": lambda stored: stored["identity"]["data"].update(name="imagenet2012"),
    "split": lambda stored: stored["identity"]["data"].update(split="validation"),
    "generator": lambda stored: stored["identity"].update(prng="rbg"),
    "model": lambda stored: stored["identity"]["model"].update(head="free"),
    "data of the configuration": lambda stored: stored["config"]["data"].update(name="cifar10", split="train"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_identity_and_configuration_say_is_compared(home, name):
    folder = folder_of(home)
    reseal_after(folder, CONTRADICTIONS[name])
    with pytest.raises(UserError, match="it contradicts itself: identity"):
        verified(home)
    assert verify_certificates.main([str(folder)]) == 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda stored: stored["identity"].update(images=352), "its images is 352, that of its configuration 360"),
        (lambda stored: stored["identity"]["data"].update(digest="0" * 64), "are not those certified"),
        (lambda stored: stored["identity"].update(classes=9), "classes|shape"),
    ],
)
def test_a_deterministic_folder_that_contradicts_the_images_is_refused(home, change, why):
    """With checkpoint and images at hand, only their absence leaves something unchecked."""
    reseal_after(folder_of(home, "margin"), change)
    with pytest.raises(UserError, match=why):
        verified(home, "margin")


def test_names_of_sets_that_carry_none_are_left_to_the_images(home):
    """Control: a version, a configuration of a builder, and a set that a path names."""
    stored = store.read(folder_of(home) / "certificates.json")
    for named, recorded, split in (("mnist:3.0.1", "mnist", "test"), ("emnist/letters", "emnist", "test")):
        stored.settings.data.update({"name": named, "split": "test"})
        stored.identity.data.update({"name": recorded, "split": split, "class_names": ["a", "b"]})
        assert identity.contradiction(stored.identity, stored.settings) is None
    stored.settings.data.name = "folder"
    stored.identity.data.update({"name": "pictures", "split": "val"})
    assert identity.contradiction(stored.identity, stored.settings) is None
    assert not identity.names_its_data(stored.settings)
    reseal_after(
        folder_of(home),
        lambda stored: (stored["config"]["data"].update(name="npz"), stored["identity"]["data"].update(name="npz")),
    )
    assert "which images data.name='npz' stands for (--recast=N)" in verified(home).beyond.values()


def to_format_1(folder):
    """Takes the fields of format 2 away, as a forger would who wants the checks of format 1."""
    stored = json.loads((folder / "certificates.json").read_text())
    del stored["identity"]["format"], stored["identity"]["images"]
    stored["config"]["certify"]["stop"] = 0
    path = folder / "votes.0.tsv"
    header, *rows = path.read_text().splitlines()
    bodies = ["\t".join(row.split("\t")[:8]) for row in rows]
    lines = [header.replace("\trun", ""), *(f"{body}\t{zlib.crc32(body.encode()):08x}" for body in bodies)]
    path.write_text("\n".join(lines) + "\n")
    (folder / "certificates.json").write_text(json.dumps(stored))
    rederive(folder)


def test_a_folder_that_was_turned_into_format_1_never_counts_as_complete(home, capsys):
    """Rows of 30 of 40 images are deleted; nothing in the folder shows it, so nobody may call it complete."""
    folder = folder_of(home)
    path = folder / "votes.0.tsv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1] + [line for line in lines[1:] if int(line.split("\t")[0]) < 10]))
    to_format_1(folder)
    assert "was begun in format 1" in capsys.readouterr().out
    assert set(verified(home).unchecked) == {"images", "run"}
    assert verify_certificates.main([str(folder)]) == 3
    assert "in format 1 nobody can: that no image of the split is missing; the run" in capsys.readouterr().out
    verdict = draw_again(home)
    assert not verdict.unchecked
    assert (verdict.wanted, verdict.missing) == (360, 350)


def test_an_old_folder_of_all_images_is_complete_after_sampling_them_again(home):
    flags = ["--config.certify.stop=360", "--config.certify.n=64", "--config.certify.name=old"]
    run("certify", f"--workdir={home}", *flags)
    to_format_1(folder_of(home, "old"))
    assert not verified(home, "old").complete
    assert draw_again(home, 360, "old").complete


def test_odd_and_empty_ledgers_leave_a_folder_usable(home):
    folder = folder_of(home)
    (folder / "votes.1234567890.tsv").touch()
    (folder / "votes.3.tsv").touch()
    rederive(folder)
    for removed in ((), ("votes.3.tsv",), ("votes.1234567890.tsv",)):
        for name in removed:
            (folder / name).unlink()
        assert verified(home).complete
        assert verify_certificates.main([str(folder)]) == 0
        run("certify", f"--workdir={home}", "--from-counts")
    run("certify", f"--workdir={home}")


@pytest.mark.parametrize("name", ["certificates.tsv", "audit.tsv", "audit.json"])
def test_a_pipe_in_the_place_of_a_table_is_refused_by_every_reader(home, name):
    path = folder_of(home) / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    for flags in (["--verify"], ["--from-counts"], []):
        assert f"{name} is not a file" in refused("certify", f"--workdir={home}", *flags)


def test_so_many_classes_are_not_believed(home):
    folder = folder_of(home)
    reseal_after(folder, lambda stored: stored["identity"].update(classes=2**20))
    with pytest.raises(UserError, match="claims 1,048,576 classes, but its samples and labels name no class above 9"):
        verified(home)
    assert verify_certificates.main([str(folder)]) == 2


def test_equal_images_are_counted(home, monkeypatch):
    honest = target.load_split

    def twice(data, split):
        found = honest(data, split)
        images = found.images.copy()
        images[3] = images[5]
        return dataclasses.replace(found, images=images)

    monkeypatch.setattr(target, "load_split", twice)
    run("certify", f"--workdir={home}", "--config.certify.n=64", "--config.certify.name=pair")
    verdict = draw_again(home, 4, "pair")
    assert verdict.complete
    assert "1 of the images compared equal another one" in str(verdict)


def test_a_table_of_margins_has_the_form_that_certify_writes(home):
    path = folder_of(home, "margin") / "certificates.tsv"
    text = path.read_text()
    lines = text.splitlines()
    longer = "".join(f"{line}\t{'p_a_lower' if number == 0 else '0.99'}\n" for number, line in enumerate(lines))
    fields = lines[1].split("\t")
    early = text.replace(lines[1], "\t".join([*fields[:5], "-5.0", *fields[6:]]))
    for changed, why in ((text[:-1], "does not end"), (longer, "line 1: its columns are"), (early, "time is '-5.0'")):
        path.write_text(changed)
        renew_digests(path.parent)
        with pytest.raises(UserError, match=why):
            verified(home, "margin")
        assert verify_certificates.main([str(path.parent)]) == 2


def test_two_folders_that_hold_the_same_image_are_named(home):
    run("certify", f"--workdir={home}", "--config.certify.name=again", "--config.certify.stop=1")
    shutil.copy(folder_of(home, "again") / "votes.0.tsv", folder_of(home) / "votes.1.tsv")
    line = refused("certify", f"--workdir={home}", "--from-counts")
    assert re.search(r"votes.0.tsv and .*votes.1.tsv both hold samples of image 0; .*; remove one of the files", line)


def test_a_copy_made_of_links_writes_nothing_into_the_original(home, tmp_path):
    before = fingerprint(home)
    subprocess.run(["cp", "-rs", home, tmp_path / "links"], check=True)
    line = refused("certify", f"--workdir={tmp_path / 'links'}", "--config.certify.stop=50")
    assert re.search(r"votes.0.tsv is a link to .*, outside of .*; copy that file to its place", line)
    assert fingerprint(home) == before
    path = folder_of(tmp_path / "links") / "votes.0.tsv"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)  # the remedy
    run("certify", f"--workdir={tmp_path / 'links'}", "--config.certify.stop=41")
    assert fingerprint(home) == before


def test_a_refusal_by_the_operating_system_is_json_too(home):
    path = folder_of(home) / "certificates.tsv"
    path.unlink()
    path.symlink_to(path.name)
    code, out, _ = ended("certify", f"--workdir={home}", "--verify", "--json")
    assert code == 2
    assert json.loads(out)["verdict"] == "refused"
