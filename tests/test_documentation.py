"""Every Python block of the pages and docstrings runs; every command line in them names what exists."""

import contextlib
import functools
import io
import pathlib
import re

import jax
import numpy as np
import pytest
from scipy import stats

import lsrs_jax
from lsrs_jax import cli
from lsrs_jax.config import FIELDS
from lsrs_jax.flags import config_from_flags
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing import certified_radius, confidence
from studies import render
from studies.page_figures import number, rows
from support import ROOT, pages, threefry
from support.commands import run

ELSEWHERE = ("start.md", "data.md")  # tests/test_package.py runs their programs, outside of the repository
PROGRAMS = [(page, number) for page in pages.PAGES if page.name not in ELSEWHERE for number, _ in pages.programs(page)]
OUTPUTS = {"lipschitz_report(": r"Lipschitz constant 1\.0000000000", ".program": "channels_last", "print(": r"\d"}
PLACEHOLDER = re.compile(r"[A-Z_]+\d?(:.*)?|.*(…|\.\.\.|\$|PATH|FILE|VALUE|CLASS).*")


@pytest.mark.parametrize(("page", "number"), PROGRAMS, ids=lambda value: str(value).rpartition("/")[2])
def test_a_program_of_a_page_runs(page, number, capsys, monkeypatch, tmp_path):
    program = dict(pages.programs(page))[number]
    for library in ("torch", "equinox"):
        if f"import {library}" in program:
            pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, f"{page.name}, program {number}", "exec"), {"__name__": "__main__"})
    out = capsys.readouterr().out
    for words, pattern in OUTPUTS.items():
        assert words not in program or re.search(pattern, out), words


def test_the_programs_of_docstrings_run(tmp_path):
    found = [text for path in pages.SOURCES for text in pages.docstrings(path)]
    assert not any(">>> " in text for text in found)
    blocks = [block for text in found for block in re.findall(r"::\n\n((?:    .*\n?)+)", text)]
    assert len(blocks) == 1  # of SmoothedClassifier.export: more need their own values here
    weights = np.eye(64, 3, dtype=np.float32)
    exported = lsrs_jax.SmoothedClassifier(lambda z: z @ weights, sigma=0.25).export(tmp_path / "program", (64,))
    values = {"jax": jax, "pathlib": pathlib, "path": exported, "seed": 0, "x": np.eye(1, 64, dtype=np.float32)}
    exec(re.sub("^    ", "", blocks[0], flags=re.M), values)
    assert values["classes"].tolist() == [0]
    assert lsrs_jax.SmoothedClassifier(lambda z: z @ weights, sigma=0.25).predict(values["x"], key=threefry(0)) == [0]


@functools.cache
def options(command):
    """The options of a command of lsrs, from its help."""
    return set(re.findall(r"--[a-z](?:[\w.-]*\w)?", run(cli.COMMANDS[command][0], "--help")))


@functools.cache
def options_of_module(module):
    path = ROOT / module.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    return set(re.findall(r'"(--[a-z][\w-]*)"', path.read_text(encoding="utf-8"))) | {"--help"}


def check_line(words):
    """Raises AssertionError or UserError for a command line that does not fit the code."""
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in rest if "=" not in word} <= set(targets), words
    elif program == "module":
        if rest[0].split(".")[0] in ("benchmarks", "studies"):
            assert {word.partition("=")[0] for word in rest[1:] if word.startswith("--")} <= options_of_module(rest[0])
    elif program != "lsrs":
        assert (ROOT / program).exists(), words
    elif rest and rest[0] not in ("COMMAND", "…", "--help"):
        assert rest[0] in cli.COMMANDS, words
        check_options(rest[0], re.sub(r"[\[\]]", " ", " ".join(rest[1:])).split())


def check_options(command, words):
    flags, config = [word for word in words if word.startswith("--")], []
    for flag in flags:
        name, equals, value = flag.partition("=")
        if name == "--config" or name.startswith("--config."):
            field = name.removeprefix("--config").removeprefix(".")
            assert not field or field in FIELDS or field in ("FIELD", "field"), flag
            if equals and not PLACEHOLDER.fullmatch(value) and field not in ("FIELD", "field"):
                config.append(flag)
        else:
            assert name in options(command), (command, flag)
    if not any(flag.startswith("--config=") for flag in config):
        config.insert(0, "--config=digits")
    config_from_flags(config)


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_the_command_lines_of_a_page_fit_the_code(page):
    for words in pages.command_lines(pages.shell_text(page)):
        check_line(words)


