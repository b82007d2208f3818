"""verify_certificates.py, which shares no code with lsrs_jax, agrees with it and finds forgeries."""

import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
from scipy import stats

import verify_certificates
from lsrs_jax.certification import from_counts, smoothed, store, verify
from lsrs_jax.certification.identity import Identity
from lsrs_jax.config import FIELDS, default
from lsrs_jax.layers.lipschitz import LayerBound, LipschitzReport
from lsrs_jax.runtime.documents import digest, plain
from lsrs_jax.smoothing import confidence
from lsrs_jax.smoothing.arithmetic import make_arithmetic
from lsrs_jax.smoothing.counts import Row
from support import ROOT, samples
from support.commands import fingerprint, run
from support.forging import edit, reseal, rewrite
from support.hostile import STRANGE, changed, places, sealed

PROGRAM = ROOT / "verify_certificates.py"
IMAGES = 30
LAYERS = (LayerBound("0 Dense", 1.25, 0.5, "SVD", 1e-15, 0.0), LayerBound("1 Dense", 1.0 + 1e-11, 1.0, "SVD"))
REPORT = LipschitzReport(LAYERS, (2, 2, 1), (4,))


def settings(**fields):
    """The configuration of a small folder; `fields` are those of certify."""
    config = default()
    config.certify.update({"n0": 20, "n": 4000, "tile": (2, 16), **fields})
    return config


def identity_of(config, classes, **facts):
    model = plain(config.model.to_dict()) | {"input_shape": [2, 2, 1]}
    data = {"name": "digits", "version": "1", "split": "test", "digest": "1" * 64}
    checkpoint = {"step": 3, "digest": "0" * 64}
    kind = config.certify.certificate
    return Identity(kind, classes=classes, checkpoint=checkpoint, data=data, model=model, platform="cpu cpu", **facts)


def random_rows(schedule, slack, classes, images, rng):
    """Rows of images with very different probabilities; each image stops at a random look."""
    for idx in range(images):
        p = rng.dirichlet(np.full(classes, rng.choice([0.1, 0.5, 2.0])))
        p[rng.integers(classes)] += rng.choice([0.0, 1.0, 100.0])
        p, reached = p / p.sum(), rng.integers(1, len(schedule.looks) + 1)
        for stream, stops in schedule.stops.items():
            stops = stops[:reached]
            for start, stop in zip((0, *stops), stops, strict=False):
                n = min(stop * schedule.samples, schedule.totals[stream]) - start * schedule.samples
                yield Row(idx, 1, slack, stream, start, stop, rng.multinomial(n, p), 0.125)


def build(home, classes=5, begun=2, rule=2, draw=0, images=IMAGES, **fields):
    """Writes a folder of random counts, and the certificates that lsrs_jax derives from them."""
    config = settings(**fields)
    arithmetic = make_arithmetic(config.certify.arithmetic, config.sigma)
    facts = {"images": images, "format": 2} if begun == 2 else {}
    identity = identity_of(config, classes, **facts).sampled(config, arithmetic, REPORT.output_shape)
    certification = smoothed.Certification(home, config, identity, REPORT, rule=rule)
    certification.record = [store.new_session(images)]
    slack = float(arithmetic.slack(np.zeros((1, *REPORT.output_shape)))[0]) * (1 + 1e-3)
    with certification.open_ledger() as counts:
        counts.append(random_rows(certification.schedule, slack, classes, images, np.random.default_rng(draw)))
        certification.derive(counts, counts.images)
    if rule == 1:
        change(home, lambda document: document.update(format=1))
    return home


def change(folder, how):
    """Changes the content of certificates.json and renews its digest."""
    path = folder / "certificates.json"
    document = json.loads(path.read_text())
    how(document)
    path.write_text(json.dumps(document | {"digest": digest(document)}))


