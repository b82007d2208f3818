"""Every chunk of an image is counted once, in its place, whatever is appended and whatever interrupts."""

import sys

import numpy as np
import pytest

from lsrs_jax.smoothing.counts import Counts, Row
from lsrs_jax.smoothing.schedule import Schedule

PLAN = Schedule(20, (32, 64, 100), 16)


def row(purpose, first, stop, votes, idx=0):
    return Row(idx, 1, 0.0, purpose, first, stop, np.array(votes), 0.0)


def test_a_tally_keeps_the_counts_at_every_look():
    counts = Counts(PLAN, 2)
    assert PLAN.next_stop(counts.done(0)) == ("selection", 0, 2)
    counts.append([row("selection", 0, 2, [12, 8]), row("estimation", 0, 1, [16, 0])])
    assert PLAN.next_stop(counts.done(0)) == ("estimation", 1, 2)
    assert not counts.at_a_look(0)
    counts.append([row("estimation", 1, 2, [10, 6])])
    assert counts.at_a_look(0)
    counts.append([row("estimation", 2, 4, [30, 2]), row("estimation", 4, 7, [30, 6])])
    np.testing.assert_array_equal(counts.images[0].looks, [[26, 6], [56, 8], [86, 14]])
    assert counts.schedule.next_stop(counts.done(0)) is None
    assert PLAN.next_stop(counts.done(0)) is None


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (row("estimation", 0, 1, [16, 0]), "before the selection is complete"),
        (row("selection", 0, 1, [15, 0]), "15 samples where 16 belong"),
        (row("selection", 1, 2, [4, 0]), "where 0 come next"),
        (row("selection", 0, 3, [20, 0]), "not among those"),
    ],
)
def test_votes_that_do_not_fit_are_refused(bad, why):
    counts = Counts(PLAN, 2)
    with pytest.raises(ValueError, match=why):
        counts.append([bad])
    assert not counts.images


def test_no_row_reaches_over_a_look():
    """Sampler counted together across a look would leave that look without a count."""
    counts = Counts(PLAN, 2)
    counts.append([row("selection", 0, 2, [12, 8])])
    with pytest.raises(ValueError, match="reach over the look at 2"):
        counts.append([row("estimation", 0, 3, [40, 8])])


class Stop(BaseException):
    """Like a Ctrl-C, at a line of `Counts.count`."""


def interrupted(line, function):
    """Calls a function and interrupts `Counts.count` before it executes its line of this number."""

    def local(frame, event, _):
        if event == "line" and frame.f_lineno == line:
            sys.settrace(None)
            raise Stop
        return local

    sys.settrace(lambda frame, *_: local if frame.f_code is Counts.count.__code__ else None)
    try:
        function()
    finally:
        sys.settrace(None)


def test_an_interrupted_count_is_whole_or_not_at_all():
    before, last = [row("selection", 0, 2, [12, 8]), row("estimation", 0, 1, [16, 0])], row("estimation", 1, 2, [10, 6])
    lines = sorted({line for *_, line in Counts.count.__code__.co_lines() if line})
    stopped = 0
    for line in lines:
        counts = Counts(PLAN, 2)
        counts.append(before)
        try:
            interrupted(line, lambda counts=counts: counts.count(last))
        except Stop:
            stopped += 1
            if counts.done(0) == (2, 1):
                counts.count(last)
        np.testing.assert_array_equal(counts.images[0].counts["estimation"], [26, 6])
        np.testing.assert_array_equal(counts.images[0].looks, [[26, 6]])
    assert stopped > 10