def test_the_command_lines_of_docstrings_fit_the_code():
    texts = [text for path in pages.SOURCES for text in pages.docstrings(path)]
    indented = ["\n".join(re.findall("^  .*", text, re.M)) for text in texts]
    found = [words for words in pages.command_lines(indented) if any(word.startswith("--") for word in words)]
    assert len(found) > 40
    for words in found:
        check_line(words)


@pytest.mark.parametrize(
    "line",
    [
        "lsrs trian --workdir=DIR",
        "python -m lsrs_jax.certify --workdir=DIR --from_counts",
        "python -m lsrs_jax.train --config=digits --config.train.step=10 --workdir=DIR",
        "python -m lsrs_jax.train --config=digit --workdir=DIR",
        "python -m lsrs_jax.train --config=digits --config.train.loss=gauss --workdir=DIR",
        "TFDS_DATA_DIR=... python -m studies run --studdy=split",
        "python -m lsrs_jax.certify --workdir=DIR --config.certify.alpha=2",
        "make tests",
    ],
)
def test_a_command_line_that_does_not_fit_is_found(line):
    (words,) = pages.command_lines([line])
    with pytest.raises((AssertionError, UserError)):
        check_line(words)


def test_files_of_the_documentation_that_the_code_names_exist():
    names = set()
    for folder in ("lsrs_jax", "configs", "studies", "benchmarks", "launch", "tests"):
        for path in sorted(ROOT.glob(f"{folder}/**/*")):
            if path.suffix in (".py", ".sh", ".yaml", ".sbatch"):
                names |= set(re.findall(r"docs/[\w/.-]+\.(?:md|png|txt)", path.read_text(encoding="utf-8")))
    assert len(names) > 10
    assert not [name for name in sorted(names) if not (ROOT / name).exists()]


def test_the_readme_fits_on_a_screen():
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    assert len(words) <= 800


def test_the_site_lists_every_field_and_every_command(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    pytest.importorskip("sphinx")
    import from_code

    with contextlib.redirect_stderr(io.StringIO()):
        fields, commands = "\n".join(from_code.configuration()), "\n".join(from_code.commands())
    assert all(f"| `{name}` |" in fields for name in FIELDS)
    assert all(f"usage: python -m lsrs_jax.{module}" in commands for module, _ in cli.COMMANDS.values())


def test_the_numbers_about_sigma_n_and_alpha_are_what_the_program_computes():
    text = pages.text(ROOT / "docs" / "howto" / "choosing.md")

    def radius(n, share, alpha):
        bound = confidence.lower(round(n * share), n, alpha)
        return f"{certified_radius(bound, 1 - bound, sigma=1.0):.2f} σ" if bound > 0.5 else "abstains"

    for row in rows(text, "r / σ"):
        share, most = stats.norm.cdf(number(row["r / σ"])), number(row["fewest samples, α = 0.001"])
        digits = len(row["share that is needed"].removesuffix(" %").partition(".")[2])
        assert row["share that is needed"] == f"{100 * share:.{digits}f} %"
        assert [0.001 ** (1 / n) >= share for n in (most - 1, most)] == [False, True]
    for row in rows(text, "n", "100 % (the cap)"):
        n = int(number(row.pop("n")))
        assert row == {name: radius(n, number(name.split(" %")[0]) / 100, 0.001) for name in row}
    for row in rows(text, "α", "radius with 99 % of 10,000 samples"):
        alpha, *others = row.values()
        shown = [radius(10_000, 0.99, float(alpha)), radius(10_000, 1, float(alpha)), f"{1000 * float(alpha):g}"]
        assert others == shown
    for row in rows(text, "probability of the leading class"):
        share, *others = row.values()
        chosen = [stats.binom.sf(n0 // 2, n0, number(share.removesuffix(" %")) / 100) for n0 in (10, 100, 1000)]
        assert others == [f"{value:.2f}" for value in chosen]
    measured = {
        run.facts["config"]["sigma"]: run
        for label, run in render.kept_runs("sigma").items()
        if label.startswith("LSRS")
    }
    for row in rows(text, "σ", "r=0"):
        table = measured.pop(float(row.pop("σ"))).table
        assert row == {name: f"{table.certified_accuracy(float(name[2:])):.3f}" for name in row}
    assert not measured
