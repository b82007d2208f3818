"""Tables from strangers give valid numbers, or an error of one line."""

import contextlib
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsrs_jax import report
from lsrs_jax.auditing.table import read_audit
from lsrs_jax.certification.foreign import read_log
from lsrs_jax.certification.table import read_table
from lsrs_jax.runtime.errors import UserError
from support.hostile import CHARACTERS, NOT_NUMBERS, NOT_WHOLE, examples
from support.samples import AUDIT, TABLE, check_table, read, table_text, with_field


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
def test_a_table_comes_back_as_the_same_numbers(folder, rows):
    table = read(folder / "table.tsv", table_text(rows).encode())
    for row, *found in zip(rows, table.idx, table.label, table.predict, table.radius, table.samples, strict=True):
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
def test_a_changed_table_is_a_sound_table_or_one_line(folder, content):
    read(folder / "table.tsv", content)


@examples(150)
@given(st.binary(max_size=200) | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")), st.booleans())
def test_any_bytes_are_a_sound_table_or_one_line(folder, content, headed):
    read(folder / "table.tsv", (TABLE.partition("\n")[0] + "\n").encode() * headed + content)


@examples(400)
@given(mutated_table())
def test_a_changed_log_is_a_sound_table_or_one_line(folder, content):
    """`read_log` reads what `read_table` reads, and reads it the same way, without a note."""
    strict, log = read(folder / "table.tsv", content), read(folder / "table.tsv", content, read_log)
    if strict is not None:
        assert log is not None
        assert read_log(folder / "table.tsv")[1] == []
        for name in ("idx", "label", "predict", "radius", "correct", "seconds", "samples", "truncated"):
            np.testing.assert_array_equal(getattr(strict, name), getattr(log, name))


@examples(150)
@given(st.binary(max_size=200) | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")), st.booleans())
def test_any_bytes_are_a_sound_log_or_one_line(folder, content, headed):
    read(folder / "table.tsv", (TABLE.partition("\n")[0] + "\n").encode() * headed + content, read_log)


HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
LOG = HEADER + "0\t3\t3\t0.5\t1\t0:00:01.5\n20\t1\t-1\t0.0\t0\t0:00:01\n40\t1\t2\t0.1\t0\t2.0\n"
PANDAS = LOG.replace("\t3\t3", "\t3.0\t3.0").replace("\t1\t-1\t0.0", "\t1.0\t-1.0\tnan").replace("\t1\t2", "\t1.0\t2.0")
LENIENT = {  # name: text, a part of the note
    "byte-order mark": ("\ufeff" + LOG, "a byte-order mark is left out"),
    "UTF-16": (LOG.encode("utf-16"), "a byte-order mark is left out"),
    "no time": ("".join(line.rpartition("\t")[0] + "\n" for line in LOG.splitlines()), "there is no column 'time'"),
    "no correct": (re.sub(r"\t[^\t]*(\t[^\t]*)\n", r"\1\n", LOG), "there is no column 'correct'"),
    "True": (re.sub(r"\t([01])(\t[0-9:.]+\n)", lambda m: f"\t{m[1] == '1'}{m[2]}", LOG), "True and 1.0 .* (3 times)"),
    "1.0": (re.sub(r"\t([01])(\t[0-9:.]+\n)", r"\t\1.0\2", LOG), "True and 1.0 .* (3 times)"),
    "pandas": (PANDAS, "numbers such as 3.0 are read as whole numbers (6 times); the radius of an abstention is no"),
    "empty radius": (LOG.replace("\t0.0\t", "\t\t"), "the radius of an abstention is no number and counts as 0"),
    "days": (LOG.replace("0:00:01\n", "0 days 00:00:01\n"), "as pandas writes them"),
    "blank lines": (LOG.replace("\n", "\n\n"), "blank lines are left out (3 times)"),
    "spaces": (LOG.replace("\n", "  \n"), "spaces around fields are left out (4 times)"),
    "tabs": (LOG.replace("\n", "\t\n").replace("time\t", "time"), "empty fields after the last column .* (3 times)"),
    "header": (LOG.replace("\n40", "\n" + HEADER + "40"), "a repeated header is left out"),
    "summary": (LOG + "ACR: 0.1667", "its last line 'ACR: 0.1667' is no row and is left out"),
    "summaries": (LOG + "\n# images: 3\nACR = 0.1667\n", "'ACR = 0.1667' is no row .*'# images: 3' is no row"),
    "commas": (LOG.replace("\t", ","), "the fields are separated by ','"),
    "quotes": (LOG.replace("\t", ",").replace("0:00:01\n", '"0 days, 0:00:01"\n'), "the fields are separated by ','"),
    "negative": (LOG.replace("\t0.0\t", "\t-0.3\t"), "a negative radius of another class .*counts as 0"),
    "old Mac": (LOG.replace("\n", "\r"), None),
}


@pytest.mark.parametrize("name", LENIENT)
def test_a_log_with_a_clear_meaning_is_read_and_the_report_says_how(folder, name):
    text, note = LENIENT[name]
    path = folder / "log.tsv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    table, notes = read_log(path)
    check_table(table)
    assert [table.idx.tolist(), table.label.tolist(), table.predict.tolist()] == [[0, 20, 40], [3, 1, 1], [3, -1, 2]]
    assert [table.radius.tolist(), table.correct.tolist()] == [[0.5, 0.0, 0.1], [True, False, False]]
    np.testing.assert_array_equal(table.seconds, [np.nan] * 3 if name == "no time" else [1.5, 1.0, 2.0])
    if note:
        assert re.search(note.replace("(", r"\(").replace(")", r"\)"), notes[0])
        assert report.notes(report.load_runs([str(path)])) == [f"log: {notes[0]}"]
        # This program's own tables are read strictly; only a last line may be cut off.
        with contextlib.nullcontext() if name == "summary" else pytest.raises(UserError):
            assert read_table(path).truncated


def test_a_right_class_with_a_negative_radius_has_no_certificate(folder):
    (folder / "log.tsv").write_text(LOG.replace("\t0.5\t", "\t-0.2\t"))
    table, notes = read_log(folder / "log.tsv")
    assert [table.predict[0], table.radius[0], table.certified_accuracy(0)] == [-1, 0, 0]
    assert notes == ["read leniently: the right class with a negative radius counts as an abstention."]


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("\t0.5\t", "\tnan\t", "line 2 cannot be read (radius: 'nan' is not a number)"),
        ("\t0.1\t", "\t0,1\t", "line 4 cannot be read (radius: '0,1' is not a number)"),
        ("40\t", "4.5\t", "line 4 cannot be read (idx: '4.5' is not a whole number from 0 to"),
        ("\t-1\t", "\t-2\t", "line 3 cannot be read (predict: '-2' is not a whole number from -1 to"),
        ("20\t1\t", "20\t-1\t", "line 3 cannot be read (label: '-1' is not a whole number from 0 to"),
        ("0.5\t1", "0.5\t0", "line 2 cannot be read (correct: '0' contradicts predict 3 and label 3)"),
        ("0.5\t1", "0.5\tyes", "line 2 cannot be read (correct: 'yes' is neither 0 nor 1)"),
        ("0:00:01\n", "NaT\n", "line 3 cannot be read (time: 'NaT' is not a number)"),
        ("\n20", "\nACR: 0.5\n20", "line 3 cannot be read (1 columns instead of 6)"),
        ("40\t", "20\t", "names image 20 twice"),
        (LOG.partition("\n")[2], "", "holds no certificates"),
        (LOG, "\n \n", "is empty"),
        ("idx", "9" * 200_000, "its first line cannot be read (field larger than field limit"),
    ],
)
def test_a_refused_log_names_line_field_and_value(folder, old, new, why):
    assert old in LOG
    (folder / "log.tsv").write_text(LOG.replace(old, new))
    with pytest.raises(UserError, match=re.escape(why)):
        read_log(folder / "log.tsv")


