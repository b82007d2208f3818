"""Figures can be read: in a column of a paper, whatever runs they show."""

import csv
import dataclasses

import numpy as np
import pytest

from lsrs_jax import report
from lsrs_jax.auditing.table import Audit
from lsrs_jax.certification.table import Table
from lsrs_jax.config import config_to_dict, default
from lsrs_jax.reporting import curve, groups, kinds, style
from lsrs_jax.reporting.kinds import Kind
from lsrs_jax.reporting.runs import Run
from lsrs_jax.runtime.errors import UserError
from studies import page_figures, render, separation
from studies.runs import MARGIN, STUDIES
from support.figures import check_readable

LONG = "a network of four orthogonal blocks with Haar strides, trained under attack with consistency regularisation"
METHODS = (kinds.LSRS, kinds.ISRS, kinds.DETERMINISTIC, kinds.UNKNOWN)


def table(seed, images=50, seconds=0.01, scale=0.5):
    rng = np.random.default_rng(seed)
    label = np.arange(images) % 10
    predict = np.where(rng.random(images) < 0.8, label, -1)
    radius = np.where(predict < 0, 0.0, np.minimum(rng.exponential(scale, images), 0.9))
    values = {"radius": radius, "correct": predict == label, "seconds": np.full(images, seconds), "truncated": False}
    return Table(np.arange(images), label, predict, samples=np.full(images, 100), **values)


def runs(count, label=LONG, **fields):
    """Runs of different methods and σ, with costs from microseconds to minutes."""
    return [
        Run(
            f"{label} {number}",
            table(number, seconds=10.0 ** (number % 8 - 5)),
            kind=Kind(METHODS[number % 4], (0.25, 0.5)[number % 2], f"{number}"),
            **fields,
        )
        for number in range(count)
    ]


def audited(run):
    own, zeros = run.table, np.zeros(len(run.table), int)
    distance = np.where(own.correct, own.radius + 0.3, 0.0)
    return dataclasses.replace(
        run, audit=Audit(own.idx, own.label, own.predict, own.radius, own.correct, zeros, zeros, zeros, distance)
    )


@pytest.mark.parametrize("cost", [None, 0.5], ids=["curves", "with cost"])
@pytest.mark.parametrize("count", [1, 3, 5, 8, 17])
def test_a_report_of_runs_with_long_names_can_be_read(monkeypatch, count, cost):
    with style.look():
        check_readable(curve.figure(runs(count), cost_at=cost), monkeypatch)


def test_attacked_runs_envelopes_and_wide_names_can_be_read(monkeypatch):
    wide = runs(3, label="W" * 60 + " " + "é" * 5)
    for found in (list(map(audited, runs(4))), wide, runs(2, label="run")):
        with style.look():
            check_readable(curve.figure(found), monkeypatch)
            check_readable(curve.figure(found, envelope=True), monkeypatch)


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e300])
def test_a_figure_of_odd_radii_can_be_read(monkeypatch, scale):
    found = [
        dataclasses.replace(run, table=dataclasses.replace(run.table, radius=scale * run.table.radius))
        for run in runs(2)
    ]
    with style.look():
        check_readable(curve.figure(found, cost_at=0.5), monkeypatch)


@pytest.mark.parametrize("name", STUDIES)
def test_the_figure_of_a_study_can_be_read(monkeypatch, name):
    found = render.kept_runs(name)
    if not found:
        pytest.skip(f"no certificates of the study {name} are kept")
    with style.look():
        check_readable(render.figure(name, found), monkeypatch)
    labels = {label.rpartition(", seed ")[0] or label for label in found} | set(found)
    assert set(STUDIES[name].drawn) <= labels


def grid_of(pairs):
    """Kept runs in the place of those of the grid, with costs and tables that differ."""
    kept = list(render.kept_runs("small_heads").values())
    found = {}
    for number, (label, run) in enumerate(STUDIES["grid"].rows.items()):
        if any(label.startswith(pair) for pair in pairs):
            source = kept[number % len(kept)]
            costs = {"encoder_flops": 10 * number, "head_flops": 4_000 * 4 ** (number % 5)}
            certificates = source.certificates
            if run.certify == (MARGIN,):
                certificates = {
                    **certificates,
                    "identity": {**certificates["identity"], "certificate": "deterministic"},
                }
            facts = {**source.facts, "cost": costs}
            found[label] = dataclasses.replace(source, facts=facts, certificates=certificates, table=table(number, 200))
    return found


