"""Files and flags from strangers: a sound result or one line, and nothing in them is executed."""

import contextlib
import copy
import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
import types
import warnings

import jax
import numpy as np
import pytest
from commands import refused
from hostile import answer, examples
from hypothesis import example, given
from hypothesis import strategies as st

from lsrs_jax import certify as certify_command
from lsrs_jax import checkpoint, command, report, train
from lsrs_jax import config as configuration
from lsrs_jax.auditing import table as audits
from lsrs_jax.certification import folder, smoothed, verify
from lsrs_jax.errors import UserError
from lsrs_jax.materialize import LayerBound, LipschitzReport
from lsrs_jax.sealed import digest
from lsrs_jax.smoothing import Certificates
from lsrs_jax.smoothing.ledger import _HEADER, Ledger, _crc
from lsrs_jax.smoothing.noise import arithmetic
from lsrs_jax.smoothing.table import format_table, read_table
from lsrs_jax.smoothing.tally import Plan, Row


@examples(100)
@given(st.text() | st.text(max_size=2).map(lambda text: text * 10**4))
@example("a\r\nb\u2028c\x1b[2J\udcff" * 1000)
def test_the_message_of_an_error_is_one_printable_line(text):
    message = str(UserError(f"no {text!s} here; try again"))
    assert message.isprintable()
    assert message.startswith("no ")
    assert message.endswith("here; try again")
    assert len(message) < 2100


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("strangers")


# ------------------------------------------------------------------------------------------------ what is an execution

EXECUTIONS = (
    "ctypes.dlopen",
    "exec",
    "marshal.loads",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "pickle.find_class",
    "subprocess.Popen",
)
heard = None  # what is executed, while somebody listens


def listen(event, arguments):
    if heard is not None and event in EXECUTIONS:
        heard.append((event, arguments))


sys.addaudithook(listen)  # hears C code too, which replaced functions would not; idle, it stays for good


@contextlib.contextmanager
def nothing_executed(canary):
    global heard
    heard = []
    try:
        yield
        assert heard == []
        assert not canary.exists()
    finally:
        heard = None


