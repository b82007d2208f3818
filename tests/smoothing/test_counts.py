"""`Counts` counts every sample block of an image exactly once, also after bad rows and interrupts."""

import sys

import numpy as np
import pytest

from lsrs_jax.smoothing.counts import Counts, Row
from lsrs_jax.smoothing.schedule import Schedule

SCHEDULE = Schedule(20, (32, 64, 100), 16)


def row(stream, first, stop, samples, idx=0):
    return Row(idx, 1, 0.0, stream, first, stop, np.array(samples), 0.0)


def test_counts_are_kept_at_every_look():
    counts = Counts(SCHEDULE, 2)
    assert SCHEDULE.next_stop(counts.done(0)) == ("selection", 0, 2)
    counts.append([row("selection", 0, 2, [12, 8]), row("estimation", 0, 1, [16, 0])])
    assert SCHEDULE.next_stop(counts.done(0)) == ("estimation", 1, 2)
    assert not counts.at_a_look(0)
    counts.append([row("estimation", 1, 2, [10, 6])])
    assert counts.at_a_look(0)
    counts.append([row("estimation", 2, 4, [30, 2]), row("estimation", 4, 7, [30, 6])])
    np.testing.assert_array_equal(counts.images[0].looks, [[26, 6], [56, 8], [86, 14]])
    assert counts.schedule.next_stop(counts.done(0)) is None
    assert SCHEDULE.next_stop(counts.done(0)) is None


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (row("estimation", 0, 1, [16, 0]), "before the selection is complete"),
        (row("selection", 0, 1, [15, 0]), "15 samples where 16 belong"),
        (row("selection", 1, 2, [4, 0]), "where 0 come next"),
        (row("selection", 0, 3, [20, 0]), "outside the blocks"),
    ],
)
def test_samples_that_do_not_fit_are_refused(bad, why):
    counts = Counts(SCHEDULE, 2)
    with pytest.raises(ValueError, match=why):
        counts.append([bad])
    assert not counts.images


def test_a_row_that_passes_a_look_is_refused():
    """If one row held samples from before and after a look, there would be no counts at that look."""
    counts = Counts(SCHEDULE, 2)
    counts.append([row("selection", 0, 2, [12, 8])])
    with pytest.raises(ValueError, match="reach over the look at 2"):
        counts.append([row("estimation", 0, 3, [40, 8])])


class Stop(BaseException):
    """The exception that stands for a Ctrl-C inside `Counts.count`."""


def interrupted(line, function):
    """Calls a function and raises `Stop` in `Counts.count` just before the line of this number runs."""

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


def test_an_interrupt_never_leaves_a_row_half_counted():
    before, last = [row("selection", 0, 2, [12, 8]), row("estimation", 0, 1, [16, 0])], row("estimation", 1, 2, [10, 6])
    lines = sorted({line for *_, line in Counts.count.__code__.co_lines() if line})
    stopped = 0
    for line in lines:
        counts = Counts(SCHEDULE, 2)
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
