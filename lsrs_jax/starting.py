"""The first moments of a command, before its libraries are imported."""

import itertools
import os
import re
import sys

from lsrs_jax import interrupt


def begin():
    """Where Python was started as ``python -m lsrs_jax.<command>``: streams, and signals until the command runs.

    A program of the user's that imports the package keeps its own.
    """
    # Of a module that is run, argv[0] is -m while its package is imported, and at no other time.
    if sys.argv[0] == "-m" and _module().startswith("lsrs_jax."):
        open_streams()
        interrupt.end_imports()


def _module():
    """The module that Python was told to run."""
    for word, following in itertools.pairwise([*sys.orig_argv[1:], ""]):
        told = re.fullmatch("-[bBdEiIOPqsSuvx]*m(.*)", word)
        if told:
            return told[1] or following
    return ""


def open_streams():
    """Opens the null device as every standard stream that is closed: a ledger with its number would take its lines."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
