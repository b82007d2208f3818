"""Tables from strangers give valid numbers, or an error of one line."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsrs_jax.auditing.table import read_audit
from lsrs_jax.certification.table import read_table
from lsrs_jax.runtime.errors import UserError
from support.hostile import CHARACTERS, NOT_NUMBERS, NOT_WHOLE, examples
from support.samples import AUDIT, TABLE, read, table_text, with_field


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
