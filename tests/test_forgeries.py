"""Forged and mixed folders: each is refused with a reason, or the verdict says what was not checked.

docs/guarantee.md lists them in a table; a test compares the names.
"""

import json
import math
import os
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from lsrs_jax import certify
from lsrs_jax.certification import encode, store, target
from lsrs_jax.certification.identity import Identity, arithmetic_facts
from lsrs_jax.certification.table import read_table
from lsrs_jax.layers.lipschitz import LayerBound, LipschitzReport
from lsrs_jax.models import Model
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.rng import root_key
from lsrs_jax.smoothing.arithmetic import make_arithmetic
from support.commands import ROOT, ended, refused, run, without_time
from support.forging import (
    PURPOSE,
    change_rows,
    change_stored,
    counts_in,
    draw_again,
    edit,
    folder_of,
    rederive,
    renew_digests,
    rewrite,
    verified,
    with_counts,
)

# --------------------------------------------------------------------------------------- found without any sampling


def ledger_of_another_network(home, originals):
    shutil.copy(folder_of(originals / "other") / "votes.0.tsv", folder_of(home) / "votes.0.tsv")


def ledger_of_another_network_beside(home, originals):
    shutil.copy(folder_of(originals / "other") / "votes.0.tsv", folder_of(home) / "votes.1.tsv")


def ledger_of_another_sigma_beside(home, originals):
    run("certify", f"--workdir={home}", "--config.sigma=0.25", "--config.certify.name=narrow")
    shutil.copy(folder_of(home, "narrow") / "votes.0.tsv", folder_of(home) / "votes.1.tsv")


def ledger_that_is_a_link(home, originals):
    path = folder_of(home) / "votes.0.tsv"
    path.unlink()
    path.symlink_to(folder_of(originals / "other") / "votes.0.tsv")


MIXED = [
    ledger_of_another_network,
    ledger_of_another_network_beside,
    ledger_of_another_sigma_beside,
    ledger_that_is_a_link,
]


@pytest.mark.parametrize("mix", MIXED, ids=lambda mix: mix.__name__)
def test_samples_of_another_run_are_laundered_by_no_command(home, originals, mix):
    mix(home, originals)
    table = (folder_of(home) / "certificates.tsv").read_bytes()
    for flags in ([], ["--from-counts"], ["--verify"]) if mix is MIXED[0] else ([],):
        line = refused("certify", f"--workdir={home}", *flags)
        assert re.search("is of another run: it names|has changed: its digest|is a link to .*, outside of", line)
    assert (folder_of(home) / "certificates.tsv").read_bytes() == table
    # Even if the digests are renewed, the rows name their own run.
    renew_digests(folder_of(home))
    for flags in ([], ["--from-counts"], ["--verify"]) if mix is MIXED[1] else (["--verify"],):
        assert "is of another run" in refused("certify", f"--workdir={home}", *flags)


def test_folders_of_one_run_may_be_put_together(home, tmp_path):
    """Control: two machines that certified different images with the same settings."""
    parts = {"first": ["--config.certify.stop=20"], "second": ["--config.certify.start=20"]}
    for name, flags in parts.items():
        run("certify", f"--workdir={home}", f"--config.certify.name={name}", *flags)
    shutil.copy(folder_of(home, "second") / "votes.0.tsv", folder_of(home, "first") / "votes.1.tsv")
    run("certify", f"--workdir={home}", "--config.certify.name=first")
    assert without_time(folder_of(home, "first") / "certificates.tsv") == without_time(
        folder_of(home) / "certificates.tsv"
    )
    assert draw_again(home, 40, "first").complete


def test_rows_that_are_left_out_are_counted_and_give_an_exit_code(home):
    """The rows of wrong and abstaining images are deleted, and everything is derived again."""
    folder = folder_of(home)
    table = (folder / "certificates.tsv").read_text().splitlines()
    bad = {line.split("\t")[0] for line in table[1:] if line.split("\t")[4] == "0"}
    lines = (folder / "votes.0.tsv").read_text().splitlines(keepends=True)
    (folder / "votes.0.tsv").write_text("".join(line for line in lines if line.split("\t")[0] not in bad))
    assert "has changed: its digest" in refused("certify", f"--workdir={home}", "--from-counts")
    rederive(folder)
    code, out, _ = ended("certify", f"--workdir={home}", "--verify", "--json")
    answer = json.loads(out)
    assert code == 3
    assert answer["verdict"] == "incomplete"
    assert (answer["wanted"], answer["missing"]) == (40, len(bad))
    report = run("report", f"A={home}", f"--out={home / 'report'}")
    assert f"{len(bad)} of the 40 images that were to be certified are not in its table" in report


