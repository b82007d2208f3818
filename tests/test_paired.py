"""The comparison of runs with published logs, image by image."""

import json
import re

import numpy as np
import pytest
from scipy import stats

from lsrs_jax.certification.table import read_table
from lsrs_jax.runtime.errors import UserError
from studies import paired, render

COLUMNS = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
PAGE = render.RESULTS / "cifar10.md"


def write(path, labels, predictions, radii, indices):
    rows = zip(indices, labels, predictions, radii, strict=True)
    path.parent.mkdir(exist_ok=True)
    path.write_text(COLUMNS + "".join(f"{i}\t{y}\t{p}\t{r!r}\t{int(p == y)}\t1.0\n" for i, y, p, r in rows))
    return path


@pytest.fixture
def tables(tmp_path):
    """A log of 60 images and a run of 40, which have 30 in common, in different orders."""
    rng = np.random.default_rng(0)
    labels, found = rng.integers(0, 3, 100), []
    for name, indices in (("log", np.arange(60)), ("run/certificates.tsv", rng.permutation(np.arange(30, 70)))):
        radii, wrong = rng.uniform(0, 1, len(indices)).round(3).tolist(), rng.random(len(indices)) < 0.2
        own = labels[indices]
        found.append(write(tmp_path / name, own.tolist(), np.where(wrong, (own + 1) % 3, own).tolist(), radii, indices))
    (tmp_path / "run" / "certificates.json").write_text(
        json.dumps({"identity": {"data": {"name": "digits", "split": "test"}}})
    )
    return found


def test_differences_have_the_paired_standard_error_and_mcnemars_counts(tables):
    log, run = map(read_table, tables)
    radius = {idx: np.where(run.correct, run.radius, 0)[row] for row, idx in enumerate(run.idx.tolist())}
    shared = [row for row, idx in enumerate(log.idx.tolist()) if idx in radius]
    theirs = np.where(log.correct, log.radius, 0)[shared]
    ours = np.array([radius[idx] for idx in log.idx[shared].tolist()])
    test, found = stats.ttest_rel(ours, theirs), paired.cells(log, run, [0.5])
    expected = paired.difference(theirs, ours)
    assert len(shared) == 30
    assert expected.mean / expected.error == pytest.approx(test.statistic)
    assert found["ACR: difference (se)"] == f"{expected.mean:+.3f} ({expected.error:.3f})"
    only = int(((ours >= 0.5) & (theirs < 0.5)).sum()), int(((ours < 0.5) & (theirs >= 0.5)).sum())
    assert min(only) > 0
    assert found["r=0.5: run only, log only; p"].startswith(f"{only[0]}, {only[1]}; ")


def test_mcnemars_test_is_exact():
    log, run = np.array([True] * 8 + [False] * 3), np.array([False] * 8 + [True] + [False] * 2)
    found = paired.difference(log, run)
    assert (found.run_only, found.log_only) == (1, 8)
    assert found.p_value == pytest.approx(2 * (1 + 9) / 2**9)  # P[at most 1 of 9 fair coins], twice
    assert paired.difference(run, run).p_value == 1


def test_other_labels_and_too_few_images_are_refused(tables, tmp_path):
    other = tables[0].read_text().replace("\n45\t", "\n145\t")
    (tmp_path / "moved").write_text(re.sub(r"\n46\t(\d)\t", lambda m: f"\n46\t{(int(m[1]) + 1) % 3}\t", other))
    for path, why in ((tmp_path / "moved", "contradicts|image 46 has another label"), (None, "give at least one log")):
        with pytest.raises(UserError, match=why):
            paired.main([str(tables[1].parent), *([str(path)] if path else [])])
    alone = write(tmp_path / "alone", [1, 1], [1, 1], [0.1, 0.2], [300, 301])
    with pytest.raises(UserError, match="0 images in common"):
        paired.main([str(tables[1].parent), str(alone)])


def test_the_order_of_the_exact_images_is_that_of_the_data(real_data):
    data = pytest.importorskip("tensorflow_datasets").data_source(
        "cifar10", split="test_exact", data_dir=real_data, download=False
    )
    ids = [data[index]["id"].decode() for index in range(0, len(data), 50)]
    order = paired.ORDER.read_text().split()
    assert sorted(map(int, order)) == list(range(1000))
    assert [f"test_{int(position):05d}" for position in order[::50]] == ids


def test_the_page_shows_what_the_command_prints(reference, monkeypatch, capsys):
    section = PAGE.read_text().split("## Beside published logs")[1].split("\n## ")[0]
    command = re.search(r"```\n(.*?)```", section, re.DOTALL)[1].replace("\\\n", " ")
    words = [word.replace("LOGS", str(reference)) for word in re.findall(r'(?:[^\s"]|"[^"]*")+', command)]
    assert words[:3] == ["python", "-m", "studies.paired"]
    monkeypatch.chdir(render.ROOT)
    paired.main([word.replace('"', "") for word in words[3:]])
    assert capsys.readouterr().out.strip() in section