class Payload:
    """Its unpickling runs a command."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def payloads(canary):
    touch = f"touch {canary}"
    return [
        f"__import__('os').system({touch!r})",
        f'__import__("pathlib").Path("{canary}").touch()',
        f"exec('import os; os.system(\"{touch}\")')",
        f"!!python/object/apply:os.system ['{touch}']",
        f"$({touch})",
        f"`{touch}`",
        f"cos\nsystem\n(S'{touch}'\ntR.",
    ]


@pytest.mark.parametrize("attack", ["eval", "exec", "pickle", "system", "process"])
def test_the_listener_hears_an_execution(tmp_path, attack):
    canary = tmp_path / "canary"
    attacks = {
        "eval": lambda: eval("1 + 1"),
        "exec": lambda: exec("pass"),
        "pickle": lambda: pickle.loads(pickle.dumps(Payload(tmp_path / "other"))),
        "system": lambda: os.system("true"),
        "process": lambda: subprocess.run(["true"], check=True),
    }
    with pytest.raises(AssertionError), nothing_executed(canary):
        attacks[attack]()
    with pytest.raises(AssertionError), nothing_executed(canary):
        canary.touch()


# -------------------------------------------------------------------------------------------------------------- tables

CHARACTERS = ["\0", "\r", "\n", "\t", " ", "\ufeff", "\u2028", "\x85", "\x1b", "_", "-", "+", ".", "e", "٣", "９", "½"]
NOT_NUMBERS = ["nan", "-inf", "Infinity", "1e309", "1_0", "0x10", " 1", "1 ", "1\0", "٣", "９", "", "True", "x" * 10**5]
NOT_WHOLE = ["1.0", "1e3", "+1", "9" * 19, "9" * 5000]


def table_text(rows):
    """The text that `format_table` makes of rows ``(idx, label, predict, radius, seconds, votes)``."""
    idx, label, predicted, radius, seconds, votes = zip(*rows, strict=True)
    tallies = [
        types.SimpleNamespace(idx=i, label=y, seconds=s, slack=1e-6)
        for i, y, s in zip(idx, label, seconds, strict=True)
    ]
    predicted, p_a = np.array(predicted), np.full(len(rows), 0.9)
    found = Certificates(predicted, np.array(radius), p_a, np.array(votes), p_a, 1 - p_a, predicted == -1)
    return format_table(tallies, found, 1.0)


TABLE = table_text([(0, 3, 3, 0.512, 0.25, 1000), (20, 1, -1, 0.0, 0.5, 1000), (40, 1, 2, 0.1, 1e-6, 300)])


def check_table(table):
    """What holds for every table that was read; it can also be reported."""
    assert len(set(table.idx.tolist())) == len(table) > 0
    assert (table.idx >= 0).all()
    assert (np.isfinite(table.radius) & (table.radius >= 0)).all()
    assert (np.isfinite(table.seconds) & (table.seconds >= 0)).all()
    np.testing.assert_array_equal(table.correct, table.predict == table.label)
    accuracy = [table.certified_accuracy(radius) for radius in (0, 0.25, 1e300)]
    assert 0 <= accuracy[2] <= accuracy[1] <= accuracy[0] <= 1 - table.abstention
    assert 0 <= table.average_certified_radius <= table.radius.max() * (1 + 1e-12)
    run = report.Run("x", table)
    lines = report.markdown([run], report.radius_grid([run])).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 3


def read(path, content):
    path.write_bytes(content)
    table = answer(read_table, path)
    if table is not None:
        check_table(table)
    return table


@examples(60)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**53 - 1),
            st.integers(0, 2**31 - 1),
            st.integers(-1, 2**31 - 1),
            st.floats(0, 1e300),
            st.floats(0, 1e9),
            st.integers(0, 2**53 - 1),
        ),
        min_size=1,
        max_size=5,
        unique_by=lambda row: row[0],
    )
)
def test_a_table_comes_back_as_the_same_numbers(place, rows):
    table = read(place / "table.tsv", table_text(rows).encode())
    for row, *found in zip(rows, table.idx, table.label, table.predict, table.radius, table.votes, strict=True):
        assert found == [*row[:4], row[5]]
    np.testing.assert_allclose(table.seconds, [row[4] for row in rows], rtol=0, atol=1e-6)
    assert not table.truncated


@st.composite
def mutated_table(draw):
    """The bytes of a valid table with one change."""
    rows = [line.split("\t") for line in TABLE.splitlines()]
    row, column = draw(st.integers(0, len(rows) - 1)), draw(st.integers(0, len(rows[0]) - 1))
    kind = draw(st.sampled_from(["byte", "character", "field", "line", "column", "endings", "start", "cut"]))
    where = draw(st.integers(0, len(TABLE) - 1))
    if kind == "byte":
        return TABLE[:where].encode() + bytes([draw(st.integers(0, 255))]) + TABLE[where + 1 :].encode()
    if kind == "character":
        new = draw(st.sampled_from(CHARACTERS) | st.characters(exclude_categories=["Cs"]))
        return (TABLE[:where] + new + TABLE[where + draw(st.integers(0, 1)) :]).encode()
    if kind == "cut":
        return TABLE[:where].encode()
    if kind == "field":
        rows[row][column] = draw(st.sampled_from([*NOT_NUMBERS, *NOT_WHOLE, "1e308", "-1"]) | st.text(max_size=5))
    copies = draw(st.sampled_from([0, 2]))
    if kind == "line":
        rows[row : row + 1] = [rows[row]] * copies
    if kind == "column":
        for fields in rows:
            fields[column : column + 1] = [fields[column]] * copies
    text = "\n".join("\t".join(fields) for fields in rows) + "\n"
    if kind == "endings":
        text = text.replace("\n", draw(st.sampled_from(["\r\n", "\r", "\n\n", "\u2028", "\x0b", "\0\n"])))
    return ("\ufeff" * (kind == "start") + text).encode("utf-8", "surrogatepass")


@examples(400)
@given(mutated_table())
def test_a_changed_table_is_a_sound_table_or_one_line(place, content):
    read(place / "table.tsv", content)


@examples(150)
@given(st.binary(max_size=200) | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")), st.booleans())
def test_any_bytes_are_a_sound_table_or_one_line(place, content, headed):
    read(place / "table.tsv", (TABLE.partition("\n")[0] + "\n").encode() * headed + content)


def with_field(column, text):
    rows = [line.split("\t") for line in TABLE.splitlines()]
    rows[1][rows[0].index(column)] = text
    return "\n".join("\t".join(row) for row in rows) + "\n"


@pytest.mark.parametrize("column", ["idx", "label", "predict", "n", "radius", "time"])
def test_what_is_no_plain_number_is_refused_though_python_would_read_it(place, column):
    wrong = NOT_NUMBERS if column in ("radius", "time") else [*NOT_NUMBERS, *NOT_WHOLE]
    for text in wrong:
        assert read(place / "table.tsv", with_field(column, text).encode()) is None, text


def test_a_line_with_more_or_fewer_fields_is_told_so(place):
    for line, number in (("9\t1\t1\t0.5", 4), ("9" + "\t1" * 12, 13)):
        (place / "table.tsv").write_text(TABLE + line + "\n")
        with pytest.raises(UserError, match=rf"line 5 cannot be read \({number} columns instead of 12\)"):
            read_table(place / "table.tsv")
    (place / "audit.tsv").write_text(AUDIT + "9\t3\n")
    with pytest.raises(UserError, match=r"line 4 cannot be read \(2 columns instead of"):
        audits.read(place / "audit.tsv")


def test_numbers_that_no_report_could_add_up_are_refused(place):
    for column, text in (
        ("time", "9" * 400 + ":00:00"),
        ("time", "9" * 20 + " days, 0:00:00"),
        ("time", "1e308"),
        ("time", "٣:00:00"),
        ("radius", "1.7e308"),
    ):
        assert read(place / "table.tsv", with_field(column, text).encode()) is None, text
    assert read(place / "table.tsv", with_field("radius", "1e300").encode()) is not None


# ------------------------------------------------------------------------------------------------------------- ledgers

PLAN = Plan(10, (100,), 16)
VOTES = [
    Row(idx, 1, 1e-6, purpose, first, stop, np.array(votes), 0.25)
    for idx in (4, 2)
    for purpose, first, stop, votes in (
        ("selection", 0, 1, [1, 9, 0]),
        ("estimation", 0, 4, [2, 62, 0]),
        ("estimation", 4, 7, [0, 36, 0]),
    )
]


@pytest.fixture(scope="module")
def ledger_bytes(place):
    with Ledger(place / "whole.tsv", PLAN, 3) as ledger:
        ledger.append(VOTES)
    return (place / "whole.tsv").read_bytes()


def votes_of(path, content):
    """The counts of a ledger with this content, or None where it is refused, and then left alone."""

    def counts():
        with Ledger(path, PLAN, 3) as ledger:
            return {
                idx: (tally.label, tally.slack, tally.seconds, [part.tolist() for part in tally.counts.values()])
                for idx, tally in ledger.tallies.items()
            }

    path.write_bytes(content)
    found = answer(counts)
    assert found is not None or path.read_bytes() == content
    return found


@examples(400)
@given(st.data())
def test_no_changed_byte_of_a_ledger_gives_other_counts(place, ledger_bytes, data):
    where = data.draw(st.integers(0, len(ledger_bytes) - 1))
    changed = bytearray(ledger_bytes)
    changed[where] = data.draw(st.sampled_from(b"\t\n\r 0123456789:,.\0\xff") | st.integers(0, 255))
    found = votes_of(place / "ledger.tsv", bytes(changed))
    if changed == ledger_bytes:
        assert found is not None
    elif found is not None:  # the end of the last line is gone: it counts as torn
        assert where == len(ledger_bytes) - 1
        whole = ledger_bytes.splitlines(keepends=True)
        assert found == votes_of(place / "ledger.tsv", b"".join(whole[:-1]))


@examples(150)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_an_empty_ledger_or_one_line(place, content, headed):
    assert votes_of(place / "ledger.tsv", _HEADER.encode() * headed + content) in (None, {})


COUNTS = st.integers(-1, 11).map(str) | st.sampled_from([*NOT_NUMBERS[:-1], *NOT_WHOLE, "9" * 18, "1e308"])


@examples(400)
@given(
    st.lists(
        st.tuples(
            COUNTS,
            COUNTS,
            st.sampled_from(["0.0", "1e-6", "nan", "-1", "1e308", "1e309", "x"]),
            st.sampled_from(["selection", "estimation", "pilot", ""]),
            st.sampled_from(["0", "1", "-1"]) | COUNTS,
            st.sampled_from(["1", "7"]) | COUNTS,
            st.sampled_from(["1:10", "0:3,2:7", "1:5,1:5", "0:100"])
            | st.lists(st.tuples(COUNTS, COUNTS).map(":".join), max_size=3).map(",".join),
            st.sampled_from(["0.1", "nan", "-1", "1e308", "2e9", "inf"]),
        ),
        max_size=3,
    )
)
@example(
    [
        ("1", "0", "0.0", "selection", "0", "1", "1:10", "1e308"),
        ("1", "0", "0.0", "estimation", "0", "7", "1:100", "1e308"),
    ]
)
def test_rows_with_the_right_checksum_add_up_or_are_refused(place, rows):
    content = ["\t".join(fields) for fields in rows]
    found = votes_of(place / "ledger.tsv", (_HEADER + "".join(f"{line}\t{_crc(line)}\n" for line in content)).encode())
    for label, slack, seconds, (selection, estimation) in (found or {}).values():
        assert label >= 0
        assert sum(selection) == 10
        assert sum(estimation) in (0, *range(16, 100, 16), 100)
        assert min(selection + estimation) >= 0
        assert math.isfinite(slack)
        assert seconds < 2.0**53


def test_huge_counts_whose_sum_wraps_around_are_refused(place):
    classes = 100
    votes = [10**18 - 1] * 18  # about 2**64
    votes += [(2**64 + 10) - sum(votes)]
    assert np.array(votes).sum() == 10
    line = "0\t0\t0.0\tselection\t0\t1\t" + ",".join(f"{i}:{count}" for i, count in enumerate(votes)) + "\t0.1"
    (place / "ledger.tsv").write_text(f"{_HEADER}{line}\t{_crc(line)}\n")
    with pytest.raises(UserError, match="where 10 belong"):
        Ledger(place / "ledger.tsv", PLAN, classes)


# --------------------------------------------------------------------------------------------------- certificates.json

DEEP = {f"<{depth}>": "[" * depth + "]" * depth for depth in (90, 400, 980, 100_000)}
STRANGE = [None, True, -1, 0, 3, 10**30, 10**400, 0.5, 1e308, math.nan, -math.inf, "", "0.5", "a\nb\x1b[2J"]
STRANGE += [[], [[]], ["a"], {}, {"name": "sound"}, *DEEP]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(STRANGE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def json_text(value):
    """JSON with what json.dumps could not write: lists nested too deeply."""
    text = json.dumps(value)
    for name, nested in DEEP.items():
        text = text.replace(json.dumps(name), nested)
    return text


def sealed(value):
    """`json_text` with the digest that a certificates.json of this content has, if a reader can compute one."""
    try:
        value = json.loads(json_text(value))
        return json.dumps(value | {"digest": digest(value)})
    except (RecursionError, TypeError):
        return json_text(value)


def places(value, path=()):
    """The paths of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(value, path, new):
    value = copy.deepcopy(value)
    part = value
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = new
    return value