def test_a_size_of_the_split_that_hides_missing_images_is_found_with_the_images(home):
    folder = folder_of(home)
    lines = (folder / "votes.0.tsv").read_text().splitlines(keepends=True)
    (folder / "votes.0.tsv").write_text("".join(lines[:1] + [x for x in lines[1:] if int(x.split("\t")[0]) < 30]))

    def smaller(stored):
        stored["identity"]["images"] = 30
        stored["config"]["certify"]["stop"] = 0

    change_stored(folder, smaller)
    assert verified(home).complete
    with pytest.raises(UserError, match="contradicts itself: its images is 30, that of its configuration 360"):
        draw_again(home)


def test_a_halved_constant_without_its_checkpoint_is_said_to_be_unchecked(home):
    def halved(stored):
        layer = dict(stored["lipschitz"]["layers"][0], layer="0 invented", sigma_max=0.5, sigma_min=0.5)
        stored["lipschitz"]["layers"].insert(0, layer)
        layers = tuple(LayerBound(**one) for one in stored["lipschitz"]["layers"])
        stored["lipschitz"]["constant"] = LipschitzReport(layers, (), ()).constant

    change_stored(folder_of(home), halved)
    with pytest.raises(UserError, match=r"the certificates claim 0.5"):
        verified(home)
    shutil.rmtree(home / "checkpoints")
    code, out, _ = ended("certify", f"--workdir={home}", "--verify")
    assert code == 3
    assert "verdict: incomplete" in out
    assert "could not be checked: the weights and the Lipschitz constant 0.5" in out.splitlines()[-1]


def test_deterministic_radii_are_computed_again(home):
    folder = folder_of(home, "margin")
    assert verified(home, "margin").complete
    assert draw_again(home, 5, "margin").complete
    rows = [line.split("\t") for line in (folder / "certificates.tsv").read_text().splitlines()]
    for number, row in enumerate(rows[1:], 2):
        edit(folder / "certificates.tsv", number, "radius", repr(2 * float(row[3])))
    renew_digests(folder)
    for check in (verified, lambda home, name: draw_again(home, 40, name)):
        with pytest.raises(UserError, match=r"certificates.tsv: image \d+ has class .*, the network gives class"):
            check(home, "margin")
    shutil.rmtree(home / "checkpoints")
    verdict = verified(home, "margin")
    assert not verdict.complete
    assert any("the radii, which were not computed again" in item for item in verdict.unchecked.values())


def test_a_field_that_stands_twice_and_a_number_that_json_lacks_are_refused(home):
    path = folder_of(home) / "certificates.json"
    text = path.read_text()
    for changed, why in (
        (text.replace('"alpha": 0.001', '"alpha": 0.05, "alpha": 0.001'), "names a field twice"),
        (text.replace('"alpha": 0.001', '"alpha": NaN'), "NaN is not a number"),
    ):
        assert changed != text
        path.write_text(changed)
        assert why in refused("certify", f"--workdir={home}", "--verify")


def test_a_seed_that_was_chosen_is_named(home, capsys):
    verified(home)
    assert "derived from weights and images" in capsys.readouterr().out
    run("certify", f"--workdir={home}", "--config.certify.seed=7", "--config.certify.name=lucky")
    verified(home, "lucky")
    assert "noise of seed 7, chosen by the author" in capsys.readouterr().out

    def derived(stored):
        stored["config"]["certify"]["seed"] = -1

    with pytest.raises(UserError, match=r"were drawn with seed 7, not \d+"):
        change_stored(folder_of(home, "lucky"), derived)


def test_times_are_not_certified_and_must_be_times(home):
    folder = folder_of(home)
    for seconds in ("-1.0", "nan", "inf", "1e10"):
        shutil.copy(folder / "votes.0.tsv", folder / "kept")
        rewrite(folder / "votes.0.tsv", 2, lambda fields, s=seconds: [*fields[:7], s, *fields[8:]])
        assert "line 2 is damaged" in refused("certify", f"--workdir={home}", "--verify")
        (folder / "kept").replace(folder / "votes.0.tsv")


# ------------------------------------------------------------------------------------------ found by sampling again


def votes_of_an_easy_image(fields):
    """Image 1 gets the samples of image 0, turned to its own label."""
    return with_counts(fields, {int(fields[1]): sum(counts_in(fields).values())}) if fields[0] == "1" else fields


