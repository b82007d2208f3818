"""Writes and prints the metrics of a training."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lsrs_jax.runtime.errors import first_line
from lsrs_jax.runtime.files import with_filename, write_atomic
from lsrs_jax.runtime.progress import Update, print_now


class Metrics:
    """Writes metrics.jsonl, TensorBoard events (if tensorboardX is installed), and lines on the screen.

    If tensorboardX fails, a note says so, and the training goes on without events.
    """

    def __init__(self, workdir: Path, first: int, steps: int) -> None:
        self._path, self._steps = workdir / "metrics.jsonl", steps
        text = self._path.read_text(encoding="utf-8", errors="replace") if self._path.exists() else ""
        # The steps after the checkpoint `first` run again: drop their lines, and a line that a kill has cut off.
        kept = [line for line in text[: text.rfind("\n") + 1].splitlines() if _step(line) <= first]
        write_atomic(self._path, "".join(f"{line}\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._board: Any = None
        with self._optional():
            try:
                from tensorboardX import SummaryWriter

                self._board = SummaryWriter(str(workdir / "tensorboard"))
            except ModuleNotFoundError as error:
                if error.name != "tensorboardX":
                    raise

    def __call__(self, metrics: Mapping[str, Any], left: str | None = None) -> None:
        metrics = {key: value if key == "step" else float(value) for key, value in metrics.items()}
        with with_filename(self._path):
            self._file.write(json.dumps(metrics) + "\n")
            self._file.flush()
        with self._optional():
            for name, value in metrics.items() if self._board else ():
                self._board.add_scalar(name, value, metrics["step"])
        cells = {name: f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" for name, value in metrics.items()}
        parts = [f"{name} {cell}" for name, cell in cells.items() if name != "step"]
        parts.insert(0, f"step {metrics['step']:>6}")
        print_now(Update([*parts, f"{left} left"], metrics["step"], self._steps) if left else "  ".join(parts))

    def close(self) -> None:
        self._file.close()
        with self._optional():
            if self._board:
                self._board.close()

    @contextlib.contextmanager
    def _optional(self) -> Iterator[None]:
        """A block about TensorBoard; after an error in it there are no more events."""
        try:
            yield
        except Exception as error:  # whatever the library raises
            self._board = None
            print(f"note: no TensorBoard events ({type(error).__name__}: {first_line(error)})", flush=True)


def _step(line: str) -> float:
    """The step of a line; infinity if the line is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf
