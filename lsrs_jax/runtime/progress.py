"""Progress with an estimate of the time left: a bar on a terminal and in a notebook, and lines elsewhere."""

import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

SECONDS_PER_REPORT = 2.0
_NARROWEST = 12  # columns of a bar, if the first and the last part of its line leave so many
_bars: list[Any] = []  # the bar that is shown


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


class Update(str):
    """A line about the progress of `total` units of work, `done` of them finished.

    `share` is the part of the work that is done, where the units take different times. The line consists of `parts`.
    """

    __slots__ = ("done", "parts", "share", "total")

    def __new__(cls, parts: Sequence[str], done: int, total: int, share: float | None = None) -> "Update":
        line = super().__new__(cls, "  ".join(parts))
        line.parts, line.done, line.total = tuple(parts), done, total
        line.share = done / max(1, total) if share is None else share
        return line

    def noted(self, note: str) -> "Update":
        """The line with a note at its end."""
        return Update([*self.parts[:-1], f"{self.parts[-1]}  {note}"], self.done, self.total, self.share)


def print_now(line: str) -> None:
    """Prints a line immediately; on a terminal and in a notebook, an `Update` before the end moves a bar instead."""
    if isinstance(line, Update) and line.done < line.total and (sys.stdout.isatty() or _in_notebook()):
        _move(line)
        return
    remove_bar()
    print(line, flush=True)


def remove_bar() -> None:
    """Removes the bar, if there is one."""
    while _bars:
        _bars.pop().close()


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def _move(update: Update) -> None:
    text = _fitting(update.parts, shutil.get_terminal_size().columns - len("100% || ") - _NARROWEST)
    if not _bars:
        with warnings.catch_warnings(action="ignore"):  # without ipywidgets a notebook gets the bar of a terminal
            from tqdm.auto import tqdm

        form = {"bar_format": "{percentage:3.0f}% |{bar}| {desc}", "dynamic_ncols": True, "leave": False}
        _bars.append(tqdm(total=1.0, initial=update.share, desc=text, file=sys.stdout, **form))
        return
    _bars[0].n = update.share
    _bars[0].set_description_str(text)


def _fitting(parts: Sequence[str], columns: int) -> str:
    """The first and the last part of a line, and as many of those between them as fit into these columns."""
    first, *between, last = map(str.strip, parts)
    while between and len("  ".join([first, *between, last])) > columns:
        between.pop()
    return "  ".join([first, *between, last])


class Progress:
    """Estimates the time left for `total` units of work, `done` of them finished when the object is created.

    `say` receives the lines.
    """

    def __init__(self, total: int, done: int = 0, say: Callable[[Update], object] = print_now) -> None:
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
            self._say(Update([line(), f"{self.left(done)} left"], done, self._total))
