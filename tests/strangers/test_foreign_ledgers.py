"""Ledgers from strangers give the same counts, or an error of one line."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lsrs_jax.certification.ledger import Ledger
from lsrs_jax.certification.rows import crc_of
from lsrs_jax.runtime.errors import UserError
from support.hostile import NOT_NUMBERS, NOT_WHOLE, examples
from support.samples import HEADER, ROWS, RUN, SCHEDULE, counts_of


@pytest.fixture(scope="module")
def ledger_bytes(folder):
    with Ledger(folder / "whole.tsv", SCHEDULE, 3, RUN) as ledger:
        ledger.append(ROWS)
    return (folder / "whole.tsv").read_bytes()


@examples(400)
@given(st.data())
def test_no_changed_byte_of_a_ledger_gives_other_counts(folder, ledger_bytes, data):
    where = data.draw(st.integers(0, len(ledger_bytes) - 1))
    changed = bytearray(ledger_bytes)
    changed[where] = data.draw(st.sampled_from(b"\t\n\r 0123456789:,.\0\xff") | st.integers(0, 255))
    found = counts_of(folder / "ledger.tsv", bytes(changed))
    if changed == ledger_bytes:
        assert found is not None
    elif found is not None:  # the end of the last line is missing, so the line counts as torn
        assert where == len(ledger_bytes) - 1
        whole = ledger_bytes.splitlines(keepends=True)
        assert found == counts_of(folder / "ledger.tsv", b"".join(whole[:-1]))


@examples(150)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_an_empty_ledger_or_one_line(folder, content, headed):
    assert counts_of(folder / "ledger.tsv", HEADER.encode() * headed + content) in (None, {})


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
def test_rows_with_the_right_checksum_add_up_or_are_refused(folder, rows):
    content = ["\t".join((*fields, RUN)) for fields in rows]
    found = counts_of(
        folder / "ledger.tsv", (HEADER + "".join(f"{line}\t{crc_of(line)}\n" for line in content)).encode()
    )
    for label, slack, seconds, (selection, estimation) in (found or {}).values():
        assert label >= 0
        assert sum(selection) == 10
        assert sum(estimation) in (0, *range(16, 100, 16), 100)
        assert min(selection + estimation) >= 0
        assert math.isfinite(slack)
        assert seconds < 2.0**53


def test_huge_counts_whose_sum_wraps_around_are_refused(folder):
    classes = 100
    counts = [10**18 - 1] * 18  # about 2**64
    counts += [(2**64 + 10) - sum(counts)]
    assert np.array(counts).sum() == 10
    line = "0\t0\t0.0\tselection\t0\t1\t" + ",".join(f"{i}:{count}" for i, count in enumerate(counts)) + f"\t0.1\t{RUN}"
    (folder / "ledger.tsv").write_text(f"{HEADER}{line}\t{crc_of(line)}\n")
    with pytest.raises(UserError, match="where 10 belong"):
        Ledger(folder / "ledger.tsv", SCHEDULE, classes, RUN)
