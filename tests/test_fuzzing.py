"""Thousands of damaged and hostile files for every reader: each gives a right value or one line, and soon.

A failure names the seed of its input: `mutations.mutated(random.Random(seed), content)` makes it again.
"""

import contextlib
import functools
import hashlib
import io
import json
import random
import sys

import jax
import numpy as np
import pytest

import verify_certificates
from lsrs_jax import report
from lsrs_jax.auditing.table import read_audit, read_finished
from lsrs_jax.certification import store
from lsrs_jax.certification.ledger import Ledger
from lsrs_jax.certification.table import read_table
from lsrs_jax.config import config_to_dict, load_config
from lsrs_jax.runtime.documents import digest
from lsrs_jax.training import checkpoint
from support import mutations
from support.hostile import answer, changed, places, sealed
from support.mutations import (
    campaign,
    mutated,
    same_json,
    sealed_value,
    with_checksums,
)
from support.samples import AUDIT, CONFIG, ROWS, SCHEDULE, TABLE, check_table, derive, load, read, with_field

NUMBERS = [200, pytest.param(100_000, marks=pytest.mark.soak)]
SLOW = [10, pytest.param(2_000, marks=pytest.mark.soak)]

# A log in the format of Cohen et al. 2019, as other programs write it.
PUBLISHED = """idx\tlabel\tpredict\tradius\tcorrect\ttime
0\t3\t3\t0.448\t1\t0:00:11.571409
20\t1\t-1\t0.0\t0\t0:00:11.6
40\t9\t7\t0.0226\t0\t1 day, 2:00:03.25
60\t0\t0\t1.2\t1\t12.5
"""


def either(*makers):
    """Makes each input by one of these functions of a generator."""
    return lambda rng: rng.choice(makers)(rng)


def test_a_reader_with_a_defect_is_caught(monkeypatch):
    monkeypatch.setattr(mutations, "SECONDS", 0.2)

    def hangs(content):
        while b"\0" in content:
            pass

    for read_wrongly, cause in (
        (lambda content: content.decode("utf-8"), "UnicodeDecodeError in"),
        (lambda content: [int(field) for field in content.split(b"\t") if field.isdigit()], "ValueError in"),
        (lambda content: bytearray(2 * mutations.MEMORY) if b"\0" in content else None, "MemoryError in"),
        (hangs, "Hang in"),
    ):
        with pytest.raises(AssertionError, match=cause):
            campaign(2000, lambda rng: mutated(rng, TABLE.encode()), read_wrongly, most=1)


def summary(number, accepted):
    print(f"\n{number} inputs, {accepted} read, {number - accepted} refused in one line")
    assert accepted < number  # most mutations must be refused, or the reader checks nothing


# ------------------------------------------------------------------------------------------------ tables and reports


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("text", [TABLE, PUBLISHED], ids=["ours", "published"])
def test_tables(folder, number, text):
    read_mutated = functools.partial(read, folder / "table.tsv")
    accepted = campaign(number, lambda rng: mutated(rng, text.encode()), read_mutated)
    summary(number, accepted)
    assert accepted > number // 100


@pytest.mark.parametrize("column", ["idx", "radius", "time"])
@pytest.mark.parametrize("text", ["9" * 30_000 + "x", "0." + "9" * 30_000 + "x", "1e" + "9" * 30_000 + "x"])
def test_a_long_field_that_is_no_number_is_refused_soon(folder, column, text):
    """A regular expression that tries every division of the digits would need a minute."""
    content = with_field(column, text).encode()
    assert campaign(1, lambda rng: content, functools.partial(read, folder / "table.tsv")) == 0


def test_a_table_with_other_line_ends_is_the_same_table(folder):
    path = folder / "table.tsv"
    for text in (TABLE, PUBLISHED):
        path.write_text(text)
        table = read_table(path)
        for same in (text.replace("\n", "\r\n"), text[:-1], text + "\n\n", text + "\r\n"):
            path.write_bytes(same.encode())
            again = read_table(path)
            check_table(again)
            for column in ("idx", "label", "predict", "radius", "correct", "seconds"):
                np.testing.assert_array_equal(getattr(again, column), getattr(table, column))


@pytest.mark.parametrize("number", NUMBERS)
def test_reports_on_foreign_logs(folder, number):
    path = folder / "noise_0.25.tsv"
    (folder / "other.tsv").write_text(PUBLISHED)

    def reported(content):
        path.write_bytes(content)
        runs = answer(report.load_runs, [f"foreign={path}", str(folder / "other.tsv")])
        if runs is None:
            return None
        radii = report.radius_grid(runs)
        assert 2 <= len(radii) < 50
        lines = report.markdown(runs, radii).splitlines()
        assert len(lines) == 4
        assert len({line.count("|") for line in lines}) == 1
        assert all(line.isprintable() for line in [*lines, *report.notes(runs)])
        return runs

    summary(number, campaign(number, lambda rng: mutated(rng, PUBLISHED.encode()), reported))


# ------------------------------------------------------------------------------------------------------------ ledgers


RUNS = [None, "0123456789abcdef"]


