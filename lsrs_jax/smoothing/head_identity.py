"""What identifies a head, or an encoder, between sessions: its parameters, and its program."""

import hashlib
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing.head_check import Head, calls_python, facts, fingerprint
from lsrs_jax.smoothing.head_trace import TracedHead, calling
from lsrs_jax.smoothing.sampler import pinned_flags


class ProgramIdentity(NamedTuple):
    """The digest of a function's parameters, and that of its program, which differs between versions of JAX."""

    parameters: str
    program: str

    def with_encoder(self, encoder: "ProgramIdentity") -> "ProgramIdentity":
        """The identity of a head behind an encoder."""
        return ProgramIdentity(*(_both(*pair) for pair in zip(encoder, self, strict=True)))


def head_identity(head: Head, shape: tuple[int, ...]) -> ProgramIdentity:
    """The `ProgramIdentity` of a head for a batch of latents of this shape."""
    with pinned_flags(), calling(f"in its first call, with latents {shape}"):
        program = TracedHead(head).trace(shape).jaxpr
    return program_identity(program, head, "head")


def program_identity(program: ClosedJaxpr, function: Any, name: str) -> ProgramIdentity:
    """The `ProgramIdentity` of a function with this trace; `name` is what messages call it.

    The parameters are all arrays with more than one entry that it reads, in any order. For a function that calls
    functions of Python, whose parameters JAX does not see, both are its attribute ``digest``.

    Raises UserError for a function that calls functions of Python and has no such attribute.
    """
    if calls_python(program):
        own = getattr(function, "digest", None)
        if not isinstance(own, str) or not own:
            remedy = "give it an attribute digest, a text that changes with its parameters (or, without out, a key)"
            raise UserError(f"the {name} calls functions of Python, so nothing tells its parameters apart: {remedy}")
        return ProgramIdentity(hashlib.sha256(own.encode()).hexdigest(), own)
    digests = {_digest(fact) for fact in facts(program) if math.prod(np.shape(fact)) > 1}
    return ProgramIdentity(hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest(), fingerprint(program))


def _both(one: str, other: str) -> str:
    return hashlib.sha256(f"{one}\n{other}".encode()).hexdigest()


def _digest(array: Any) -> str:
    if isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    array = np.asarray(array)
    return hashlib.sha256(f"{array.dtype} {array.shape}\n".encode() + array.tobytes()).hexdigest()
