"""Progress lines with an estimate of the time left."""

import time


def duration(seconds):
    """``21 ms``, ``4.2 s``, ``3 min 20 s``, ``5 h 02 min``."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Rate and time left of a countable piece of work, measured from creation."""

    def __init__(self, total, done=0):
        self._total, self._first, self._start = total, done, time.monotonic()

    def rate(self, done):
        """Units per second."""
        return (done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def left(self, done):
        """Time left as text."""
        rate = self.rate(done)
        return duration((self._total - done) / rate) if rate > 0 else "unknown"