def state(counts):
    return {
        idx: (image.label, image.slack, image.seconds, {name: part.tolist() for name, part in image.counts.items()})
        for idx, image in counts.images.items()
    }


def reader_of_ledgers(folder, run):
    """``(bytes of a valid ledger, its counts, read)``; a ledger that is refused must stay as it was."""
    whole, path = folder / f"whole_{run}.tsv", folder / f"changed_{run}.tsv"
    if not whole.exists():
        with Ledger(whole, SCHEDULE, 3, run) as ledger:
            ledger.append(ROWS)

    def counted():
        with Ledger(path, SCHEDULE, 3, run) as ledger:
            return state(ledger)

    def read_ledger(content):
        path.write_bytes(content)
        found = answer(counted)
        assert found is not None or path.read_bytes() == content
        return found

    return whole.read_bytes(), read_ledger


def prefixes(rows):
    """All counts that an image may have if some of its last rows are missing."""
    found = [{name: [0, 0, 0] for name in SCHEDULE.totals}]
    for row in rows:
        found.append(found[-1] | {row.stream: (np.array(found[-1][row.stream]) + row.counts).tolist()})
    return found


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("run", RUNS, ids=["format 1", "with a run"])
def test_ledgers(folder, number, run):
    whole, read_ledger = reader_of_ledgers(folder, run)
    known = {idx: prefixes([row for row in ROWS if row.idx == idx]) for idx in (2, 4)}

    def checked(content):
        found = read_ledger(content)
        for idx, (label, slack, _, counts) in (found or {}).items():
            assert (label, slack) == (1, 1e-3)
            assert counts in known[idx][1:]
        return found

    assert checked(whole) == {idx: (1, 1e-3, 0.75, known[idx][-1]) for idx in (2, 4)}
    summary(number, campaign(number, lambda rng: mutated(rng, whole), checked))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("run", RUNS, ids=["format 1", "with a run"])
def test_ledgers_with_the_right_checksums(folder, number, run):
    whole, read_ledger = reader_of_ledgers(folder, run)

    def checked(content):
        found = read_ledger(content)
        for idx, (label, slack, seconds, counts) in (found or {}).items():
            assert min(idx, label) >= 0
            assert 0 <= slack < np.inf
            assert 0 <= seconds < 2.0**53
            assert sum(counts["selection"]) == 10
            assert sum(counts["estimation"]) in (0, *range(16, 100, 16), 100)
            assert min(counts["selection"] + counts["estimation"]) >= 0
        return found

    summary(number, campaign(number, lambda rng: with_checksums(mutated(rng, whole)), checked))


# ------------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize("number", NUMBERS)
def test_configurations(folder, number):
    text = json.dumps(CONFIG, indent=2).encode()
    unsealed = functools.partial(mutated, content=text)
    accepted = campaign(
        number,
        either(unsealed, lambda rng: sealed_value(rng, CONFIG)),
        lambda content: load(folder / "config.json", content),
    )
    summary(number, accepted)


@pytest.mark.parametrize("number", [50, pytest.param(5_000, marks=pytest.mark.soak)])
def test_a_configuration_in_another_layout_is_the_same(folder, number):
    path = folder / "config.json"

    def loaded(content):
        path.write_bytes(content)
        assert config_to_dict(load_config(path)) == CONFIG
        return True

    assert campaign(number, lambda rng: same_json(rng, CONFIG), loaded) == number


# -------------------------------------------------------------------------------------------------- certificates.json


def plain(content):
    """The JSON value of a text, in a layout of its own, so that texts of equal values are equal."""
    return json.dumps(json.loads(content), sort_keys=True)


@pytest.mark.parametrize("number", NUMBERS)
def test_certificates_json(certification, folder, number):
    stored = certification[2]
    path = folder / "certificates.json"
    text = json.dumps(stored, indent=2).encode()
    path.write_bytes(text)
    expected = store.read(path)

    def checked(content):
        path.write_bytes(content)
        found = answer(store.read, path)
        if found is not None and found.sealed:
            assert json.loads(content)["digest"] == digest(json.loads(content))
        if found is not None and plain(content) == plain(text):
            assert found == expected
        return found

    makers = either(functools.partial(mutated, content=text), lambda rng: sealed_value(rng, stored))
    summary(number, campaign(number, makers, checked))


def derived(certification, content):
    """True if certificates were derived beside a certificates.json with this content; they are the right ones."""
    with contextlib.redirect_stdout(io.StringIO()):
        return derive(certification, content) or None


@pytest.mark.parametrize("number", SLOW)
def test_certificates_from_a_changed_certificates_json_are_the_same_or_none(certification, number):
    stored = certification[2]
    text = json.dumps(stored, indent=2).encode()
    makers = either(functools.partial(mutated, content=text), lambda rng: sealed_value(rng, stored))
    summary(number, campaign(number, makers, functools.partial(derived, certification)))


def test_half_a_character_in_any_field_gives_the_same_certificates_or_none(certification):
    """JSON can spell the halves of a surrogate pair, which have no UTF-8."""
    stored = certification[2]
    for path in places(stored):
        derived(certification, sealed(changed(stored, path, "\ud800")).encode())


@pytest.mark.parametrize("number", SLOW)
def test_certificates_from_another_layout_are_the_same(certification, number):
    stored = certification[2]
    read_layout = functools.partial(derived, certification)
    assert campaign(number, lambda rng: same_json(rng, stored), read_layout) == number


@pytest.mark.parametrize("number", [30, pytest.param(5_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", ["certificates.json", "certificates.tsv", "votes.0.tsv"])
def test_the_second_implementation(certification, tmp_path, number, name):
    """`verify_certificates.py`, which shares no code with the package."""
    home, _, stored, table = certification
    good = {"certificates.json": json.dumps(stored, indent=2).encode(), "certificates.tsv": table}
    good |= {"votes.0.tsv": (home / "votes.0.tsv").read_bytes()}
    for file, content in good.items():
        (tmp_path / file).write_bytes(content)

    def verified(content):
        (tmp_path / name).write_bytes(content)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error:
            code = verify_certificates.main([str(tmp_path)])
        if code == 2:
            assert 10 < len(error.getvalue()) < 1100
            assert error.getvalue()[:-1].isprintable()
            return None
        assert code in (0, 3)
        if name != "certificates.json":
            assert content == good[name] or (name == "votes.0.tsv" and content.startswith(good[name]))
        return code

    assert verified(good[name]) is not None
    make = functools.partial(mutated, content=good[name])
    if name == "certificates.json":
        make = either(make, lambda rng: sealed_value(rng, stored))
    summary(number, campaign(number, make, verified))


# -------------------------------------------------------------------------------------------------------------- audits


def check_audit(found):
    assert len(np.unique(found.idx)) == len(found.idx) > 0
    assert (np.isfinite(found.radius) & (found.radius >= 0)).all()
    assert (found.distance >= 0).all()
    assert 0 <= found.robust_accuracy(0.1) <= found.robust_accuracy(0) <= 1


@pytest.mark.parametrize("number", NUMBERS)
def test_audits(folder, number):
    path = folder / "audit.tsv"

    def checked(content):
        path.write_bytes(content)
        found = answer(read_audit, path)
        if found is not None:
            check_audit(found)
        return found

    summary(number, campaign(number, lambda rng: mutated(rng, AUDIT.encode()), checked))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("which", ["audit.tsv", "audit.json"])
def test_finished_audits_are_as_they_were_finished_or_refused(folder, number, which):
    home = folder / "finished"
    home.mkdir(exist_ok=True)
    settings = {"images": 1, "fractions": [1.0], "restarts": 1, "steps": 1, "samples": 1, "votes": 1}
    facts = {
        "format": 1,
        "certificates": "00",
        "settings": settings,
        "audit": hashlib.sha256(AUDIT.encode()).hexdigest(),
    }
    facts |= {"digest": digest(facts)}
    good = {"audit.tsv": AUDIT.encode(), "audit.json": json.dumps(facts, indent=2).encode()}
    for name, content in good.items():
        (home / name).write_bytes(content)
    expected = read_finished(home / "audit.tsv")
    assert expected[0] == "00"

    def checked(content):
        (home / which).write_bytes(content)
        found = answer(read_finished, home / "audit.tsv")
        if found is not None:
            for part, wanted in zip(found[1], expected[1], strict=True):
                np.testing.assert_array_equal(part, wanted)
            if which == "audit.tsv":
                assert content == AUDIT.encode()
        return found

    make = functools.partial(mutated, content=good[which])
    if which == "audit.json":
        make = either(make, lambda rng: sealed_value(rng, facts))
    summary(number, campaign(number, make, checked))


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.soak
def test_checkpoints(folder, monkeypatch):
    """The short version is `test_a_damaged_checkpoint_gives_the_same_parameters_or_one_line`."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # Orbax leaves unfinished tasks behind
    params = {"head": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)}}
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    with checkpoint.Checkpoints(folder / "run") as checkpoints:
        checkpoints.save(2, params, {"momentum": np.zeros(1, np.float32)})
        checkpoints.wait()
    files = [path for path in sorted((folder / "run" / "checkpoints").rglob("*")) if path.is_file()]
    originals = {path: path.read_bytes() for path in files}
    expected = checkpoint.restore_model(folder / "run", target)[1]
    random.Random(0).shuffle(files)
    chosen = files[0]

    def checked(content):
        chosen.write_bytes(content)
        restored = answer(checkpoint.restore_model, folder / "run", target)
        trained_on = answer(checkpoint.trained_on, folder / "run")
        if restored is not None:
            jax.tree.map(np.testing.assert_array_equal, restored[0], params)
            assert restored[1]["digest"] == expected["digest"]
            assert restored[1]["step"] == 2
        return restored, trained_on

    tried = 0
    for path in files:
        chosen = path
        number = 1 + 2_000 // len(files)
        campaign(number, functools.partial(mutated, content=originals[path]), checked, start=tried)
        path.write_bytes(originals[path])
        tried += number
    print(f"\n{tried} damaged checkpoints, in {len(files)} files")
    assert checked(originals[chosen])[0] is not None
