"""The published tables agree with the certificates that are committed beside them."""

import dataclasses
import functools
import hashlib
import json
import re

import numpy as np
import pytest
from ml_collections import ConfigDict

from lsrs_jax import models
from lsrs_jax.config import config_from_dict, config_to_dict, upgrade_section
from lsrs_jax.runtime.errors import UserError
from studies import __main__ as studies
from studies import accelerator, page_figures, render, results
from studies.runs import STUDIES, Run, Study

FOLDERS = sorted(path.parent for path in render.RESULTS.glob("*/*/run.json"))


@functools.cache
def cost(section, input_shape):
    """`models.cost` of a section ``model`` (JSON): many runs have the same network."""
    return models.cost(models.build(ConfigDict(json.loads(section)), input_shape, 10))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_published_run_is_complete_and_belongs_together(folder):
    run = results.load(folder)
    text = (folder / "certificates.tsv").read_bytes()
    assert hashlib.sha256(text).hexdigest() == run.certificates["derivation"]["certificates"]
    assert (folder / "card.md").read_text() == results.card(run)
    runs = {render.folder(name) / run.name: run for name, study in STUDIES.items() for run in study.rows.values()}
    assert studies.made(runs[folder], folder)
    identity, config = run.certificates["identity"], config_from_dict(run.facts["config"])
    assert identity["checkpoint"]["step"] == config.train.steps
    own = upgrade_section(identity["model"], "model.")
    assert {name: own[name] for name in config.model} == config_to_dict(config)["model"]
    section = json.dumps(config.model.to_dict(), sort_keys=True)
    assert run.cost == cost(section, tuple(identity["model"]["input_shape"]))


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_shows_what_the_certificates_say(name):
    found = render.kept_runs(name)
    if not found:
        pytest.skip("no run of this study is published")
    first, last = render.markers(name)
    text = render.page(name).read_text()
    assert text.split(first)[1].split(last)[0].strip() == render.section(name, found)
    assert (render.folder(name) / f"{name}.png").exists()
    images = next(iter(found.values())).table.idx
    for label, run in found.items():
        assert np.array_equal(run.table.idx, images[::2] if "every second image" in label else images)


def test_the_page_of_the_accelerator_shows_what_was_measured():
    first, last = render.markers(render.ACCELERATOR)
    text = render.page(render.ACCELERATOR).read_text()
    found = text.split(first)[1].split(last)[0].strip()
    assert found.count("|---") >= 3
    assert found == accelerator.markdown(render.folder(render.ACCELERATOR))


