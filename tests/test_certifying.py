"""Certification end to end: what it writes on any devices and with any options, and how it continues."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lsrs_jax.certification.table import read_table
from support.commands import ended, fingerprint, run, without_time


def test_training_leaves_what_certification_needs(trained):
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in metrics if "loss" in row}
    assert list(losses) == [20, 40, 60]
    assert all(row["images_per_second"] > 0 for row in metrics if "loss" in row)
    assert losses[60] < losses[20] < 2.4
    assert next(row for row in metrics if "test_noisy_accuracy" in row)["test_clean_accuracy"] > 0.3
    assert list((trained / "tensorboard").glob("events.*"))
    assert json.loads((trained / "config.json").read_text())["train"]["steps"] == 60


def test_certificates_are_complete_and_consistent(certified):
    header = certified.read_text().splitlines()[0].split("\t")
    assert header[:6] == ["idx", "label", "predict", "radius", "correct", "time"]
    assert header[6:] == ["n", "p_a_lower", "p_b_upper", "lipschitz", "slack", "abstain"]
    table = read_table(certified)
    np.testing.assert_array_equal(table.idx, np.arange(40))
    np.testing.assert_array_equal(table.samples, 1000)
    assert 0.2 < table.certified_accuracy(0) <= 1
    assert table.radius.max() <= 0.5 * 2.4633
    assert (table.radius[table.predict == -1] == 0).all()
    provenance = json.loads((certified.parent / "certificates.json").read_text())
    assert provenance["identity"]["data"]["name"] == "digits"
    assert provenance["lipschitz"]["constant"] >= 1
    assert provenance["record"][0]["seconds"] > 0


JAX_SETTINGS = {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg"}


@pytest.mark.parametrize(("devices", "spmd", "environment"), [(8, "shard_map", {}), (3, "pmap", JAX_SETTINGS)])
def test_certificates_do_not_depend_on_devices(trained, certified, devices, spmd, environment):
    name = f"{spmd}{devices}"
    run(
        "certify",
        f"--workdir={trained}",
        f"--config.certify.name={name}",
        f"--config.certify.spmd={spmd}",
        devices=devices,
        **environment,
    )
    assert without_time(trained / "certify" / name / "certificates.tsv") == without_time(certified)


@pytest.mark.parametrize(
    "flag",
    ["arithmetic=float32", "noise=independent", "head_dtype=bfloat16", "bound=multiclass"],
)
def test_every_option_certifies_about_the_same(copy, certified, flag):
    run("certify", f"--workdir={copy}", "--config.certify.name=other", f"--config.certify.{flag}")
    tables = [read_table(path) for path in (certified, copy / "certify" / "other" / "certificates.tsv")]
    radii = [table.average_certified_radius for table in tables]
    assert radii[0] > 0
    assert 0.8 * radii[0] < radii[1] < (2.0 if "bound" in flag else 1.2) * radii[0]
    # The flags of the sampling need not be given again.
    run("certify", f"--workdir={copy}", "--config.certify.name=other", "--from-counts", "--config.certify.alpha=0.05")
    again = read_table(copy / "certify" / "other" / "certificates.tsv")
    assert again.average_certified_radius > tables[1].average_certified_radius


def test_certification_needs_no_optimizer_state(copy, certified):
    for item in (copy / "checkpoints").glob("*/train"):
        shutil.rmtree(item)
    run("certify", f"--workdir={copy}", "--config.certify.name=again")
    assert without_time(copy / "certify" / "again" / "certificates.tsv") == without_time(certified)


def test_more_images_extend_the_same_ledger(copy, certified):
    run("certify", f"--workdir={copy}", "--config.certify.name=base", "--config.certify.stop=50", devices=2)
    rows = without_time(copy / "certify" / "base" / "certificates.tsv")
    assert rows[:41] == without_time(certified)
    assert len(rows) == 51


def begin_cache(folder):
    """Forgets all compiled programs, and keeps them in a folder from now on."""
    jax.clear_caches()
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", folder)


def test_compiled_programs_are_kept_and_a_broken_cache_does_no_harm(copy, certified, tmp_path, monkeypatch):
    def certify_again(name, home):
        folder = jax.config.jax_compilation_cache_dir
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        try:
            begin_cache(None)  # as in a new process
            code, _, err = ended("certify", f"--workdir={copy}", f"--config.certify.name={name}")
        finally:
            begin_cache(folder)
        assert (code, err) == (0, "")
        assert without_time(copy / "certify" / name / "certificates.tsv") == without_time(certified)
        return fingerprint(home) if home.is_dir() else {}

    first = certify_again("first", tmp_path / "cache")
    loops = [name for name in first if "device_counts" in name and name.endswith("cache")]
    assert len(loops) == 1
    path = tmp_path / "cache" / loops[0]
    path.write_bytes(path.read_bytes()[:1000])  # the file that a kill during the write would leave
    second = certify_again("second", tmp_path / "cache")
    assert {name for name in second if name.endswith("cache")} == {name for name in first if name.endswith("cache")}
    certify_again("third", tmp_path / "config.json" / "nowhere")


def test_another_sigma_than_that_of_the_training_is_named(copy):
    few = ["--config.certify.stop=4", "--config.certify.n=100"]
    for sigma, said in ((0.25, True), (0.5, False)):
        name = f"sigma{sigma}"
        code, out, err = ended(
            "certify", f"--workdir={copy}", f"--config.sigma={sigma}", f"--config.certify.name={name}", *few
        )
        assert (code, err) == (0, "")
        assert ("note: trained with sigma 0.5, certified with sigma 0.25: this is sound" in out) == said
        assert json.loads((copy / "certify" / name / "certificates.json").read_text())["identity"]["sigma"] == sigma