@pytest.mark.parametrize("pairs", [[""], ["low-pass, 3", "learned; MLP"]], ids=["whole", "a part"])
def test_the_figure_of_a_grid_can_be_read(monkeypatch, pairs):
    found = grid_of(pairs)
    with style.look():
        figure = render.grid(found)
        check_readable(figure, monkeypatch)
    drawn = np.concatenate([line.get_xydata() for line in figure.axes[0].lines if len(line.get_xydata())])
    for run in found.values():
        samples = run.facts["decided"]["samples"] if run.smoothed else 1
        x = (run.cost.encoder + samples * run.cost.head) / 1e6
        assert np.isclose(drawn, [x, run.table.certified_accuracy(0.5)]).all(axis=1).any()


def test_the_table_of_a_grid_compares_learned_encoders_with_the_best_other_over_common_seeds():
    found = grid_of([""])
    del found["Haar; linear, seed 1"], found["Haar; MLP, 64, seed 0"], found["Haar; MLP, 64, seed 1"]
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in render.gains(found).splitlines())
    rows = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert [row["seeds"] for row in rows.values()] == ["0", "0, 1", "0, 1", "0, 1", "0, 1, 2"]
    assert rows["MLP, 64"]["Haar"] == "-"
    for head, row in rows.items():
        means = {}
        for encoder in header[2:-1]:
            pair = [found.get(f"{encoder}; {head}, seed {seed}") for seed in row["seeds"].split(", ")]
            if None not in pair:
                means[encoder] = np.mean([run.table.certified_accuracy(0.5) for run in pair])
                assert row[encoder] == f"{means[encoder]:.3f}"
        own = means.pop("learned")
        best = max(means, key=means.get)
        assert abs(float(row[header[-1]].split()[0]) - (own - means[best])) < 0.00051
        assert row[header[-1]].endswith(f"), {best}")


def test_the_figure_of_the_separation_can_be_read(monkeypatch):
    with style.look():
        check_readable(separation.figure(dict.fromkeys(separation.MEASURED, 0.49), 0.14), monkeypatch)


@pytest.mark.parametrize("name", page_figures.FIGURES)
def test_the_figure_of_the_tables_of_a_page_can_be_read(monkeypatch, name):
    text = render.page(name).read_text()
    with style.look():
        check_readable(page_figures.FIGURES[name](text), monkeypatch)
    with pytest.raises(UserError, match="the page has no table with the columns"):
        page_figures.FIGURES[name](text.replace("|---|", "").replace("| loop |", "").replace("| variant |", ""))


def test_more_than_eight_runs_are_drawn_as_means_and_ranges_over_seeds():
    found = [
        Run(f"{name}, seed {seed}", table(seed, scale=scale), kind=Kind(method, 0.25, name))
        for name, method, scale in (
            ("LSRS", kinds.LSRS, 0.2),
            ("same network", kinds.ISRS, 0.4),
            ("c", kinds.ISRS, 0.6),
        )
        for seed in range(3)
    ]
    assert [group.label for group in groups.grouped(found[:8])[0]] == [run.label for run in found[:8]]
    drawn, note = groups.grouped(found)
    assert [(group.label, len(group.runs)) for group in drawn] == [("LSRS", 3), ("same network", 3), ("c", 3)]
    assert note == "lines: means over seeds; bands: lowest to highest run"
    radii = np.array([0.0, 0.3, 0.9, 2.0])
    each = np.array([[run.table.certified_accuracy(radius) for radius in radii] for run in found[3:6]])
    for own, expected in zip(
        drawn[1].accuracy(radii), (each.mean(axis=0), each.min(axis=0), each.max(axis=0)), strict=True
    ):
        np.testing.assert_allclose(own, expected, rtol=1e-12)
    twins = [dataclasses.replace(run, label=f"run {number}") for number, run in enumerate(found)]
    assert [group.label for group in groups.grouped(twins)[0]] == [f"run {number} and others" for number in (0, 3, 6)]
    unknown, note = groups.grouped([dataclasses.replace(run, kind=Kind()) for run in found])
    assert [(group.label, len(group.runs)) for group in unknown] == [("method not known", 9)]