def answer(folder, capsys):
    """(exit code, what was printed)."""
    capsys.readouterr()
    code = verify_certificates.main([str(folder)])
    out, err = capsys.readouterr()
    assert (err.count("\n"), code) in ((1, 2), (0, 0), (0, 3)), (code, err)
    return code, err or out


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return build(tmp_path_factory.mktemp("folder") / "certify" / "default", schedule="staged", bound="multiclass")


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def test_the_program_stands_alone(copy, tmp_path):
    text = PROGRAM.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert max(map(len, text.splitlines())) <= 120
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    assert imported <= {"numpy", "scipy"} | set(sys.stdlib_module_names)
    alone = shutil.copy(PROGRAM, tmp_path / "elsewhere.py")
    command = [sys.executable, "-I", str(alone), str(copy)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"{IMAGES} certificates follow from " in ended.stdout
    assert subprocess.run(command[:-1], capture_output=True, text=True).returncode == 2


GRID = [
    (bound, schedule, arithmetic, classes)
    for bound in ("binary", "multiclass")
    for schedule in ("fixed", "staged", "anytime")
    for arithmetic, classes in (("sound", 3), ("sound", 40), ("float32", 10))
]


@pytest.mark.parametrize(("bound", "schedule", "arithmetic", "classes"), GRID)
def test_it_derives_what_the_package_derives(bound, schedule, arithmetic, classes, tmp_path, capsys, monkeypatch):
    folder = build(tmp_path / "x", classes, bound=bound, schedule=schedule, arithmetic=arithmetic, draw=classes)
    derived, derive = [], verify_certificates.derive
    monkeypatch.setattr(verify_certificates, "derive", lambda *given: iter(derived.extend(derive(*given)) or derived))
    before = fingerprint(folder)
    code, out = answer(folder, capsys)
    assert (code, fingerprint(folder)) == (0, before), out
    table = [dict(zip(names, row, strict=True)) for names, *rows in [lines(folder)] for row in rows]
    certified = [row["predict"] != "-1" for row in table]
    assert 5 < sum(certified) < IMAGES
    for row, (candidate, radius, p_a, p_b) in zip(table, derived, strict=True):
        assert int(row["predict"]) == (candidate if radius > 0 else -1)
        assert float(row["radius"]) == pytest.approx(radius, rel=1e-10, abs=1e-13)
        assert float(row["p_a_lower"]) == pytest.approx(p_a, rel=1e-12, abs=1e-14)
        assert float(row["p_b_upper"]) == pytest.approx(p_b, rel=1e-12, abs=1e-14)


def lines(folder):
    return [line.split("\t") for line in (folder / "certificates.tsv").read_text().splitlines()]


@pytest.mark.parametrize("rule", [1, 2])
def test_folders_of_format_1_are_derived_and_what_is_not_known_is_said(rule, tmp_path, capsys):
    folder = build(tmp_path / "x", begun=1, rule=rule, schedule="staged", bound="multiclass")
    assert "run" not in (folder / "votes.0.tsv").read_text().split("\n")[0]
    verify.run(folder)
    code, out = answer(folder, capsys)
    assert code == 3
    assert "in format 1 nobody can: that no image of the split is missing; the run" in out


def test_what_the_commands_write_is_accepted(trained, certified, tmp_path, capsys):
    before = fingerprint(trained)
    code, out = answer(certified.parent, capsys)
    assert code == 0, out
    assert "40 certificates follow from 44000 samples" in out
    assert fingerprint(trained) == before
    copy = shutil.copytree(trained, tmp_path / "copy")
    flags = ["--config.certify.schedule=staged", "--config.certify.bound=multiclass", "--config.certify.n=1500"]
    run("certify", f"--workdir={copy}", *flags, "--config.certify.name=staged")
    assert answer(copy / "certify" / "staged", capsys)[0] == 0
    shutil.copytree(samples.certified(tmp_path / "samples")[0], tmp_path / "again")
    code, out = answer(tmp_path / "again", capsys)
    assert (code, "3 of 5 images are missing" in out) == (3, True)


PUBLISHED = sorted((ROOT / "docs" / "results").rglob("certificates.json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_every_published_folder_gets_the_answer_that_its_files_allow(path, capsys):
    folder = path.parent
    code, out = answer(folder, capsys)
    if list(folder.glob("votes.*.tsv")):
        assert (code, "0 of" in out, "in format 1 nobody can" in out) == (3, True, True), out
    elif code == 0:
        assert json.loads(path.read_text())["identity"]["certificate"] == "deterministic"
        assert "certificates are unchanged; they are deterministic, without samples" in out
    else:  # published without samples, which are large
        assert (code, "unsealed" in out or "['votes.0.tsv'] is missing" in out) == (2, True), out


def test_deterministic_certificates_are_compared_with_their_digests(tmp_path, capsys):
    config = settings(certificate="deterministic")
    identity = identity_of(config, 3, images=3, format=2)
    columns = {"idx": np.arange(3), "label": np.array([0, 1, 1]), "predict": np.array([0, 1, 2]), "time": np.ones(3)}
    columns |= {"radius": np.array([0.5, 0.25, 0.125]), "n": 0, "lipschitz": REPORT.constant, "slack": np.ones(3)}
    text = store.format_columns(columns)
    store.write(tmp_path, config, identity, REPORT, [], {"bound": "margin"}, text)
    code, out = answer(tmp_path, capsys)
    assert (code, "deterministic, without samples" in out) == (0, True), out
    edit(tmp_path / "certificates.tsv", 3, "correct", "0")
    assert "it has changed" in answer(tmp_path, capsys)[1]
    change(tmp_path, lambda document: document["derivation"].update(certificates=table_digest(tmp_path)))
    assert "correct is 0, the counts give True" in answer(tmp_path, capsys)[1]


def table_digest(folder):
    return verify_certificates.sha256((folder / "certificates.tsv").read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------ completeness
def test_missing_images_give_exit_code_3(copy, capsys):
    table = copy / "certificates.tsv"
    text = table.read_text().splitlines(keepends=True)
    table.write_text("".join(text[:4] + text[6:]))
    reseal(copy)
    code, out = answer(copy, capsys)
    assert (code, f"2 of {IMAGES} images are missing" in out) == (3, True), out
    change(copy, lambda document: document["config"]["certify"].update(start=6, step=2))
    code, out = answer(copy, capsys)
    wanted = len(range(6, IMAGES, 2))
    expected = (
        f"0 of {wanted} images are missing, of range(6, {IMAGES}, 2); {IMAGES - 2 - wanted} certificates of others"
    )
    assert (code, expected in out) == (3, True), out


def test_a_torn_line_and_later_rows_are_allowed_and_rows_may_lie_in_several_files(copy, capsys):
    path, other = copy / "votes.0.tsv", copy / "votes.1.tsv"
    header, *rows = path.read_text().splitlines(keepends=True)
    path.write_bytes(path.read_bytes() + b"3\t1\t0.00")
    assert answer(copy, capsys)[0] == 0
    other.write_text(header[:20])  # a process that was killed in its first write
    assert answer(copy, capsys)[0] == 0
    shuffled = random.Random(0).sample(rows, len(rows))
    path.write_text(header + "".join(shuffled[::2]))
    other.write_text(header + "".join(shuffled[1::2]))
    reseal(copy)
    assert answer(copy, capsys)[0] == 0
    # Rows of further images that follow the recorded part are counted, and need no line in the table.
    table = (copy / "certificates.tsv").read_text().splitlines(keepends=True)
    (copy / "certificates.tsv").write_text("".join(table[:-1]))
    last = [row for row in rows if row.startswith(f"{IMAGES - 1}\t")]
    path.write_text(header + "".join(row for row in rows if row not in last))
    other.unlink()
    change(copy, lambda document: document["derivation"].update(votes={}))
    reseal(copy)
    path.write_text(path.read_text() + "".join(last))
    assert answer(copy, capsys)[0] == 3
    other.write_text("something else\n")
    assert "votes.1.tsv: its first line is not" in answer(copy, capsys)[1]


# --------------------------------------------------------------------------------------------------------- forgeries
def test_one_changed_digit_is_found_in_every_file(copy, capsys):
    rng = random.Random(0)
    for name in ("certificates.tsv", "certificates.json", "votes.0.tsv"):
        text = (copy / name).read_text()
        digits = [i for i, character in enumerate(text) if character.isdigit()]
        for position in [digits[0], digits[-1], *rng.sample(digits, 10)]:
            other = rng.choice([digit for digit in "0123456789" if digit != text[position]])
            (copy / name).write_text(text[:position] + other + text[position + 1 :])
            code, out = answer(copy, capsys)
            assert (code, name in out) == (2, True), (out, text[position - 20 : position + 20])
        (copy / name).write_text(text)
    assert answer(copy, capsys)[0] == 0


CELLS = {"label": "2", "predict": "4", "correct": "0", "time": "9.125000", "n": "999", "lipschitz": "1.0"}
CELLS |= {"p_a_lower": "0.9999", "p_b_upper": "1e-05", "slack": "0.0", "abstain": "1", "idx": "77"}


@pytest.mark.parametrize("column", CELLS)
def test_a_changed_cell_of_the_table_is_found_under_new_digests(copy, column, capsys):
    names, *rows = lines(copy)
    row = next(i for i, row in enumerate(rows) if row[names.index("predict")] == "1")
    edit(copy / "certificates.tsv", row + 2, column, CELLS[column])
    if column in ("label", "predict"):
        edit(copy / "certificates.tsv", row + 2, "correct", "0")
    reseal(copy)
    code, out = answer(copy, capsys)
    assert (code, "certificates.tsv" in out) == (2, True), out
    assert column in out or column == "idx", out


FACTORS = [(1 + 3e-9, False), (2.0, False), (1 - 1e-5, False), (0.0, False), (1 + 3e-10, True), (1 - 1e-8, True)]


@pytest.mark.parametrize(("factor", "accepted"), FACTORS)
def test_radii_are_compared_with_a_small_tolerance(copy, factor, accepted, capsys):
    names, *rows = lines(copy)
    for line, row in enumerate(rows, start=2):
        radius = float(row[names.index("radius")])
        edit(copy / "certificates.tsv", line, "radius", repr(factor * radius))
    reseal(copy)
    code, out = answer(copy, capsys)
    assert (code == 0) == accepted, out
    assert accepted or "radius is" in out


def constant(document):
    document["lipschitz"]["constant"] /= 2


def both_settings(name, value):
    def how(document):
        document["config"]["certify"][name] = value
        document["derivation" if name in ("alpha", "bound") else "identity"][name] = value

    return how


def deterministic(document):
    document["identity"]["certificate"] = document["config"]["certify"]["certificate"] = "deterministic"


DOCUMENTS = {
    "half the Lipschitz constant": (constant, "is not the product of the layers"),
    "half a layer": (lambda d: d["lipschitz"]["layers"][0].update(sigma_max=0.5), "is not the product of the layers"),
    "a layer that is no number": (lambda d: d["lipschitz"]["layers"][0].update(sigma_max="1"), "TypeError"),
    "a larger alpha": (both_settings("alpha", 0.5), "the counts give"),
    "the alpha of the derivation alone": (lambda d: d["derivation"].update(alpha=0.5), "its alpha is 0.5"),
    "another bound": (both_settings("bound", "binary"), "the counts give"),
    "an unknown bound": (both_settings("bound", "none"), "unknown schedule"),
    "a larger sigma": (lambda d: d["identity"].update(sigma=1.0), "its sigma is 1.0"),
    "a larger sigma of the noise": (lambda d: d["identity"]["arithmetic"].update(sigma=1.0), "its arithmetic is"),
    "no tau": (lambda d: d["identity"]["arithmetic"].update(tau=0.0), "its arithmetic is"),
    "a finer grid": (lambda d: d["identity"]["arithmetic"].update(spacing=2.0**-20), "its arithmetic is"),
    "a smaller latent": (lambda d: d["lipschitz"].update(output_shape=[1]), "its arithmetic is"),
    "another arithmetic": (lambda d: d["config"]["certify"].update(arithmetic="float32"), "its arithmetic is"),
    "one look": (lambda d: d["identity"].update(stages=[4000]), "its stages is"),
    "the other schedule": (both_settings("schedule", "fixed"), "its stages is"),
    "more samples": (both_settings("n", 5000), "its stages is"),
    "another seed": (lambda d: d["identity"].update(seed=5), "its seed is 5"),
    "another seed in the configuration": (lambda d: d["config"]["certify"].update(seed=5), "the configuration gives 5"),
    "one class": (lambda d: d["identity"].update(classes=1), "out of range"),
    "fewer classes": (lambda d: d["identity"].update(classes=4), "IndexError"),
    "deterministic": (deterministic, "deterministic certificates have no ledger"),
    "two kinds": (lambda d: d["identity"].update(certificate="deterministic"), "differ in kind"),
    "a newer format": (lambda d: d.update(format=3), "its format is 3"),
    "an older format": (lambda d: d.update(format=1), "begun in 2"),
    "no number of images": (lambda d: d["identity"].pop("images"), "how many images the split has"),
    "no table": (lambda d: d.update(derivation=None), "no certificates yet"),
    "no ledger": (lambda d: d["derivation"].update(votes={}), "is missing"),
    "another path": (lambda d: d["derivation"]["votes"].update({"../votes.0.tsv": {}}), "is missing"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_changed_document_is_found_under_new_digests(copy, name, capsys):
    how, why = DOCUMENTS[name]
    change(copy, how)
    if json.loads((copy / "certificates.json").read_text())["derivation"] and "ledger" not in name:
        reseal(copy)
    code, out = answer(copy, capsys)
    assert (code, why in out) == (2, True), out


def test_documents_that_two_readers_may_understand_differently_are_refused(copy, capsys):
    path = copy / "certificates.json"
    text = path.read_text()
    document = json.loads(text)
    path.write_text(text.replace('"bound":', '"alpha": 0.5, "bound":'))
    assert "a field stands twice" in answer(copy, capsys)[1]
    path.write_text(json.dumps(document | {"record": [float("nan")]}))
    assert "NaN is no number" in answer(copy, capsys)[1]
    del document["digest"]
    path.write_text(json.dumps(document))
    assert "unsealed" in answer(copy, capsys)[1]


def test_smaller_slack_is_found_even_if_all_radii_agree(copy, capsys):
    rows = (copy / "votes.0.tsv").read_text().count("\n")
    for line in range(2, rows + 1):
        rewrite(copy / "votes.0.tsv", line, lambda fields: [*fields[:2], "1e-07", *fields[3:]])
    for line in range(2, IMAGES + 2):
        edit(copy / "certificates.tsv", line, "slack", "1e-07")
    reseal(copy)
    assert "its slack 1e-07 is below 6.1" in answer(copy, capsys)[1]


def test_a_consistent_smaller_constant_needs_the_weights(copy, capsys):
    """The program says that it does not check the layers; `certify --verify` compares them with the weights."""
    layers = (LayerBound("0 Dense", 0.625, 0.5, "SVD", 1e-15, 0.0), LAYERS[1])
    report = LipschitzReport(layers, REPORT.input_shape, REPORT.output_shape)
    change(copy, lambda document: document.update(lipschitz=report.to_dict()))
    assert "radius is" in answer(copy, capsys)[1]
    stored = store.read(copy / "certificates.json")
    from_counts.derive(copy, stored.settings)
    code, out = answer(copy, capsys)
    assert (code, "not checked: that the network gives them" in out) == (0, True)


def first_line(text, stream, count=1):
    """The numbers of the first `count` lines of the first image with at least two rows of a stream."""
    found = {}
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split("\t")
        if number > 1 and fields[3] == stream:
            found.setdefault(fields[0], []).append(number)
    return next(numbers for numbers in found.values() if len(numbers) >= count)[:count]


def merged(rows, a, b):
    """Joins two rows of the same image to one that reaches over a look."""
    one, two = rows[a - 1].split("\t"), rows[b - 1].split("\t")
    counts = {}
    for pair in f"{one[6]},{two[6]}".split(","):
        class_, number = map(int, pair.split(":"))
        counts[class_] = counts.get(class_, 0) + number
    one[5], one[6] = two[5], ",".join(f"{class_}:{number}" for class_, number in sorted(counts.items()))
    rows[a - 1] = with_crc("\t".join(one[:-1]))
    del rows[b - 1]


def with_crc(content):
    return f"{content}\t{zlib.crc32(content.encode()):08x}"


def moved(rows, a):
    fields = rows[a - 1].split("\t")[:-1]
    rows[a - 1] = with_crc("\t".join(["29" if fields[0] != "29" else "28", *fields[1:]]))


def replaced(column, value):
    def how(rows, a):
        fields = rows[a - 1].split("\t")[:-1]
        fields[column] = value(fields[column]) if callable(value) else value
        rows[a - 1] = with_crc("\t".join(fields))

    return how


def more_of(pairs):
    class_, _, count = pairs.partition(",")[0].partition(":")
    return ",".join([f"{class_}:{int(count) + 1}", *pairs.split(",")[1:]])


LEDGERS = {
    "a row twice": ("estimation", 1, lambda rows, a: rows.append(rows[a - 1]), "do not follow"),
    "a row of the selection twice": ("selection", 1, lambda rows, a: rows.append(rows[a - 1]), "do not follow"),
    "a row less": ("estimation", 2, lambda rows, a, b: rows.pop(a - 1), "do not follow"),
    "no selection": ("selection", 1, lambda rows, a: rows.pop(a - 1), "before the selection is complete"),
    "a row of another image": ("estimation", 1, moved, "do not follow|label or slack"),
    "a row over a look": ("estimation", 2, merged, "reach over the look at"),
    "one sample more": ("estimation", 1, replaced(6, more_of), "samples, where"),
    "a class too many": ("estimation", 1, replaced(6, lambda pairs: re.sub(r"^\d+", "9", pairs)), "IndexError|bad"),
    "a class twice": ("estimation", 1, replaced(6, lambda pairs: f"{pairs},0:1,0:1"), "bad counts"),
    "a negative count": ("estimation", 1, replaced(6, "0:-5,1:5"), "is no number"),
    "another purpose": ("estimation", 1, replaced(3, "selection"), "do not follow"),
    "an unknown purpose": ("estimation", 1, replaced(3, "prediction"), "unknown purpose"),
    "another label": ("estimation", 1, replaced(1, "2"), "label or slack changes"),
    "an infinite slack": ("estimation", 1, replaced(2, "inf"), "is no number"),
    "too many blocks": ("estimation", 1, replaced(5, "100000"), "do not follow"),
    "a changed checksum": ("estimation", 1, lambda rows, a: rows.__setitem__(a - 1, rows[a - 1] + "0"), "checksum"),
}


@pytest.mark.parametrize("name", LEDGERS)
@pytest.mark.parametrize("begun", [1, 2])
def test_a_changed_ledger_is_found_under_new_digests(begun, name, original, tmp_path, capsys):
    folder = tmp_path / "x"
    if begun == 1:
        build(folder, begun=1, schedule="staged", bound="multiclass")
    else:
        shutil.copytree(original, folder)
    stream, count, how, why = LEDGERS[name]
    path = folder / "votes.0.tsv"
    rows = path.read_text().splitlines()
    how(rows, *first_line(path.read_text(), stream, count))
    path.write_text("\n".join(rows) + "\n")
    if name != "a changed checksum":
        reseal(folder)
    else:
        content = path.read_bytes()
        recorded = {"bytes": len(content), "sha256": verify_certificates.sha256(content).hexdigest()}
        change(folder, lambda document: document["derivation"].update(votes={"votes.0.tsv": recorded}))
    code, out = answer(folder, capsys)
    assert (code, bool(re.search(why, out))) == (2, True), out
    assert "votes.0.tsv line " in out


def test_rows_of_another_run_are_found(copy, tmp_path, capsys):
    other = build(tmp_path / "other", schedule="staged", bound="multiclass", head_dtype="bfloat16", images=31)
    later = [row for row in (other / "votes.0.tsv").read_text().splitlines(keepends=True) if row.startswith("30\t")]
    path = copy / "votes.0.tsv"
    path.write_text(path.read_text() + "".join(later))
    code, out = answer(copy, capsys)
    assert (code, "it names the run" in out) == (2, True), out
    old = build(tmp_path / "old", begun=1, schedule="staged", bound="multiclass")
    path.write_text(path.read_text().removesuffix("".join(later)))
    assert answer(copy, capsys)[0] == 0
    shutil.copy(old / "votes.0.tsv", copy / "votes.1.tsv")
    assert "votes.1.tsv: its first line is not" in answer(copy, capsys)[1]


def test_damaged_files_give_one_line_and_never_a_traceback(copy, capsys):
    document = json.loads((copy / "certificates.json").read_text())
    kept = {path: path.read_bytes() for path in sorted(copy.iterdir())}
    rng = random.Random(0)
    for path, content in kept.items():
        for damaged in (b"", b"\xff\xfe", content[:100], b"[" * 100_000, content.replace(b"\t", b" ")):
            path.write_bytes(damaged)
            assert answer(copy, capsys)[0] in (0, 2)
        path.unlink()
        assert answer(copy, capsys)[0] == 2
        path.write_bytes(content)
    found = [place for place in places(document) if place[0] not in ("record", "digest")]
    for place in rng.sample(found, 60):
        text = sealed(changed(document, place, rng.choice(STRANGE)))
        (copy / "certificates.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        assert answer(copy, capsys)[0] in (0, 2, 3), place
    assert verify_certificates.main([str(copy / "none")]) == 2


# ------------------------------------------------------------------------------------------------------- the details
def test_bounds_are_those_of_the_binomial_tail_also_where_scipys_inverse_is_wrong():
    k, n = np.array([0, 1, 500, 145_901, 999, 100_000]), np.array([10, 10, 1000, 146_900, 1000, 100_000])
    for level in (1e-4, 0.05):
        low, high = (verify_certificates.bounds(k, n, level, upper) for upper in (False, True))
        np.testing.assert_allclose(low, confidence.lower(k, n, level), rtol=1e-12)
        np.testing.assert_allclose(high, confidence.upper(k, n, level), rtol=1e-12)
        assert (stats.binom.sf(k - 1, n, low)[1:] <= level).all()
        assert (stats.binom.cdf(k, n, high)[:-1] <= level).all()


def test_buckets_are_those_of_the_package():
    rng = np.random.default_rng(0)
    for classes in (2, 3, 10, 120):
        selection = np.stack([rng.multinomial(200, rng.dirichlet(np.full(classes, 0.3))) for _ in range(100)])
        for bound in ("binary", "multiclass"):
            n = np.full(100, 10_000)
            expected = confidence.partition(selection, n, 1e-3, bound)
            found = verify_certificates.buckets(selection, 10_000, 1e-3, bound)
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_array_equal(a, b)


def test_the_seed_of_the_noise_follows_from_the_configuration(tmp_path, capsys):
    folder = build(tmp_path / "x", images=3, n=100)
    for chosen, seed in ((-2, 0), (11, 11)):
        change(folder, lambda document, chosen=chosen: document["config"]["certify"].update(seed=chosen))
        assert "its seed is" in answer(folder, capsys)[1]
        change(folder, lambda document, seed=seed: document["identity"].update(seed=seed))
        reseal(folder)
        assert answer(folder, capsys)[0] == 0


def test_the_signature_of_the_documentation_works(copy, tmp_path):
    if not shutil.which("ssh-keygen"):
        pytest.skip("ssh-keygen is not here")
    section = (ROOT / "docs" / "format.md").read_text().partition("## Signing results")[2]
    commands = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    assert len(commands) == 2
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "FOLDER": str(copy)}

    def bash(script):
        script = script.replace("python verify", f"{sys.executable} {ROOT}/verify")
        return subprocess.run(["bash", "-euc", script], env=environment, cwd=tmp_path, capture_output=True, text=True)

    sign, check = commands
    assert bash(sign).returncode == 0
    ended = bash(check)
    assert ended.returncode == 0, ended.stderr
    assert 'Good "lsrs_jax" signature for author@example.org' in ended.stdout
    assert f"{IMAGES} certificates follow from" in ended.stdout
    path = copy / "certificates.json"
    path.write_text(path.read_text() + "\n")
    ended = bash(check)
    assert ended.returncode == 255
    assert "certificates follow from" not in ended.stdout


def test_absent_fields_have_the_meaning_of_the_package():
    for name, value in verify_certificates.ABSENT.items():
        assert FIELDS[f"certify.{name}"].absent == value, name
