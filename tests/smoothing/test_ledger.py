import numpy as np
import pytest

from lsrs_jax.certification.ledger import Ledger
from lsrs_jax.certification.rows import crc_of, line_of
from lsrs_jax.certification.table import read_table
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing.counts import Row
from lsrs_jax.smoothing.schedule import Schedule

SCHEDULE = Schedule(10, (100,), 16)
RUN = "0123456789abcdef"


def rows(idx, slack=1e-6):
    """The rows of one image: 10 selection samples in one sample block of 16, 100 estimation samples in 4 + 3 blocks."""
    return [
        Row(idx, 1, slack, "selection", 0, 1, np.array([3, 7, 0]), 0.25),
        Row(idx, 1, slack, "estimation", 0, 4, np.array([10, 50, 4]), 0.5),
        Row(idx, 1, slack, "estimation", 4, 7, np.array([0, 36, 0]), 0.25),
    ]


def open_ledger(path):
    return Ledger(path, SCHEDULE, 3, RUN)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "votes.0.tsv"
    with open_ledger(path) as ledger:
        ledger.append(rows(4))
        ledger.append(rows(2)[:2])
    return path


def test_what_is_written_is_read(path):
    with open_ledger(path) as ledger:
        assert [idx for idx in ledger.images if ledger.schedule.next_stop(ledger.done(idx)) is None] == [4]
        image = ledger.images[4]
        np.testing.assert_array_equal(image.counts["selection"], [3, 7, 0])
        np.testing.assert_array_equal(image.counts["estimation"], [10, 86, 4])
        assert (image.label, image.slack, image.seconds) == (1, 1e-6, 1.0)
        assert ledger.done(2) == (1, 4)
        assert ledger.done(0) == (0, 0)
        np.testing.assert_array_equal(image.looks, [[10, 86, 4]])
        assert not len(ledger.images[2].looks)
        ledger.append(rows(2)[2:])
    with open_ledger(path) as ledger:
        assert [idx for idx in ledger.images if ledger.schedule.next_stop(ledger.done(idx)) is None] == [2, 4]


def test_any_torn_tail_is_cut_off_and_nothing_else(path):
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with open_ledger(path) as ledger:
            kept = sum(sum(image.done) > 0 for image in ledger.images.values())
        whole = content[:size].count(b"\n")
        expected = b"".join(lines[: max(whole, 1)])
        assert path.read_bytes() == expected
        assert kept == {0: 0, 1: 0, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2}[whole]


def test_any_changed_character_is_found(path):
    content = path.read_text()
    for place in range(len(content.splitlines()[0]) + 1, len(content)):
        if content[place] == "\n":
            continue
        path.write_text(content[:place] + ("1" if content[place] != "1" else "2") + content[place + 1 :])
        with pytest.raises(UserError, match="line"):
            open_ledger(path)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("4\t1\t1e-06\testimation\t4\t7\t1:36\t0.1", "where 7 come next"),
        ("5\t1\t1e-06\testimation\t1\t2\t1:16\t0.1", "where 0 come next"),
        ("5\t1\t1e-06\tselection\t0\t2\t1:10\t0.1", "outside the blocks"),
        ("5\t1\t1e-06\tselection\t0\t1\t1:9\t0.1", "9 samples where 10 belong"),
        ("5\t1\t1e-06\tpilot\t0\t1\t1:10\t0.1", "unknown purpose"),
        ("5\t1\t1e-06\tselection\t0\t1\t3:10\t0.1", "bad count"),
        ("5\t1\t1e-06\tselection\t0\t1\t1:5,1:5\t0.1", "bad count"),
        ("5\t1\t1e-06\tselection\t0\t1\t1:-10\t0.1", "not a natural number"),
        ("5\t1\tnan\tselection\t0\t1\t1:10\t0.1", "is not a number"),
        ("5\t1\t-1.0\tselection\t0\t1\t1:10\t0.1", "out of range"),
        ("2\t2\t1e-06\testimation\t4\t7\t1:36\t0.1", "label or slack changes"),
        ("2\t1\t2e-06\testimation\t4\t7\t1:36\t0.1", "label or slack changes"),
        ("5\t1\t1e-06\tselection\t0\t1\t1:10", "9 columns"),
        (f"5\t1\t1e-06\tselection\t0\t1\t1:10\t0.1\t{RUN}\t0000000X", "checksum"),
        (line_of(rows(5)[0], RUN).strip() + "\rX", "checksum"),
        (f"5\t1\t1e-06\tselection\t0\t1\t1:{'9' * 30}\t0.1", "not a natural number"),
        ("", "1 columns"),
        ("\xff", "line 7"),
    ],
)
def test_damaged_rows_are_refused_and_the_file_is_kept(path, line, why):
    checked = line and line.isascii() and not line.endswith("X")
    named = f"{line}\t{RUN}"
    line = f"{named}\t{crc_of(named)}".encode("latin-1") if checked else line.encode("latin-1")
    path.write_bytes(path.read_bytes() + line + b"\n" + line_of(rows(9)[0], RUN).encode())
    before = path.read_bytes()
    with pytest.raises(UserError, match=why) as caught:
        open_ledger(path)
    assert "line 7" in str(caught.value)
    assert path.read_bytes() == before


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "votes.0.tsv"
    path.write_text("something else\nentirely\n")
    for text in ("something else\nentirely\n", "no line at all", "idx\tlabels"):
        path.write_text(text)
        with pytest.raises(UserError, match="not a ledger"):
            open_ledger(path)
        assert path.read_text() == text