def test_an_envelope_is_the_best_of_the_runs_of_one_configuration_and_says_so(tmp_path):
    found = [
        Run(f"{name}, σ {sigma}", table(number, scale=sigma), kind=Kind(name, sigma, name))
        for number, (name, sigma) in enumerate((name, s) for name in ("LSRS", "ISRS") for s in (0.12, 0.25, 0.5))
    ]
    drawn, note = groups.grouped(found, envelope=True)
    assert [group.label for group in drawn] == ["LSRS", "ISRS"]
    assert "no one classifier has it" in note
    for radius in (0.0, 0.1, 0.5, 0.89):
        best = max(run.table.certified_accuracy(radius) for run in found[:3])
        assert drawn[0].accuracy(np.array([radius]))[0] == best


def test_runs_are_of_one_kind_if_only_seeds_differ():
    def kind(noise="latent", certificate="smoothed", encoder="shallow", **changes):
        config = config_to_dict(default()) | changes
        config["model"] |= {"noise": noise, "encoder": encoder}
        model = config["model"] | {"head": "mlp"}
        identity = {"certificate": certificate, "sigma": config["sigma"], "model": model}
        return kinds.kind_of({"identity": identity, "config": config})

    first = kind()
    assert (first.method, first.sigma) == (kinds.LSRS, 0.5)
    assert kind(seed=7) == first
    assert kind(sigma=0.25) != first
    assert kind(sigma=0.25).family == first.family
    assert kind(train=config_to_dict(default())["train"] | {"steps": 7}).family != first.family
    assert kind(noise="input").method == kind(encoder="identity").method == kinds.ISRS
    assert (kind(certificate="deterministic").method, kind(certificate="deterministic").sigma) == (
        "deterministic",
        None,
    )
    for foreign in ({}, {"identity": []}, {"identity": {"model": {}, "sigma": "x"}, "config": {"seed": 1}}):
        assert not kinds.kind_of(foreign).family


def test_the_tables_for_a_paper_and_for_a_program_hold_the_numbers(tmp_path):
    header = "idx\tlabel\tpredict\tradius\tcorrect\ttime"
    for name, radii in (("a", (0.1, 0.6, 0.8)), ("b", (0.3, 0.4, 0.5))):
        lines = [header, *(f"{i}\t1\t1\t{radius}\t1\t0.000050" for i, radius in enumerate(radii))]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    report.run([f"50 % & x_1={tmp_path / 'a'}", f"σ={tmp_path / 'b'}", f"--out={tmp_path}", "--radii=0,0.5", "--cost"])
    latex = (tmp_path / "table.tex").read_text().splitlines()
    rules = [line for line in latex if line.endswith("rule")]
    assert rules == ["\\toprule", "\\midrule", "\\bottomrule"]
    rows = [line for line in latex if line.endswith(r"\\")]
    assert [row.count(" & ") for row in rows] == [5, 5, 5]
    assert rows[1] == r"50 \% \& x\_1 & 100.0 & 66.7 & 0.500 & ? & 50 $\mu$s \\"
    assert rows[2].startswith(r"$\sigma$ & ")
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert first["run"] == "50 % & x_1"
    assert float(first["certified accuracy at r=0.5"]) == 2 / 3
    assert float(second["ACR"]) == pytest.approx(0.4, rel=1e-15)
    assert float(second["seconds per image"]) == 50e-6
    assert (first["sigma"], first["alpha"], first["n"]) == ("", "", "")
    assert (tmp_path / "curve.pdf").read_bytes().startswith(b"%PDF")
    assert ">50 % &amp; x_1<" in (tmp_path / "curve.svg").read_text()
    assert "compare times only if they were measured on one machine" in (tmp_path / "report.md").read_text()