def test_published_logs_need_no_lenience(reference):
    paths = [path for path in reference.glob("cohen_certify/**/sigma_*") if path.is_file()]
    assert len(paths) > 10
    for path in paths:
        strict, (log, notes) = read_table(path), read_log(path)
        assert notes == []
        np.testing.assert_array_equal(strict.radius, log.radius)


@pytest.mark.parametrize("column", ["idx", "label", "predict", "n", "radius", "time"])
def test_what_is_no_plain_number_is_refused_though_python_would_read_it(folder, column):
    wrong = NOT_NUMBERS if column in ("radius", "time") else [*NOT_NUMBERS, *NOT_WHOLE]
    for text in wrong:
        assert read(folder / "table.tsv", with_field(column, text).encode()) is None, text


def test_a_line_with_more_or_fewer_fields_is_told_so(folder):
    for line, number in (("9\t1\t1\t0.5", 4), ("9" + "\t1" * 12, 13)):
        (folder / "table.tsv").write_text(TABLE + line + "\n")
        with pytest.raises(UserError, match=rf"line 5 cannot be read \({number} columns instead of 12\)"):
            read_table(folder / "table.tsv")
    (folder / "audit.tsv").write_text(AUDIT + "9\t3\n")
    with pytest.raises(UserError, match=r"line 4 cannot be read \(2 columns instead of"):
        read_audit(folder / "audit.tsv")


def test_numbers_that_no_report_could_add_up_are_refused(folder):
    for column, text in (
        ("time", "9" * 400 + ":00:00"),
        ("time", "9" * 20 + " days, 0:00:00"),
        ("time", "1e308"),
        ("time", "٣:00:00"),
        ("radius", "1.7e308"),
    ):
        assert read(folder / "table.tsv", with_field(column, text).encode()) is None, text
    assert read(folder / "table.tsv", with_field("radius", "1e300").encode()) is not None