@pytest.fixture(scope="module")
def certification(place):
    """A folder of certificates: ``(folder, config, content of its certificates.json, bytes of its table)``."""
    config = configuration.default()
    config.certify.n0, config.certify.n, config.certify.tile = 10, 100, (2, 16)
    home = place / "certify" / "default"
    layers = (LayerBound("0 Dense", 1.25, 0.5, "SVD", 1e-15, 0.0), LayerBound("1 MaxMin", 1.0, 1.0, "permutation"))
    lipschitz = LipschitzReport(layers, (2, 2, 1), (4,)).to_dict()
    identity = {"certificate": "smoothed", "checkpoint": {"step": 3, "digest": "00"}, "platform": "cpu cpu"}
    identity |= {"model": configuration.to_dict(config.model) | {"input_shape": [2, 2, 1]}, "data": {"name": "digits"}}
    identity |= {"classes": 3, "prng": "threefry2x32"}
    identity |= smoothed.identity_of_config(config)
    identity["arithmetic"] = smoothed._terms(arithmetic("sound", config.sigma), (4,))
    with Ledger(home / "votes.0.tsv", PLAN, 3) as ledger:
        ledger.append(VOTES)
    folder.write(home, config, identity, lipschitz, [folder.session(2)])
    smoothed.from_counts(home, config)
    stored = json.loads((home / "certificates.json").read_text())
    assert read_table(home / "certificates.tsv").radius.min() > 0
    return home, config, stored, (home / "certificates.tsv").read_bytes()