PAGES = [path for path in sorted(render.RESULTS.glob("*.md")) if path.name != "index.md"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_begins_with_its_answer_and_one_figure(path):
    text = path.read_text()
    _, answer, *rest = text.split("\n\n")
    assert 1 <= len(re.findall(r"[.?](?=\s+[A-Z*`(]|\s*$)", answer)) <= 3, answer
    figure = next(part for part in rest if "![" in part)
    assert (path.parent / re.search(r"!\[[^]]+\]\(([^)]+)\)", figure)[1]).is_file()
    assert not any(part.startswith(("## ", "| ")) for part in rest[: rest.index(figure)])
    unfolded = re.sub("<details>.*?</details>", "", text, flags=re.S)
    assert all(table.count("\n") <= 12 for table in re.findall(r"(?:^\|.*\n)+", unfolded, re.M))


def test_the_answers_that_were_computed_from_tables_agree_with_them():
    text = render.page("certify").read_text()
    loops = {row["loop"]: page_figures.number(row["votes/s"]) for row in page_figures.rows(text, "loop", "votes/s")}
    lsrs, isrs = loops["LSRS here, noise on the latent"], loops["ISRS here, noise on the image"]
    classic = next(speed for loop, speed in loops.items() if loop.startswith("PyTorch"))
    answer = text.split("\n\n")[1]
    for found in (lsrs / classic, lsrs / isrs):
        assert f" {found:.1f}" in answer
    assert f" {isrs / classic:.2f}" in answer
    schedules = page_figures.rows(text, "run", "images", "votes")
    fewer = [float(row["fewer"].rstrip("x")) for row in schedules if row["votes"] == "staged: every 0.25 up to 4σ"]
    assert len(fewer) == 3
    assert f"takes {min(fewer):.0f} to {max(fewer):.0f} times" in " ".join(answer.split())
    found = page_figures.rows(render.page("orthogonal").read_text(), "variant", "initialisation")
    at_36 = [row["36/255"] for row in found if row["initialisation"].startswith("identity")]
    equal = sorted(at_36, key=float)[1:]  # without `exponential`
    assert f"{equal[0]} to {equal[-1]}" in render.page("orthogonal").read_text().split("\n\n")[1]


def test_runs_need_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        studies.main(["run", "--study=mnist", f"--runs={tmp_path / 'file'}"])
    assert f"--runs={tmp_path / 'file'} is no folder" in capsys.readouterr().err


def test_names_of_runs_are_unique():
    runs = {run for study in STUDIES.values() for run in study.rows.values()}
    assert len({run.name for run in runs}) == len(runs)


@pytest.mark.soak
@pytest.mark.parametrize("figure", ["pareto", "curves"])
def test_a_study_from_training_to_page(tmp_path, monkeypatch, figure):
    """Runs a whole study on the embedded digits. A second call does no work, and a changed result changes the page."""
    quick = ("train.steps=20", "certify.n=200", "certify.stop=40")
    rows = {
        "head": Run("head", "configs/digits.py:isrs", quick, "test"),
        "latent": Run("latent", "configs/digits.py", (*quick, "sigma=0.3"), "test"),
    }
    monkeypatch.setitem(STUDIES, "split", Study(figure, rows, page="page"))
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("before\n" + "\n".join(render.markers("split")) + "\nafter\n")
    arguments = ["run", "--study=split", f"--runs={tmp_path / 'runs'}"]
    studies.main([*arguments, "--jobs=2"])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert text.count("| [") == 2
    assert (tmp_path / "page" / "split.png").stat().st_size > 5000
    run = results.load(tmp_path / "page" / "latent")
    assert len(run.table) == 40
    assert run.facts["config"]["sigma"] == 0.3
    assert 0.1 < run.facts["distances"]["other_class"] < 1
    assert results.load(tmp_path / "page" / "head").facts["distances"] == {"same_class": 1.0, "other_class": 1.0}
    assert "sigma=0.3" in run.facts["commands"][0]
    assert str(tmp_path) not in (tmp_path / "page" / "latent" / "card.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(studies, "make", None)
        studies.main(arguments)
    assert page.read_text() == text
    # A changed run under an old name is refused, because the workdir holds the old run; the other runs go on.
    changed = {**rows, "latent": Run("latent", "configs/digits.py", (*quick, "sigma=0.4"), "test")}
    monkeypatch.setitem(STUDIES, "split", Study(figure, changed, page="page"))
    with pytest.raises(UserError, match=r"1 runs failed.*latent: error: .* was trained with sigma=0.3, not 0.4"):
        studies.main(arguments)
    assert page.read_text() == text
    monkeypatch.setitem(STUDIES, "split", Study(figure, rows, page="page"))
    facts = json.loads((tmp_path / "page" / "latent" / "run.json").read_text())
    facts["training"]["test_clean_accuracy"] = 0.1234
    (tmp_path / "page" / "latent" / "run.json").write_text(json.dumps(facts))
    studies.main(["render", "--study=split"])
    assert "| 0.123 |" in page.read_text()


def test_a_run_that_only_decided_radii_shows_no_average_radius():
    run = render.kept_runs("small_heads")["ISRS, low-pass, seed 0"]
    derivation = {**run.certificates["derivation"], "radii": [0.25, 0.5, 0.75]}
    stopped = dataclasses.replace(run, certificates={**run.certificates, "derivation": derivation})
    own, whole = results.cells(stopped), results.cells(run)
    hidden = {"ACR", "p_A above .5, .9, .99"}
    assert {name for name in whole if own[name] != whole[name]} == hidden
    assert {own[name] for name in hidden} == {"-"}
    assert "ACR" in results.card(run)
    assert "ACR" not in results.card(stopped)
