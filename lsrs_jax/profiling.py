"""A JAX profile of some seconds of a run, for TensorBoard or Perfetto."""

import argparse
import contextlib
import time

import jax


def seconds(text):
    """Argument type: a positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def add_argument(parser):
    """Gives a command the option ``--profile``."""
    parser.add_argument(
        "--profile", type=seconds, metavar="SECONDS", help="record a JAX profile of so long in <workdir>/profile"
    )


@contextlib.contextmanager
def captured(duration, folder):
    """Yields a function to call with every line of progress.

    The first call, when everything is compiled, starts the profile; the first one `duration` seconds later, or the end
    of the block, writes it into `folder`. Does nothing where `duration` is None.
    """
    began = None

    def tick():
        nonlocal began, duration
        if duration is None:
            return
        if began is None:
            jax.profiler.start_trace(str(folder))
            began = time.monotonic()
        elif time.monotonic() - began > duration:
            stop()

    def stop():
        nonlocal duration
        duration = None
        jax.profiler.stop_trace()
        print(f"profile of {time.monotonic() - began:.1f} s: {folder}", flush=True)

    try:
        yield tick
    finally:
        if duration is not None and began is not None:
            stop()