def derive(certification, text):
    """Derives certificates beside a certificates.json of this text; they must be the right ones, or none."""
    home, config, stored, table = certification
    path = home / "certificates.json"
    path.write_bytes(text)
    (home / "certificates.tsv").unlink(missing_ok=True)
    record = answer(folder.read_record, path, stored["identity"])
    assert record is None or isinstance(record, list)
    (home / "certificates.tsv").write_bytes(table)
    answer(verify.run, home)
    (home / "certificates.tsv").unlink()
    answer(smoothed.from_counts, home, config)
    if (home / "certificates.tsv").exists():
        assert (home / "certificates.tsv").read_bytes() == table
        return True
    assert path.read_bytes() == text
    return False


def test_numbers_from_which_a_radius_would_follow_are_not_believed(certification):
    stored = certification[2]
    for path, new in (
        (("identity", "arithmetic", "sigma"), 1.0),
        (("identity", "arithmetic", "tau"), 0.0),
        (("identity", "arithmetic", "spacing"), 2.0**-30),
        (("lipschitz", "constant"), 1.0),
        (("lipschitz", "layers", 0, "sigma_max"), 1.0),
        (("lipschitz", "output_shape"), [1]),
        (("lipschitz", "output_shape"), {}),
        (("identity", "model", "input_shape"), {}),
        (("identity", "classes"), 2.0),
        (("identity", "classes"), 10**12),
        (("identity", "classes"), "3"),
    ):
        assert not derive(certification, sealed(changed(stored, path, new)).encode()), path
    assert derive(certification, json_text(stored).encode())