def one_sample_more_for_every_label(fields):
    counts, label = counts_in(fields), int(fields[1])
    other = min((name for name in counts if name != label), key=lambda name: counts[name], default=None)
    if fields[PURPOSE] == "estimation" and other is not None and fields[5] != fields[4]:
        counts[other], counts[label] = counts[other] - 1, counts.get(label, 0) + 1
    return with_counts(fields, counts)


def selections_of_the_label(fields):
    """Where the label is a close second in the selection, it becomes the candidate."""
    counts, label = counts_in(fields), int(fields[1])
    if fields[PURPOSE] != "selection" or max(counts, key=counts.get) == label:
        return fields
    first = max(counts, key=counts.get)
    counts[first], counts[label] = counts.get(label, 0), counts[first]
    return with_counts(fields, counts)


RECOUNTED = [votes_of_an_easy_image, one_sample_more_for_every_label, selections_of_the_label]


@pytest.mark.parametrize("change", RECOUNTED, ids=lambda change: change.__name__)
def test_changed_counts_are_found_by_sampling_again(home, change):
    change_rows(folder_of(home), change)
    assert verified(home).complete
    with pytest.raises(UserError, match="not of this checkpoint, sigma and seed"):
        draw_again(home)


def test_a_balanced_forgery_in_bfloat16_is_found(home):
    """Samples move to the label on right images and away from it on wrong ones; the folder claims another platform."""
    folder = folder_of(home, "half")
    assert draw_again(home, 40, "half").complete
    right = {row.split("\t")[0] for row in (folder / "certificates.tsv").read_text().splitlines() if "\t1\t" in row}

    def balanced(fields):
        counts, label = counts_in(fields), int(fields[1])
        others = [name for name in counts if name != label]
        if fields[PURPOSE] == "estimation" and others:
            share = sum(counts.values()) // 20
            giver, taker = max(others, key=counts.get), label
            if fields[0] not in right:
                giver, taker = taker, giver
            share = min(share, counts.get(giver, 0))
            counts[giver], counts[taker] = counts.get(giver, 0) - share, counts.get(taker, 0) + share
        return with_counts(fields, counts)

    change_rows(folder, balanced)
    change_stored(folder, lambda stored: stored["identity"].update(platform="gpu NVIDIA H200"))
    assert verified(home, "half").complete
    with pytest.raises(UserError, match=r"the right classes lead|average certified radius|are not from this network"):
        draw_again(home, 40, "half")


def test_an_honest_folder_of_another_machine_is_accepted(home, monkeypatch):
    """Control: the folder was made on a machine that computes the whole head in float32 where this one rounds."""
    honest = Model.for_certification
    flags = ["--config.certify.name=elsewhere", "--config.certify.head_dtype=bfloat16"]
    with monkeypatch.context() as patch:
        patch.setattr(Model, "for_certification", lambda self, params, dtype: honest(self, params, "float32"))
        run("certify", f"--workdir={home}", *flags)
    change_stored(folder_of(home, "elsewhere"), lambda stored: stored["identity"].update(platform="gpu other"))
    for count in (40, 5):
        assert draw_again(home, count, "elsewhere").checked[-1].startswith(f"the samples of {count} images")


def test_a_head_that_knows_the_noise_of_the_seed_is_found(home, monkeypatch):
    """It answers with class 0 wherever a latent is one that the seed draws for the first images."""
    folder, honest = folder_of(home), Model.for_certification
    stored = store.read(folder / "certificates.json")
    made = target.target_of_certificates(folder, stored, "")
    pipeline = encode.Pipeline(made, {"channels_last": False})
    sampler, images = pipeline.sampler, next(iter(pipeline.encoded([0, 1, 2], {})))
    keys = sampler.keys(root_key(stored.identity.seed))
    weights = np.random.default_rng(0).normal(size=math.prod(sampler.latent_shape)).astype(np.float32)

    def codes(latents):
        return jnp.sum(latents.reshape(len(latents), -1) * weights, axis=1)

    seen = []
    for stream, total in (("selection", stored.identity.n0), ("estimation", stored.identity.n)):
        for block in range(-(-total // sampler.tile[1])):
            noise = sampler.blocks.noise(keys[stream], jnp.arange(3), block, sampler._tables)
            seen += [codes(sampler.arithmetic.add(jnp.asarray(latent).ravel(), noise)) for latent in images.latents]
    table = np.sort(np.concatenate(seen))

    def forged(self, params, dtype):
        encoder, inner = honest(self, params, dtype)

        def knowing(latents):
            code = codes(latents)
            place = jnp.clip(jnp.searchsorted(table, code), 1, len(table) - 1)
            near = jnp.minimum(*(jnp.abs(jnp.asarray(table)[at] - code) for at in (place, place - 1)))
            return inner(latents) + 100 * (near < 1e-5)[:, None] * jnp.eye(10)[0]

        return encoder, knowing

    monkeypatch.setattr(Model, "for_certification", forged)
    certify.run([f"--workdir={home}", "--config.certify.name=knowing", "--config.certify.stop=3"])
    assert read_table(folder_of(home, "knowing") / "certificates.tsv").predict.tolist() == [0, 0, 0]
    assert verified(home, "knowing").complete
    with pytest.raises(UserError, match="fresh noise"):
        draw_again(home, 3, "knowing")


def test_another_latent_and_sigma_are_found(home):
    def wider(stored):
        stored["config"]["sigma"] = stored["identity"]["sigma"] = 0.75
        shape = tuple(stored["lipschitz"]["output_shape"])
        stored["identity"]["arithmetic"] = arithmetic_facts(make_arithmetic("sound", 0.75), shape)

    folder = folder_of(home)
    path = folder / "votes.0.tsv"
    for line in range(2, path.read_text().count("\n") + 1):
        rewrite(path, line, lambda fields: [*fields[:2], "0.001", *fields[3:]])
    change_stored(folder, wider)
    assert Identity.from_dict(json.loads((folder / "certificates.json").read_text())["identity"]).sigma == 0.75
    with pytest.raises(UserError, match=r"not of this checkpoint, sigma and seed|less than"):
        draw_again(home)


def test_every_forgery_of_this_file_is_in_the_table_of_the_docs():
    text = (ROOT / "docs" / "guarantee.md").read_text()
    for change in (*MIXED, *RECOUNTED):
        assert change.__name__.replace("_", " ") in text


def test_a_narrowed_selection_is_counted(home):
    """Rows of wrong images are deleted, and the configuration asks for a single image only."""
    folder = folder_of(home)
    rows = [line.split("\t") for line in (folder / "certificates.tsv").read_text().splitlines()[1:]]
    right = {row[0] for row in rows if row[4] == "1"}
    lines = (folder / "votes.0.tsv").read_text().splitlines(keepends=True)
    (folder / "votes.0.tsv").write_text("".join(lines[:1] + [x for x in lines[1:] if x.split("\t")[0] in right]))

    def narrowed(stored):
        first = min(map(int, right))
        stored["config"]["certify"].update(start=first, stop=first + 1)

    change_stored(folder, narrowed)
    verdict = verified(home)
    assert not verdict.complete
    assert (verdict.wanted, verdict.missing, verdict.others) == (1, 0, len(right) - 1)
    report = run("report", f"A={home}", f"--out={home / 'report'}")
    assert f"{len(right) - 1} of its images are not among the 1 that were to be certified" in report


def test_rows_under_indices_beyond_the_split_are_refused(home):
    path = folder_of(home) / "votes.0.tsv"
    for line in range(2, path.read_text().count("\n") + 1):
        rewrite(path, line, lambda fields: [str(int(fields[0]) + 1000), *fields[1:]])
    change_stored(folder_of(home), lambda stored: stored["config"]["certify"].update(stop=2000))
    with pytest.raises(UserError, match=r"has a certificate of image 1039, but the split has 360 images"):
        verified(home)


def test_a_rewritten_and_shortened_ledger_is_not_resumed(home):
    path = folder_of(home) / "votes.0.tsv"
    for line in range(2, path.read_text().count("\n") + 1):
        rewrite(path, line, lambda fields: with_counts(fields, {int(fields[1]): sum(counts_in(fields).values())}))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    line = refused("certify", f"--workdir={home}")
    assert "has other samples in its ledger than its certificate was derived from" in line


@pytest.mark.parametrize("name", ["votes.1.tsv", "certificates.json"])
def test_a_pipe_in_the_place_of_a_file_is_refused(home, name):
    path = folder_of(home) / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert "is not a file" in refused("certify", f"--workdir={home}", "--verify")


def test_json_is_one_object_for_every_refusal(tmp_path):
    for arguments in (["--verify"], ["--recast=0"]):
        code, out, _ = ended("certify", f"--workdir={tmp_path / 'none'}", *arguments, "--json")
        assert code == 2
        assert json.loads(out)["verdict"] == "refused"