def test_rows_of_another_run_are_refused_wherever_they_are(path):
    before = path.read_bytes()
    other = path.with_name("votes.1.tsv")
    other.write_text(before.decode().split("\n")[0] + "\n")
    line = line_of(rows(7)[0], "f" * 16)
    path.write_bytes(before + line.encode())
    with pytest.raises(UserError, match=r"line 7 is of another run: it names 'f{16}', the run of this folder is '0123"):
        open_ledger(path)
    path.write_bytes(before)
    other.write_text(other.read_text() + line)
    with pytest.raises(UserError, match=r"votes.1.tsv line 2 is of another run"):
        open_ledger(path)
    assert path.read_bytes() == before


def test_ledgers_of_two_formats_are_not_mixed(path):
    old = path.with_name("votes.1.tsv")
    with Ledger(path.with_name("alone") / "votes.1.tsv", SCHEDULE, 3) as ledger:
        ledger.append(rows(5))
    alone = path.with_name("alone") / "votes.1.tsv"
    assert "run" not in alone.read_text().split("\n")[0].split("\t")
    old.write_bytes(alone.read_bytes())
    with pytest.raises(UserError, match=r"votes.1.tsv is of another folder: its rows name no run"):
        open_ledger(path)
    old.unlink()
    with pytest.raises(UserError, match=r"votes.0.tsv is of another folder: its rows name a run"):
        Ledger(path, SCHEDULE, 3)
    with Ledger(alone, SCHEDULE, 3) as ledger:
        assert set(ledger.images) == {5}


def test_a_second_writer_is_refused(path):
    with open_ledger(path), pytest.raises(UserError, match="another process"):
        open_ledger(path)
    with open_ledger(path):
        pass


def test_appending_the_same_sample_blocks_twice_is_refused(path):
    with open_ledger(path) as ledger, pytest.raises(UserError, match="come next"):
        ledger.append(rows(4)[2:])


# ------------------------------------------------------------------------------------------------------------- tables

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"


def test_both_time_formats_are_read(tmp_path):
    path = tmp_path / "log"
    path.write_text(
        HEADER + "0\t3\t3\t0.5\t1\t0:00:14.25\n20\t1\t-1\t0.0\t0\t1 day, 2:03:04.5\n40\t1\t2\t0.1\t0\t7.5\n"
    )
    table = read_table(path)
    np.testing.assert_allclose(table.seconds, [14.25, 93784.5, 7.5])
    np.testing.assert_array_equal(table.idx, [0, 20, 40])
    assert table.samples is None
    assert not table.truncated
    assert table.certified_accuracy(0) == pytest.approx(1 / 3)
    assert table.certified_accuracy(0.5) == pytest.approx(1 / 3)
    assert table.certified_accuracy(0.500001) == 0
    assert table.average_certified_radius == pytest.approx(0.5 / 3)
    assert table.abstention == pytest.approx(1 / 3)


@pytest.mark.parametrize("cut", [1, 3, 8, 12, 20])
def test_truncated_tables_are_read_without_their_lastline_of(tmp_path, cut):
    whole = HEADER + "0\t3\t3\t0.512\t1\t0:00:14.25\n20\t1\t1\t0.25\t1\t0:00:15.25\n"
    path = tmp_path / "log"
    path.write_text(whole[:-cut])
    table = read_table(path)
    if len(table) == 2:  # if the cut is inside the time, the rest is still a number
        assert cut < 8
    else:
        assert table.truncated
    assert table.radius[0] == 0.512


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no column 'idx'"),
        ("idx\tlabel\n0\t1\n", "no column 'predict'"),
        (HEADER, "holds no certificates"),
        (HEADER + "0\t3\t3\tnan\t1\t1.0\n1\t3\t3\t0.5\t1\t1.0\n", "line 2"),
        (HEADER + "0\t3\t3\t-0.5\t1\t1.0\n1\t3\t3\t0.5\t1\t1.0\n", "line 2"),
        (HEADER + "0\t3\t3\t0.5\tTrue\t1.0\n1\t3\t3\t0.5\t1\t1.0\n", "line 2"),
        (HEADER + "0\t3\t2\t0.5\t1\t1.0\n1\t3\t3\t0.5\t1\t1.0\n", "contradicts"),
        (HEADER + "0\t3\t3\t0.5\t1\t1.0\n1\t3\t3\tnan\t1\t1.0\n", "line 3"),
        (HEADER + "0\t3\t3\t1_0.5\t1\t1.0\n1\t3\t3\t0.5\t1\t1.0\n", "line 2"),
        (HEADER + "0\t-1\t-1\t0.0\t1\t1.0\n1\t3\t3\t0.5\t1\t1.0\n", "line 2"),
        (HEADER.replace("label", "idx\tlabel"), "names a column twice"),
        (HEADER + "1000000000000\t3\t3\t0.5\t1\t1.0\n" * 2, "image 1000000000000 twice"),
        (HEADER + "0\t3\t3\t0.5\t1\t1.0\n0\t3\t3\t0.5\t1\t1.0\n", "image 0 twice"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, why):
    path = tmp_path / "log"
    path.write_text(text)
    with pytest.raises(UserError, match=why):
        read_table(path)