def test_another_identity_is_told_in_words_that_a_user_knows(certification):
    home, _, stored, _ = certification
    path, identity = home / "certificates.json", stored["identity"]
    path.write_text(json.dumps(stored))
    assert folder.read_record(path, identity) == stored["record"]
    checkpoint, data = identity["checkpoint"], identity["data"] | {"version": "1.0.0", "split": "test"}
    for change, words in (
        ({"checkpoint": {"step": 5, "digest": "11"}}, "of the checkpoint of step 3, and the newest is that of step 5;"),
        ({"checkpoint": checkpoint | {"digest": "11"}}, "the checkpoint of step 3 has other weights than it had;"),
        ({"data": data | {"name": "mnist", "digest": "11"}}, "data.name was 'digits' and is now 'mnist';"),
        ({"tile": [2, 32], "stages": [96]}, "certify.tile was [2, 16] and is now [2, 32];"),
        ({"stages": [96]}, "stages was"),
    ):
        with pytest.raises(UserError) as error:
            folder.read_record(path, identity | change)
        assert words in str(error.value), error.value
    old = stored | {"identity": identity | {"data": data | {"digest": "00"}}}
    path.write_text(sealed(old))
    with pytest.raises(UserError, match=r"images or labels of digits 1.0.0, split test, are not what they were;"):
        folder.read_record(path, identity | {"data": data | {"digest": "11"}})


@examples(300)
@given(st.data())
def test_a_changed_certificates_json_gives_the_same_certificates_or_none(certification, data):
    stored = certification[2]
    where = data.draw(st.sampled_from(list(places(stored))))
    text = sealed(changed(stored, where, data.draw(st.sampled_from(STRANGE) | JSON)))
    derive(certification, text.encode())


@examples(100)
@given(st.binary(max_size=50) | JSON.map(lambda value: json_text(value).encode()))
@example(b"[" * 100_000)
@example(b'{"identity": {}, "lipschitz": {}, "record": ' + b"[" * 950 + b"]" * 950 + b"}")
def test_any_certificates_json_is_refused_in_one_line(certification, text):
    assert not derive(certification, text)


def test_a_table_of_other_bytes_is_written_anew(certification):
    home, config, stored, table = certification
    (home / "certificates.json").write_text(json.dumps(stored))
    (home / "certificates.tsv").write_bytes(b"\xff\xfe")
    smoothed.from_counts(home, config)
    assert (home / "certificates.tsv").read_bytes() == table


# ----------------------------------------------------------------------------------------------------- configurations

CONFIG = configuration.to_dict(configuration.default())


def load(path, text):
    """A configuration that was stored as this text, if it is one and within its limits."""
    path.write_bytes(text)
    config = answer(configuration.load, path)
    if config is not None:
        again = configuration.from_dict(configuration.to_dict(config))
        assert json.dumps(configuration.to_dict(again)) == json.dumps(configuration.to_dict(config))
    return config and answer(configuration.check, config)


@examples(300)
@given(
    st.sampled_from(list(places(CONFIG))),
    st.sampled_from([*STRANGE, {"a.b": 1}, [10**400], [math.nan], [True]]) | JSON,
)
@example(("sigma",), 10**400)
@example(("certify", "radii"), [10**400])
@example(("certify", "alpha"), {"a.b": 1})
def test_a_changed_configuration_is_valid_or_one_line(place, where, new):
    config = load(place / "config.json", json_text(changed(CONFIG, where, new)).encode())
    if config is not None:
        assert np.isfinite(
            [config.sigma, config.certify.alpha, config.train.learning_rate, *config.certify.radii]
        ).all()
        assert type(config.certify.n) is type(config.seed) is int


@examples(150)
@given(st.binary(max_size=50) | JSON.map(lambda value: json_text(value).encode()))
@example(b"[" * 100_000)
@example(b"1" * 5000)
def test_any_other_text_is_no_configuration(place, text):
    assert load(place / "config.json", text) is None


def test_a_field_beside_the_known_ones_is_refused(place):
    for value in (CONFIG | {"a\nb": 1}, CONFIG | {"certify": CONFIG["certify"] | {"__class__": {}, "": 1}}):
        assert load(place / "config.json", json.dumps(value).encode()) is None


FLAG_VALUES = [
    *(text for text in NOT_NUMBERS if "\0" not in text),
    *NOT_WHOLE,
    "0.25",
    "(0.25, 0.5)",
    "(2, 16)",
    "(1j, 2)",
    "(b'a', 3)",
    "({1}, 3)",
    "(..., 3)",
    "({}, 3)",
    "(None,)",
    "('a\nb', 3)",
    "(1e999,)",
    f"({'9' * 400}, 2)",
    f"(0x{'f' * 5000}, 2)",
    f"0x{'f' * 5000}",
    "(" * 500,
    "-" * 5000 + "1",
    "{'a': 1}",
    "{}",
    "\x1b[2J",
    "\udcff",
]
FIELDS = [".".join(map(str, path)) for path in places(CONFIG)]


