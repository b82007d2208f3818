"""A JAX profile of some seconds of a run, for TensorBoard or Perfetto."""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax


def seconds(text: str) -> float:
    """Argument type: a positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def add_argument(parser: argparse._ActionsContainer) -> None:
    """Gives a command the option ``--profile``."""
    parser.add_argument(
        "--profile", type=seconds, metavar="SECONDS", help="record a JAX profile of so long in <workdir>/profile"
    )


@contextlib.contextmanager
def captured(duration: float | None, folder: Path) -> Iterator[Callable[[], None]]:
    """Yields a function that the caller calls with every line of progress.

    The first call, when everything is compiled, starts the profile. The first call after `duration` seconds, or the end
    of the block, writes it into `folder`. Nothing is recorded where `duration` is None.
    """
    began = 0.0

    def tick() -> None:
        nonlocal began, duration
        if duration is None:
            return
        if not began:
            jax.profiler.start_trace(str(folder))
            began = time.monotonic()
        elif time.monotonic() - began > duration:
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
