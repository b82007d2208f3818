"""A JAX profile of some seconds of a run, for TensorBoard or Perfetto."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax


@contextlib.contextmanager
def captured(duration: float | None, folder: Path) -> Iterator[Callable[[], None]]:
    """Yields a function that the caller calls with every line of progress.

    The first call starts the profile; by then everything is compiled. The first call after `duration` seconds, or the
    end of the block, writes the profile into `folder`. If `duration` is None, nothing is recorded.
    """
    began = 0.0

    def tick() -> None:
        nonlocal began
        if duration is not None and not began:
            jax.profiler.start_trace(str(folder))
            began = time.monotonic()
        elif duration is not None and time.monotonic() - began > duration:
            stop()

    def stop() -> None:
        nonlocal duration
        duration = None
        jax.profiler.stop_trace()
        print(f"profile of {time.monotonic() - began:.1f} s: {folder}", flush=True)

    try:
        yield tick
    finally:
        if duration is not None and began:
            stop()