@examples(400)
@given(
    st.sampled_from(FIELDS) | st.text(max_size=8),
    st.sampled_from(FLAG_VALUES) | st.text(max_size=8),
    st.sampled_from(["--config.{}={}", "--config.{} {}", "--config.{}", "--config{}={}", "-config.{}={}"]),
)
def test_any_flag_gives_a_valid_configuration_or_one_line(field, value, form):
    arguments = form.format(field, value).split(" ", 1)
    config = answer(command.config_from_flags, arguments, configuration.default())
    if config is not None:
        assert configuration.check(configuration.from_dict(configuration.to_dict(config)))
        assert 2.0**-60 <= config.sigma <= 2.0**60


@examples(100)
@given(
    st.lists(
        st.text(max_size=8) | st.sampled_from(["--config", "--config=", "--", "--config=x:y", "--help"]), max_size=3
    )
)
@example(["--config=" + "a" * 5000])
@example(["--config=a\0b"])
def test_any_arguments_without_a_configuration_file_are_one_line(arguments):
    assert answer(command.config_from_flags, arguments) is None


# --------------------------------------------------------------------------------------------------------- executions


def everywhere(value, texts):
    """The value with one of the texts in each of its places in turn."""
    return [changed(value, where, texts[number % len(texts)]) for number, where in enumerate(places(value))]


def test_no_file_and_no_flag_is_executed(place, certification, tmp_path):
    """In every field of every file that is read, and in every flag."""
    canary = tmp_path / "canary"
    home, _, stored, table = certification
    texts = payloads(canary)
    whole = [*(text.encode() for text in texts), pickle.dumps(Payload(canary)), pickle.dumps(Payload(canary), 0)]
    rows = [line.split("\t") for line in TABLE.splitlines()]
    tables = ["\n".join("\t".join(map(str, row)) for row in table).encode() for table in everywhere(rows, texts)]
    derive(certification, json_text(stored).encode())  # lazy imports are executions too
    load(place / "config.json", json_text(CONFIG).encode())
    answer(command.config_from_flags, ["--config.certify.n=5"], configuration.default())
    with nothing_executed(canary):
        for text in [*(json_text(value).encode() for value in everywhere(stored, texts)), *whole]:
            derive(certification, text)
            (home / "certificates.tsv").write_bytes(table)
            answer(report.load_runs, [str(home)])
        for text in [*(json_text(value).encode() for value in everywhere(CONFIG, texts)), *whole]:
            load(place / "config.json", text)
            train._complete_lines(place / "config.json")
        for text in [*tables, *whole]:
            read(place / "table.tsv", text)
            votes_of(place / "ledger.tsv", _HEADER.encode() + text)
        for field in FIELDS:
            for text in texts:
                answer(command.config_from_flags, [f"--config.{field}={text}"], configuration.default())


# ---------------------------------------------------------------------------------------------------------- checkpoints

PARAMS = {
    "encoder": {},
    "head": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)},
}
MOMENTUM = {"momentum": np.zeros(1, np.float32)}
TARGET = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)


@pytest.fixture(scope="module")
def trained(place):
    with checkpoint.Checkpoints(place / "run") as checkpoints:
        checkpoints.save(2, PARAMS, MOMENTUM)
        checkpoints.wait()
    # Orbax leaves half-finished tasks behind when a checkpoint is damaged; the commands are deaf to them as well.
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    yield place / "run"
    sys.unraisablehook = hook


def restore(workdir):
    """Whether the checkpoint of a workdir was restored, to the very numbers; else it was refused in one line."""
    restored = answer(checkpoint.restore_model, workdir, TARGET)
    if restored is None:
        return False
    params, meta = restored
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    digests = {"digest": checkpoint.digest(PARAMS), "optimizer": checkpoint.digest(MOMENTUM)}
    assert meta == {"step": 2} | digests
    return True


@contextlib.contextmanager
def replaced(path, content):
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def test_no_checkpoint_is_unpickled(trained, tmp_path):
    canary = tmp_path / "canary"
    files = [path for path in sorted((trained / "checkpoints").rglob("*")) if path.is_file()]
    assert restore(trained)
    refusals = set()
    with nothing_executed(canary):
        for path in files:
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
                with replaced(path, pickle.dumps(Payload(canary), protocol)):
                    if not restore(trained):
                        refusals.add(path.relative_to(trained / "checkpoints/2").parts[0])
    assert refusals == {"model", "meta"}
    assert restore(trained)


@examples(150)
@given(st.data())
def test_a_damaged_checkpoint_gives_the_same_parameters_or_one_line(trained, data):
    files = [path for path in sorted((trained / "checkpoints").rglob("*")) if path.is_file()]
    names = sorted({path.name for path in files if len(path.name) < 32})
    name = data.draw(st.sampled_from([*names, "data"]))  # names of data files are drawn anew by every training
    some = [path for path in files if path.name == name or (name == "data" and len(path.name) >= 32)]
    path = some[data.draw(st.integers(0, len(some) - 1))]
    content = data.draw(
        st.binary(max_size=30)
        | JSON.map(lambda value: json_text(value).encode())
        | st.integers(0, 300).map(lambda size: path.read_bytes()[:size])
        | st.sampled_from([b"[" * 100_000, b"1" * 5000, b"[]", b"NaN"])
    )
    with replaced(path, content):
        restore(trained)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"1" * 5000])
def test_damaged_metadata_of_orbax_is_one_line_for_both_commands(trained, content):
    with replaced(trained / "checkpoints" / "2" / "_CHECKPOINT_METADATA", content):
        assert answer(checkpoint.Checkpoints, trained) is None
        assert not restore(trained)


@pytest.mark.parametrize("step", [3, "2", None, 1e999, [2]])
def test_a_checkpoint_of_another_step_is_refused(trained, step):
    path = trained / "checkpoints" / "2" / "meta" / "metadata"
    with replaced(path, json.dumps(json.loads(path.read_text()) | {"step": step}).encode()):
        assert not restore(trained)


# ----------------------------------------------------------------------------------------------- metrics and reports


@examples(150)
@given(st.binary(max_size=60) | st.lists(JSON.map(json_text), max_size=3).map(lambda lines: "\n".join(lines).encode()))
@example(b'{"step": ' + b"[" * 100_000 + b"\n")
@example(b'{"step": 3, "loss": 1.0}\n{"step": 4}')
def test_only_whole_lines_with_a_step_are_kept_of_any_metrics(place, content):
    path = place / "metrics.jsonl"
    path.write_bytes(content + b'\n{"step": 7, "loss": 0.5}\n{"step": 8, "lo')
    kept = train._complete_lines(path)
    assert kept[-1] == '{"step": 7, "loss": 0.5}'
    assert all(isinstance(json.loads(line)["step"], int) for line in kept)


def reported(path):
    """The names and the notes of the runs in a folder."""
    runs = answer(report.load_runs, [str(path)])
    return None if runs is None else ([run.label for run in runs], report.notes(runs))


@examples(200)
@given(st.sampled_from(STRANGE) | JSON, st.sampled_from(["radii", "derivation", None]))
@example(["a"], "radii")
@example([10**400], "radii")
@example("abc", "radii")
@example({"0.5": 1}, "radii")
@example([[0.5]], "radii")
def test_a_foreign_file_beside_a_table_says_nothing(place, value, where):
    home = place / "peer"
    home.mkdir(exist_ok=True)
    (home / "certificates.tsv").write_text(TABLE)
    content = {"radii": {"derivation": {"radii": value}}, "derivation": {"derivation": value}, None: value}[where]
    (home / "certificates.json").write_text(json_text(content), encoding="utf-8", errors="surrogatepass")
    labels, notes = reported(home)
    assert labels == ["peer"]
    assert all("staged to decide the radii" in note for note in notes)
    if notes:
        assert where == "radii"
        assert all(type(radius) in (int, float) and 0 <= radius <= 1e300 for radius in value)


AUDIT = "\t".join(audits.COLUMNS) + "\n0\t3\t3\t0.5\t3\t12\t0\t2\t0.75\tpgd\n4\t1\t-1\t0.0\t-1\t0\t0\t0\tinf\tnone\n"


@examples(200)
@given(
    st.integers(0, len(AUDIT)),
    st.integers(0, 20),
    st.text(max_size=4) | st.sampled_from(["\n", "\t", "nan", "9" * 400]),
)
@example(0, len(AUDIT), "")
def test_a_changed_audit_is_read_or_refused_in_one_line(place, start, length, text):
    path = place / "audit.tsv"
    path.write_text(AUDIT[:start] + text + AUDIT[start + length :], encoding="utf-8", errors="surrogatepass")
    found = answer(audits.read, path)
    if found is not None:
        assert len(np.unique(found.idx)) == len(found.idx)
        assert np.isfinite(found.radius).all()
        assert (found.distance >= 0).all()
        assert 0 <= found.robust_accuracy(0.1) <= 1


@examples(100)
@given(st.sampled_from(["certificates", "settings", "audit", "digest", None]), st.sampled_from(STRANGE) | JSON)
def test_facts_about_an_audit_are_its_own_or_refused_in_one_line(place, field, new):
    home = place / "audited"
    home.mkdir(exist_ok=True)
    (home / "audit.tsv").write_text(AUDIT)
    facts = {"certificates": "00", "settings": {}, "audit": hashlib.sha256(AUDIT.encode()).hexdigest()}
    content = new if field is None else facts | {field: new}
    (home / "audit.json").write_text(sealed(content) if field in facts else json_text(content))
    found = answer(audits.read_finished, home / "audit.tsv")
    assert found is None or (found[0] == new if field == "certificates" else field == "settings")


