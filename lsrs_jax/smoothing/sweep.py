"""From latents to settled images: all of them together, look by look, tiles kept full."""

import collections
import itertools
import time
from typing import NamedTuple

import numpy as np

from lsrs_jax.progress import duration
from lsrs_jax.smoothing.tally import Row

_SECONDS_PER_LAUNCH = 1.0  # device work between two looks at the clock
_SECONDS_PER_REPORT = 2.0


class Block(NamedTuple):
    """Images whose latents are in memory; parallel sequences."""

    idx: list
    labels: list
    slack: list  # float64, ℓ2 in the latent
    placed: np.ndarray  # `Votes.place` of the latents


class Status:
    """What has been done and what is left, for a line of progress.

    Args:
      plan: `tally.Plan`.
      total: images of the whole run.
      settled: images that an earlier session settled.
      say: function of a line.
    """

    def __init__(self, plan, total, settled, say):
        self._plan, self._total, self._settled, self._say = plan, total, settled, say
        self._finished = self._finished_votes = self._votes = 0
        self._target = self._measured = None
        self._before = 0  # images that set out for the last look
        self._survival = 0.8  # share of the images at a look that go on to the next
        self._shown = time.monotonic()

    def set_out(self, tallies):
        """The images of a block that go on to the next look; None for one without votes."""
        if any(tally is not None and len(tally.looks) for tally in tallies) and self._before:
            self._survival = min(len(tallies) / self._before, 1.0)
        self._before = len(tallies)
        waiting = self._total - self._settled - len(tallies)
        expected = self._expected()
        typical = self._finished_votes / self._finished if self._finished else expected[0]
        left = sum(expected[0] if t is None else expected[len(t.looks)] - self._cast(t) for t in tallies)
        self._target = self._votes + left + waiting * typical

    def _expected(self):
        """Votes of an image by the looks it has reached, if it survives each with the chance seen last."""
        looks = np.array([0, *self._plan.looks])
        steps = np.diff(looks)
        to_come = [np.sum(steps[i:] * self._survival ** np.arange(len(steps) - i)) for i in range(len(looks))]
        return (looks + to_come + self._plan.n0).tolist()

    def _cast(self, tally):
        return self._plan.votes(tally.done)

    def count(self, votes):
        """New votes on the books."""
        self._votes += votes
        now = time.monotonic()
        if self._measured is None:  # the first launch compiles; rates are measured from its end
            self._measured = (now, self._votes)
        elif now - self._shown > _SECONDS_PER_REPORT:
            self.show()

    def finish(self, tallies):
        """Images that are settled now."""
        self._settled += len(tallies)
        self._finished += len(tallies)
        self._finished_votes += sum(map(self._cast, tallies))

    def show(self):
        """Says the line."""
        self._shown = now = time.monotonic()
        start, before = self._measured or (now, 0)
        rate = (self._votes - before) / max(now - start, 1e-9)
        left = duration(max(self._target - self._votes, 0) / rate) if rate > 0 else "unknown"
        mean = f"  {self._finished_votes / self._finished:,.0f} votes per image" if self._finished else ""
        self._say(f"{self._settled:>6,} of {self._total:,} images settled{mean}  {rate:,.0f} votes/s  {left} left")


class Sweep:
    """Brings images to the point where their certificates are settled.

    All images advance to the next look together: tiles are filled anew at every look, with those that are not settled
    yet, so that no row of the compiled program is wasted on an image that left. The counts do not depend on it.

    Args:
      votes: `votes.Votes`.
      tallies: `tally.Tallies` (a `ledger.Ledger`); rows go there as they come.
      settled: function of a list of tallies at a look → bool per tally.
      status: `Status`.
      begin: called once, when the first votes have been cast and before they are counted.
    """

    def __init__(self, votes, tallies, settled, status, begin=lambda: None):
        self._votes, self._tallies, self._settled, self._status = votes, tallies, settled, status
        self._begin, self._begun = begin, False
        self._chunks_per_launch = 1

    def run(self, block):
        """Samples a block of images to its end."""
        everything = range(len(block.idx))
        at_a_look = [i for i in everything if self._tallies.at_a_look(block.idx[i])]
        finished = set(self._leave(block, at_a_look))
        while pending := [i for i in everything if i not in finished]:
            self._status.set_out([self._tallies.tallies.get(block.idx[i]) for i in pending])
            finished |= self._advance(block, pending)

    def _leave(self, block, members):
        """Those of the members, all at a look, that are settled."""
        if not members:
            return []
        tallies = [self._tallies.tallies[block.idx[i]] for i in members]
        found = self._settled(tallies)
        self._status.finish([tally for tally, yes in zip(tallies, found, strict=True) if yes])
        return [i for i, yes in zip(members, found, strict=True) if yes]

    def _advance(self, block, pending):
        """Every pending image to its next stop; returns those that are settled there.

        While the host books one launch, the device works at the next.
        """
        waiting, finished, clock = None, set(), time.monotonic()
        for launch in itertools.chain(self._launches(block, pending), [None]):
            if waiting is not None:
                clock = self._book(block, *waiting, clock)
                members = waiting[0]
                if self._tallies.at_a_look(block.idx[members[0]]):
                    finished.update(self._leave(block, members))
            waiting = launch
        return finished

    def _launches(self, block, pending):
        """Launches one after the other: ``(members, purpose, first, stop, counts on the device)``."""
        plan, groups = self._tallies.plan, collections.defaultdict(list)
        for i in pending:  # after a kill images stand at different chunks
            groups[self._tallies.done(block.idx[i])].append(i)
        size = self._votes.tile[0]
        for done in sorted(groups):
            purpose, begin, end = plan.next_stop(done)
            for start in range(0, len(groups[done]), size):
                members, first = groups[done][start : start + size], begin
                on_device = self._votes.put(block.placed[members], [block.idx[i] for i in members])
                while first < end:
                    stop = min(first + self._chunks_per_launch, end)
                    counts = self._votes.launch(on_device, purpose, first, stop, plan.totals[purpose])
                    yield members, purpose, first, stop, counts
                    first = stop

    def _book(self, block, members, purpose, first, stop, counts, clock):
        """Waits for a launch and counts its votes. Returns the time."""
        counts = self._votes.collect(counts, len(members))
        now = time.monotonic()
        seconds = round((now - clock) / len(members), 6)
        if not self._begun:
            self._begin()
            self._begun = True
        self._tallies.append(
            [
                Row(block.idx[i], block.labels[i], block.slack[i], purpose, first, stop, votes, seconds)
                for i, votes in zip(members, counts, strict=True)
            ]
        )
        self._status.count(int(counts.sum()))
        self._adapt(stop - first, now - clock)
        return now

    def _adapt(self, done, seconds):
        """Doubles or halves the chunks per launch towards `_SECONDS_PER_LAUNCH`; counts do not depend on it."""
        if seconds < _SECONDS_PER_LAUNCH / 2 and done == self._chunks_per_launch:
            self._chunks_per_launch *= 2
        elif seconds > 2 * _SECONDS_PER_LAUNCH:
            self._chunks_per_launch = max(1, self._chunks_per_launch // 2)
