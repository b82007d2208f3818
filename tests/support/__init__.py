"""Helpers that several test files share: paths, keys, commands, prepared data, hostile input."""

from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[2]


def threefry(seed):
    """The typed key of a seed."""
    return jax.random.key(seed, impl="threefry2x32")