def test_radii_that_a_staged_certification_decided_are_noted(place):
    home = place / "staged"
    home.mkdir()
    (home / "certificates.tsv").write_text(TABLE)
    (home / "certificates.json").write_text('{"derivation": {"radii": [0.25, 1]}}')
    assert "radii 0.25, 1;" in reported(home)[1][0]


@examples(60)
@given(st.text(min_size=1, max_size=8).filter(lambda name: "/" not in name and "\0" not in name and name.strip(".")))
@example("a|b")
@example("a\rb\x1b[2J")
@example(os.fsdecode(b"\xff"))
@example("\u2028")
def test_the_name_of_a_folder_breaks_neither_table_nor_terminal(tmp_path_factory, name):
    home = tmp_path_factory.mktemp("named")
    try:
        for run in ("x", name):
            (home / name / "certify" / run).mkdir(parents=True, exist_ok=True)
            (home / name / "certify" / run / "certificates.tsv").write_text(TABLE)
    except (OSError, ValueError):  # no name for this file system
        return
    for label in reported(home / name)[0]:
        assert label.isprintable()
        assert not set(label) & set("|$\\`")


# ------------------------------------------------------------------------------------------------------ command line


def one_line(monkeypatch, capsys, run, arguments):
    """The line on stderr of a command that must end with exit code 2; as `commands.refused`, in this process."""
    monkeypatch.setattr(sys, "argv", ["lsrs_jax", *map(str, arguments)])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(command.interrupt, "handled", contextlib.nullcontext)
    capsys.readouterr()
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        command.execute(run)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert error[:-1].isprintable()
    return error


def test_commands_answer_files_of_strangers_with_one_line_and_leave_them_alone(
    certification, tmp_path, monkeypatch, capsys
):
    home, config, stored, table = certification
    workdir = tmp_path / "run\nof a stranger"
    copied = workdir / "certify" / "default"
    copied.mkdir(parents=True)
    votes = (home / "votes.0.tsv").read_bytes()
    good = {
        workdir / "config.json": json.dumps(configuration.to_dict(config)).encode(),
        copied / "certificates.json": json.dumps(stored).encode(),
        copied / "certificates.tsv": table,
        copied / "votes.0.tsv": votes,
    }
    pickled = pickle.dumps(Payload(tmp_path / "canary"))
    bad = [
        (workdir / "config.json", b"[" * 100_000),
        (workdir / "config.json", json_text(changed(CONFIG, ("sigma",), 10**400)).encode()),
        (workdir / "config.json", pickled),
        (copied / "certificates.json", b"[" * 100_000),
        (copied / "certificates.json", sealed(changed(stored, ("identity", "arithmetic"), {})).encode()),
        (copied / "certificates.json", sealed(changed(stored, ("identity", "certificate"), "a\nb")).encode()),
        (copied / "certificates.json", pickled),
        (copied / "votes.0.tsv", votes[:-9] + b"\xff" + votes[-8:]),
        (copied / "votes.0.tsv", pickled),
    ]
    for path, content in bad:
        for name, text in (good | {path: content}).items():
            name.write_bytes(text)
        one_line(monkeypatch, capsys, certify_command.run, [f"--workdir={workdir}", "--from-counts"])
        assert {name: name.read_bytes() for name in good} == good | {path: content}
    for name, text in good.items():
        name.write_bytes(text)
    for flag in (
        "--config.certify.tile=(b'a', 3)",
        "--config.certify.radii=(" + "9" * 400 + ",)",
        "--config.x\ny=1",
        "z",
    ):
        one_line(monkeypatch, capsys, certify_command.run, [f"--workdir={workdir}", flag])
    for content in (pickled, b"\xff", with_field("time", "9" * 400 + ":00:00").encode(), b"idx\tlabel\n"):
        (copied / "certificates.tsv").write_bytes(content)
        one_line(monkeypatch, capsys, report.run, [copied, f"--out={tmp_path / 'report'}"])
    assert not (tmp_path / "report").exists()
    assert not (tmp_path / "canary").exists()


def test_a_process_answers_as_the_same_process_would(tmp_path):
    (tmp_path / "a\x1bb.tsv").write_text(with_field("radius", "\x1b[2J\u2028"))
    line = refused("report", tmp_path / "a\x1bb.tsv", f"--out={tmp_path / 'out'}")
    assert "line 2 cannot be read" in line
    assert line.isprintable()
