"""Progress lines with an estimate of the time left."""

import time
from collections.abc import Callable

SECONDS_PER_REPORT = 2.0


def duration(seconds: float) -> str:
    """``80 µs``, ``21 ms``, ``4.2 s``, ``3 min 20 s``, ``5 h 02 min``."""
    if 0 < seconds < 0.9995e-3:
        return f"{1e6 * seconds:.0f} µs"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def print_now(line: str) -> None:
    """Prints a line, also where the output is no terminal, immediately."""
    print(line, flush=True)


class Progress:
    """Estimates the time left for `total` units of work, `done` of them finished when the object is created.

    `say` receives the lines.
    """

    def __init__(self, total: int, done: int = 0, say: Callable[[str], object] = print_now) -> None:
        self._total, self._first, self._start, self._say = total, done, time.monotonic(), say
        self._shown = self._start

    def left(self, done: int) -> str:
        """The time left, as text."""
        rate = (done - self._first) / max(time.monotonic() - self._start, 1e-9)
        return duration((self._total - done) / rate) if rate > 0 else "unknown"

    def show(self, done: int, line: Callable[[], str]) -> None:
        """Says a line with the time left, at most every two seconds."""
        if time.monotonic() - self._shown > SECONDS_PER_REPORT:
            self._shown = time.monotonic()
            self._say(f"{line()}  {self.left(done)} left")
